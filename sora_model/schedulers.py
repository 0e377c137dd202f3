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


def flow_scheduler(name: str, *, shift: float = 3.0) -> Any:
    """One of `FLOW` by name; shift moves its steps towards noise, as in training.

    >>> pipeline.scheduler = flow_scheduler("unipc")
    """
    if name not in FLOW:
        raise ValueError(f"flow_scheduler: name: expected one of {', '.join(FLOW)}, got {name!r}")
    kind, options = FLOW[name]
    return getattr(diffusers, kind)(**{"flow_shift" if options else "shift": shift}, **options)
