"""Schedulers of diffusers: which ones a checkpoint may name, and those that sample one and the same flow-matching model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..storage.weights import built, read_json

FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}
# What a checkpoint may name. A name is never looked up anywhere else: diffusers has classes whose loading runs files of a folder.
FLOW_PREDICTION = "flow_prediction"
DDPM = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler")
MOST_TIMESTEPS = 100_000
WHOLE = {"num_train_timesteps": MOST_TIMESTEPS, "solver_order": 3}  # entries that take memory, and the most of each
LISTS = "trained_betas", "disable_corrector"  # of at most MOST_TIMESTEPS numbers
PROBED = 4  # steps that a scheduler makes before it is taken
CLASSES = (*(name for name, _ in FLOW.values()), *DDPM)


def load_scheduler(folder: Path, owner: str) -> Any:
    """The scheduler of a checkpoint, from the numbers in its scheduler_config.json alone.

    Raises ValueError for a class that is not in `CLASSES`, and for numbers with which it cannot make steps.
    """
    path = folder / "scheduler_config.json"
    config = read_json(path, owner, constants=True)  # some have a number that may be infinite
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{owner}: {path}: expected _class_name out of {', '.join(CLASSES)}, got {name}")
    for entry, most in WHOLE.items():
        value = config.get(entry, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{owner}: {path}: {entry}: expected a whole number from 1 to {most}, got {value!r}")
    for entry in LISTS:
        if isinstance(value := config.get(entry), list) and len(value) > MOST_TIMESTEPS:
            raise ValueError(f"{owner}: {path}: {entry}: expected at most {MOST_TIMESTEPS} numbers, got {len(value)}")
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if isinstance(betas, list) and len(betas) != steps:
        raise ValueError(f"{owner}: {path}: trained_betas: expected {steps} numbers, as num_train_timesteps says, got {len(betas)}")
    for entry in ("shift", "flow_shift"):
        value = config.get(entry, 1.0)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{owner}: {path}: {entry}: expected a number above 0, got {value!r}")
    if name.startswith("FlowMatch") and config.get("prediction_type", FLOW_PREDICTION) != FLOW_PREDICTION:
        raise ValueError(
            f"{owner}: {path}: prediction_type: expected {FLOW_PREDICTION} for {name}, got {config['prediction_type']!r}"
        )
    scheduler = built(getattr(diffusers, name).from_config, {"config": config}, owner, path)
    expected = f"{owner}: {path}: expected a scheduler that can make {PROBED} steps"
    try:
        finite = _samples(scheduler)
    except MemoryError:
        raise
    except Exception as error:  # of any kind, as values are not of theirs
        raise ValueError(f"{expected}, got {str(error) or type(error).__name__}") from None
    if not finite:
        raise ValueError(f"{expected}, got one whose latents are not finite")
    return scheduler


def _samples(scheduler: Any) -> bool:
    """Whether steps are finite. Only in a step does diffusers look at most numbers of a config; its errors are of any kind."""
    stepper = copy.deepcopy(scheduler)
    stepper.set_timesteps(PROBED)
    latent = torch.ones(1, 1, 2, 2) * getattr(stepper, "init_noise_sigma", 1.0)
    with torch.random.fork_rng(devices=[]):  # some draw noise
        for t in stepper.timesteps:
            seen = stepper.scale_model_input(latent, t) if hasattr(stepper, "scale_model_input") else latent
            latent = stepper.step(torch.zeros_like(seen), t, latent, return_dict=False)[0]
    return bool(latent.isfinite().all())


def flow_scheduler(name: str, *, like: Any) -> Any:
    """One of `FLOW` by name, with the shift of another scheduler: how far its steps lie towards noise, as in training.

    >>> pipeline = pipeline.with_scheduler(flow_scheduler("unipc", like=pipeline.scheduler))
    """
    if name not in FLOW:
        raise ValueError(f"flow_scheduler: name: expected one of {', '.join(FLOW)}, got {name!r}")
    kind, options = FLOW[name]
    shift = like.config.get("shift", like.config.get("flow_shift", 1.0))
    return getattr(diffusers, kind)(**{"flow_shift" if options else "shift": shift}, **options)
