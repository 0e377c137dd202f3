"""A case for every op whose tensors may have any number of elements: a batch that repeats a small one.

Whatever is repeated is known from the small batch, every element of it, and the gradient of what all samples share is a multiple.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.block_mask import BlockMask
from sora_kernels.block_sparse_attention import block_sparse_attention
from sora_kernels.layout import PackedLayout
from sora_kernels.norm_rope import apply_rope, norm_rope
from sora_kernels.patch_embed import patch_embed_3d, patchify_3d, unpatchify_3d
from sora_kernels.rope import qk_norm_rope_3d, rope_3d
from sora_kernels.token_blocks import TokenBlocks

WIDTH = 1000  # no power of two: the limits of 32 bits are inside of rows and of vectors
ROWS = 4099
HEADS, HEAD_DIM = 48, 120  # of attention: many, so that samples are few
GRID, WINDOW = (2, 4, 5), (1, 3, 3)
PATCH = (1, 2, 2)
VIDEO = (15, 4, 102, 106)  # [C, T, H, W]


@dataclass
class Case:
    """An op on a batch that holds a small one `count` times.

    repeated: inputs of the small batch, along `axis`; the same tensor twice is two inputs in the same memory. shared: inputs that
    are not repeated. call: of the count, gives the op on all of these. out_axis: along which the outputs repeat.
    """

    repeated: list[Tensor]
    call: Callable[[int], Callable[..., Any]]
    shared: list[Tensor] = field(default_factory=list)
    axis: int = 0
    out_axis: int = 0

    def count(self, elements: int) -> int:
        """The smallest with which the first input's last repetition lies wholly beyond so many elements."""
        return -(-elements // self.repeated[0].numel()) + 1


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


def boundaries(count: int, *lengths: int) -> Tensor:
    return torch.tensor([0, *list(lengths) * count]).cumsum(0).int()


def layout(count: int) -> PackedLayout:
    return PackedLayout.from_grids([GRID] * count)


TOKENS = GRID[0] * GRID[1] * GRID[2]


def adaln(op: Callable[..., Any], inputs: int, modulations: int, **options: Any) -> Case:
    """The first `inputs` are rows of tokens, in the same memory; of the modulations there is a row for all of them."""
    x = randn(ROWS, WIDTH)
    shared = [randn(1, WIDTH + i)[:, :WIDTH].contiguous() for i in range(modulations)]

    def call(count: int) -> Callable[..., Any]:
        cu_rows = boundaries(1, ROWS * count)
        return lambda *tensors: op(*tensors, cu_rows, **options)

    return Case([x] * inputs, call, shared)


def rows_and_weight(op: Callable[..., Any]) -> Case:
    return Case([randn(ROWS, WIDTH)], lambda count: op, [randn(WIDTH)])


def heads(op: Callable[..., Any], *shared: Tensor) -> Case:
    """Tokens of a layout, each with heads."""
    return Case([randn(TOKENS, 8, 64)], lambda count: lambda x, *weights: op(x, *weights, layout(count)), list(shared))


def two_heads() -> Case:
    """qk_norm_rope_3d of many heads of queries and one of keys."""
    case = heads(qk_norm_rope_3d, randn(64), randn(64))
    case.repeated.append(randn(TOKENS, 1, 64))
    return case


def rotated(op: Callable[..., Any], *shared: Tensor) -> Case:
    """Dense samples of tokens, each with heads, by tables for one sample."""
    angles = torch.randn(321, 32, generator=torch.Generator().manual_seed(0))
    return Case([randn(1, 321, 6, 64)], lambda count: lambda x, *weights: op(x, angles.cos(), angles.sin(), *weights), list(shared))


def few_keys() -> Case:
    """Attention of huge queries, of two samples of other lengths, to keys with one head."""

    def call(count: int) -> Callable[..., Any]:
        cu = boundaries(count, 17, 23)
        return lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, causal=True)

    keys = randn(40, 1, HEAD_DIM)
    return Case([randn(40, HEADS, HEAD_DIM), keys, keys], call)


def few_queries() -> Case:
    """Attention of one query a sample to huge keys and values."""

    def call(count: int) -> Callable[..., Any]:
        cu_q, cu_k = boundaries(count, 1, 1), boundaries(count, 17, 23)
        return lambda k, v, q: flash_attn_varlen_func(q, k, v, cu_q, cu_k)

    keys = randn(40, HEADS, HEAD_DIM)
    return Case([keys, keys, randn(2, HEADS, HEAD_DIM)], call)


def of_layout(op: Callable[[int], Callable[..., Any]]) -> Case:
    """Attention on a layout, of many heads of queries and one of keys."""
    keys = randn(TOKENS, 1, HEAD_DIM)
    return Case([randn(TOKENS, HEADS, HEAD_DIM), keys, keys], op)


def windows(count: int) -> Callable[..., Any]:
    batch = layout(count)
    return lambda q, k, v: spatiotemporal_attention(q, k, v, batch, window=WINDOW)


def blocks(count: int) -> Callable[..., Any]:
    mask = BlockMask.sliding(TokenBlocks.tiles(layout(count), (2, 2, 2)), (1, 3, 3))
    return lambda q, k, v: block_sparse_attention(q, k, v, mask)


def embedded() -> Case:
    """Videos and tokens of about as many elements, of one long clip."""
    channels = VIDEO[0] * 4

    def embed(count: int) -> Callable[..., Any]:
        return lambda video, weight, bias: patch_embed_3d([video], weight, bias, patch_size=PATCH)[0]

    return Case([randn(*VIDEO)], embed, [randn(channels, VIDEO[0], *PATCH), randn(channels)], axis=1)


def cut() -> Case:
    return Case([randn(*VIDEO)], lambda count: lambda video: patchify_3d([video], patch_size=PATCH)[0], axis=1)


def joined() -> Case:
    grid = (VIDEO[1], VIDEO[2] // 2, VIDEO[3] // 2)
    rows = randn(grid[0] * grid[1] * grid[2], VIDEO[0] * 4)

    def join(count: int) -> Callable[..., Any]:
        whole = PackedLayout.from_grids([(grid[0] * count, *grid[1:])])
        return lambda rows: unpatchify_3d(rows, whole, patch_size=PATCH)

    return Case([rows], join, out_axis=1)


def gated(residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, cu_rows: Tensor) -> Any:
    return gate_residual_layer_norm_modulate(residual, x, gate, shift, scale, cu_rows, weight=weight[0])


# By the op's name, with what is huge behind a comma where that is not the first input alone.
CASES: dict[str, Callable[[], Case]] = {
    "layer_norm_modulate": lambda: adaln(layer_norm_modulate, 1, 2),
    "gate_residual": lambda: adaln(gate_residual, 2, 1),
    "gate_residual_layer_norm_modulate": lambda: adaln(gated, 2, 4),
    "norm_gate_residual": lambda: adaln(norm_gate_residual, 2, 1, tanh=True, norm="rms"),
    "bias_gelu": lambda: rows_and_weight(bias_gelu),
    "rope_3d": lambda: heads(rope_3d),
    "qk_norm_rope_3d": two_heads,
    "apply_rope": lambda: rotated(apply_rope),
    "norm_rope": lambda: rotated(lambda x, cos, sin, weight: norm_rope(x, cos, sin, weight=weight), randn(64)),
    "attention": few_keys,
    "attention, keys": few_queries,
    "spatiotemporal_attention": lambda: of_layout(windows),
    "block_sparse_attention": lambda: of_layout(blocks),
    "patch_embed_3d": embedded,
    "patchify_3d": cut,
    "unpatchify_3d": joined,
}
