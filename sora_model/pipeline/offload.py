"""A pipeline whose parts are on a GPU in turn, by accelerate's hooks: `put_in_turn`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from ..codec.vae import VideoVAE
from ..model.dit import DiT
from ..model.experts import Experts
from .parts import Parts


class InTurn(ModelHook):
    """Brings a module to a device before it runs, after the others of its group have left it.

    accelerate's own `CpuOffload` sends away the module before it in a fixed order; a VAE runs before the transformer and after it.
    """

    def __init__(self, group: Sequence[nn.Module], device: torch.device) -> None:
        self.group, self.execution_device = group, device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self.group:
            if other is not module:
                other.to("cpu")
        module.to(self.execution_device)
        return args, kwargs


def put_in_turn(parts: Parts, device: torch.device) -> None:
    """Has text encoder, transformers and VAE, which are on the CPU, come to a device one at a time; in place."""
    group = [part for part in (parts.text_encoder, parts.image_encoder, *_transformers(parts.dit)) if isinstance(part, nn.Module)]
    if isinstance(parts.codec, VideoVAE):
        group.append(parts.codec.model)  # whose encode and decode run hooks, too
        parts.codec.mean, parts.codec.std = parts.codec.mean.to(device), parts.codec.std.to(device)
    for module in group:
        add_hook_to_module(module, InTurn(group, device))
    if parts.captioner is not None:
        parts.captioner.to(device)  # small


def execution_device(dit: DiT | Experts) -> torch.device:
    """Where a transformer computes, which is where its weights are unless it is offloaded."""
    hook = _hook(dit)
    return dit.final.weight.device if hook is None else hook.execution_device


def is_offloaded(dit: DiT | Experts) -> bool:
    return _hook(dit) is not None


def _hook(dit: DiT | Experts) -> InTurn | None:
    hook = getattr(_transformers(dit)[0], "_hf_hook", None)
    return hook if isinstance(hook, InTurn) else None


def _transformers(dit: DiT | Experts) -> list[Any]:
    return [dit.high, dit.low] if isinstance(dit, Experts) else [dit]
