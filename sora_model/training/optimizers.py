"""Which weights Muon takes and which AdamW, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class KernelMuon(torch.optim.Muon):
    """torch's Muon, which takes matrices alone, on convolution kernels too: each is seen as the matrix [out, in * kernel]."""

    def __init__(self, parameters: list[nn.Parameter], *args: Any, **options: Any) -> None:
        self.kernels = parameters
        self.views = [p if p.ndim == 2 else nn.Parameter(p.data.view(p.shape[0], -1)) for p in parameters]
        super().__init__(self.views, *args, **options)

    def step(self, closure: Any = None) -> Any:
        for view, kernel in zip(self.views, self.kernels, strict=True):
            if view is not kernel:
                view.grad = None if kernel.grad is None else kernel.grad.view_as(view)
        return super().step(closure)


def check_moments(moments: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, parameter: Tensor, where: str) -> None:
    """Raises ValueError for other moments than an optimizer has of a parameter; it would compute with any, beyond their memory too.

    where: how the error begins; the moment's name follows.
    """
    shape = list(parameter.shape)
    expected = (
        {"momentum_buffer": shape} if isinstance(optimizer, KernelMuon) else {"step": [], "exp_avg": shape, "exp_avg_sq": shape}
    )
    for name in {**expected, **moments}:
        value = moments.get(name)
        got = "none" if value is None else f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if name not in expected:
            raise ValueError(f"{where}.{name}: expected none, got {got}")
        dtype = torch.float32 if name == "step" else parameter.dtype
        if value is None or list(value.shape) != expected[name] or value.dtype is not dtype:
            wanted = f"{str(dtype).removeprefix('torch.')} {expected[name]}"
            raise ValueError(f"{where}.{name}: expected {wanted}, got {got}")


def muon_parameters(model: nn.Module) -> set[str]:
    """Names of the matrices and kernels that Muon takes: those inside a model.

    Not tables of embeddings, nor what meets inputs and outputs of a transformer, nor adaLN's, a quarter of the cost for nothing.
    Of a convolutional VAE all of them.
    """
    outer = {"final", "modulation", "shared_modulation", "final_modulation", "lm_head"}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def inside(name: str) -> bool:
        parts = set(name.split("."))
        return name not in tables and not parts & outer and not any(part.endswith("_embed") for part in parts)

    return {name for name, p in model.named_parameters() if p.ndim >= 2 and inside(name)}


def schedule(step: int, warmup: int, progress: float, final: float) -> float:
    """The learning rate as a share of its highest."""
    fallen = (1 - math.cos(math.pi * min(progress, 1.0))) / 2  # 0 at the start, 1 at the end
    return min(1.0, (step + 1) / max(warmup, 1)) * (1 - (1 - final) * fallen)
