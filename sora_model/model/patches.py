"""The two ways of cutting a clip into patches (Arnab et al., ViViT, 2021).

tubelets          patches (pt, ph, pw) of the whole clip
uniform frames    n_t frames, evenly spread over the clip, each cut as in ViT; their tokens laid end to end, at the times they
                  are of, give or take half a frame
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sora_kernels.layout import PackedLayout, Span
from sora_kernels.patch_embed import patch_embed_3d


def uniform_frames(clip: Tensor, num_frames: int) -> tuple[Tensor, float]:
    """`num_frames` frames of a clip [C, T, H, W], from the first to the last, and how many frames apart they are.

    >>> frames, step = uniform_frames(torch.randn(16, 9, 6, 6), 3)
    >>> frames.shape, step
    (torch.Size([16, 3, 6, 6]), 4.0)

    A clip that has no more than so many comes back as it is.
    """
    if num_frames < 1:
        raise ValueError(f"uniform_frames: num_frames: expected at least 1, got {num_frames}")
    length = clip.shape[1]
    if length <= num_frames:
        return clip, 1.0
    places = torch.linspace(0, length - 1, num_frames).round().long()
    return clip[:, places], (length - 1) / max(num_frames - 1, 1)


def embed_patches(
    clips: Sequence[Tensor], weight: Tensor, bias: Tensor, *, patch_size: tuple[int, int, int], num_frames: int | None = None
) -> tuple[Tensor, PackedLayout]:
    """Tokens [N, D] of clips [C, T, H, W] of any sizes, and where they lie.

    Args:
        weight, bias: as a Conv3d has them.
        patch_size: (pt, ph, pw).
        num_frames: n_t, for uniform frames instead of tubelets; pt must be 1.
    """
    if num_frames is None:
        return patch_embed_3d(clips, weight, bias, patch_size=patch_size)
    if patch_size[0] != 1:
        raise ValueError(f"embed_patches: patch_size: expected (1, ph, pw) with num_frames, got {patch_size}")
    frames, steps = zip(*(uniform_frames(clip, num_frames) for clip in clips), strict=True)
    _, ph, pw = patch_size
    grids = [(clip.shape[1], clip.shape[2] // ph, clip.shape[3] // pw) for clip in frames]
    spans = [[Span(grid, step=(step, 1.0, 1.0))] for grid, step in zip(grids, steps, strict=True)]
    layout = PackedLayout.from_spans(spans, frames[0].device)
    return patch_embed_3d(frames, weight, bias, patch_size=patch_size, layout=layout)
