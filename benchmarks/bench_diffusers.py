"""A layer of each of diffusers' families, patched, against the same weights unpatched in eager and compiled torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.race import DEVICE, FORWARD, OURS, Implementation, Race, compiled
from sora_kernels.integrations.diffusers import apply

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "diffusers_models").glob("[a-z]*.py"))


def tensors(output: object) -> list[Tensor]:
    """Those of an output of nested sequences."""
    if isinstance(output, Tensor):
        return [output]
    return [x for part in output if part is not None for x in tensors(part)] if isinstance(output, Sequence) else []


def forward(family: str, dtype: torch.dtype) -> Race:
    torch.manual_seed(0)
    module = import_module(f"benchmarks.diffusers_models.{family}")
    model: nn.Module = module.build().eval().requires_grad_(False).to(DEVICE, dtype)
    given = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in module.inputs(dtype).items()}
    patched = copy.deepcopy(model)
    apply(patched)

    @cache
    def peer() -> nn.Module:
        return compiled(model)

    def reference() -> list[Tensor]:
        exact = {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
        return tensors(copy.deepcopy(model).float()(**exact, return_dict=False))

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**given, return_dict=False)
    rows = {
        OURS: Implementation(lambda: tensors(patched(**given, return_dict=False))),
        "diffusers": Implementation(lambda: tensors(model(**given, return_dict=False))),
        "torch.compile": Implementation(lambda: tensors(peer()(**given, return_dict=False))),
    }
    return Race(f"diffusers {family}", dtype, FORWARD, {"gflops": counter.get_total_flops() / 1e9}, [], [], reference, rows)


@pytest.mark.parametrize("implementation", [OURS, "diffusers", "torch.compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers(measure, family, dtype, implementation):
    measure(implementation, forward, family, dtype)
