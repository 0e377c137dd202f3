"""Noising latents of many sizes for training, by diffusers' schedulers. Every task is a mask of clean frames.

Each token frame of a sample has its own noise level. A clean frame has level 0: the model sees it as it is, it is left out of
the loss, and sampling returns it unchanged.

    text to video    no frame is clean           image to video    frame 0 is
    extension        a prefix or a suffix is     joining           both ends are

The training loss draws the same masks, so one network learns all of them.

Flow matching follows FlowMatchEulerDiscreteScheduler: x_sigma = (1 - sigma) x + sigma noise, and the target is noise - x. The other
schedulers say what they want in `prediction_type`: the noise ("epsilon"), the velocity ("v_prediction") or x ("sample").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .masks import check_clean_masks, fill_clean, frame_levels


@dataclass(frozen=True)
class NoisedBatch:
    """A training step's input and target.

    latents: [C, T, H, W] each, noised where not clean. timesteps: [B], or [F] where some frames are clean; see `DiT.forward`.
    targets: like latents. clean_masks: bool [T] each on the host, or None. sigmas: like timesteps, from 0 to 1, of flow matching;
    else None. patch_frames: latent frames per token frame.
    """

    latents: list[Tensor]
    timesteps: Tensor
    targets: list[Tensor]
    clean_masks: list[Tensor] | None
    sigmas: Tensor | None
    patch_frames: int


def prediction_type(scheduler: Any) -> str:
    """What the scheduler wants predicted: "flow_prediction", "epsilon", "v_prediction" or "sample"."""
    return scheduler.config.get("prediction_type", "flow_prediction")


def add_noise(
    scheduler: Any,
    latents: Sequence[Tensor],
    *,
    clean_masks: Sequence[Tensor] | None = None,
    context: Sequence[Tensor] | None = None,
    per_frame: Sequence[bool] | None = None,
    patch_frames: int = 1,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    generator: torch.Generator | None = None,
) -> NoisedBatch:
    """Noises each latent to a random level of its own.

    >>> from sora_model.diffusion.loss import diffusion_loss
    >>> from sora_model.diffusion.task_mix import TaskMix
    >>> masks = [TaskMix().draw_mask(latent.shape[1]) for latent in latents]
    >>> batch = add_noise(scheduler, latents, clean_masks=masks)
    >>> diffusion_loss(dit(batch.latents, batch.timesteps, text), batch).backward()

    Args:
        scheduler: of diffusers. With flow matching sigma is logit-normal (Esser et al., 2024), then moved by the scheduler's
            `shift`; otherwise the timestep is uniform. Levels are spread evenly over the batch (Kingma et al., 2021).
        latents: [C, T, H, W] each.
        clean_masks: bool [T] each, True for the frames that stay clean; whole token frames.
        context: latents that clean frames are taken from; default: `latents`.
        per_frame: for each latent, whether every token frame has a level of its own; default: none.
        patch_frames: pt.
        logit_mean, logit_std: of the logit of sigma.
        generator: on the host, so that a seed means the same on every device.
    """
    samples, device = len(latents), latents[0].device
    noise = [torch.randn(latent.shape, generator=generator).to(latent) for latent in latents]
    # One level from each of `samples` equal slices of (0, 1), in random order: less variance than independent draws.
    slices = torch.randperm(samples, generator=generator)
    levels = list(((slices + torch.rand(samples, generator=generator)) / samples).split(1))
    for i, levels_differ in enumerate(per_frame or ()):
        if levels_differ:
            levels[i] = torch.rand(latents[i].shape[1] // patch_frames, generator=generator)
    prediction, steps = prediction_type(scheduler), scheduler.config.num_train_timesteps
    if prediction == "flow_prediction":
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        normals = [torch.special.ndtri(level.clamp(1e-6, 1 - 1e-6)) for level in levels]
        sigmas = [torch.sigmoid(logit_mean + logit_std * normal) for normal in normals]
        timesteps = [(shift * sigma / (1 + (shift - 1) * sigma) * steps).to(device) for sigma in sigmas]
    else:
        timesteps = [(level * steps).long().to(device) for level in levels]
    pairs = [
        _noised(scheduler, prediction, x, n, t.repeat_interleave(patch_frames) if len(t) > 1 else t)
        for x, n, t in zip(latents, noise, timesteps, strict=True)
    ]
    noised, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    masks = check_clean_masks(clean_masks, latents, patch_frames)
    if masks is not None:
        noised = fill_clean(noised, latents if context is None else context, masks)
    packed = frame_levels(timesteps, latents, masks, patch_frames)
    return NoisedBatch(noised, packed, targets, masks, packed / steps if prediction == "flow_prediction" else None, patch_frames)


def _noised(scheduler: Any, prediction: str, x: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """A latent [C, T, H, W] at timesteps [1] or [T], and what is to be predicted of it."""
    if prediction == "flow_prediction":
        sigma = (timesteps / scheduler.config.num_train_timesteps).to(x)[:, None, None]
        return torch.lerp(x, noise, sigma), noise - x
    # Frames as a batch: schedulers take one timestep for each of it.
    frames, noises, timesteps = x.transpose(0, 1), noise.transpose(0, 1), timesteps.expand(x.shape[1])
    noised = scheduler.add_noise(frames, noises, timesteps).transpose(0, 1)
    if prediction == "epsilon":
        return noised, noise
    if prediction == "v_prediction":
        if not hasattr(scheduler, "get_velocity"):
            raise ValueError(f"add_noise: scheduler: expected one that trains with v_prediction, got {type(scheduler).__name__}")
        return noised, scheduler.get_velocity(frames, noises, timesteps).transpose(0, 1)
    if prediction == "sample":
        return noised, x
    raise ValueError(f"add_noise: scheduler: expected a known prediction_type, got {prediction!r}")
