"""Videos to patch tokens and back: Conv3d with stride = kernel, written as a matrix product over packed patches.

tokens[n] = Σ_c weight[:, c] · patch n + bias, the patches of each video in raster order, t slowest
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

from .common import widen, write, write_gradients

PATCHES = "c (t pt) (h ph) (w pw) -> (t h w) (pt ph pw c)"


def patchify(videos: Sequence[Tensor], patch_size: Sequence[int]) -> Tensor:
    """Videos [C,T,H,W] of any sizes -> their patches, [N, pt·ph·pw·C]."""
    sizes = dict(zip(("pt", "ph", "pw"), patch_size, strict=True))
    return torch.cat([rearrange(video, PATCHES, **sizes) for video in videos])


def unpatchify(tokens: Tensor, patch_size: Sequence[int], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Patches [N, pt·ph·pw·C] -> videos of the given shapes [C,T,H,W]; patches past the last video are left out."""
    pt, ph, pw = patch_size
    grids = [(t // pt, h // ph, w // pw) for _, t, h, w in shapes]
    inverse = " -> ".join(reversed(PATCHES.split(" -> ")))
    counts = [t * h * w for t, h, w in grids]
    return [
        rearrange(patches, inverse, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
        for patches, (t, h, w) in zip(tokens[: sum(counts)].split(counts), grids, strict=True)
    ]


def patch_embed_3d(videos: Sequence[Tensor], weight: Tensor, bias: Tensor | None, patch_size: Sequence[int]) -> Tensor:
    """Videos [C,T,H,W], weight [D,C,pt,ph,pw], bias [D] -> tokens [N,D]."""
    kernel = rearrange(widen(weight), "d c pt ph pw -> d (pt ph pw c)")
    # a product per video: how a matrix library blocks one, and so its last bits, may depend on the number of rows
    tokens = torch.cat([einsum(widen(patchify([v], patch_size)), kernel, "n i, d i -> n d") for v in videos])
    return tokens if bias is None else tokens + widen(bias)


def patch_embed_3d_forward(
    videos: Sequence[Tensor], weight: Tensor, bias: Tensor | None, patch_size: Sequence[int], tokens: Tensor
) -> None:
    write([patch_embed_3d(videos, weight, bias, patch_size)], [tokens])


def patch_embed_3d_backward(
    dtokens: Tensor,
    videos: Sequence[Tensor],
    weight: Tensor,
    patch_size: Sequence[int],
    dvideos: Sequence[Tensor] | None,
    dweight: Tensor,
    dbias: Tensor | None,
) -> None:
    def function(weight: Tensor, bias: Tensor | None, *videos: Tensor) -> Sequence[Tensor]:
        return [patch_embed_3d(videos, weight, bias, patch_size)]

    # any bias has the same gradients
    bias = None if dbias is None else torch.zeros_like(dbias)
    outputs = (dweight, dbias, *([None] * len(videos) if dvideos is None else dvideos))
    write_gradients(function, (weight, bias, *videos), [dtokens], outputs)


def patchify_3d(videos: Sequence[Tensor], patch_size: Sequence[int], tokens: Tensor) -> None:
    write([patchify(videos, patch_size)], [tokens])


def unpatchify_3d(tokens: Tensor, patch_size: Sequence[int], videos: Sequence[Tensor]) -> None:
    write(unpatchify(tokens, patch_size, [video.shape for video in videos]), videos)
