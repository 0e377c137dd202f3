"""adaLN with modulation rows per sample and per latent frame, against eager and compiled torch."""

import pytest
import torch

from benchmarks import workloads
from benchmarks.workloads import ADALN, OURS


@pytest.mark.parametrize("implementation", [OURS, "torch eager", "torch.compile"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("per_frame", [False, True], ids=["sample", "frame"])
@pytest.mark.parametrize("op", ADALN)
def test_adaln(measure, implementation, op, backward, per_frame):
    measure(implementation, workloads.adaln, op, torch.float32, backward, per_frame=per_frame)
