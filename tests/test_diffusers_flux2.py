"""Flux 2, patched: dev with guidance, Klein without, and Klein's cache of reference images."""

from functools import partial

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
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
    "timestep_guidance_channels": 32,
}
SIZES = ((2, 6, 8), (3, 5, 12), (5, 9, 4))
REFERENCE = 16
"""Tokens of a reference image, the first ones of the image's."""


def inputs(size: int, guidance: bool = True, text: int = 512, **options) -> Inputs:
    b, *grid = SIZES[size]
    ids = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in grid), torch.zeros(1))
    made = {
        "hidden_states": torch.randn(b, grid[0] * grid[1], 8),
        "encoder_hidden_states": torch.randn(b, text, 32),
        "timestep": torch.rand(b),
        "img_ids": ids.expand(b, -1, -1),
        "txt_ids": torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(float(text))).expand(b, -1, -1),
    }
    return made | ({"guidance": torch.full((b,), 3.5)} if guidance else {}) | options


def build(cached: bool = False, **changes) -> nn.Module:
    model = Flux2Transformer2DModel(**(CONFIG | changes))
    if cached:
        for block in model.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


klein = partial(inputs, guidance=False, text=77)
KEYS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
VARIANTS = {
    "dev": Variant(build, inputs, lora=KEYS),
    "klein": Variant(partial(build, guidance_embeds=False), klein, lora=KEYS),
    "reference": Variant(
        partial(build, cached=True, guidance_embeds=False),
        partial(klein, kv_cache_mode="extract", num_ref_tokens=REFERENCE),
        lora=KEYS,
    ),
    "no_reference": Variant(partial(build, cached=True), partial(inputs, text=77), lora=KEYS),
}


class TestFlux2(FamilyContract):
    def test_cached_reference(self) -> None:
        """A later step takes what the first one has kept, each of its own."""
        variant = VARIANTS["reference"]
        model, first = made(variant).eval(), given(variant)
        later = first | {
            "hidden_states": first["hidden_states"][:, REFERENCE:],
            "img_ids": first["img_ids"][:, REFERENCE:],
            "kv_cache_mode": "cached",
        }
        found = []
        with torch.no_grad():
            for _ in range(2):
                cache = model(**first, return_dict=False)[1]
                caches = cache.double_block_caches + cache.single_block_caches
                found.append([*outputs(model, later | {"kv_cache": cache}), *(x for c in caches for x in c.get())])
                if len(found) == 1:
                    apply(model)
        assert len(found[0]) == 9
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
