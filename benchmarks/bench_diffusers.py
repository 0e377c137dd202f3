"""A layer of diffusers' models, patched, against the same weights unpatched in eager and compiled torch: --families all, or some.

And Wan on samples of three sizes with and without their texts, packed, against one forward each and against a batch that is padded
to the largest. The padded one computes what it must, but not the right numbers: Wan takes no mask of its video.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.race import DEVICE, FORWARD, OURS, Implementation, Race, compiled
from sora_kernels.integrations.diffusers import apply, packed_forward


def tensors(output: object) -> list[Tensor]:
    """Those of an output of nested sequences."""
    if isinstance(output, Tensor):
        return [output]
    return [x for part in output if part is not None for x in tensors(part)] if isinstance(output, Sequence) else []


def mapped(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """The inputs of a model, with the function of each tensor, in lists, tuples and dicts too."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: mapped(function, x) for name, x in inputs.items()}
    return type(inputs)(mapped(function, x) for x in inputs) if isinstance(inputs, list | tuple) else inputs


def forward(family: str, dtype: torch.dtype) -> Race:
    torch.manual_seed(0)
    module = import_module(f"benchmarks.diffusers_models.{family}")
    model: nn.Module = module.build().eval().requires_grad_(False).to(DEVICE, dtype)
    given = mapped(lambda x: x.to(DEVICE), module.inputs(dtype))
    patched = copy.deepcopy(model)
    apply(patched)

    @cache
    def peer() -> nn.Module:
        return compiled(model)

    def reference() -> list[Tensor]:
        exact = mapped(lambda x: x.float() if x.is_floating_point() else x, given)
        return tensors(copy.deepcopy(model).float()(**exact, return_dict=False))

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**given, return_dict=False)
    rows = {
        OURS: Implementation(lambda: tensors(patched(**given, return_dict=False))),
        "diffusers": Implementation(lambda: tensors(model(**given, return_dict=False))),
        "torch.compile": Implementation(lambda: tensors(peer()(**given, return_dict=False))),
    }
    return Race(
        f"diffusers {family}", dtype, FORWARD, {"gflops": counter.get_total_flops() / 1e9}, [], [], reference, rows, roundings=2
    )


@pytest.mark.parametrize("implementation", [OURS, "diffusers", "torch.compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_diffusers(measure, family, dtype, implementation):
    measure(implementation, forward, family, dtype)


GRIDS = [(5, 48, 48), (1, 64, 64), (3, 32, 48)] * 2
TEXTS = [512, 120, 40, 8, 8, 8]  # of the prompts, and of none


def guided(dtype: torch.dtype) -> Race:
    torch.manual_seed(0)
    model = import_module("benchmarks.diffusers_models.wan").build().eval().requires_grad_(False).to(DEVICE, dtype)
    latents = [torch.randn(16, *grid, device=DEVICE, dtype=dtype) for grid in GRIDS]
    text = [torch.randn(n, 4096, device=DEVICE, dtype=dtype) for n in TEXTS]
    times = torch.tensor([500] * len(GRIDS), device=DEVICE)
    patched = copy.deepcopy(model)
    apply(patched)

    def one_by_one(model: nn.Module, latents: Sequence[Tensor], text: Sequence[Tensor]) -> list[Tensor]:
        samples = zip(latents, times, text, strict=True)
        return [model(x[None], t[None], c[None], return_dict=False)[0][0] for x, t, c in samples]

    def padded() -> Tensor:
        return model(
            torch.zeros(len(GRIDS), 16, *GRIDS[0], device=DEVICE, dtype=dtype),
            times,
            torch.zeros(len(GRIDS), max(TEXTS), 4096, device=DEVICE, dtype=dtype),
            return_dict=False,
        )[0]

    def reference() -> list[Tensor]:
        exact = copy.deepcopy(model).float()
        return one_by_one(exact, [x.float() for x in latents], [x.float() for x in text])

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        one_by_one(model, latents, text)
    rows = {
        OURS: Implementation(lambda: packed_forward(patched, latents, times, text)),
        "diffusers one by one": Implementation(lambda: one_by_one(model, latents, text)),
        "diffusers padded": Implementation(padded, comparable=False),
    }
    return Race(
        "diffusers wan, packed", dtype, FORWARD, {"gflops": counter.get_total_flops() / 1e9}, [], [], reference, rows, roundings=2
    )


@pytest.mark.parametrize("implementation", [OURS, "diffusers one by one", "diffusers padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed(measure, dtype, implementation):
    measure(implementation, guided, dtype)
