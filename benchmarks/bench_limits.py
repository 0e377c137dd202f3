"""Our ops against what the machine can do at most.

Attention on one long sample against multiply-adds alone, and against one thread of two; memory-bound ops on a batch that no cache
holds against a copy. For these rows "ours is faster by" is a share: 0.7x "multiply-adds" is 70% of the arithmetic that vectors can
do at most (AMX tiles can do more), 0.9x "copy" 90% of the bandwidth, 1.9x "1 thread" is how much faster all threads are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_adaln import ADALN, adaln
from benchmarks.bench_bias_gelu import activation
from benchmarks.bench_rope import ROPE, rope
from benchmarks.race import BACKWARD, BEYOND_CACHES, BOTH, FORWARD, IDS, ON_GPU, OURS, Implementation, Race, Tensors, of_pass, randn
from sora_kernels import backends
from sora_kernels.attention import flash_attn_func

MEMORY_BOUND = {
    **{op: partial(adaln, op) for op in ADALN},
    **{op: partial(rope, op) for op in ROPE},
    "bias_gelu": activation,
}
LENGTH, HEADS = 4096, 4
PEAK, SINGLE, PEER = "multiply-adds", f"{OURS}, 1 thread", "SDPA"


def multiply_adds(gigaflops: float) -> Implementation:
    """A row that does as many floating-point operations as the op must, and nothing else."""
    cpu = backends.BACKENDS["cpu"].load()
    items = 16 * torch.get_num_threads()

    def run(*_: Tensor) -> Tensor:
        return torch.tensor(cpu.multiply_adds(items, int(gigaflops * 1e9 / items)))

    return Implementation(run, comparable=False, differentiable=False)


def single_thread(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return flash_attn_func(q, k, v)
    finally:
        torch.set_num_threads(threads)


def one_sample(dtype: torch.dtype, which: str, head_dim: int) -> Race:
    torch.manual_seed(0)
    q, k, v, dout = (randn(1, LENGTH, HEADS, head_dim, dtype=dtype, grad=which != FORWARD) for _ in range(4))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    forward = 4e-9 * HEADS * head_dim * LENGTH**2
    work = of_pass(which, forward, 2.5 * forward)
    inputs: Tensors = [q, k, v]
    rows = {
        OURS: Implementation(flash_attn_func),
        PEER: Implementation(sdpa),
        PEAK: multiply_adds(work),
        SINGLE: Implementation(single_thread),  # forward only: the backward would have all threads
    }
    name = f"attention, one sample of {LENGTH}, d {head_dim}"
    return Race(name, dtype, which, {"gflops": work}, inputs, [dout.detach()], sdpa, rows)


def beyond_caches(op: str, dtype: torch.dtype, which: str) -> Race:
    """A memory-bound op on four times the tokens of its own benchmark."""
    race = MEMORY_BOUND[op](dtype, which, layout=BEYOND_CACHES)
    return replace(race, op=f"{op}, {BEYOND_CACHES.num_tokens} tokens")


if not ON_GPU:  # these are the limits of a CPU

    @pytest.mark.parametrize(
        ("which", "implementation"),
        [*((FORWARD, row) for row in (OURS, PEER, PEAK, SINGLE)), *((BACKWARD, row) for row in (OURS, PEER, PEAK))],
        ids=IDS.get,
    )
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_one_sample(measure, implementation, dtype, which, head_dim):
        measure(implementation, one_sample, dtype, which, head_dim)

    @pytest.mark.parametrize("implementation", [OURS, "copy"])
    @pytest.mark.parametrize("which", [FORWARD, BOTH], ids=IDS.get)
    @pytest.mark.parametrize("op", MEMORY_BOUND)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_beyond_caches(measure, implementation, dtype, op, which):
        measure(implementation, beyond_caches, op, dtype, which)
