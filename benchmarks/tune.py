"""Measures block sizes of the Triton attention kernels on the GPU at hand.

    python -m benchmarks.tune [--head-dim 64 128] [--dtype bfloat16] [--kernel forward dq] [--candidates 20]

For each kernel, head dim and dtype it times candidates on one packed batch, those that configs.py names first, then those most like
the present blocks. It checks that the result stays what it was, and prints the lines of `sora_kernels/triton/configs.py` with the
fastest. Candidates that fail, such as those that do not fit the GPU, are passed over.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.race import DEVICE, ON_GPU, REHEARSED
from benchmarks.works import TYPICAL
from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.backends import use_backend
from sora_kernels.int8_attention import KEYS, QUERIES, int8_attention
from sora_kernels.layout import PackedLayout
from sora_kernels.triton import configs
from sora_kernels.triton.configs import Config

GRIDS = [(1, 16, 16)] if REHEARSED else TYPICAL
HEADS, WINDOW = 16, (5, 9, 9)
BLOCKS, WARPS, STAGES = (32, 64, 128), (4, 8), (1, 2, 3, 4)


def architecture() -> str:
    return configs.architecture(torch.device("cuda", 0))


def table_of(kernel: str) -> configs.Table:
    return configs.CONFIGS[kernel][architecture()]


def key_of(kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """The table's line that serves this head dim."""
    return min(key for key in table_of(kernel) if key[0] >= head_dim and key[1] == dtype.itemsize)


@contextmanager
def blocks(kernel: str, head_dim: int, dtype: torch.dtype, config: Config) -> Iterator[None]:
    """The kernel runs in these blocks."""
    table, key = table_of(kernel), key_of(kernel, head_dim, dtype)
    before, table[key] = table[key], config
    try:
        yield
    finally:
        table[key] = before


def candidates(kernel: str, head_dim: int, dtype: torch.dtype, count: int) -> list[Config]:
    """The present one, the named ones, then those most like it that give a warp neither too little nor too much to do."""
    present = table_of(kernel)[key_of(kernel, head_dim, dtype)]

    def distance(config: Config) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(config, present, strict=True))

    every = itertools.product(BLOCKS, BLOCKS, WARPS, STAGES)
    if kernel.startswith("int8"):  # blocks may not be larger than what shares a scale
        every = (c for c in every if c[0] <= QUERIES and c[1] <= KEYS)
    likely = sorted((c for c in every if 1024 <= c[0] * c[1] / c[2] <= 4096), key=distance)
    return list(dict.fromkeys([present, *named(kernel, head_dim, dtype), *likely]))[:count]


def named(kernel: str, head_dim: int, dtype: torch.dtype) -> list[Config]:
    """Those that configs.py wants measured first."""
    return configs.CANDIDATES.get((kernel, architecture()), {}).get(key_of(kernel, head_dim, dtype), [])


@lru_cache(maxsize=2)
def run_of(kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A function that runs the kernel (for dq and dkdv the whole backward), and what it gives in the present blocks."""
    torch.manual_seed(0)
    layout = PackedLayout.from_grids(GRIDS, DEVICE)
    q, k, v, dout = torch.randn(4, layout.num_tokens, HEADS, head_dim, device=DEVICE).to(dtype).requires_grad_().unbind(0)

    def forward() -> Tensor:
        if kernel.startswith("window"):
            return spatiotemporal_attention(q, k, v, layout, window=WINDOW)
        if kernel.startswith("int8"):
            with torch.no_grad():
                return int8_attention(q, k, v, layout.cu_seqlens, layout.cu_seqlens)
        return flash_attn_varlen_func(q, k, v, layout.cu_seqlens, layout.cu_seqlens)

    out = forward()

    def run() -> list[Tensor]:
        return [forward()] if kernel.endswith("forward") else list(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))

    return run, run()


def milliseconds(kernel: str, head_dim: int, dtype: torch.dtype, config: Config) -> float:
    """The median time of the kernel in these blocks; raises what Triton raises, and AssertionError for another result."""
    with use_backend("triton"):
        run, expected = run_of(kernel, head_dim, dtype)
        with blocks(kernel, head_dim, dtype, config):
            for got, right in zip(run(), expected, strict=True):
                torch.testing.assert_close(got, right, rtol=3e-2, atol=3e-2)
            host = measure.host_seconds(run)
            return measure.percentiles([measure.CLOCK.on_gpu(run, host) for _ in range(measure.ROUNDS[0])])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kernel", nargs="+", default=list(configs.CONFIGS), choices=list(configs.CONFIGS))
    parser.add_argument("--candidates", type=int, default=20, help="for one line of the table")
    arguments = parser.parse_args()
    if not ON_GPU:
        parser.error("needs a GPU")
    print(f"{torch.cuda.get_device_name()}, table {architecture()}")
    for kernel, head_dim, name in itertools.product(arguments.kernel, arguments.head_dim, arguments.dtype):
        dtype = getattr(torch, name)
        times: dict[Config, float] = {}
        for config in candidates(kernel, head_dim, dtype, arguments.candidates):
            try:
                times[config] = milliseconds(kernel, head_dim, dtype, config)
            except Exception as error:  # too large for the GPU, not to be compiled or not right: the next may do
                print(f"  {config}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        best = min(times, key=times.__getitem__)
        print(f"{kernel}: ({head_dim}, {dtype.itemsize}): {best},  # {times[best]:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
