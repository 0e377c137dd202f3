"""Packed self-attention, cross-attention to text and windowed attention, against SDPA and flex_attention."""

import pytest
import torch

from benchmarks import workloads
from benchmarks.workloads import OURS

SINGLE, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("implementation", [OURS, "SDPA per sample", "SDPA padded", "flex_attention compiled"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_attention(measure, implementation, dtype):
    measure(implementation, workloads.attention, dtype, False)


@pytest.mark.parametrize("implementation", [OURS, "SDPA per sample", "flex_attention compiled"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_attention_backward(measure, implementation, dtype):
    measure(implementation, workloads.attention, dtype, True)


@pytest.mark.parametrize("implementation", [OURS, "SDPA per sample", "SDPA padded"])
@pytest.mark.parametrize(("dtype", "backward"), [(SINGLE, False), (HALF, False), (SINGLE, True)])
def test_cross_attention(measure, implementation, dtype, backward):
    measure(implementation, workloads.attention, dtype, backward, cross=True)


@pytest.mark.parametrize("implementation", [OURS, f"{OURS}, no window", "SDPA with mask", "flex_attention compiled"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_window_attention(measure, implementation, backward):
    measure(implementation, workloads.window_attention, SINGLE, backward)
