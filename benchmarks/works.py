"""Every op on a workload: what the report compiles and counts, and what a first check on a GPU runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.block_mask import BlockMask
from sora_kernels.block_sparse_attention import block_sparse_attention
from sora_kernels.int8_attention import int8_attention
from sora_kernels.layout import PackedLayout
from sora_kernels.norm_rope import apply_rope, norm_rope
from sora_kernels.patch_embed import patch_embed_3d, patchify_3d, unpatchify_3d
from sora_kernels.rope import qk_norm_rope_3d, rope_3d
from sora_kernels.token_blocks import TokenBlocks

TYPICAL = [(16, 16, 16), (4, 32, 32), (4, 24, 24), (1, 64, 64), (1, 40, 40)]
CHANNELS, PATCH, WINDOW = 16, (1, 2, 2), (5, 9, 9)  # of latents; of spatiotemporal attention
TILE, TILES = (4, 4, 4), (3, 3, 3)  # of block-sparse attention: tokens, and the window


@dataclass
class Work:
    """One pass of one op.

    Args:
        function: of the inputs; what `run` calls, and differentiates in a backward by all inputs that require gradients.
    """

    op: str
    unit: str
    units: int
    gigabytes: float
    teraflops: float
    function: Callable[..., Any]
    inputs: Sequence[Tensor]
    backward: bool = False

    def run(self, make: Callable[[Tensor], Tensor] = torch.empty_like) -> list[Tensor]:
        """Outputs, and in a backward the gradients; cotangents are made like the outputs."""
        outputs = self.function(*self.inputs)
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        if not self.backward:
            return outputs
        wanted = [x for x in self.inputs if x.requires_grad]
        return outputs + list(torch.autograd.grad(outputs, wanted, [make(x) for x in outputs]))


@dataclass
class Batch:
    """A packed batch of samples of one span each, and how its tensors are made.

    Args:
        num_tokens: with those behind the last sample.
        make: as torch.empty, of a shape and a dtype.
    """

    layout: PackedLayout
    num_tokens: int
    head_dim: int
    width: int
    dtype: torch.dtype
    make: Callable[..., Tensor]

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        return [spans[0].grid for spans in self.layout.spans]

    @property
    def tokens_bytes(self) -> int:
        """Of a tensor of all tokens."""
        return self.num_tokens * self.width * self.dtype.itemsize

    def tensor(self, *shape: int) -> Tensor:
        return self.make(shape, dtype=self.dtype).requires_grad_()

    def tokens(self) -> Tensor:
        return self.tensor(self.num_tokens, self.width)

    def heads(self) -> Tensor:
        return self.tensor(self.num_tokens, self.num_heads, self.head_dim)


@dataclass
class Cost:
    """Of one pass."""

    num_bytes: int
    flops: int = 0


def passes(
    op: str, units: int, forward: Cost, backward: Cost, function: Callable, inputs: Sequence[Tensor], unit: str = "token"
) -> Iterator[Work]:
    """Forward and backward."""
    for suffix, cost in (("", forward), (", backward", backward)):
        gigabytes, teraflops = cost.num_bytes / 1e9, cost.flops / 1e12
        yield Work(f"{op}{suffix}", unit, units, gigabytes, teraflops, function, inputs, backward=cost is backward)


def adaln_works(batch: Batch) -> Iterator[Work]:
    n, size, cu = batch.num_tokens, batch.tokens_bytes, batch.layout.cu_frames
    residual, x = batch.tokens(), batch.tokens()
    gate, shift, scale = (batch.tensor(batch.layout.num_frames, batch.width) for _ in range(3))
    weight, bias = batch.tensor(batch.width), batch.tensor(batch.width)

    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm_modulate(x, shift, scale, cu)

    def gated(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return gate_residual(residual, x, gate, cu)

    def fused(residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return gate_residual_layer_norm_modulate(residual, x, gate, shift, scale, cu, weight=weight, bias=bias)

    def gated_norm(residual: Tensor, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return norm_gate_residual(residual, x, gate, cu, tanh=True, norm="rms", weight=weight)

    yield from passes("layer_norm_modulate", n, Cost(2 * size), Cost(3 * size), modulate, [x, shift, scale])
    yield from passes("gate_residual", n, Cost(3 * size), Cost(4 * size), gated, [residual, x, gate])
    inputs = [residual, x, gate, shift, scale, weight, bias]
    yield from passes("gate_residual_layer_norm_modulate", n, Cost(4 * size), Cost(6 * size), fused, inputs)
    yield from passes("norm_gate_residual", n, Cost(3 * size), Cost(4 * size), gated_norm, [residual, x, gate, weight])


def bias_gelu_works(batch: Batch) -> Iterator[Work]:
    hidden = 4 * batch.width
    size = 4 * batch.tokens_bytes
    inputs = [batch.tensor(batch.num_tokens, hidden), batch.tensor(hidden)]
    yield from passes("bias_gelu", batch.num_tokens, Cost(2 * size), Cost(3 * size), bias_gelu, inputs)


def rope_works(batch: Batch) -> Iterator[Work]:
    n, size, layout = batch.num_tokens, batch.tokens_bytes, batch.layout
    q, k = batch.heads(), batch.heads()

    def rotate(q: Tensor) -> Tensor:
        return rope_3d(q, layout)

    def norm_rotate(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
        return qk_norm_rope_3d(q, k, q_weight, k_weight, layout)

    yield from passes("rope_3d", n, Cost(2 * size), Cost(2 * size), rotate, [q])
    inputs = [q, k, batch.tensor(batch.head_dim), batch.tensor(batch.head_dim)]
    yield from passes("qk_norm_rope_3d", n, Cost(4 * size), Cost(6 * size), norm_rotate, inputs)


def norm_rope_works(batch: Batch) -> Iterator[Work]:
    """Tables count as what is read once, in float32; they serve all heads."""
    n, size, d = batch.num_tokens, batch.tokens_bytes, batch.head_dim
    cos, sin = (batch.make((n, d // 2), dtype=torch.float32) for _ in range(2))
    tables = cos.nbytes + sin.nbytes

    def rotate(x: Tensor) -> Tensor:
        return apply_rope(x, cos, sin)

    def norm_rotate(x: Tensor, weight: Tensor) -> Tensor:
        return norm_rope(x, cos, sin, weight=weight)

    x, weight = batch.heads(), batch.tensor(d)
    yield from passes("apply_rope", n, Cost(2 * size + tables), Cost(2 * size + tables), rotate, [x])
    yield from passes("norm_rope", n, Cost(2 * size + tables), Cost(3 * size + tables), norm_rotate, [x, weight])


def attention_works(batch: Batch) -> Iterator[Work]:
    """In units of one query and one key that it attends to."""
    layout, heads, d, size = batch.layout, batch.num_heads, batch.head_dim, batch.tokens_bytes
    qkv = [batch.heads() for _ in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, layout.cu_seqlens, layout.cu_seqlens)

    def attend_within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spatiotemporal_attention(q, k, v, layout, window=WINDOW)

    blocks = TokenBlocks.tiles(layout, TILE)
    mask = BlockMask.sliding(blocks, TILES)

    def attend_by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, mask)

    @torch.no_grad()
    def attend_in_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return int8_attention(q, k, v, layout.cu_seqlens, layout.cu_seqlens)

    everywhere = heads * sum(length * length for length in layout.seqlens)
    within = heads * sum(t * h * w * min(t, WINDOW[0]) * min(h, WINDOW[1]) * min(w, WINDOW[2]) for t, h, w in batch.grids)
    sizes, (offsets, indices) = blocks.cu_blocks.cpu().diff(), (x.cpu() for x in mask.lists)
    by_blocks = heads * int((sizes.repeat_interleave(offsets.diff()) * sizes[indices[: offsets[-1]]]).sum())
    for op, function, pairs in (
        ("attention", attend, everywhere),
        ("spatiotemporal_attention", attend_within, within),
        ("block_sparse_attention", attend_by_blocks, by_blocks),
    ):
        forward, backward = Cost(4 * size, 4 * d * pairs), Cost(8 * size, 10 * d * pairs)
        yield from passes(op, pairs, forward, backward, function, qkv, "query and key")
    # Operations on int8 count half, as matrix units do twice as many of them.
    teraflops = 3 * d * everywhere / 1e12
    yield Work("int8_attention", "query and key", everywhere, 4 * size / 1e9, teraflops, attend_in_int8, qkv)


def patch_works(batch: Batch) -> Iterator[Work]:
    n, width, layout = batch.num_tokens, batch.width, batch.layout
    elements = CHANNELS * 4  # of a patch
    size = n * elements * batch.dtype.itemsize
    videos = [batch.tensor(CHANNELS, t, 2 * h, 2 * w) for t, h, w in batch.grids]

    def embed(weight: Tensor, bias: Tensor, *videos: Tensor) -> Tensor:
        return patch_embed_3d(videos, weight, bias, patch_size=PATCH)[0]

    def cut(*videos: Tensor) -> Tensor:
        return patchify_3d(videos, patch_size=PATCH)[0]

    def join(rows: Tensor) -> list[Tensor]:
        return unpatchify_3d(rows, layout, patch_size=PATCH)

    flops = 2 * n * elements * width
    forward, backward = Cost(size + batch.tokens_bytes, flops), Cost(2 * size + batch.tokens_bytes, 2 * flops)
    inputs = [batch.tensor(width, CHANNELS, *PATCH), batch.tensor(width), *videos]
    yield from passes("patch_embed_3d", n, forward, backward, embed, inputs)
    yield Work("patchify_3d", "token", n, 2 * size / 1e9, 0, cut, videos)
    yield Work("unpatchify_3d", "token", n, 2 * size / 1e9, 0, join, [batch.tensor(n, elements)])


OPS = (adaln_works, bias_gelu_works, rope_works, norm_rope_works, attention_works, patch_works)


def works(
    dtype: torch.dtype,
    head_dim: int,
    width: int = 3072,
    *,
    layout: PackedLayout | None = None,
    slack: int = 0,
    make: Callable[..., Tensor] = torch.empty,
) -> Iterator[Work]:
    """Each op forward, and its backward, on a packed batch of images and videos.

    Args:
        layout: of samples of one span each; default a typical batch.
        slack: tokens behind the last sample.
        make: as torch.empty, of a shape and a dtype.
    """
    layout = PackedLayout.from_grids(TYPICAL) if layout is None else layout
    batch = Batch(layout, layout.num_tokens + slack, head_dim, width, dtype, make)
    for of_op in OPS:
        yield from of_op(batch)
