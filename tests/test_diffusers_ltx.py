"""LTX-Video, patched."""

from functools import partial

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers_contract import FamilyContract, Inputs, Variant, given, made, outputs
from tolerance import assert_bit_equal

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "caption_channels": 16,
    "num_layers": 2,
}
GRIDS = ((3, 4, 6), (2, 5, 7), (4, 4, 3))
BATCHES = (4, 5, 6)
TEXT = (128, 112, 96)


def padding(b: int, length: int) -> torch.Tensor:
    """In front, in the middle, at the end, and of a whole sample."""
    mask = torch.ones(b, length)
    mask[0, : length // 3] = 0
    mask[1, length // 4 : length // 2] = 0
    mask[2, length // 5 :] = 0
    mask[3] = 0
    return mask


def inputs(size: int, masked: bool = True, per_token: bool = False, coordinates: bool = False, bias: bool = False) -> Inputs:
    b, grid, length = BATCHES[size], GRIDS[size], TEXT[size]
    tokens = grid[0] * grid[1] * grid[2]
    made = {
        "hidden_states": torch.randn(b, tokens, 4),
        "encoder_hidden_states": torch.randn(b, length, 16),
        "timestep": torch.randint(0, 1000, (b, tokens) if per_token else (b,)),
        "encoder_attention_mask": padding(b, length) if masked else None,
    }
    if bias:  # numbers that diffusers adds to the scores
        made["encoder_attention_mask"] = torch.randn(b, 1, length)
    if coordinates:
        return made | {"video_coords": 100 * torch.rand(b, 3, tokens)}
    return made | dict(zip(("num_frames", "height", "width"), grid, strict=True)) | {"rope_interpolation_scale": (0.3, 32.0, 32.0)}


def build(**changes):
    return partial(LTXVideoTransformer3DModel, **(CONFIG | changes))


VARIANTS = {
    "masked": Variant(build(), inputs),
    "unmasked": Variant(build(), partial(inputs, masked=False)),
    "per_token": Variant(build(), partial(inputs, per_token=True)),
    "coordinates": Variant(build(), partial(inputs, coordinates=True)),
    "bias": Variant(build(), partial(inputs, bias=True)),
    "affine_norms": Variant(build(norm_elementwise_affine=True, attention_bias=False), inputs),
}


class TestLTX(FamilyContract):
    pass


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_dtypes_of_masks(dtype: torch.dtype) -> None:
    variant = VARIANTS["masked"]
    model, inputs = made(variant).eval(), given(variant)
    apply(model)
    with torch.no_grad():
        want = outputs(model, inputs)
        got = outputs(model, inputs | {"encoder_attention_mask": inputs["encoder_attention_mask"].to(dtype)})
    assert_bit_equal(got, want)
