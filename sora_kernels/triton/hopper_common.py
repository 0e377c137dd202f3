"""What attention's kernels for Hopper share: blocks of rows that TMA copies, and how `wgmma` and stores take them.

A program has three groups of warps: two consumers of 4 warps, with ROWS rows each of the block that the program owns, and the
producer, one warp, which copies.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.6 has another name for it; the arguments are the same.
copy_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
ROWS: gl.constexpr = gl.constexpr(64)  # of a consumer: what one `wgmma` computes
CONSUMERS: gl.constexpr = gl.constexpr(2)
BLOCK: gl.constexpr = gl.constexpr(128)  # rows that a program owns
# Per thread: 504 for the three groups of 4 warps to which the hardware gives registers.
CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(240)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def matrix(x):
    """The block [1, 1, rows, d] of a descriptor in shared memory as [rows, d]."""
    return x.reshape([x.shape[2], x.shape[3]])


@gluon.jit
def operand(x, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """Results of a product as the left operand of another; they stay in the registers in which they are."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.constexpr_function
def row_layout(D):
    """Of [rows, D] in a consumer's warps: what a thread loads or stores at once are 8 channels."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])


@gluon.jit
def row_block(x, first, num_rows, D: gl.constexpr):
    """Pointers [ROWS, D] to HeadRows from row `first` on, and their mask."""
    layout: gl.constexpr = row_layout(D)
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    p_rows = x.pointer + row.to(gl.int64)[:, None] * x.stride
    return p_rows + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :], (row < num_rows)[:, None]


@gluon.jit
def clear_rows(x, valid):
    """Zeros in the rows from `valid` on. Both consumers write the same, so that neither waits for the other."""
    CHUNK: gl.constexpr = 16  # few registers are free
    layout: gl.constexpr = row_layout(x.shape[1])
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))[:, None]
    NUM_ROWS: gl.constexpr = x.shape[0]
    for first in gl.static_range(0, NUM_ROWS, CHUNK):
        if valid < first + CHUNK:
            rows = x.slice(first, CHUNK)
            value = rows.load(layout)
            rows.store(gl.where(row < valid - first, value, gl.zeros_like(value)))
    hopper.fence_async_shared()


@gluon.jit
def store_rows(x, first, num_rows, value, space):
    """A consumer's `value` [ROWS, d] to rows first .. first + ROWS of HeadRows, by way of a block of shared memory that is free."""
    D: gl.constexpr = value.shape[1]
    space.store(value.to(space.dtype))  # for stores to memory of whole rows
    p_block, inside = row_block(x, first, num_rows, D)
    gl.store(p_block, space.load(row_layout(D)), mask=inside)


def strides(x: Tensor) -> list[int]:
    """Of batch, head and token. PyTorch's may be anything in a dimension of one element."""
    batch, token, head = x.stride()[:-1] if x.ndim == 4 else (0, *x.stride()[:-1])
    samples, (tokens, heads, d) = len(x) if x.ndim == 4 else 1, x.shape[-3:]
    return [stride if size > 1 else d for size, stride in ((samples, batch), (heads, head), (tokens, token))]


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Of blocks of so many rows of [B, H, S, d]; a packed tensor counts as one sample."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    tokens, heads, d = x.shape[-3:]
    shape = [len(x) if x.ndim == 4 else 1, heads, tokens, d]
    return TensorDescriptor(x, shape, [*strides(x), 1], [1, 1, rows, d], layout)
