"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.block import Window
from ..model.conditioning import PackedText, Samples
from ..model.dit import DiT
from ..model.experts import Experts
from ..model.step_cache import StepCache

# (latents, timesteps, which samples of the batch these are) -> predictions
Denoiser = Callable[[list[Tensor], Tensor, Sequence[int]], list[Tensor]]


def guided(
    dit: DiT | Experts,
    *,
    text: PackedText | None = None,
    null_text: PackedText | None = None,
    labels: Tensor | None = None,
    frame_steps: Sequence[float] | None = None,
    conditions: Sequence[Tensor] | None = None,
    image_tokens: Sequence[Tensor] | None = None,
    guidance_scale: float = 1.0,
    guidance_from: float = 0.0,
    guidance_scale_2: float | None = None,
    window: Window | None = None,
    cache: StepCache | None = None,
) -> Denoiser:
    """Classifier-free guidance as a function of (latents, timesteps, samples): null + guidance_scale * (conditioned - null).

    Both predictions come from one packed batch of twice the samples. A guidance_scale of 1 needs the conditioned one alone, and
    so do timesteps below guidance_from: at low noise guidance adds little but its faults (Kynkäänniemi et al., 2024).

    Args:
        text: captions of the samples.
        null_text: what guidance leads away from: empty or negative captions. Default: no text at all.
        labels: int64 [B]; num_classes is their null.
        frame_steps, image_tokens: see `DiT.forward`.
        conditions: the last channels of each latent, for a model with condition_channels.
        guidance_from: the lowest timestep with guidance.
        guidance_scale_2: of `Experts`, for the one of low noise; default: guidance_scale.
        window: see `DiT.forward`.
        cache: see `StepCache`.
    """
    channels, negative = dit.config.latent_channels, null_text
    low = guidance_scale if guidance_scale_2 is None else guidance_scale_2
    if text is not None and (guidance_scale, low) != (1, 1) and negative is None:
        negative = PackedText.empty(text.num_samples, text.tokens.shape[1])

    def predict(samples: Samples, halves: list[tuple[int, str]]) -> list[Tensor]:
        known = None if cache is None else cache.of(halves, [sample for sample, _ in halves])
        return [x[:channels] for x in dit(*samples, window=window, cache=known)]

    def denoise(latents: list[Tensor], timesteps: Tensor, which: Sequence[int]) -> list[Tensor]:
        texts = None if text is None else text.select(which)
        classes = None if labels is None else labels[list(which)]
        steps = None if frame_steps is None else [frame_steps[i] for i in which]
        tokens = None if image_tokens is None else [image_tokens[i] for i in which]
        if conditions is not None:
            latents = [torch.cat([x, conditions[i].to(x)]) for x, i in zip(latents, which, strict=True)]
        highest = timesteps.max()
        scale = low if isinstance(dit, Experts) and highest < dit.boundary else guidance_scale
        if scale == 1 or highest < guidance_from:
            return predict(Samples(latents, timesteps, texts, classes, steps, tokens), [(i, "text") for i in which])
        if texts is not None and negative is not None:
            texts = PackedText.concat([texts, negative.select(which).to(texts.tokens.device, texts.tokens.dtype)])
        if classes is not None and dit.config.num_classes is not None:
            classes = torch.cat([classes, torch.full_like(classes, dit.config.num_classes)])
        steps, tokens = None if steps is None else steps * 2, None if tokens is None else tokens * 2
        halves = [(i, half) for half in ("text", "null") for i in which]
        both = predict(Samples(latents * 2, timesteps.repeat(2), texts, classes, steps, tokens), halves)
        pairs = zip(both[: len(latents)], both[len(latents) :], strict=True)
        return [torch.lerp(null, conditioned, scale) for conditioned, null in pairs]

    return denoise
