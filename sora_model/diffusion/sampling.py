"""Sampling: noise -> latents with diffusers' schedulers, samples of many sizes together."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .guidance import Denoiser
from .masks import CleanFrames, check_clean_masks, fill_clean, frame_levels

Callback = Callable[[int, Tensor, list[Tensor]], None]


class Init(NamedTuple):
    """A latent [C, T, H, W] to start from, and in (0, 1] the share of the denoising that is done: 1 keeps nothing of it."""

    latent: Tensor
    strength: float


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: Any,
    noise: Sequence[Tensor],
    *,
    num_inference_steps: int = 50,
    clean: Sequence[CleanFrames] | None = None,
    init: Sequence[Init | None] | None = None,
    patch_frames: int = 1,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
) -> list[Tensor]:
    """Turns noise into latents, all samples together; what a sample becomes does not depend on the others.

    >>> from sora_model.diffusion.guidance import guided
    >>> noise = [torch.randn(16, 4, 6, 10), torch.randn(16, 1, 8, 8)]
    >>> with torch.no_grad():
    ...     latents = sample(guided(dit, text=text, guidance_scale=4), scheduler, noise, num_inference_steps=4)

    Each sample is stepped by its own copy of the scheduler, so that those that keep a history, threshold or draw noise treat it as
    if it were alone.

    Args:
        denoise: (latents, timesteps, samples) -> predictions; see `guided`.
        scheduler: any of diffusers' with set_timesteps and step.
        noise: [C, T, H, W] each, float32, on the model's device.
        num_inference_steps: steps.
        clean: the frames of each sample to keep.
        init: for each sample a latent to start from instead of noise, or None. It is noised, and only the share `strength` of the
            steps is made (SDEdit: Meng et al., 2021). Samples join the batch where their steps begin.
        patch_frames: pt.
        generators: one per sample, for schedulers that draw noise.
        callback: called after each step with (step, timestep, latents).
    """
    masks = check_clean_masks([frames.mask for frames in clean], noise, patch_frames) if clean else None
    kept_latents = [frames.latent for frames in clean] if clean else []
    device = noise[0].device
    steppers = [copy.deepcopy(scheduler) for _ in noise]
    with _naming_scheduler(num_inference_steps):
        for stepper in steppers:
            stepper.set_timesteps(num_inference_steps, device=device)
    options: list[dict[str, Any]] = [{} for _ in noise]
    if generators is not None and "generator" in inspect.signature(scheduler.step).parameters:
        options = [{"generator": generator} for generator in generators]
    latents = [x * getattr(stepper, "init_noise_sigma", 1.0) for x, stepper in zip(noise, steppers, strict=True)]
    times = steppers[0].timesteps
    starts = [0] * len(latents)
    for i, start in enumerate(init or ()):
        if start is not None:
            starts[i], latents[i] = _start(steppers[i], times, noise[i], start)
    for step, t in enumerate(times):
        which = [i for i in range(len(latents)) if starts[i] <= step]
        if not which:
            continue
        inputs = [_scaled(steppers[i], latents[i], t) for i in which]
        active = None if masks is None else [masks[i] for i in which]
        if active is not None:
            inputs = fill_clean(inputs, [kept_latents[i] for i in which], active)
        levels = frame_levels([t[None]] * len(which), inputs, active, patch_frames)
        for i, prediction in zip(which, denoise(inputs, levels, which), strict=True):
            with _naming_scheduler(num_inference_steps):
                latents[i] = steppers[i].step(prediction.to(latents[i]), t, latents[i], **options[i], return_dict=False)[0]
        if callback is not None:
            callback(step, t, latents if masks is None else fill_clean(latents, kept_latents, masks))
    return latents if masks is None else fill_clean(latents, kept_latents, masks)


@contextlib.contextmanager
def _naming_scheduler(steps: int) -> Iterator[None]:
    """Errors of any kind that diffusers' schedulers have for a number of steps that they cannot make."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"sample: scheduler: expected one that can make {steps} steps, got {str(error) or type(error).__name__}"
        ) from error


def _start(scheduler: Any, times: Tensor, noise: Tensor, init: Init) -> tuple[int, Tensor]:
    """The first step to make, and the latent noised for it."""
    if not 0 < init.strength <= 1:
        raise ValueError(f"sample: init: expected a strength above 0 and up to 1, got {init.strength}")
    order = getattr(scheduler, "order", 1)
    start = round((1 - init.strength) * len(times)) // order * order
    start = min(start, len(times) - 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    add = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
    latent, noise, t = init.latent.to(noise)[None], noise[None], times[start : start + 1]
    return start, (add(latent, t, noise) if hasattr(scheduler, "scale_noise") else add(latent, noise, t))[0]


def _scaled(scheduler: Any, latent: Tensor, t: Tensor) -> Tensor:
    """What the scheduler wants the model to see; flow matching has no such scaling."""
    return scheduler.scale_model_input(latent, t) if hasattr(scheduler, "scale_model_input") else latent
