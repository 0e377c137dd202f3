"""3D RoPE, alone and behind QK-norm, against diffusers' way in eager and compiled torch."""

import pytest
import torch

from benchmarks import workloads
from benchmarks.workloads import OURS


@pytest.mark.parametrize("implementation", [OURS, "torch eager", "torch.compile"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("norm", [False, True], ids=["rope_3d", "qk_norm_rope_3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope(measure, implementation, dtype, backward, norm):
    measure(implementation, workloads.rope, dtype, backward, norm=norm)
