"""DiT and Latte, patched: blocks of one and of two attentions, masks of text, bool and added, other kinds of norms."""

from functools import partial

import torch
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel
from diffusers.models.embeddings import LabelEmbedding
from diffusers_contract import FamilyContract, Inputs, Variant
from torch import nn

COMMON = {"num_attention_heads": 2, "attention_head_dim": 72, "in_channels": 4, "num_layers": 2, "patch_size": 2}
LATTE = COMMON | {
    "cross_attention_dim": 144,
    "sample_size": 16,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "caption_channels": 32,
    "video_length": 4,
}


def dit(**changes) -> nn.Module:
    """Without dropout of labels, which is random while a model trains."""
    model = DiTTransformer2DModel(**COMMON, num_embeds_ada_norm=10, sample_size=16, **changes)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0
    return model


def images(size: int) -> Inputs:
    b, edge = ((2, 16), (3, 8), (5, 12))[size]
    labels = torch.randint(0, 10, (b,))
    return {"hidden_states": torch.randn(b, 4, edge, edge), "timestep": torch.randint(0, 1000, (b,)), "class_labels": labels}


def latte(**changes) -> nn.Module:
    return LatteTransformer3DModel(**(LATTE | changes))


def videos(size: int, padding: str | None = None, added: bool = False, **options) -> Inputs:
    b, *grid = ((2, 8, 12), (3, 16, 16), (5, 4, 12))[size]
    made = {
        "hidden_states": torch.randn(b, 4, 4, *grid),
        "timestep": torch.randint(0, 1000, (b,)),
        "encoder_hidden_states": torch.randn(b, 120, 32),
    }
    if padding is not None:
        kept = torch.ones(b, 120, dtype=torch.bool)
        for i in range(b):
            start, end = {"front": (0, 9 + i), "middle": (20, 40 + i), "end": (9 + i, 120), "sample": (0, 120 * (i % 2))}[padding]
            kept[i, start:end] = False
        kept = kept.repeat_interleave(4, dim=0)  # of each frame
        made["encoder_attention_mask"] = torch.where(kept, 0.0, -10000.0)[:, None] if added else kept
    return made | options


VARIANTS = {
    "dit": Variant(dit, images),
    "dit_affine": Variant(partial(dit, norm_elementwise_affine=True, activation_fn="geglu", attention_bias=False), images),
    "latte": Variant(latte, videos),
    "latte_spatial": Variant(latte, partial(videos, enable_temporal_attentions=False)),
    "latte_layer_norm": Variant(partial(latte, norm_type="layer_norm", norm_elementwise_affine=True), videos, blocks=False),
    **{f"latte_{name}": Variant(latte, partial(videos, padding=name)) for name in ("front", "middle", "end", "sample")},
    "latte_added": Variant(latte, partial(videos, padding="end", added=True)),
}


class TestDiT(FamilyContract):
    pass
