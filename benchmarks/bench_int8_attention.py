"""int8 attention of packed batches, against ours in bfloat16 and its peers. Only on GPUs: nothing else has a kernel for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.bench_attention import BATCHES, attention
from benchmarks.race import DEVICE, FORWARD, MAIN, ON_GPU, OURS, Implementation, Race
from sora_kernels.int8_attention import int8_attention

pytestmark = pytest.mark.skipif(not ON_GPU, reason="only GPUs have a kernel")
ROWS = [OURS, "bfloat16", "SDPA per sample, flash", "SDPA per sample, cuDNN", "torch varlen_attn"]


def quantized(dtype: torch.dtype, which: str, *, batch: str) -> Race:
    race = attention(dtype, which, batch=batch)
    cu = torch.tensor([0, *BATCHES[batch][0]], device=DEVICE).cumsum(0).int()
    rows = {OURS: Implementation(lambda q, k, v: int8_attention(q, k, v, cu, cu)), "bfloat16": race.implementations[OURS]}
    return replace(race, op=f"int8 {race.op}", implementations={**race.implementations, **rows})


@pytest.mark.parametrize("implementation", ROWS)
@pytest.mark.parametrize("batch", BATCHES)
def test_int8_attention(measure, implementation, batch):
    measure(implementation, quantized, MAIN, FORWARD, batch=batch)
