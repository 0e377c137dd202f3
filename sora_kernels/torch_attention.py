"""Attention with the signatures of torch: `scaled_dot_product_attention` and `varlen_attn`; the formulas are attention.py's."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor

from .attention_arguments import attend, bias_of_mask, check_unpaged, first_channels, of_one_head_dim
from .attention_op import Longest, attention_forward
from .checks import UNBOUNDED, AttentionNames, check_bool, check_qkv, check_tensor, fail
from .library import autocast


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int | None = None,
    max_k: int | None = None,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """Packed attention with the signature of `torch.nn.attention.varlen.varlen_attn`, on any device.

    Args:
        query: [Nq, H, d].
        key, value: [Nk, Hk, d]; Hk may differ from H only with `enable_gqa`. value may have another head dim.
        cu_seq_q, cu_seq_k: int32 [B+1]; None for the keys means the same as the queries.
        max_q, max_k: of the longest sample, as `flash_attn_varlen_func` takes them.
        return_aux: torch's `AuxRequest`; with `lse=True` returns (out, lse), lse float32 [H, Nq].
        window_size: (-1, 0) is causal, (L, R) a window, as in `flash_attn_func`.
        seqused_k: int32 [B]: sample b has only its first seqused_k[b] keys, as in `flash_attn_varlen_func`. Differentiable here.
        block_table: must be None: there is no paged cache here.
        num_splits: taken for compatibility: a sample's numbers never depend on what it is packed with.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "varlen_attn"
    check_tensor(op, "query", query, ("Nq", "H", "d"))
    check_tensor(op, "key", key, ("Nk", "Hk", "d"))
    if not check_bool(op, "enable_gqa", enable_gqa) and query.shape[1] != key.shape[1]:
        fail(op, "key", f"{query.shape[1]} heads (or enable_gqa=True)", f"{key.shape[1]}")
    cu_seq_k = cu_seq_q if cu_seq_k is None else cu_seq_k
    if return_aux is not None and not hasattr(return_aux, "lse"):
        fail(op, "return_aux", "None or torch's AuxRequest", repr(return_aux), TypeError)
    want_lse = return_aux is not None and return_aux.lse
    check_unpaged(op, block_table, num_splits)
    names = AttentionNames("query", "key", "value", "scale", "cu_seq_q", "cu_seq_k")
    result = attend(
        op, query, key, value, (cu_seq_q, cu_seq_k), 0.0, scale, False, window_size, 0.0, None, want_lse, names, seqused_k,
        Longest.of(max_q, max_k),
    )  # fmt: skip
    return result[:2] if want_lse else result


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of a dense batch; signature and semantics of `torch.nn.functional.scaled_dot_product_attention`.

    >>> q = torch.randn(2, 8, 1024, 64); k, v = torch.randn(2, 2, 8, 77, 64)
    >>> scaled_dot_product_attention(q, k, v).shape
    torch.Size([2, 8, 1024, 64])
    >>> scaled_dot_product_attention(q, k[:1], v[:1, :1, :, :32]).shape                   # batch and heads broadcast
    torch.Size([2, 8, 1024, 32])

    Args:
        query: [..., H, S, d], or [S, d].
        key: [..., Hk, Sk, d]; Hk may differ from H only with `enable_gqa`.
        value: [..., Hk, Sk, dv]; where dv differs from d, what is narrower is copied with zeros behind its channels.
        attn_mask: broadcastable to [..., H, S, Sk]: bool (True is seen) or float (added to the scores, as it
            is: autocast does not round it), or torch's `causal_lower_right` or `causal_upper_left` of S and Sk. The gradient of a
            float mask, where it needs one, is that of the formula in plain torch, which builds the scores of one sample at a time.
        dropout_p: must be 0.
        is_causal: key j is seen by query i iff j <= i (aligned to the top left); excludes `attn_mask`.
        scale: scale of q.k; default 1/sqrt(d).

    Leading dimensions broadcast, and so do heads without `enable_gqa`, all of them without a copy if there is one of them.

    Returns:
        [..., H, S, dv].

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "scaled_dot_product_attention"
    check_tensor(op, "query", query)
    query, key, value = autocast(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor, dtype=query.dtype, like=query)
        if tensor.ndim < 2:
            fail(op, name, "shape [..., H, S, d] or [S, d]", str(list(tensor.shape)))
    rank = max(query.ndim, key.ndim, value.ndim)
    if key.shape[-1] != query.shape[-1]:
        fail(op, "key", f"a head dim of {query.shape[-1]}", f"{key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        fail(op, "value", f"{key.shape[-2]} keys", f"{value.shape[-2]}")
    grouped = check_bool(op, "enable_gqa", enable_gqa)
    if rank < 3 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        query, key, value = _broadcast(op, max(rank, 3), query, key, value, grouped)
    lead = query.shape[:-3]
    batch = math.prod(lead)
    q, k, v = (x.reshape(batch, *x.shape[-3:]).transpose(1, 2) for x in (query, key, value))
    scale = check_qkv(op, q, k, v, dropout_p, scale, AttentionNames("query", "key", "value", "scale"))
    sizes = query.shape[-2], key.shape[-2]
    right = sizes[0] - sizes[1] if check_bool(op, "is_causal", is_causal) else UNBOUNDED
    bias = None
    if attn_mask is not None:
        if is_causal:
            fail(op, "attn_mask", "None with is_causal=True", "a mask")
        if _is_causal_bias(attn_mask):
            right = _right_side(op, attn_mask, sizes)
        else:
            bias = bias_of_mask(op, attn_mask, (*lead, query.shape[-3], *sizes), q)
    width = v.shape[-1]
    q, k, v = of_one_head_dim(q, k, v)
    out, *_ = attention_forward(q, k, v, None, None, bias, None, scale, UNBOUNDED, right, 0.0, *Longest())
    out = first_channels(out, width).transpose(1, 2)
    return out.reshape(*(lead if rank > 2 else ()), *out.shape[1 if rank > 2 else 2 :])


def _broadcast(op: str, rank: int, query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors with `rank` dimensions, leading ones alike, and as many heads as the query has or one."""
    query, key, value = (x if x.ndim == rank else x[(None,) * (rank - x.ndim)] for x in (query, key, value))
    lead = list(query.shape[:-3])
    for name, x in (("key", key), ("value", value)):
        for axis, (n, m) in enumerate(zip(lead, x.shape[:-3], strict=True)):
            if n != m and n != 1 and m != 1:
                fail(op, name, f"leading dimensions that broadcast to {lead}", str(list(x.shape[:-3])))
            lead[axis] = m if n == 1 else n
    heads, key_heads = query.shape[-3], key.shape[-3]
    if grouped and value.shape[-3] != key_heads:
        fail(op, "value", f"{key_heads} heads, as many as key", f"{value.shape[-3]}")
    if not grouped:
        for name, x in (("key", key), ("value", value)):
            if x.shape[-3] not in (heads, 1) and heads != 1:
                fail(op, name, f"{heads} heads (or enable_gqa=True)", f"{x.shape[-3]}")
            heads = x.shape[-3] if heads == 1 else heads
        key_heads = 1 if key.shape[-3] == value.shape[-3] == 1 else heads
        if key_heads != value.shape[-3]:
            value = value.expand(*value.shape[:-3], key_heads, *value.shape[-2:])
    query, key, value = (
        x if x.shape[:-2] == (*lead, h) else x.expand(*lead, h, *x.shape[-2:])
        for x, h in ((query, heads), (key, key_heads), (value, value.shape[-3]))
    )
    return query, key, value


def _is_causal_bias(mask: object) -> bool:
    """Whether this is one of torch's causal masks, whose module nobody has who has none; importing it takes a second."""
    module = sys.modules.get("torch.nn.attention.bias")
    return type(mask) is not Tensor and module is not None and isinstance(mask, module.CausalBias)


def _right_side(op: str, mask: Any, sizes: tuple[int, int]) -> int:
    """How far beyond its own place, from the end, a query sees: the window of torch's causal mask."""
    if (mask.seq_len_q, mask.seq_len_kv) != sizes:
        fail(op, "attn_mask", f"a causal mask of {sizes[0]} queries and {sizes[1]} keys", f"{mask.seq_len_q} and {mask.seq_len_kv}")
    return 0 if mask.variant.name == "LOWER_RIGHT" else sizes[0] - sizes[1]
