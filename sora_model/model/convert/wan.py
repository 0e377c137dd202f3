"""Wan's transformer as a `DiT`, and back: 2.1 and 2.2, text to video, image to video and TI2V.

A DiT keeps queries, keys and values in one layer, and tables as vectors; all else is a matter of names. Sources: Wan Team, Wan:
Open and Advanced Large-Scale Video Generative Models (2025); names of weights as in diffusers' WanTransformer3DModel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DiTConfig
from ..dit import FREQUENCIES, DiT

TEXT_LENGTH = 512  # tokens of zeros fill each prompt up to it
# Our names of a block's layers, and diffusers'.
_BLOCK = {
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.out": ("attn1.to_out.0",),
    "cross_norm": ("norm2",),
    "cross_attention.q": ("attn2.to_q",),
    "cross_attention.kv": ("attn2.to_k", "attn2.to_v"),
    "cross_attention.out": ("attn2.to_out.0",),
    "mlp.0": ("ffn.net.0.proj",),
    "mlp.2": ("ffn.net.2",),
}
_BLOCK_PARAMETERS = {
    "offset": "scale_shift_table",
    "attention.q_norm": "attn1.norm_q.weight",
    "attention.k_norm": "attn1.norm_k.weight",
    "cross_attention.q_norm": "attn2.norm_q.weight",
    "cross_attention.k_norm": "attn2.norm_k.weight",
}
# What models with images have besides.
_IMAGE_BLOCK = {"cross_attention.image_kv": ("attn2.add_k_proj", "attn2.add_v_proj")}
_IMAGE_BLOCK_PARAMETERS = {"cross_attention.image_k_norm": "attn2.norm_added_k.weight"}
_IMAGE_OUTER = {
    "image_projection.norm_in": "condition_embedder.image_embedder.norm1",
    "image_projection.mlp.0": "condition_embedder.image_embedder.ff.net.0.proj",
    "image_projection.mlp.2": "condition_embedder.image_embedder.ff.net.2",
    "image_projection.norm_out": "condition_embedder.image_embedder.norm2",
}
_OUTER = {
    "patch_embed": "patch_embedding",
    "time_embed.0": "condition_embedder.time_embedder.linear_1",
    "time_embed.2": "condition_embedder.time_embedder.linear_2",
    "shared_modulation": "condition_embedder.time_proj",
    "text_projection.0": "condition_embedder.text_embedder.linear_1",
    "text_projection.2": "condition_embedder.text_embedder.linear_2",
    "final": "proj_out",
}
# What a DiT has in common with Wan, whatever its size.
_STYLE: dict[str, Any] = {
    "qk_norm": True,
    "qk_norm_across_heads": True,
    "positions": "rope",
    "rope_theta": 10000.0,
    "rope_size": None,
    "absolute_positions": False,
    "text_projection": True,
    "text_length": TEXT_LENGTH,
    "cross_attention_norms": True,
    "num_classes": None,
    "modulation": "tables",
    "prediction": "direct",
    "learn_sigma": False,
    "timestep_shift": 0,
    "timestep_float32": True,
}
# Options of diffusers' that have one value here.
_FIXED = {
    "freq_dim": FREQUENCIES,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
_NUMBERS = "in_channels", "num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim"
FLOAT32 = "time_embed", "offset", "final_offset", "cross_norm", "norm_in", "norm_out"
"""Modules and parameters that stay in float32 where the others are in 16 bits, as in diffusers."""


def from_diffusers_wan(transformer: Any) -> DiT:
    """diffusers' `WanTransformer3DModel` as a `DiT`, with copies of its weights in their dtypes.

    >>> from diffusers import WanTransformer3DModel          # of a checkpoint: .from_pretrained(..., subfolder="transformer")
    >>> transformer = WanTransformer3DModel(num_attention_heads=2, num_layers=1, ffn_dim=64, text_dim=32)
    >>> dit = from_diffusers_wan(transformer)
    >>> latents = [torch.randn(16, 3, 8, 8), torch.randn(16, 1, 12, 4)]
    >>> [tuple(x.shape) for x in dit(latents, torch.tensor([700.0, 20.0]))]
    [(16, 3, 8, 8), (16, 1, 12, 4)]

    Captions are of the transformer's text width, without padding: the model attends as if zeros filled them up to 512 tokens.

    Raises:
        ValueError: options that a DiT does not have.
    """
    kind = type(transformer).__name__
    if kind != "WanTransformer3DModel":
        raise ValueError(f"from_diffusers_wan: transformer: expected a WanTransformer3DModel, got {kind}")
    weights = transformer.state_dict()
    config = wan_config(dict(transformer.config), "from_diffusers_wan")
    return load_wan(config, weights.__getitem__).train(transformer.training)


def to_diffusers_wan(dit: DiT) -> Any:
    """The inverse of `from_diffusers_wan`, whose weights it gives to the last bit; rope_max_seq_len is diffusers' default.

    Raises:
        ValueError: a DiT with another option than Wan has.
    """
    from diffusers import WanTransformer3DModel

    if not isinstance(dit, DiT):
        raise ValueError(f"to_diffusers_wan: dit: expected a DiT (each of Experts by itself), got {type(dit).__name__}")
    config = dit.config
    for name, expected in _STYLE.items():
        if getattr(config, name) != expected:
            raise ValueError(f"to_diffusers_wan: {name}: expected {expected!r}, got {getattr(config, name)!r}")
    options = {
        "patch_size": config.patch_size,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": config.hidden_size if config.image_dim else None,
        "pos_embed_seq_len": config.image_positions,
        "text_dim": config.text_dim,
        "ffn_dim": config.mlp_width,
        "num_layers": config.depth,
        "eps": config.eps,
    }
    with torch.device("meta"):
        transformer: Any = WanTransformer3DModel(**options)
    shapes = {name: value.shape for name, value in transformer.state_dict().items()}
    weights = dit.state_dict()
    state = {}
    for ours, theirs in weight_names(config).items():
        for name, part in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
            state[name] = part.reshape(shapes[name]).clone()
    transformer.load_state_dict(state, assign=True)
    # Its tables of positions are no weights, and have to be computed.
    transformer.rope = type(transformer.rope)(options["attention_head_dim"], config.patch_size, transformer.config.rope_max_seq_len)
    return transformer


def wan_config(values: Mapping[str, Any], owner: str) -> DiTConfig:
    """The config.json of a WanTransformer3DModel as a `DiTConfig`; an option that a DiT does not have is an error."""
    for name, expected in _FIXED.items():
        if values.get(name, expected) != expected:
            raise ValueError(f"{owner}: {name}: expected {expected!r}, got {values[name]!r}")
    for name in _NUMBERS:
        if type(values[name]) is not int or values[name] < 1:
            raise ValueError(f"{owner}: {name}: expected a whole number of at least 1, got {values[name]!r}")
    channels, heads = values["in_channels"], values["num_attention_heads"]
    hidden_size, image_dim = heads * values["attention_head_dim"], values.get("image_dim")
    out_channels = channels if values.get("out_channels") is None else values["out_channels"]
    if type(out_channels) is not int or not 1 <= out_channels <= channels:
        raise ValueError(f"{owner}: out_channels: expected from 1 to in_channels {channels}, got {out_channels!r}")
    if values.get("added_kv_proj_dim") != (hidden_size if image_dim else None):
        expected = f"{hidden_size}, as wide as the model, with an image_dim and None without"
        raise ValueError(f"{owner}: added_kv_proj_dim: expected {expected}, got {values.get('added_kv_proj_dim')}")
    return DiTConfig(
        in_channels=channels,
        condition_channels=channels - out_channels,
        image_dim=image_dim,
        image_positions=values.get("pos_embed_seq_len"),
        patch_size=tuple(values["patch_size"]),
        hidden_size=hidden_size,
        depth=values["num_layers"],
        num_heads=heads,
        mlp_size=values["ffn_dim"],
        eps=values["eps"],
        text_dim=values["text_dim"],
        **_STYLE,
    )


def weight_names(config: DiTConfig) -> dict[str, tuple[str, ...]]:
    """Of each of our weights, the names of those of diffusers that it is made of, end to end."""
    outer, block, parameters = dict(_OUTER), dict(_BLOCK), dict(_BLOCK_PARAMETERS)
    found: dict[str, tuple[str, ...]] = {"final_offset": ("scale_shift_table",)}
    if config.image_dim:
        outer, block, parameters = outer | _IMAGE_OUTER, block | _IMAGE_BLOCK, parameters | _IMAGE_BLOCK_PARAMETERS
    if config.image_positions:
        found["image_projection.positions"] = ("condition_embedder.image_embedder.pos_embed",)
    for kind in ("weight", "bias"):
        found |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in outer.items()}
        for i in range(config.depth):
            layers = {f"blocks.{i}.{ours}.{kind}": theirs for ours, theirs in block.items()}
            found |= {ours: tuple(f"blocks.{i}.{layer}.{kind}" for layer in theirs) for ours, theirs in layers.items()}
    for i in range(config.depth):
        found |= {f"blocks.{i}.{ours}": (f"blocks.{i}.{theirs}",) for ours, theirs in parameters.items()}
    return found


def load_wan(
    config: DiTConfig, read: Callable[[str], Tensor], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> DiT:
    """A DiT whose weights are read one at a time, by diffusers' names: beside it, memory holds one layer at most.

    dtype: of the weights, but for those of FLOAT32; default: as they are.
    """
    with torch.device("meta"):
        dit = DiT(config)
    shapes = {name: value.shape for name, value in dit.state_dict().items()}
    for ours, theirs in weight_names(config).items():
        kept = dtype is not None and any(part in FLOAT32 for part in ours.split("."))
        parts = map(read, theirs)
        first = next(parts)
        wanted = torch.float32 if kept else dtype or first.dtype
        options: dict[str, Any] = {"dtype": wanted, "device": first.device if device is None else device}
        value = torch.empty(len(theirs), *first.shape, **options)
        for place, part in zip(value, chain([first], parts), strict=True):
            place.copy_(part)  # from the file to where it stays: a copy between would leave holes in memory
        owner, _, attribute = ours.rpartition(".")
        setattr(dit.get_submodule(owner), attribute, nn.Parameter(value.reshape(shapes[ours])))
    return dit
