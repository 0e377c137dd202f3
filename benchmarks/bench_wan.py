"""The DiT of sora_model with Wan 2.1's weights at 1.3B, one layer: a video and an image, packed, against diffusers one by one."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.race import DEVICE, FORWARD, OURS, REHEARSED, Implementation, Race
from sora_kernels.integrations.diffusers import apply
from sora_model.model.conditioning import PackedText
from sora_model.model.convert.wan import from_diffusers_wan

GRIDS = [(1, 8, 8), (1, 8, 4)] if REHEARSED else [(3, 60, 104), (1, 60, 60)]  # 9 frames of 480 x 832, and 480 x 480
TEXTS = [60, 25]
PADDED = 512


def step(dtype: torch.dtype) -> Race:
    torch.manual_seed(0)
    model: nn.Module = import_module("benchmarks.diffusers_models.wan").build().eval().requires_grad_(False).to(DEVICE, dtype)
    dit, patched = from_diffusers_wan(model), copy.deepcopy(model)
    apply(patched)
    latents = [torch.randn(16, *grid, device=DEVICE, dtype=dtype) for grid in GRIDS]
    text = [torch.randn(n, 4096, device=DEVICE, dtype=dtype) for n in TEXTS]
    times = torch.tensor([500.0, 500.0], device=DEVICE)
    bounds = torch.tensor([0, *TEXTS], device=DEVICE).cumsum(0).int()
    packed = PackedText(torch.cat(text), bounds, torch.zeros(len(text), 4096, device=DEVICE, dtype=dtype))

    def one_by_one(model: nn.Module, latents: list[Tensor], text: list[Tensor]) -> list[Tensor]:
        padded = [torch.nn.functional.pad(c, (0, 0, 0, PADDED - len(c))) for c in text]
        samples = zip(latents, times, padded, strict=True)
        return [model(x[None], t[None], c[None], return_dict=False)[0][0] for x, t, c in samples]

    def reference() -> list[Tensor]:
        exact = copy.deepcopy(model).float()
        return one_by_one(exact, [x.float() for x in latents], [c.float() for c in text])

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        one_by_one(model, latents, text)
    rows = {
        OURS: Implementation(lambda: dit(latents, times, packed)),
        "diffusers, patched": Implementation(lambda: one_by_one(patched, latents, text)),
        "diffusers": Implementation(lambda: one_by_one(model, latents, text)),
    }
    work = {"gflops": counter.get_total_flops() / 1e9}
    return Race("DiT with Wan's weights", dtype, FORWARD, work, [], [], reference, rows, roundings=2)


@pytest.mark.parametrize("implementation", [OURS, "diffusers, patched", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_wan(measure, dtype, implementation):
    measure(implementation, step, dtype)
