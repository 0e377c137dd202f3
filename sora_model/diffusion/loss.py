"""The loss of diffusion training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import NoisedBatch


def diffusion_loss(predictions: Sequence[Tensor], batch: NoisedBatch, *, smallest_sigma: float = 0.0) -> Tensor:
    """Mean over everything that is not clean of w * (prediction - target)**2, in float32: a scalar.

    Args:
        predictions: [C, T, H, W] each; channels past the target's (a learned variance) do not count.
        batch: of `add_noise`.
        smallest_sigma: w = min(sigma / smallest_sigma, 1)**2, for a network that predicts the clean latent: its error becomes
            that of a velocity by a division by sigma, which this bounds at low noise. 0 is w = 1. Flow matching only.

    Source of the weight: Li and He, Back to Basics: Let Denoising Generative Models Denoise (JiT, 2025), which bounds the
    divisor; the weighted error is the same.
    """
    weights = _weights(batch, smallest_sigma) if smallest_sigma else None
    total, count = torch.zeros((), device=batch.targets[0].device), 0
    for i, (prediction, target) in enumerate(zip(predictions, batch.targets, strict=True)):
        error = (prediction[: target.shape[0]].float() - target.float()).square()
        if weights is not None:
            error = error * weights[i][:, None, None]
        frames = target.shape[1]
        if batch.clean_masks is not None and batch.clean_masks[i].any():
            noised = ~batch.clean_masks[i]
            frames = int(noised.sum())
            error = error * noised.to(error)[:, None, None]
        total = total + error.sum()
        count += target[:, 0].numel() * frames
    if count == 0:
        raise ValueError("diffusion_loss: batch.clean_masks: expected at least one frame to learn, got only clean ones")
    return total / count


def _weights(batch: NoisedBatch, smallest_sigma: float) -> list[Tensor]:
    """min(sigma / smallest_sigma, 1)**2 of each sample: [1], or [T] where its frames have levels of their own."""
    if batch.sigmas is None:
        raise ValueError("diffusion_loss: smallest_sigma: expected 0 for a scheduler without flow matching")
    weights = (batch.sigmas / smallest_sigma).clamp(max=1).square()
    if len(weights) == len(batch.latents):
        return list(weights.split(1))
    frames = [latent.shape[1] // batch.patch_frames for latent in batch.latents]
    return [weight.repeat_interleave(batch.patch_frames) for weight in weights.split(frames)]
