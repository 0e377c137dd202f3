"""CogVideoX 1.0 and 1.5, with and without RoPE, patched."""

from functools import partial

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers_contract import FamilyContract, Inputs, Variant, given, made, outputs
from torch import nn

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "use_rotary_positional_embeddings": True,
}
SIZES = ((2, 3, 8, 8), (3, 2, 8, 12), (5, 4, 12, 4))


def inputs(size: int, rope: bool = True, patch_size_t: int = 1, ofs: bool = False, learned: bool = False) -> Inputs:
    b, t, h, w = SIZES[size]
    t = 2 * patch_size_t if patch_size_t > 1 else t
    text = 226 if learned or not rope else 226 - size
    made = {
        "hidden_states": torch.randn(b, t, 4, h, w),
        "encoder_hidden_states": torch.randn(b, text, 16),
        "timestep": torch.randint(0, 1000, (b,)),
    }
    if rope:
        angles = torch.randn(t // patch_size_t * h * w // 4, 32).repeat_interleave(2, dim=1)
        made["image_rotary_emb"] = angles.cos(), angles.sin()
    return made | {"ofs": torch.full((1,), 2.0)} if ofs else made


def build(fused: bool = False, **changes) -> nn.Module:
    model = CogVideoXTransformer3DModel(**(CONFIG | changes))
    if fused:
        model.fuse_qkv_projections()
    return model


V15 = {"patch_size_t": 2, "ofs_embed_dim": 32}
WITHOUT = {"use_rotary_positional_embeddings": False}
VARIANTS = {
    "rope": Variant(build, inputs),
    "v1.5": Variant(partial(build, **V15), partial(inputs, patch_size_t=2, ofs=True)),
    "without_rope": Variant(partial(build, **WITHOUT), partial(inputs, rope=False)),
    "learned_positions": Variant(partial(build, use_learned_positional_embeddings=True), partial(inputs, learned=True)),
    "norms_without_weights": Variant(partial(build, norm_elementwise_affine=False, attention_bias=False), inputs),
    "fused": Variant(partial(build, fused=True), inputs, lora=("to_qkv", "to_out.0")),
}


class TestCogVideoX(FamilyContract):
    def test_fused_afterwards(self) -> None:
        """diffusers' processor takes the place of ours, and blocks their own forward."""
        model, inputs = made(VARIANTS["rope"]).eval(), given(VARIANTS["rope"])
        with torch.no_grad():
            want = outputs(model, inputs)
            apply(model)
            model.fuse_qkv_projections()
            torch.testing.assert_close(outputs(model, inputs), want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("queries", [1, 226 + 48])
    @pytest.mark.parametrize("backend", [None, "native"])
    def test_mask(self, queries: int, backend: str | None) -> None:
        """Of keys, or of queries and keys, as attention_kwargs bring it. There are as many samples as heads."""
        model, inputs = made(VARIANTS["rope"]).eval(), given(VARIANTS["rope"])
        mask = torch.rand(2, queries, 226 + 48) < 0.7
        with torch.no_grad():
            want = outputs(model, inputs | {"attention_kwargs": {"attention_mask": mask}})
            assert not torch.allclose(want[0], outputs(model, inputs)[0], rtol=1e-2)
            apply(model)
            if backend is not None:
                model.set_attention_backend(backend)
            got = outputs(model, inputs | {"attention_kwargs": {"attention_mask": mask}})
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
