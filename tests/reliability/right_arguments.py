"""Every public function, and right values of its arguments: what a test, or chance, then changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, noop_mask

import sora_kernels

LAYOUT = sora_kernels.PackedLayout.from_grids([(1, 2, 2)])
BLOCKS = sora_kernels.TokenBlocks.runs(LAYOUT, 64)
MASK = sora_kernels.BlockMask.from_dense([torch.ones(1, 1, dtype=torch.bool)], BLOCKS)
# Whose methods are called.
INSTANCES = {type(instance): instance for instance in (LAYOUT, BLOCKS, MASK, sora_kernels.Span((1, 2, 2)))}
X, HEADS, DENSE = torch.zeros(4, 8), torch.zeros(4, 2, 8), torch.zeros(1, 2, 4, 8)
ROW, VIDEO = torch.zeros(1, 8), torch.zeros(1, 2, 2, 2)
# A right value of every argument by its name; some functions give a name another meaning.
RIGHT: dict[str, Any] = {
    **dict.fromkeys(("x", "residual"), X),
    **dict.fromkeys(("gate", "shift", "scale"), ROW),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_q", "cu_seq_k"), LAYOUT.cu_seqlens),
    **dict.fromkeys(("q", "k", "v", "query", "key", "value"), HEADS),
    **dict.fromkeys(("q_weight", "k_weight", "weight", "bias"), torch.zeros(8)),
    **dict.fromkeys(("k_cache", "v_cache"), DENSE),
    "qkv": torch.zeros(4, 3, 2, 8),
    "kv": torch.zeros(4, 2, 2, 8),
    **dict.fromkeys(("cos", "sin"), torch.zeros(4, 4)),
    "alibi_slopes": torch.zeros(2),
    "attn_mask": torch.zeros(4, 4),
    "layout": LAYOUT,
    "layouts": [LAYOUT],
    "videos": [VIDEO],
    "tokens": torch.zeros(4, 8),
    "patch_size": (1, 2, 2),
    "grid": (1, 2, 2),
    "grids": [(1, 2, 2)],
    "spans": [[sora_kernels.Span((1, 2, 2))]],
    "samples": [0],
    "length": 4,
    "head_dim": 64,
    "name": "reference",
    "device": "cpu",
    **dict.fromkeys(("blocks", "queries", "keys"), BLOCKS),
    "mask": MASK,
    "indices": [torch.zeros(1, 1, dtype=torch.int32)],
    "counts": [torch.ones(1, dtype=torch.int32)],
    "window": (1, 1, 1),
    "what": "default",
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "flash_attn_func": {"q": DENSE, "k": DENSE, "v": DENSE},
    "flash_attn_qkvpacked_func": {"qkv": torch.zeros(1, 4, 3, 2, 8)},
    "flash_attn_kvpacked_func": {"q": DENSE, "kv": torch.zeros(1, 2, 2, 4, 8)},
    "flash_attn_with_kvcache": {"q": DENSE},
    "scaled_dot_product_attention": {"query": DENSE, "key": DENSE, "value": DENSE},
    "int8_attention": dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), LAYOUT.cu_seqlens),
    "rope_3d": {"x": HEADS},
    "apply_rope": {"x": HEADS},
    "norm_rope": {"x": HEADS},
    "patch_embed_3d": {"weight": torch.zeros(8, 1, 1, 2, 2)},
    "PackedLayout.pack": {"samples": [X]},
    "BlockMask.from_dense": {"mask": [torch.ones(1, 1, dtype=torch.bool)]},
    "BlockMask.from_flex": {"mask": create_block_mask(noop_mask, None, None, 4, 4, device="cpu", BLOCK_SIZE=64)},
    "BlockMask.sliding": {"blocks": sora_kernels.TokenBlocks.tiles(LAYOUT)},
}
# Taken for compatibility with flash_attn and torch, and read by nobody.
IGNORED = {"deterministic", "max_seqlen", "max_seqlen_q", "max_seqlen_k", "max_q", "max_k"}


def functions() -> Iterator[tuple[str, Callable]]:
    """Every exported function, constructor and method, by the name that its complaints begin with."""
    for name in sora_kernels.__all__:
        value = getattr(sora_kernels, name)
        if value not in (sora_kernels.TokenBlocks, sora_kernels.BlockMask):  # which their class methods construct
            yield name, value
        if inspect.isclass(value):
            for attribute, member in inspect.getmembers(value, callable):
                if not attribute.startswith("_"):
                    own = not isinstance(inspect.getattr_static(value, attribute), classmethod | staticmethod)
                    yield f"{name}.{attribute}", getattr(INSTANCES[value], attribute) if own else member


FUNCTIONS = dict(functions())


def right(name: str) -> dict[str, Any]:
    """Of the arguments without which it cannot be called."""
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    special = OTHERWISE.get(name, {})
    return {p.name: {**RIGHT, **special}[p.name] for p in parameters if p.default is p.empty or p.name in special}


def call(name: str, arguments: dict[str, Any]) -> Any:
    """What it returns; a context is entered and left."""
    result = FUNCTIONS[name](**arguments)
    if hasattr(result, "__enter__"):
        with result:
            pass
    return result
