"""Errors of int8 attention and of attention by blocks on what a model sees: python -m benchmarks.attention_errors [--count 96]

The checkpoint in the package makes text to video. Each of its attentions is computed in float64, as it is and by each way: queries
and keys in bfloat16; int8; int8 without taking the keys' mean off. Self-attention is also by a quarter of the blocks, those whose
means of queries and keys have the largest products, and by sliding tiles. Then the checkpoint makes videos by these, which
`sora eval` judges.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import mean, median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.approximations import Approximate, timed
from sora_kernels import BlockMask, PackedLayout, TokenBlocks, block_sparse_attention
from sora_kernels.attention import flash_attn_varlen_func
from sora_kernels.int8_attention import KEYS, QUERIES, int8_attention
from sora_kernels.reference.attention import boundaries
from sora_kernels.reference.int8_attention import mean_of_keys, quantized
from sora_model import SoraPipeline
from sora_model.codec.codec import psnr
from sora_model.model.block import CrossAttention, SelfAttention
from sora_model.world.evaluate import text_to_videos

TILE, SHARE, WINDOW = (2, 2, 2), 4, (2, 2, 2)  # of 4 x 6 x 8 tokens; one block in SHARE is seen; tiles of the window
ATTENTION = "sora_model.model.block.flash_attn_varlen_func"


class Sample(NamedTuple):
    """Queries [i, H, d] and keys [j, H, d]; their layout in self-attention."""

    q: Tensor
    k: Tensor
    layout: PackedLayout | None


@lru_cache
def tiles(layout: PackedLayout) -> TokenBlocks:
    return TokenBlocks.tiles(layout, TILE)


def best(q: Tensor, k: Tensor, blocks: TokenBlocks) -> BlockMask:
    """For each head and block of queries, the blocks of keys that its mean points to; q, k [N, H, d] in the order of the blocks."""
    lengths = blocks.cu_blocks.diff()
    means = [torch.segment_reduce(x.float(), "mean", lengths=lengths, axis=0).split(blocks.num_blocks) for x in (q, k)]
    products = [torch.einsum("rhd,chd->hrc", *sample) for sample in zip(*means, strict=True)]
    return BlockMask.from_indices([x.topk(max(1, x.shape[-1] // SHARE)).indices for x in products], blocks)


def sliding(q: Tensor, k: Tensor, blocks: TokenBlocks) -> BlockMask:
    return BlockMask.sliding(blocks, WINDOW)


Choice = Callable[[Tensor, Tensor, TokenBlocks], BlockMask]
CHOICES: dict[str, Choice] = {"a quarter of the blocks": best, "sliding tiles": sliding}


def seen(sample: Sample, choice: Choice) -> Tensor:
    """bool [H or 1, i, j] in the order of the tokens."""
    assert sample.layout is not None
    blocks = tiles(sample.layout)
    mask = choice(blocks.arrange(sample.q), blocks.arrange(sample.k), blocks)
    (count,) = blocks.num_blocks
    offsets, indices = mask.lists
    table = torch.zeros(mask.num_heads * count, count, dtype=torch.bool)
    table[torch.arange(len(table)).repeat_interleave(offsets.diff()), indices.long()] = True
    block = blocks.restore(torch.arange(count).repeat_interleave(blocks.cu_blocks.diff()))
    return table.view(-1, count, count)[:, block][:, :, block]


def probabilities(q: Tensor, k: Tensor, visible: Tensor | None = None) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.softmax(scores if visible is None else scores.masked_fill(~visible, -torch.inf), -1)


def ways(sample: Sample) -> Iterator[tuple[str, Tensor]]:
    """Names, and probabilities [H, i, j]."""
    q, k, layout = sample
    steps = quantized(q, QUERIES)
    yield "bfloat16", probabilities(q.bfloat16(), k.bfloat16())
    yield "int8", probabilities(steps, quantized(k - mean_of_keys(k), KEYS))
    yield "int8 without the mean", probabilities(steps, quantized(k, KEYS))
    if layout is not None:
        for name, choice in CHOICES.items():
            yield name, probabilities(q, k, seen(sample, choice))


@dataclass
class Errors:
    """Of one attention of the model by one way, over all that it saw."""

    output: list[float] = field(default_factory=lambda: [0.0, 0.0])  # squares of the error, and of what is right
    probabilities: list[float] = field(default_factory=list)  # of each sample, the mean over queries of sum |p' - p|

    def add(self, right: Tensor, p: Tensor, v: Tensor) -> None:
        for i, x in enumerate((p - right, right)):
            self.output[i] += float(torch.einsum("hij,jhd->ihd", x, v).square().sum())
        self.probabilities.append(float((p - right).abs().sum(-1).mean()))

    def __str__(self) -> str:
        return f"{(self.output[0] / self.output[1]) ** 0.5:.2%} | {mean(self.probabilities):.2%}"


class Watched(NamedTuple):
    """Which attention of the model runs, and on what layout, if it is self-attention."""

    name: str
    layout: PackedLayout | None


@contextmanager
def watched(pipeline: SoraPipeline) -> Iterator[Callable[[], Watched]]:
    """Yields a function that says what runs."""
    now: list[Watched] = []
    hooks = []
    for name, module in pipeline.dit.named_modules():
        if isinstance(module, SelfAttention | CrossAttention):

            def note(module: Any, args: tuple, name: str = name) -> None:
                now[:] = [Watched(name, args[1] if isinstance(module, SelfAttention) else None)]

            hooks.append(module.register_forward_pre_hook(note))
    try:
        yield lambda: now[0]
    finally:
        for hook in hooks:
            hook.remove()


def report_errors(pipeline: SoraPipeline, count: int) -> None:
    errors: dict[str, dict[str, Errors]] = {}

    with watched(pipeline) as running:

        def compared(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any) -> Tensor:
            name, layout = running()
            for b, ((q0, q1), (k0, k1)) in enumerate(zip(boundaries(cu_q), boundaries(cu_k), strict=True)):
                if q0 < q1 and k0 < k1:
                    sample = Sample(q[q0:q1], k[k0:k1], layout and layout.select([b]))
                    right, values = probabilities(sample.q, sample.k), v[k0:k1].double()
                    for way, p in ways(sample):
                        errors.setdefault(name, {}).setdefault(way, Errors()).add(right, p, values)
            return flash_attn_varlen_func(q, k, v, cu_q, cu_k, *rest)

        with mock.patch(ATTENTION, compared), torch.no_grad():
            text_to_videos(Approximate(pipeline, count))
    names = list(max(errors.values(), key=len))
    print("| | " + " | ".join(f"{name}: output | probabilities" for name in names) + " |")
    print("|---|" + "---:|" * 2 * len(names))
    for name, of_attention in errors.items():
        print(f"| {name} | " + " | ".join(str(of_attention.get(way, " | ")) for way in names) + " |")


def report_videos(pipeline: SoraPipeline, count: int) -> None:
    whole = Approximate(pipeline, count)
    _, (videos, figures) = timed(whole)
    print(f"| | all right | PSNR |\n|---|---:|---:|\n| the whole model | {figures} | |")
    with watched(pipeline) as running:

        def in_int8(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any) -> Tensor:
            return int8_attention(q, k, v, cu_q, cu_k)

        def by_blocks(choice: Choice) -> Callable[..., Tensor]:
            def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
                layout = running().layout
                if layout is None:
                    return flash_attn_varlen_func(q, k, v, *rest)
                blocks = tiles(layout)
                q, k, v = (blocks.arrange(x) for x in (q, k, v))
                return blocks.restore(block_sparse_attention(q, k, v, choice(q, k, blocks)))

            return attend

        for name, way in {"int8": in_int8, **{name: by_blocks(choice) for name, choice in CHOICES.items()}}.items():
            with mock.patch(ATTENTION, way), torch.no_grad():
                _, (others, right) = timed(whole)
            print(f"| {name} | {right} | {median(psnr(a, b) for a, b in zip(others, videos, strict=True)):.1f} dB |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=96, help="videos of each way; errors are of 8")
    chosen = parser.parse_args()
    model = SoraPipeline.from_pretrained()
    report_errors(model, min(8, chosen.count))
    report_videos(model, chosen.count)
