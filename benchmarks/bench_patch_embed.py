"""Patch embedding of a list of videos and images of many sizes, and its inverse, against Conv3d and einops."""

import pytest
import torch

from benchmarks import workloads
from benchmarks.workloads import OURS


@pytest.mark.parametrize("implementation", [OURS, "Conv3d per video", "einops + linear per video", "einops + linear, packed"])
@pytest.mark.parametrize(("dtype", "backward"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_patch_embed(measure, implementation, dtype, backward):
    measure(implementation, workloads.patch_embedding, dtype, backward)


@pytest.mark.parametrize("implementation", [OURS, "einops per video"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_unpatchify(measure, implementation, backward):
    measure(implementation, workloads.unpatchify, torch.float32, backward)
