"""Flux 1, patched: dev with guidance, schnell without, fused projections, residuals of a ControlNet, an IP-Adapter."""

from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers_contract import FamilyContract, Inputs, Variant, given, made, outputs
from torch import nn

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
}
SIZES = ((2, 6, 8), (3, 5, 12), (5, 9, 4))


def inputs(size: int, guidance: bool = True, control: bool = False, text: int = 512, masked: bool = False) -> Inputs:
    b, *grid = SIZES[size]
    tokens = grid[0] * grid[1]
    made = {
        "hidden_states": torch.randn(b, tokens, 8),
        "encoder_hidden_states": torch.randn(b, text, 32),
        "pooled_projections": torch.randn(b, 16),
        "timestep": torch.rand(b),
        "img_ids": torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in grid)),
        "txt_ids": torch.zeros(text, 3),
    }
    if guidance:
        made["guidance"] = torch.full((b,), 3.5)
    if masked:  # some keys of each query, not the same ones
        mask = torch.rand(b, 1, text + tokens, text + tokens) < 0.7
        made["joint_attention_kwargs"] = {"attention_mask": mask}
    if control:
        made["controlnet_block_samples"] = [torch.randn(b, tokens, 256)]
        made["controlnet_single_block_samples"] = [torch.randn(b, tokens, 256) for _ in range(2)]
    return made


def build(fused: bool = False, **changes) -> nn.Module:
    model = FluxTransformer2DModel(**(CONFIG | changes))
    if fused:
        model.fuse_qkv_projections()
    return model


VARIANTS = {
    "dev": Variant(build, inputs),
    "schnell": Variant(partial(build, guidance_embeds=False), partial(inputs, guidance=False, text=256)),
    "control": Variant(build, partial(inputs, control=True, text=77)),
    "masked": Variant(build, partial(inputs, masked=True, text=77)),
    "fused": Variant(partial(build, fused=True), partial(inputs, text=77), lora=("to_qkv", "to_added_qkv", "to_out.0")),
}


class TestFlux(FamilyContract):
    def test_ip_adapter_of_later(self) -> None:
        """Its processors take the place of ours in the double blocks."""
        variant = VARIANTS["schnell"]
        plain = made(variant).eval()
        for block in plain.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(256, 16, num_tokens=(4,), scale=0.6))
        model = made(variant).eval()
        apply(model)
        for ours, theirs in zip(model.transformer_blocks, plain.transformer_blocks, strict=True):
            ours.attn.set_processor(theirs.attn.processor)
        inputs = given(variant) | {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 4, 16)]}}
        with torch.no_grad():
            torch.testing.assert_close(outputs(model, inputs), outputs(plain, inputs), rtol=1e-4, atol=1e-5)
