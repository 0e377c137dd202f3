"""Mochi, patched."""

from functools import partial

import pytest
import torch
from diffusers import MochiTransformer3DModel
from diffusers_contract import FamilyContract, Inputs, Variant, given, made, outputs

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "num_layers": 2,
    "pooled_projection_dim": 64,
    "in_channels": 4,
    "text_embed_dim": 32,
    "time_embed_dim": 16,
}
SIZES = ((2, 3, 8, 8), (3, 2, 8, 12), (5, 5, 12, 4))


def inputs(size: int, without: bool = False) -> Inputs:
    b, *grid = SIZES[size]
    text = 256 - size
    lengths = torch.randint(1, text, (b, 1))
    if without:
        lengths[0] = 0
    return {
        "hidden_states": torch.randn(b, 4, *grid),
        "encoder_hidden_states": torch.randn(b, text, 32),
        "timestep": torch.randint(0, 1000, (b,)),
        "encoder_attention_mask": torch.arange(text) < lengths,
    }


build = partial(MochiTransformer3DModel, **CONFIG)
VARIANTS = {
    "t2v": Variant(build, inputs),
    "sample_without_prompt": Variant(build, partial(inputs, without=True)),
}


class TestMochi(FamilyContract):
    @pytest.mark.parametrize("where", ["front", "middle"])
    def test_padding_anywhere(self, where: str) -> None:
        """Equals the same prompt with its padding behind it."""
        model, inputs = made(VARIANTS["t2v"]).eval(), given(VARIANTS["t2v"])
        text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
        lengths = mask.sum(dim=1).tolist()
        shifts = [256 - n if where == "front" else -(n // 2) for n in lengths]
        moved = inputs | {
            "encoder_hidden_states": torch.stack([row.roll(n, 0) for row, n in zip(text, shifts, strict=True)]),
            "encoder_attention_mask": torch.stack([row.roll(n, 0) for row, n in zip(mask, shifts, strict=True)]),
        }
        with torch.no_grad():
            want = outputs(model, inputs)
            apply(model)
            torch.testing.assert_close(outputs(model, moved), want, rtol=1e-4, atol=1e-5)
