"""What docstrings' examples take for granted: an example that uses one of these names, and does not make it, gets it from here.

Names stand for themselves in every module: `pipeline` is the checkpoint that comes with the package, `dit` its transformer.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# True in every docstring, as `import torch` is.
ALWAYS = {"torch": torch, "nn": nn, "F": F, "json": json}


def names_used(code: str) -> list[str]:
    """The prepared names that a piece of code reads."""
    read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sorted(read & set(PREPARED))


@functools.cache
def value(name: str) -> Any:
    return PREPARED[name]()


def _pipeline() -> Any:
    from sora_model import SoraPipeline

    return SoraPipeline.from_pretrained()


def _layout() -> Any:
    from sora_kernels.layout import PackedLayout

    return PackedLayout.from_grids([(4, 8, 8), (1, 16, 9)])


def _rope_3d() -> Any:
    from sora_kernels.rope import rope_3d

    return rope_3d


def _source() -> Any:
    from sora_model.world.config import WorldConfig
    from sora_model.world.source import WorldSource
    from sora_model.world.world import World

    return WorldSource(World(WorldConfig.simple()), [(4, 16, 16), (1, 16, 24)])


def _scene() -> Any:
    from sora_model.world.config import WorldConfig
    from sora_model.world.world import World

    return World(WorldConfig.simple()).sample(7)


def _clip() -> Tensor:
    """A red disc that moves right on navy, as the package's checkpoint knows it: [3, 13, 48, 48]."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    centers = torch.linspace(14, 34, 13)
    inside = ((x[None] - centers[:, None, None]).square() + (y[None] - 24).square()) <= 81
    red, navy = torch.tensor([0.8, -0.8, -0.8]), torch.tensor([-0.9, -0.9, -0.4])
    return torch.where(inside[None], red[:, None, None, None], navy[:, None, None, None])


# A video of 13 frames and an image, as latents of the package's VAE.
PREPARED: dict[str, Callable[[], Any]] = {
    "scene": _scene,
    "layout": _layout,
    "x": lambda: torch.randn(400, 8, 64),
    "rope_3d": _rope_3d,
    "pipeline": _pipeline,
    "dit": lambda: value("pipeline").dit,
    "vae": lambda: value("pipeline").codec,
    "encoder": lambda: value("pipeline").text_encoder,
    "scheduler": lambda: value("pipeline").scheduler,
    "captioner": lambda: value("pipeline").captioner,
    "source": _source,
    "clip": _clip,
    "video": _clip,
    "latents": lambda: value("vae").encode([_clip(), torch.zeros(3, 1, 64, 64)]),
    "latent": lambda: value("latents")[0],
    "text": lambda: value("encoder")(["a red circle moves right", "a blue star"]),
}
