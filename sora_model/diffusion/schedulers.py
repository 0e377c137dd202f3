"""Schedulers of diffusers: which ones a checkpoint may name, and those that sample one and the same flow-matching model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from ..storage.weights import built, read_json

FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}
# What a checkpoint may name. A name is never looked up anywhere else: diffusers has classes whose loading runs files of a folder.
DDPM = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler")
MOST_TIMESTEPS = 100_000
CLASSES = (*(name for name, _ in FLOW.values()), *DDPM)


def load_scheduler(folder: Path, owner: str) -> Any:
    """The scheduler of a checkpoint, from the numbers in its scheduler_config.json alone."""
    path = folder / "scheduler_config.json"
    config = read_json(path, owner, constants=True)  # some have a number that may be infinite
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{owner}: {path}: expected _class_name out of {', '.join(CLASSES)}, got {name}")
    steps = config.get("num_train_timesteps", 1000)  # each takes memory
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        expected = f"a whole number from 1 to {MOST_TIMESTEPS}"
        raise ValueError(f"{owner}: {path}: num_train_timesteps: expected {expected}, got {steps!r}")
    return built(getattr(diffusers, name).from_config, {"config": config}, owner, path)


def flow_scheduler(name: str, *, like: Any) -> Any:
    """One of `FLOW` by name, with the shift of another scheduler: how far its steps lie towards noise, as in training.

    >>> pipeline = pipeline.with_scheduler(flow_scheduler("unipc", like=pipeline.scheduler))
    """
    if name not in FLOW:
        raise ValueError(f"flow_scheduler: name: expected one of {', '.join(FLOW)}, got {name!r}")
    kind, options = FLOW[name]
    shift = like.config.get("shift", like.config.get("flow_shift", 1.0))
    return getattr(diffusers, kind)(**{"flow_shift" if options else "shift": shift}, **options)
