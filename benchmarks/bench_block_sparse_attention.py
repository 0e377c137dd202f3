"""Block-sparse attention of one video, a quarter of its blocks: chosen at random for each head, and sliding tiles.

Random blocks are the worst that a model can choose, as neighbours share little of what they see. The peers are attention to all of
the video, a mask for torch's SDPA, and compiled flex_attention, which skips blocks, too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.bench_attention import leaf
from benchmarks.race import (
    DEVICE,
    FORWARD,
    MAIN,
    ON_GPU,
    OURS,
    PASSES,
    REHEARSED,
    Implementation,
    Race,
    Tensors,
    compiled,
    of_pass,
    randn,
)
from sora_kernels import BlockMask, PackedLayout, TokenBlocks, block_sparse_attention, flash_attn_varlen_func

GRID, HEADS, TILE = (8, 16, 16) if REHEARSED else (16, 32, 32), 4, (4, 4, 4)
MASKS = {"random": None, "sliding": (2, 4, 4)}  # tiles along T, H, W of 4 x 8 x 8: a quarter of them
HEAD_DIMS = (64, 128)
ROWS = [OURS, "all blocks", "SDPA with mask", "flex_attention compiled"]
DTYPES = [MAIN] if ON_GPU else [torch.float32, torch.bfloat16]


def sparse_attention(dtype: torch.dtype, which: str, *, kind: str, head_dim: int) -> Race:
    torch.manual_seed(0)
    layout = PackedLayout.from_grids([GRID], DEVICE)
    blocks = TokenBlocks.tiles(layout, TILE)
    (count,), window = blocks.num_blocks, MASKS[kind]
    if window is None:
        chosen = torch.rand(HEADS, count, count, device=DEVICE).topk(count // 4).indices
        table = torch.zeros(HEADS, count, count, dtype=torch.bool, device=DEVICE).scatter(-1, chosen, True)
        mask = BlockMask.from_dense([table], blocks)
    else:
        mask = BlockMask.sliding(blocks, window)
        offsets, indices = mask.lists
        table = torch.zeros(1, count, count, dtype=torch.bool, device=DEVICE)
        table[0, torch.arange(count, device=DEVICE).repeat_interleave(offsets.diff()), indices.long()] = True
    q, k, v, dout = (randn(layout.num_tokens, HEADS, head_dim, dtype=dtype, grad=which != FORWARD) for _ in range(4))
    size = blocks.max_size
    visible = table.repeat_interleave(size, 1).repeat_interleave(size, 2)[None]
    cu = layout.cu_seqlens

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # of four dimensions, or torch's fused kernels do not take it
        return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=visible)[0].transpose(0, 1)

    counts = table.sum(-1, dtype=torch.int32)[None]
    listed = table.int().argsort(dim=-1, descending=True, stable=True).int()[None]
    function, flex_mask = compiled(flex_attention), FlexMask.from_kv_blocks(counts, listed, BLOCK_SIZE=size)
    dense = [leaf(rearrange(x, "s h d -> 1 h s d")) for x in (q, k, v, dout)]

    def restore(results: Tensors) -> Tensors:
        return [rearrange(x, "1 h s d -> s h d") for x in results]

    rows = {
        OURS: Implementation(lambda q, k, v: block_sparse_attention(q, k, v, mask)),
        "all blocks": Implementation(lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu), comparable=False),
        "SDPA with mask": Implementation(masked),
        "flex_attention compiled": Implementation(
            lambda q, k, v: function(q, k, v, block_mask=flex_mask), dense[:3], dense[3:], restore
        ),
    }
    flops = 4e-9 * HEADS * head_dim * q.shape[0] * float(visible.float().mean()) * q.shape[0]
    work = {"gflops": of_pass(which, flops, 2.5 * flops)}
    return Race(f"block-sparse attention, {kind}, head dim {head_dim}", dtype, which, work, [q, k, v], [dout], masked, rows)


@pytest.mark.parametrize("implementation", ROWS)
@pytest.mark.parametrize("which", PASSES.values(), ids=PASSES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", MASKS)
def test_sparse_attention(measure, implementation, kind, head_dim, dtype, which):
    measure(implementation, sparse_attention, dtype, which, kind=kind, head_dim=head_dim)
