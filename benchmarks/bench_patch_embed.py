"""Patch embedding of a list of videos and images of many sizes, and its inverse, against Conv3d and einops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.race import LAYOUT, MAIN, OURS, WIDTH, Implementation, Race, Tensors, gigabytes, randn
from sora_kernels.patch_embed import patch_embed_3d, unpatchify_3d

PATCH, CHANNELS = (1, 2, 2), 16
# The batch before patching: latents [C, T, H, W].
LATENTS = [(CHANNELS, *(n * p for n, p in zip(sample[0].grid, PATCH, strict=True))) for sample in LAYOUT.spans]


def patch_embedding(dtype: torch.dtype, backward: bool) -> Race:
    """A list of latents to packed tokens; with the backward, the gradients of weight and bias."""
    torch.manual_seed(0)
    videos = [randn(*shape, dtype=dtype) for shape in LATENTS]
    weight, bias = randn(WIDTH, CHANNELS, *PATCH, dtype=dtype, grad=backward), randn(WIDTH, dtype=dtype, grad=backward)
    dtokens = randn(LAYOUT.num_tokens, WIDTH, dtype=dtype)
    split = LAYOUT.unpack(dtokens)

    def conv(videos: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        return [F.conv3d(video[None], weight, bias, stride=PATCH)[0].flatten(1).T for video in videos]

    def linear(videos: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        pattern, (pt, ph, pw) = "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)", PATCH
        return [F.linear(rearrange(x, pattern, pt=pt, ph=ph, pw=pw), weight.flatten(1), bias) for x in videos]

    def join(results: Tensors) -> Tensors:
        return [torch.cat(results[: len(videos)]), *results[len(videos) :]]

    rows = {
        OURS: Implementation(lambda *xs: patch_embed_3d(*xs, patch_size=PATCH)[0]),
        "Conv3d per video": Implementation(conv, cotangents=split, restore=join),
        "einops + linear per video": Implementation(linear, cotangents=split, restore=join),
        "einops + linear, packed": Implementation(lambda *xs: torch.cat(linear(*xs))),
    }
    flops = 2e-9 * LAYOUT.num_tokens * weight.numel() * (2 if backward else 1)
    inputs = [videos, weight, bias]
    return Race("patch_embed_3d", dtype, backward, flops, "gflops", inputs, [dtokens], lambda *xs: torch.cat(linear(*xs)), rows)


def unpatchify(dtype: torch.dtype, backward: bool) -> Race:
    """Packed tokens to a list of latents."""
    torch.manual_seed(0)
    pt, ph, pw = PATCH
    tokens = randn(LAYOUT.num_tokens, pt * ph * pw * CHANNELS, dtype=dtype, grad=backward)
    cotangents = [randn(*shape, dtype=dtype) for shape in LATENTS]

    def peer(tokens: Tensor) -> Tensors:
        pattern = "(t h w) (pt ph pw c) -> c (t pt) (h ph) (w pw)"
        samples = [(x, span.grid) for x, (span,) in zip(LAYOUT.unpack(tokens), LAYOUT.spans, strict=True)]
        return [rearrange(x, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw).contiguous() for x, (t, h, w) in samples]

    rows = {
        OURS: Implementation(lambda tokens: unpatchify_3d(tokens, LAYOUT, patch_size=PATCH)),
        "einops per video": Implementation(peer),
    }
    work = (4 if backward else 2) * gigabytes(tokens)
    return Race("unpatchify_3d", dtype, backward, work, "gbps", [tokens], cotangents, peer, rows)


@pytest.mark.parametrize("implementation", [OURS, "Conv3d per video", "einops + linear per video", "einops + linear, packed"])
@pytest.mark.parametrize(("dtype", "backward"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_patch_embed(measure, implementation, dtype, backward):
    measure(implementation, patch_embedding, dtype, backward)


@pytest.mark.parametrize("implementation", [OURS, "einops per video"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_unpatchify(measure, implementation, backward):
    measure(implementation, unpatchify, MAIN, backward)
