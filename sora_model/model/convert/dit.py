"""Weights of other libraries' models."""

from __future__ import annotations

from typing import Any

import torch

from ..config import DiTConfig
from ..dit import DiT

# Our names of a block's layers, and diffusers'.
_BLOCK = {
    "modulation": ("norm1.linear",),
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.out": ("attn1.to_out.0",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
}
_EMBED = {
    "time_embed.0.weight": "timestep_embedder.linear_1.weight",
    "time_embed.0.bias": "timestep_embedder.linear_1.bias",
    "time_embed.2.weight": "timestep_embedder.linear_2.weight",
    "time_embed.2.bias": "timestep_embedder.linear_2.bias",
    "label_embed.weight": "class_embedder.embedding_table.weight",
}
_OUTER = {"patch_embed": "pos_embed.proj", "final_modulation": "proj_out_1", "final": "proj_out_2"}


def from_diffusers_dit(transformer: Any) -> DiT:
    """diffusers' `DiTTransformer2DModel` as a `DiT`, which takes images of any sizes in one packed pass.

    >>> from diffusers import DiTTransformer2DModel           # of a checkpoint: .from_pretrained("facebook/DiT-XL-2-256", ...)
    >>> transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, num_layers=1, out_channels=8)
    >>> dit, latents = from_diffusers_dit(transformer), [torch.randn(4, 1, 32, 32), torch.randn(4, 1, 16, 48)]
    >>> [tuple(x.shape) for x in dit(latents, torch.tensor([700.0, 20.0]), labels=torch.tensor([1, 207]))]
    [(8, 1, 32, 32), (8, 1, 16, 48)]

    Raises:
        ValueError: options of diffusers' that a DiT does not have; blocks whose embedders of timestep and label differ (diffusers
            has one set per block, DiT one set; those of converted checkpoints are copies).
    """
    old = transformer.config
    for name, expected in (("activation_fn", "gelu-approximate"), ("norm_elementwise_affine", False), ("attention_bias", True)):
        if old[name] != expected:
            raise ValueError(f"from_diffusers_dit: {name}: expected {expected!r}, got {old[name]!r}")
    if transformer.out_channels not in (old.in_channels, 2 * old.in_channels):
        wanted = f"{old.in_channels} or {2 * old.in_channels}"
        raise ValueError(f"from_diffusers_dit: out_channels: expected {wanted}, got {transformer.out_channels}")
    config = DiTConfig(
        in_channels=old.in_channels,
        patch_size=(1, old.patch_size, old.patch_size),
        hidden_size=old.num_attention_heads * old.attention_head_dim,
        depth=old.num_layers,
        num_heads=old.num_attention_heads,
        qk_norm=False,
        positions="sincos",
        sincos_size=old.sample_size // old.patch_size,
        num_classes=old.num_embeds_ada_norm,
        learn_sigma=transformer.out_channels == 2 * old.in_channels,
        timestep_shift=1,
        timestep_float32=True,
    )
    weights = transformer.state_dict()
    first = "transformer_blocks.0.norm1.emb."
    state = {ours: weights[first + theirs] for ours, theirs in _EMBED.items()}
    for i in range(config.depth):
        block = f"transformer_blocks.{i}."
        for theirs in _EMBED.values():
            if not torch.equal(weights[f"{block}norm1.emb.{theirs}"], weights[first + theirs]):
                raise ValueError(
                    f"from_diffusers_dit: {block}norm1.emb.{theirs}: expected the same values as in block 0, got others"
                )
        for kind in ("weight", "bias"):
            for ours, layers in _BLOCK.items():
                state[f"blocks.{i}.{ours}.{kind}"] = torch.cat([weights[f"{block}{layer}.{kind}"] for layer in layers])
    for kind in ("weight", "bias"):
        for ours, theirs in _OUTER.items():
            state[f"{ours}.{kind}"] = weights[f"{theirs}.{kind}"]
    state["patch_embed.weight"] = state["patch_embed.weight"].unsqueeze(2)  # Conv2d -> Conv3d
    dit = DiT(config)
    dit.load_state_dict(state)
    return dit.to(state["final.weight"])
