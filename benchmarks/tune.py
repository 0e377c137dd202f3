"""Measures block sizes of the Triton attention kernels on the GPU at hand.

    python -m benchmarks.tune [--head-dim 64 128] [--dtype bfloat16] [--kernel forward dq] [--seconds 20] [--json FILE]

For each kernel, head dim and dtype it times candidates on one packed batch, those that configs.py names first, then those most like
the present blocks, checks that the result stays what it was, and prints the lines of `sora_kernels/triton/configs.py` with the
fastest. Candidates that fail, such as those that do not fit the GPU, are passed over. FILE gets a line of JSON for every candidate
as soon as it is tried.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.backends import use_backend
from sora_kernels.layout import PackedLayout
from sora_kernels.triton import configs
from sora_kernels.triton.configs import Config

LAYOUT = PackedLayout.from_grids([(16, 16, 16), (4, 32, 32), (4, 24, 24), (1, 64, 64), (1, 40, 40)])
HEADS, WINDOW = 16, (5, 9, 9)
BLOCKS, WARPS, STAGES = (32, 64, 128), (4, 8), (1, 2, 3, 4)


def candidates(present: Config, named: Sequence[Config] = ()) -> list[Config]:
    """The present one, the named ones, then those most like it that give a warp neither too little nor too much to do."""

    def distance(config: Config) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(config, present, strict=True))

    every = itertools.product(BLOCKS, BLOCKS, WARPS, STAGES)
    likely = sorted((c for c in every if 1024 <= c[0] * c[1] / c[2] <= 4096), key=distance)
    return list(dict.fromkeys([present, *named, *likely]))


def passes(kernel: str, head_dim: int, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """A function that runs the kernel: the forward, or the whole backward for one of its two."""
    layout = LAYOUT.to("cuda")
    q, k, v, dout = torch.randn(4, layout.num_tokens, HEADS, head_dim, device="cuda").to(dtype).requires_grad_().unbind(0)

    def forward() -> Tensor:
        if kernel.startswith("window"):
            return spatiotemporal_attention(q, k, v, layout, window=WINDOW)
        return flash_attn_varlen_func(q, k, v, layout.cu_seqlens, layout.cu_seqlens)

    if kernel.endswith("forward"):
        return lambda: [forward()]
    out = forward()
    return lambda: list(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))


def tune(
    kernel: str, head_dim: int, dtype: torch.dtype, seconds: float, record: Callable[[dict[str, Any]], None]
) -> tuple[Config, float]:
    """The fastest candidate and its milliseconds; each that is tried is recorded, with its time or its error."""
    arch = configs.architecture(torch.device("cuda", 0))
    table = configs.CONFIGS[kernel][arch]
    key = (head_dim, torch.empty(0, dtype=dtype).element_size())
    best, stop = (table[key], float("inf")), time.monotonic() + seconds
    run = passes(kernel, head_dim, dtype)
    expected: list[Tensor] = []
    for candidate in candidates(table[key], configs.CANDIDATES.get((kernel, arch), {}).get(key, ())):
        if time.monotonic() > stop:
            break
        table[key] = candidate
        result: dict[str, Any] = {"kernel": kernel, "head_dim": head_dim, "dtype": str(dtype), "config": candidate}
        try:
            results = run()
            expected = expected or results  # of the first that runs
            for got, right in zip(results, expected, strict=True):
                torch.testing.assert_close(got, right, rtol=3e-2, atol=3e-2)
            result["ms"] = triton.testing.do_bench(run, warmup=5, rep=20)
            best = min(best, (candidate, result["ms"]), key=lambda pair: pair[1])
        except Exception as error:  # too large for the GPU, not to be compiled or not right: the next may do
            result["error"] = f"{type(error).__name__}: {error}"[:300]
        record(result)
    table[key] = best[0]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--kernel", nargs="+", default=list(configs.CONFIGS), choices=list(configs.CONFIGS))
    parser.add_argument("--seconds", type=float, default=60, help="for one line of the table")
    parser.add_argument("--json", type=Path, help="append a line for every candidate to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")

    def record(result: dict[str, Any]) -> None:
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(result) + "\n")

    print(f"{torch.cuda.get_device_name()}, table {configs.architecture(torch.device('cuda', 0))}")
    with use_backend("triton"):
        for kernel, head_dim, name in itertools.product(arguments.kernel, arguments.head_dim, arguments.dtype):
            dtype = getattr(torch, name)
            config, milliseconds = tune(kernel, head_dim, dtype, arguments.seconds, record)
            size = torch.empty(0, dtype=dtype).element_size()
            print(f"{kernel}: ({head_dim}, {size}): {config},  # {milliseconds:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
