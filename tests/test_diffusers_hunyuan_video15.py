"""HunyuanVideo-1.5, patched."""

from functools import partial

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers_contract import FamilyContract, Inputs, Variant, given, made, outputs, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 1.0,
    "text_embed_dim": 32,
    "text_embed_2_dim": 16,
    "image_embed_dim": 24,
}
SIZES = ((2, 3, 4, 4), (3, 2, 4, 6), (5, 5, 6, 2))


def mask(batch: int, length: int, where: str) -> Tensor:
    """Of prompts of random lengths behind padding, in front of it or around it."""
    lengths = torch.randint(1, length, (batch, 1))
    place = torch.arange(length)
    if where == "front":
        return (place >= lengths).long()
    if where == "middle":
        return ((place < lengths // 2) | (place >= length - (lengths + 1) // 2)).long()
    return (place < lengths).long()


def inputs(size: int, image: bool = True, where: str = "end", glyphs: bool = True, meanflow: bool = False) -> Inputs:
    b, *grid = SIZES[size]
    made = {
        "hidden_states": torch.randn(b, 9, *grid),
        "timestep": torch.rand(b) * 1000,
        "encoder_hidden_states": torch.randn(b, 100 - size, 32),
        "encoder_attention_mask": mask(b, 100 - size, where),
        "encoder_hidden_states_2": torch.randn(b, 60 + size, 16),
        "encoder_attention_mask_2": mask(b, 60 + size, where) * glyphs,
        "image_embeds": torch.randn(b, 9 + size, 24) * image,
    }
    return made | {"timestep_r": torch.rand(b) * 1000} if meanflow else made


def build(**changes):
    return partial(HunyuanVideo15Transformer3DModel, **(CONFIG | changes))


VARIANTS = {
    "i2v": Variant(build(), inputs),
    "t2v": Variant(build(), partial(inputs, image=False)),
    "without_glyphs": Variant(build(), partial(inputs, image=False, glyphs=False)),
    "padding_in_front": Variant(build(), partial(inputs, where="front")),
    "padding_in_the_middle": Variant(build(), partial(inputs, where="middle")),
    "meanflow": Variant(build(use_meanflow=True), partial(inputs, meanflow=True)),
}


class Derived(HunyuanVideo15Transformer3DModel):
    """Whose forward is its own for all that `apply` knows."""


class LargestMask(TorchDispatchMode):
    """Of all tensors of bool that are computed, how many numbers the largest has."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = tensors(out) if isinstance(out, (Tensor, tuple, list)) else []
        self.size = max([self.size, *(x.numel() for x in made if x.dtype == torch.bool)])
        return out


class TestHunyuanVideo15(FamilyContract):
    @pytest.mark.parametrize("name", ["i2v", "t2v"])
    def test_sample_without_prompt(self, name: str) -> None:
        model, inputs = made(VARIANTS[name]).eval(), given(VARIANTS[name])
        inputs["encoder_attention_mask"][0] = 0
        inputs["encoder_attention_mask_2"][0] = 0
        with torch.no_grad():
            want = model(**inputs, return_dict=False)[0]
            apply(model)
            got = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_derived(self) -> None:
        model, inputs = made(Variant(partial(Derived, **CONFIG), VARIANTS["i2v"].inputs)).eval(), given(VARIANTS["i2v"])
        with torch.no_grad():
            want = outputs(model, inputs)
            apply(model)
            torch.testing.assert_close(outputs(model, inputs), want, rtol=1e-4, atol=1e-5)

    def test_no_mask_of_pairs(self) -> None:
        model, inputs = made(VARIANTS["i2v"]).eval(), given(VARIANTS["i2v"])
        num_tokens = 3 * 4 * 4 + 100 + 60 + 9
        with torch.no_grad(), LargestMask() as largest:
            outputs(model, inputs)
        assert largest.size == 2 * num_tokens**2
        apply(model)
        with torch.no_grad(), LargestMask() as largest:
            outputs(model, inputs)
        assert largest.size == 2 * num_tokens
