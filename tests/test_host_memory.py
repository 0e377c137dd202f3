"""GPU kernels are called without the host's memory, and nothing is read back: while a CUDA graph is captured, neither can be."""

from typing import Any
from unittest import mock

import pytest
import torch
from test_gpu import block, step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sora_kernels import backends
from sora_kernels.layout import PackedLayout, Span

aten = torch.ops.aten
# torch.tensor of numbers; .item(); what has a size that depends on values. On the CPU .tolist() and .numpy() dispatch nothing.
FORBIDDEN = (aten.lift_fresh, aten._local_scalar_dense, aten.nonzero)


class RecordHost(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket in FORBIDDEN:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_it_would_be_found() -> None:
    with RecordHost() as recorded:
        torch.tensor([1.0]).item()
    assert recorded.found == ["aten.lift_fresh.default", "aten._local_scalar_dense.default"]


@pytest.mark.emulated
@pytest.mark.skipif(not backends.INTERPRETED, reason="test_gpu.py shows it on a GPU")
def test_triton_takes_nothing_from_the_host() -> None:
    """Every op, forward and backward, with arguments that no call before had."""
    torch.manual_seed(0)
    run, inputs = block(PackedLayout.from_spans([[Span((2, 2, 3))], [], [Span((1, 3, 2))]], "cpu"), theta=777.0)
    recorded, call = RecordHost(), backends.call

    def watched(function: str, like: Tensor, **arguments: object) -> None:
        with recorded:
            call(function, like, **arguments)

    with backends.use_backend("triton"), backends.record() as calls, mock.patch.object(backends, "call", watched):
        step(run, inputs)
    assert {name for _, name in calls} == {"triton"}
    assert {"rope_3d", "qk_norm_rope_3d_backward", "attention_backward", "patch_embed_3d_backward"} < {name for name, _ in calls}
    assert recorded.found == []
