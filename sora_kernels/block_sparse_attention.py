"""Attention in which each block of queries sees some blocks of keys: sliding tiles, and masks that a model makes as it runs.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        over the keys j of all blocks that the block of query i sees

Work and memory follow the blocks that are seen. The score matrix is never built, and the backward is deterministic.

Sources: Zhang et al., Fast Video Generation with Sliding Tile Attention (2025), and VSA: Faster Video Diffusion with Trainable
Sparse Attention (2025); Mikhailov et al., NABLA: Neighborhood Adaptive Block-Level Attention (2025).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .attention_arguments import first_channels, of_one_head_dim
from .attention_op import lse_like, statistics_like
from .block_mask import BlockLists, BlockMask, transposed
from .checks import check_bool, check_qkv, check_tensor, fail
from .library import Context, Grads, autocast, cotangent, register, rows, want_gradients
from .memory import empty_like
from .token_blocks import TokenBlocks


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of a packed batch in which a block of queries sees the blocks of keys that `mask` names.

    >>> blocks = TokenBlocks.tiles(layout, (4, 4, 4))                                # of 400 tokens
    >>> mask = BlockMask.sliding(blocks, (3, 3, 3))
    >>> q, k, v = (blocks.arrange(x) for x in torch.randn(3, 400, 8, 64))
    >>> blocks.restore(block_sparse_attention(q, k, v, mask)).shape
    torch.Size([400, 8, 64])

    Args:
        q: [N, H, d], tokens in the order of `mask.queries`.
        k, v: [Nk, Hk, d], in the order of `mask.keys`; consecutive query heads share a key head. v may have another head dim,
            which the output then has; see `flash_attn_func`.
        mask: of H heads, or of one for all.
        softmax_scale: scale of q.k; default 1/sqrt(d).
        return_lse: also return lse, float32 [H, N], the logarithm of the sum of exp(scale * q.k), which is differentiable. With it
            results over other keys can be joined with this one.

    Returns:
        out [N, H, d], or (out, lse). A query that sees no key gets out 0 and lse -inf, and so do tokens past the last block.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "block_sparse_attention"
    if not isinstance(mask, BlockMask):
        fail(op, "mask", "a BlockMask", type(mask).__name__, TypeError)
    check_tensor(op, "q", q, ("N", "H", "d"))
    q, k, v = autocast(q, k, v)
    scale = check_qkv(op, q, k, v, 0.0, softmax_scale)
    _check_tokens(op, "q", q, mask.queries)
    _check_tokens(op, "k", k, mask.keys)
    if mask.num_heads not in (1, q.shape[1]):
        fail(op, "mask", f"1 or {q.shape[1]} heads", str(mask.num_heads))
    want_lse = check_bool(op, "return_lse", return_lse)
    width = v.shape[-1]
    q, k, v = of_one_head_dim(q, k, v)
    by_key = mask.transposed if torch.is_grad_enabled() and want_gradients(q, k, v) else (None, None)
    out, lse, _ = _forward(
        q, k, v, mask.queries.cu_blocks, mask.keys.cu_blocks, mask.queries.cu_samples, mask.keys.cu_samples,
        *mask.lists, *by_key, mask.queries.max_size, mask.keys.max_size, scale,
    )  # fmt: skip
    out = first_channels(out, width)
    return (out, lse) if want_lse else out


def _check_tokens(op: str, argument: str, x: Tensor, blocks: TokenBlocks) -> None:
    if blocks.device != x.device:
        fail(op, "mask", f"a mask on {x.device}", f"one on {blocks.device}")
    if x.shape[0] < blocks.layout.num_tokens:
        fail(op, argument, f"at least the {blocks.layout.num_tokens} tokens of the mask", str(x.shape[0]))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_blocks_q: Tensor,
    cu_blocks_k: Tensor,
    cu_samples_q: Tensor,
    cu_samples_k: Tensor,
    offsets: Tensor,
    indices: Tensor,
    key_offsets: Tensor | None,
    key_indices: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rows(q, k, v)
    out, lse, statistics = _fake(q)
    backends.call(
        "block_sparse_attention_forward",
        q,
        q=q,
        k=k,
        v=v,
        cu_blocks_q=cu_blocks_q,
        cu_blocks_k=cu_blocks_k,
        cu_samples_q=cu_samples_q,
        cu_samples_k=cu_samples_k,
        offsets=offsets,
        indices=indices,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
        out=out,
        lse=lse,
        statistics=statistics,
    )
    return out, lse, statistics


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(q), lse_like(q), statistics_like(q)


def _run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_blocks_q: Tensor,
    cu_blocks_k: Tensor,
    cu_samples_q: Tensor,
    cu_samples_k: Tensor,
    offsets: Tensor,
    indices: Tensor,
    key_offsets: Tensor,
    key_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (dout, q, k, v), (dlse,) = rows(dout, q, k, v), rows(dlse)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    backends.call(
        "block_sparse_attention_backward",
        q,
        dout=dout,
        dlse=dlse,
        q=q,
        k=k,
        v=v,
        out=out,
        statistics=statistics,
        cu_blocks_q=cu_blocks_q,
        cu_blocks_k=cu_blocks_k,
        cu_samples_q=cu_samples_q,
        cu_samples_k=cu_samples_k,
        offsets=offsets,
        indices=indices,
        key_offsets=key_offsets,
        key_indices=key_indices,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


def _save(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.scale = inputs
    out, _, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(out, statistics, *tensors)


def _grad(ctx: Context, dout: Tensor | None, dlse: Tensor | None, _: None) -> Grads:
    if dout is None and dlse is None:
        return (None,) * 14
    out, statistics, q, k, v, *blocks, offsets, indices, key_offsets, key_indices = ctx.saved_tensors
    by_query, by_key = BlockLists(offsets, indices), BlockLists(key_offsets, key_indices)
    if key_offsets is None:  # a program that was exported without gradients
        rows, columns = (cu_blocks.shape[0] - 1 for cu_blocks in blocks[:2])
        num_heads = (offsets.shape[0] - 1) // rows if rows else 1
        by_key = transposed(*by_query, num_heads, rows, columns)
    return *_backward(
        cotangent(dout, q), dlse, q, k, v, out, statistics, *blocks, *by_query, *by_key, ctx.block_q, ctx.block_k, ctx.scale
    ), *(None,) * 11  # fmt: skip


_BLOCKS = "Tensor cu_blocks_q, Tensor cu_blocks_k, Tensor cu_samples_q, Tensor cu_samples_k, Tensor offsets, Tensor indices"
_SIZES = "SymInt block_q, SymInt block_k, float scale"
_backward = register(
    "block_sparse_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, "
    f"{_BLOCKS}, Tensor key_offsets, Tensor key_indices, {_SIZES}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda dout, dlse, q, k, v, *_: (empty_like(q), empty_like(k), empty_like(v)),
)
_forward = register(
    f"block_sparse_attention_forward(Tensor q, Tensor k, Tensor v, {_BLOCKS}, Tensor? key_offsets, Tensor? key_indices, {_SIZES})"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _grad,
    _save,
)
