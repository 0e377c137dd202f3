"""Costs with a bound of their own: importing, memory besides the outputs, data for training. Past its bound a row fails."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sora_model.data import PackedSampler
from sora_model.world.config import WorldConfig
from sora_model.world.source import WorldSource
from sora_model.world.world import World

STORIES = ("attention", "rope", "adaln", "bias_gelu", "patch_embed")
# What is imported before the clock starts, what is timed, and the most seconds.
IMPORTS = {
    "package": ("sys", "sora_kernels", 0.1),
    "stories": ("torch, numpy, einops", ", ".join(f"sora_kernels.{story}" for story in STORIES), 0.3),
}

# Prints the MiB that a forward and a backward take beyond their arguments. A sliding window makes a long sample cheap.
PEAK_MEMORY = """
import sys, torch
from sora_kernels import backends

def status(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

def grown(call, *args):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = status("VmRSS")
    call(*args)
    return status("VmHWM") - before

torch.set_num_threads(2)
cpu, length, dtype = backends.BACKENDS["cpu"].load(), 200_000, getattr(torch, sys.argv[1])
q, k, v, out, dout, dq, dk, dv = (torch.ones(length, 1, 64, dtype=dtype) for _ in range(8))
cu = torch.tensor([0, length], dtype=torch.int32)
lse, statistics = torch.ones(1, length), torch.ones(2, 1, length)
options = cu, cu, None, None, 0.125, 64, 64, 0.0
print(grown(cpu.attention_forward, q, k, v, *options, out, lse, statistics))
print(grown(cpu.attention_backward, dout, None, q, k, v, out, statistics, *options, dq, dk, dv))
"""
PEAK_MIB = 16  # what each thread holds of an item


def run(code: str, *arguments: str) -> list[float]:
    """The numbers that a program prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return list(map(float, done.stdout.split()))


@pytest.mark.parametrize("name", IMPORTS)
def test_import(benchmark: BenchmarkFixture, name: str) -> None:
    before, modules, most = IMPORTS[name]
    code = f"import time, {before}\nt = time.perf_counter()\nimport {modules}\nprint(time.perf_counter() - t)"
    seconds: list[float] = []
    benchmark.pedantic(lambda: seconds.extend(run(code)), rounds=5)
    assert min(seconds) < most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_sample(benchmark: BenchmarkFixture, dtype: str) -> None:
    """Attention of 200,000 tokens, beyond inputs, outputs and gradients."""
    forward, backward = benchmark.pedantic(run, (PEAK_MEMORY, dtype), rounds=1)
    assert forward < PEAK_MIB
    assert backward < PEAK_MIB


def test_a_batch(benchmark: BenchmarkFixture) -> None:
    sizes = [(8, 32, 32), (8, 24, 40), (8, 40, 24), (1, 32, 32)]
    sampler, steps = PackedSampler(WorldSource(World(), sizes), (1, 2, 2), 8192, min_sizes=4), iter(range(30))
    benchmark.pedantic(lambda: sampler.batch(next(steps)), rounds=30)
    assert benchmark.disabled or benchmark.stats.stats.min < 0.02  # typically 0.004 s


def test_a_rendered_clip(benchmark: BenchmarkFixture) -> None:
    world, numbers = World(WorldConfig.simple()), iter(range(30))
    benchmark.pedantic(lambda: world.sample(next(numbers)).render(8, 32, 32), rounds=30)
    assert benchmark.disabled or benchmark.stats.stats.min < 0.004  # typically 0.0005 s
