"""What windows, the step cache and int8 cost and save: python -m benchmarks.approximations [--count 96] [--layer] [--int8]

The checkpoint in the package makes text to video by each of them. A program looks for the colour, the shape and the motion that the
prompt names (`sora eval`), and PSNR compares with what the whole model makes of the same noise. Times are of these calls, decoding
included. With --layer, windows in one layer of Wan 2.1 1.3B at its own size, with random weights, bfloat16. With --int8, the errors
of int8 attention on what each attention of the checkpoint sees as it makes videos, and what becomes of the videos.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sora_kernels.attention import flash_attn_varlen_func
from sora_kernels.int8_attention import KEYS, QUERIES, int8_attention
from sora_kernels.reference.attention import boundaries
from sora_kernels.reference.int8_attention import in_steps, mean_of_keys
from sora_model import SoraPipeline
from sora_model.codec.codec import psnr
from sora_model.model.block import Window
from sora_model.model.step_cache import StepCache
from sora_model.sizes import Size
from sora_model.world.evaluate import Judge, text_to_videos
from sora_model.world.scene import Scene

THRESHOLDS = 0.05, 0.1, 0.15, 0.2, 0.3
WINDOWS: list[Window] = [(None, 5, 5), (5, 5, 5), (3, 5, 5), (3, 3, 3)]
SIZE: Size = 13, 96, 128  # 4 x 6 x 8 tokens: larger than the windows
WAN_GRID, WAN_WINDOWS = (21, 60, 104), [(5, 9, 9), (9, 15, 15)]


@dataclass(frozen=True)
class Approximate(Judge):
    """A judge whose pipeline is called with `extra`, for videos of SIZE."""

    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return super().options | self.extra

    def cases(self, count: int, first: int = 0) -> list[tuple[Scene, Size]]:
        return [(scene, SIZE) for scene in self.scenes(count, first)]


def ways() -> Iterator[tuple[str, dict[str, Any]]]:
    for threshold in THRESHOLDS:
        yield f"step cache {threshold:g}", {"step_cache": StepCache(threshold)}
    for window in WINDOWS:
        yield f"window {'x'.join('all' if n is None else str(n) for n in window)}", {"window": window}


def report(count: int) -> None:
    """One row for each way: shares of videos that show what was asked for, PSNR, and times as fast.

    The whole model is timed before and after all others.
    """
    whole = Approximate(SoraPipeline.from_pretrained(), count)
    text_to_videos(replace(whole, count=8))  # what is done once
    before, (videos, figures) = _timed(whole)
    rows = []
    for name, extra in ways():
        took, (others, right) = _timed(replace(whole, extra=extra))
        decibels = median(psnr(a, b) for a, b in zip(others, videos, strict=True))
        cache = extra.get("step_cache")
        rows.append((name, right, f"{decibels:.1f} dB", took, f"{cache.reused / cache.passes:.0%}" if cache else ""))
    seconds = (before + _timed(whole)[0]) / 2
    print("| | all right | PSNR | times as fast | blocks left out |\n|---|---:|---:|---:|---:|")
    print(f"| the whole model | {figures} | | 1 | |")
    for name, right, decibels, took, share in rows:
        print(f"| {name} | {right} | {decibels} | {seconds / took:.2f} | {share} |")


def _timed(judge: Judge) -> tuple[float, tuple[list[Tensor], str]]:
    start = time.perf_counter()
    measured = text_to_videos(judge)
    return time.perf_counter() - start, (measured.videos, f"{measured.figures['all of these'].value:.1%}")


def layer() -> None:
    from diffusers import WanTransformer3DModel

    from sora_model.model.convert.wan import from_diffusers_wan

    from .wan_step import SIZES

    torch.manual_seed(0)
    dit = from_diffusers_wan(WanTransformer3DModel(**SIZES, num_layers=1)).to(torch.bfloat16).eval()
    latents, times = [torch.randn(16, *WAN_GRID)], torch.tensor([500.0])
    dit([x[:, :1] for x in latents], times)
    for window in (None, *WAN_WINDOWS, None, *WAN_WINDOWS):
        start = time.perf_counter()
        with torch.no_grad():
            dit(latents, times, window=window)
        print(f"one layer of Wan 1.3B, {WAN_GRID} positions, window {window}: {time.perf_counter() - start:.2f} s", flush=True)


class Ways(NamedTuple):
    """Queries and keys of a sample as a product takes them."""

    bfloat16: tuple[Tensor, Tensor]
    int8: tuple[Tensor, Tensor]
    with_means: tuple[Tensor, Tensor]  # int8 without what takes the keys' mean off

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Ways:
        steps, mean = in_steps(q, QUERIES), mean_of_keys(k)
        return cls((q.bfloat16(), k.bfloat16()), (steps, in_steps(k - mean, KEYS)), (steps, in_steps(k, KEYS)))


@dataclass
class Errors:
    """Of one attention of the model by one way, over all that it saw."""

    output: list[float] = field(default_factory=lambda: [0.0, 0.0])  # squares of the error, and of what is right
    probabilities: list[float] = field(default_factory=list)  # of each call, the mean over queries of sum |p' - p|

    def add(self, right: Tensor, p: Tensor, v: Tensor) -> None:
        """right, p: probabilities [H, i, j]."""
        for i, x in enumerate((p - right, right)):
            self.output[i] += float(torch.einsum("hij,jhd->ihd", x, v).square().sum())
        self.probabilities.append(float((p - right).abs().sum(-1).mean()))

    def __str__(self) -> str:
        return f"{(self.output[0] / self.output[1]) ** 0.5:.2%} | {sum(self.probabilities) / len(self.probabilities):.2%}"


def int8(count: int) -> None:
    """Errors by layer, in float64 beyond the way, and then the videos."""
    pipeline, call, errors = SoraPipeline.from_pretrained(), 0, dict[int, Ways]()

    def begin(*_: Any) -> None:
        nonlocal call
        call = 0

    def compared(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any) -> Tensor:
        nonlocal call
        mine = errors.setdefault(call, Ways(Errors(), Errors(), Errors()))
        call += 1
        for (q0, q1), (k0, k1) in zip(boundaries(cu_q), boundaries(cu_k), strict=True):
            if q0 < q1 and k0 < k1:
                sample, values = (q[q0:q1], k[k0:k1]), v[k0:k1].double()
                right = _probabilities(*sample)
                for of_way, pair in zip(mine, Ways.of(*sample), strict=True):
                    of_way.add(right, _probabilities(*pair), values)
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, *rest)

    hook = pipeline.dit.register_forward_pre_hook(begin)
    attention = "sora_model.model.block.flash_attn_varlen_func"
    with mock.patch(attention, compared), torch.no_grad():
        text_to_videos(Approximate(pipeline, 8))
    hook.remove()
    print("| attention | " + " | ".join(f"{name}: output | probabilities" for name in Ways._fields) + " |")
    print("|---|" + "---:|" * 2 * len(Ways._fields))
    for i, of_call in errors.items():
        print(f"| {i} | " + " | ".join(map(str, of_call)) + " |")
    whole = Approximate(pipeline, count)
    _, (videos, figures) = _timed(whole)
    with mock.patch(attention, lambda q, k, v, cu_q, cu_k, *_: int8_attention(q, k, v, cu_q, cu_k)), torch.no_grad():
        _, (others, right) = _timed(whole)
    decibels = median(psnr(a, b) for a, b in zip(others, videos, strict=True))
    print(f"all right: {figures}, by int8 {right}; PSNR {decibels:.1f} dB")


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(torch.einsum("ihd,jhd->hij", q.double(), k.double()) * q.shape[-1] ** -0.5, -1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=96, help="videos of each way")
    parser.add_argument("--layer", action="store_true", help="one layer of Wan instead")
    parser.add_argument("--int8", action="store_true", help="int8 attention instead")
    chosen = parser.parse_args()
    layer() if chosen.layer else int8(chosen.count) if chosen.int8 else report(chosen.count)
