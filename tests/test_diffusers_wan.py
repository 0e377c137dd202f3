"""Wan 2.1, 2.2, VACE and Animate, patched."""

from functools import partial

import torch
from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers_contract import FamilyContract, Inputs, Variant, given, made, outputs

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SIZES = ((2, 3, 8, 8), (3, 2, 8, 12), (5, 5, 12, 4))


def inputs(size: int, channels: int = 4, image: bool = False, per_token: bool = False) -> Inputs:
    b, *grid = SIZES[size]
    tokens = grid[0] * grid[1] * grid[2] // 4
    made = {
        "hidden_states": torch.randn(b, channels, *grid),
        "timestep": torch.randint(0, 1000, (b, tokens) if per_token else (b,)),
        "encoder_hidden_states": torch.randn(b, 512, 32),
    }
    if image:
        made["encoder_hidden_states_image"] = torch.randn(b, 10 + size, 16)
    return made


def vace_inputs(size: int) -> Inputs:
    b, *grid = SIZES[size]
    return inputs(size) | {"control_hidden_states": torch.randn(b, 6, *grid), "control_hidden_states_scale": torch.ones(2)}


def animate_inputs(size: int) -> Inputs:
    """Of a face four frames per latent frame, behind the first one, which is the reference."""
    b, t, h, w = SIZES[size]
    made = inputs(size, channels=12, image=True)
    face = torch.rand(b, 3, 4 * (t - 2) + 1, 16, 16)
    return made | {"pose_hidden_states": torch.randn(b, 4, t - 1, h, w), "face_pixel_values": face}


def build(kind: type = WanTransformer3DModel, **changes):
    return partial(kind, **(CONFIG | changes))


ANIMATE = {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 16,
    "added_kv_proj_dim": 256,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 16,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 32,
    "face_encoder_num_heads": 4,
    "inject_face_latents_blocks": 1,
}
VARIANTS = {
    "t2v": Variant(build(), inputs),
    "i2v": Variant(build(image_dim=16, added_kv_proj_dim=256), partial(inputs, image=True)),
    "ti2v": Variant(build(), partial(inputs, per_token=True)),
    "no_cross_attn_norm": Variant(build(cross_attn_norm=False), inputs),
    "vace": Variant(build(WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=6), vace_inputs),
    "animate": Variant(build(WanAnimateTransformer3DModel, **ANIMATE), animate_inputs),
}
OPERATORS = {
    "attention_forward",
    "bias_gelu_forward",
    "gate_residual_forward",
    "gate_residual_layer_norm_modulate_forward",
    "layer_norm_modulate_forward",
    "norm_rope_forward",
}
"""Of ours that a forward takes."""


class TestWan(FamilyContract):
    def test_animate_in_one_graph(self) -> None:
        """Its face encoder is compiled for one batch size, after the rows of modulation were."""
        torch._dynamo.reset()
        model, inputs = made(VARIANTS["animate"]).eval(), given(VARIANTS["animate"])
        apply(model)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(outputs(compiled, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-5)
