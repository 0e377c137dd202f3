"""Masks of clean frames: which latent frames of a sample have noise level 0, and what follows from that for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CleanFrames(NamedTuple):
    """The frames of a sample that sampling keeps.

    mask: bool [T], True for clean frames; whole token frames. latent: [C, T, H, W], of which only these frames are read.
    """

    mask: Tensor
    latent: Tensor


def check_clean_masks(masks: Sequence[Tensor] | None, latents: Sequence[Tensor], patch_frames: int) -> list[Tensor] | None:
    """The masks on the host; None if no frame is clean, as one noise level per sample costs less than one per frame.

    Raises:
        ValueError: a mask that is not bool [T], or that cuts through a token frame of `patch_frames` latent frames.
    """
    if masks is None:
        return None
    for i, (mask, latent) in enumerate(zip(masks, latents, strict=True)):
        if mask.dtype != torch.bool or mask.shape != latent.shape[1:2]:
            got = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"clean_masks[{i}]: expected torch.bool [{latent.shape[1]}], one per latent frame, got {got}")
        if not torch.equal(mask, mask[::patch_frames].repeat_interleave(patch_frames)):
            where = mask.nonzero().flatten().tolist()
            raise ValueError(f"clean_masks[{i}]: expected whole token frames of {patch_frames} latent frames, got frames {where}")
    on_host = [mask.cpu() for mask in masks]
    return on_host if any(mask.any() for mask in on_host) else None


def fill_clean(latents: Sequence[Tensor], clean: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """`latents` with the frames of `clean` where the masks are True."""
    return [
        torch.where(mask.to(x.device)[:, None, None], c.to(x), x) if mask.any() else x
        for x, c, mask in zip(latents, clean, masks, strict=True)
    ]


def frame_levels(levels: Sequence[Tensor], latents: Sequence[Tensor], masks: Sequence[Tensor] | None, patch_frames: int) -> Tensor:
    """Noise levels as `DiT.forward` takes them: [B] where one level per sample says all, else [F], 0 for clean frames.

    levels: of each sample, [1] or one per token frame.
    """
    if masks is None and all(len(level) == 1 for level in levels):
        return torch.cat(list(levels))
    rows = []
    for i, (level, latent) in enumerate(zip(levels, latents, strict=True)):
        row = level.expand(latent.shape[1] // patch_frames)
        rows.append(row if masks is None else row * ~masks[i][::patch_frames].to(row.device))
    return torch.cat(rows)
