"""Schedulers of diffusers that sample one and the same flow-matching model."""

from __future__ import annotations

from typing import Any

import diffusers

FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}


def flow_scheduler(name: str, *, like: Any) -> Any:
    """One of `FLOW` by name, with the shift of another scheduler: how far its steps lie towards noise, as in training.

    >>> pipeline = pipeline.with_scheduler(flow_scheduler("unipc", like=pipeline.scheduler))
    """
    if name not in FLOW:
        raise ValueError(f"flow_scheduler: name: expected one of {', '.join(FLOW)}, got {name!r}")
    kind, options = FLOW[name]
    shift = like.config.get("shift", like.config.get("flow_shift", 1.0))
    return getattr(diffusers, kind)(**{"flow_shift" if options else "shift": shift}, **options)
