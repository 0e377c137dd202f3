"""Qwen-Image, patched: masks of text wherever the padding is, images to edit, layers."""

from functools import partial

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers_contract import FamilyContract, Inputs, Variant

CONFIG = {
    "in_channels": 8,
    "out_channels": 2,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
}
SIZES = ((2, 6, 8), (2, 5, 12), (2, 9, 4))
"""All of one batch size, as `img_shapes` is a list of that length, which torch.compile takes for a constant."""


def inputs(size: int, padding: str | None = None, others: tuple[tuple[int, int, int], ...] = (), text: int = 256, **more) -> Inputs:
    b, *grid = SIZES[size]
    text += 16 * size
    shapes = [(1, *grid), *others]
    made = {
        "hidden_states": torch.randn(b, sum(t * h * w for t, h, w in shapes), 8),
        "encoder_hidden_states": torch.randn(b, text, 32),
        "timestep": torch.rand(b),
        "img_shapes": [shapes] * b,
    }
    if padding is not None:
        made["encoder_hidden_states_mask"] = mask(padding, b, text)
    return made | {name: torch.arange(b) % 2 for name in more}


def mask(padding: str, batch: int, text: int) -> torch.Tensor:
    """A bit more padding in each sample; of "sample" none in every other one, and only padding in the rest."""
    kept = torch.ones(batch, text, dtype=torch.bool)
    for i in range(batch):
        start, end = {"front": (0, 9 + i), "middle": (20, 40 + i), "end": (9 + i, text), "sample": (0, text * (i % 2))}[padding]
        kept[i, start:end] = False
    return kept


def build(**changes):
    return partial(QwenImageTransformer2DModel, **(CONFIG | changes))


OTHERS = (1, 4, 6), (1, 3, 5)
VARIANTS = {
    **{name: Variant(build(), partial(inputs, padding=name)) for name in ("end", "front", "middle", "sample")},
    "no_mask": Variant(build(), inputs),
    "edit": Variant(build(zero_cond_t=True), partial(inputs, padding="end", others=OTHERS, text=77)),
    "layered": Variant(
        build(use_layer3d_rope=True, use_additional_t_cond=True),
        partial(inputs, others=OTHERS, text=77, additional_t_cond=True),
    ),
}


class TestQwenImage(FamilyContract):
    pass
