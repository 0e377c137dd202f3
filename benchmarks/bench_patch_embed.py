"""Patch embedding of a list of videos and images of many sizes against Conv3d and einops; cutting them, putting them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.race import (
    BACKWARD,
    BOTH,
    FORWARD,
    GRIDS,
    IDS,
    LAYOUT,
    MAIN,
    ON_GPU,
    OURS,
    PASSES,
    WIDTH,
    Implementation,
    Race,
    Tensors,
    copied,
    gigabytes,
    of_pass,
    randn,
)
from sora_kernels.layout import PackedLayout
from sora_kernels.patch_embed import patch_embed_3d, patchify_3d, unpatchify_3d

PATCH, CHANNELS = (1, 2, 2), 16
# Patches hold so little that what only moves them needs 16 times the tokens to fill a GPU.
MOVED = PackedLayout.from_grids([(t, 4 * h, 4 * w) for t, h, w in GRIDS] * 4, LAYOUT.device) if ON_GPU else LAYOUT
COPY = ["copy"] if ON_GPU else []
PEERS = ["Conv3d per video", "einops + linear per video", "einops + linear, packed"]


def latents(layout: PackedLayout, dtype: torch.dtype, grad: bool = False) -> Tensors:
    """The batch before patching, [C, T, H, W] each."""
    shapes = [[n * p for n, p in zip(sample[0].grid, PATCH, strict=True)] for sample in layout.spans]
    return [randn(CHANNELS, *shape, dtype=dtype, grad=grad) for shape in shapes]


def patch_embedding(dtype: torch.dtype, which: str, layout: PackedLayout = LAYOUT) -> Race:
    """A list of latents to packed tokens; with the backward, the gradients of weight and bias."""
    torch.manual_seed(0)
    backward = which != FORWARD
    videos = latents(layout, dtype)
    weight, bias = randn(WIDTH, CHANNELS, *PATCH, dtype=dtype, grad=backward), randn(WIDTH, dtype=dtype, grad=backward)
    dtokens = randn(layout.num_tokens, WIDTH, dtype=dtype)
    split = layout.unpack(dtokens)

    def conv(videos: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        return [F.conv3d(video[None], weight, bias, stride=PATCH)[0].flatten(1).T for video in videos]

    def linear(videos: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        pattern, (pt, ph, pw) = "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)", PATCH
        return [F.linear(rearrange(x, pattern, pt=pt, ph=ph, pw=pw), weight.flatten(1), bias) for x in videos]

    def join(results: Tensors) -> Tensors:
        return [torch.cat(results[: len(videos)]), *results[len(videos) :]]

    flops, moved = 2e-9 * layout.num_tokens * weight.numel(), gigabytes(*videos, weight, bias, dtokens)
    work = {"gflops": of_pass(which, flops, flops), "gbps": of_pass(which, moved, moved)}  # gradients in their tensors' place
    rows = {
        OURS: Implementation(lambda *xs: patch_embed_3d(*xs, patch_size=PATCH)[0]),
        "Conv3d per video": Implementation(conv, cotangents=split, restore=join),
        "einops + linear per video": Implementation(linear, cotangents=split, restore=join),
        "einops + linear, packed": Implementation(lambda *xs: torch.cat(linear(*xs))),
        "copy": copied(work["gbps"]),
    }
    name = "patch_embed_3d" if layout is LAYOUT else f"patch_embed_3d, {'x'.join(map(str, videos[0].shape[1:]))}"
    return Race(name, dtype, which, work, [videos, weight, bias], [dtokens], lambda *xs: torch.cat(linear(*xs)), rows)


def patches(dtype: torch.dtype, which: str, *, cut: bool) -> Race:
    """A list of latents to packed patches, or back."""
    torch.manual_seed(0)
    (pt, ph, pw), backward = PATCH, which != FORWARD
    tokens = randn(MOVED.num_tokens, pt * ph * pw * CHANNELS, dtype=dtype, grad=backward and not cut)
    videos = latents(MOVED, dtype, grad=backward and cut)

    def cut_each(videos: Tensors) -> Tensor:
        pattern = "c (t pt) (h ph) (w pw) -> (t h w) (pt ph pw c)"
        return torch.cat([rearrange(x, pattern, pt=pt, ph=ph, pw=pw) for x in videos])

    def join_each(tokens: Tensor) -> Tensors:
        pattern = "(t h w) (pt ph pw c) -> c (t pt) (h ph) (w pw)"
        samples = [(x, span.grid) for x, (span,) in zip(MOVED.unpack(tokens), MOVED.spans, strict=True)]
        return [rearrange(x, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw).contiguous() for x, (t, h, w) in samples]

    def ours(x: Any) -> Any:
        return patchify_3d(x, patch_size=PATCH)[0] if cut else unpatchify_3d(x, MOVED, patch_size=PATCH)

    peer: Callable[..., Any] = cut_each if cut else join_each
    inputs, cotangents = ([videos], [tokens]) if cut else ([tokens], videos)
    work = of_pass(which, 2, 2) * gigabytes(tokens)
    rows = {OURS: Implementation(ours), "einops per video": Implementation(peer), "copy": copied(work)}
    return Race("patchify_3d" if cut else "unpatchify_3d", dtype, which, {"gbps": work}, inputs, cotangents, peer, rows)


# T, H and W of a latent, and what it packs to.
LATENTS = {
    f"{t}x{h}x{w}": PackedLayout.from_grids([(t, h // 2, w // 2)], LAYOUT.device)
    for t, h, w in ((16, 64, 64), (8, 32, 32), (1, 64, 64), (1, 32, 32))
}
CASES = [(torch.float32, FORWARD), (torch.float32, BOTH), (torch.bfloat16, FORWARD)]
CASES += [(torch.bfloat16, BOTH), (torch.bfloat16, BACKWARD)] if ON_GPU else []


@pytest.mark.parametrize("implementation", [OURS, *PEERS, *COPY])
@pytest.mark.parametrize(("dtype", "which"), CASES, ids=IDS.get)
def test_patch_embed(measure, implementation, dtype, which):
    measure(implementation, patch_embedding, dtype, which)


@pytest.mark.parametrize("implementation", [OURS, *PEERS[:2]])
@pytest.mark.parametrize("dtype", [MAIN] if ON_GPU else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("latent", LATENTS, ids=LATENTS.keys())
def test_one_latent(measure, implementation, latent, dtype):
    measure(implementation, patch_embedding, dtype, FORWARD, LATENTS[latent])


@pytest.mark.parametrize("implementation", [OURS, "einops per video", *COPY])
@pytest.mark.parametrize("which", PASSES.values(), ids=PASSES.keys())
def test_unpatchify(measure, implementation, which):
    measure(implementation, patches, MAIN, which, cut=False)


if ON_GPU:

    @pytest.mark.parametrize("implementation", [OURS, "einops per video", *COPY])
    @pytest.mark.parametrize("which", PASSES.values(), ids=PASSES.keys())
    def test_patchify(measure, implementation, which):
        measure(implementation, patches, MAIN, which, cut=True)
