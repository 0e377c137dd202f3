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

# The same of HunyuanVideo-1.5's joint attention, of one head and with a mask of its text: ours, or diffusers' own with its mask of
# S x S.
MASKED_ATTENTION = """
import sys, torch
from diffusers import HunyuanVideo15Transformer3DModel
from sora_kernels.integrations.diffusers import apply

def status(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(2)
length, text = int(sys.argv[2]), 256
widths = {"num_attention_heads": 1, "attention_head_dim": 128, "text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 16}
model = HunyuanVideo15Transformer3DModel(**widths, num_layers=1, num_refiner_layers=1)
mask = torch.arange(text)[None] < 100
if sys.argv[1] == "ours":
    apply(model)
    mask = torch.nn.functional.pad(mask, (length - text, 0), value=True)[:, None, None]
x, text, attention = torch.randn(1, length - text, 128), torch.randn(1, text, 128), model.transformer_blocks[0].attn
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
with torch.no_grad():
    attention(x, text, mask)
print(status("VmHWM") - before)
"""


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


@pytest.mark.parametrize("whose", ["ours", "diffusers"])
def test_memory_of_masked_attention(benchmark: BenchmarkFixture, whose: str) -> None:
    """Of 20,000 tokens: typically 69 MiB, and 2,328 MiB of diffusers' own. Twice the tokens take twice the memory."""
    (peak,) = benchmark.pedantic(run, (MASKED_ATTENTION, whose, "20000"), rounds=1)
    benchmark.extra_info["peak MiB"] = peak
    if whose == "ours":
        assert peak < 100
        assert peak < 2.5 * run(MASKED_ATTENTION, whose, "10000")[0]


def test_a_batch(benchmark: BenchmarkFixture) -> None:
    sizes = [(8, 32, 32), (8, 24, 40), (8, 40, 24), (1, 32, 32)]
    sampler, steps = PackedSampler(WorldSource(World(), sizes), (1, 2, 2), 8192, min_sizes=4), iter(range(30))
    benchmark.pedantic(lambda: sampler.batch(next(steps)), rounds=30)
    assert benchmark.disabled or benchmark.stats.stats.min < 0.02  # typically 0.004 s


def test_a_rendered_clip(benchmark: BenchmarkFixture) -> None:
    world, numbers = World(WorldConfig.simple()), iter(range(30))
    benchmark.pedantic(lambda: world.sample(next(numbers)).render(8, 32, 32), rounds=30)
    assert benchmark.disabled or benchmark.stats.stats.min < 0.004  # typically 0.0005 s
