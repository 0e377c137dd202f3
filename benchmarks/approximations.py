"""What windows and the step cache cost and save: python -m benchmarks.approximations [--count 96] [--layer]

The checkpoint in the package makes text to video by each of them. A program looks for the colour, the shape and the motion that the
prompt names (`sora eval`), and PSNR compares with what the whole model makes of the same noise. Times are of these calls, decoding
included. With --layer, windows in one layer of Wan 2.1 1.3B at its own size, with random weights, bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

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
    before, (videos, figures) = timed(whole)
    rows = []
    for name, extra in ways():
        took, (others, right) = timed(replace(whole, extra=extra))
        decibels = median(psnr(a, b) for a, b in zip(others, videos, strict=True))
        cache = extra.get("step_cache")
        rows.append((name, right, f"{decibels:.1f} dB", took, f"{cache.reused / cache.passes:.0%}" if cache else ""))
    seconds = (before + timed(whole)[0]) / 2
    print("| | all right | PSNR | times as fast | blocks left out |\n|---|---:|---:|---:|---:|")
    print(f"| the whole model | {figures} | | 1 | |")
    for name, right, decibels, took, share in rows:
        print(f"| {name} | {right} | {decibels} | {seconds / took:.2f} | {share} |")


def timed(judge: Judge) -> tuple[float, tuple[list[Tensor], str]]:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=96, help="videos of each way")
    parser.add_argument("--layer", action="store_true", help="one layer of Wan instead")
    chosen = parser.parse_args()
    layer() if chosen.layer else report(chosen.count)
