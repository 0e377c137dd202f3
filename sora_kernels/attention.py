"""Attention over packed and dense batches, as drop-ins for flash_attn, torch's SDPA and varlen_attn.

    s_ij = scale * q_i . k_j                          (softcap: s_ij <- c * tanh(s_ij / c); then + mask or ALiBi)
    lse_i = log sum_j exp(s_ij)                       over the keys j that query i sees
    out_i = sum_j exp(s_ij - lse_i) v_j

computed with an online softmax over blocks of keys (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022): no S x S buffer
exists at any time. A query that sees no key gets out 0 and lse -inf. Tokens past the last boundary get zeros. Sums are float32
whatever the storage dtype, the backward is deterministic, and q, k and v may be views into one fused projection. Under autocast
they are taken in its lower dtype, as torch's own attention takes them.

Forward-mode derivatives and derivatives of gradients are those of the formula in plain torch, which does build the S x S scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .attention_op import attention_forward
from .checks import (
    FLOATS,
    UNBOUNDED,
    AttentionNames,
    check_bool,
    check_cu_seqlens,
    check_number,
    check_qkv,
    check_tensor,
    fail,
    side,
)
from .library import autocast
from .spatiotemporal_attention import spatiotemporal_attention as spatiotemporal_attention

# Of softcap, which kernels divide and multiply by in float32.
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 8


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of a dense batch; signature and semantics of FlashAttention-2.

    >>> q = torch.randn(2, 1024, 8, 64); k, v = torch.randn(2, 2, 2048, 4, 64)      # grouped-query: 8 heads share 4
    >>> flash_attn_func(q, k, v, causal=True).shape
    torch.Size([2, 1024, 8, 64])

    Args:
        q: [B, S, H, d].
        k, v: [B, Sk, Hk, d]; H is a multiple of Hk, and consecutive query heads share a key head.
        dropout_p: must be 0: diffusion transformers train without attention dropout.
        softmax_scale: scale of q.k; default 1/sqrt(d).
        causal: key j is seen by query i iff j <= i + Sk - S (aligned to the bottom right).
        window_size: (L, R): keys i+Sk-S-L to i+Sk-S+R, both included, are seen; -1 is no limit.
        softcap: c > 0 caps scores smoothly at +-c.
        alibi_slopes: float32 [H] or [B, H]: subtracts slope * |i + Sk - S - j|.
        deterministic: taken for compatibility; the backward always is.
        return_attn_probs: also return lse, float32 [B, H, S], and an empty tensor where FlashAttention has its dropout mask.
            lse is differentiable. It is -inf for a query without keys (FlashAttention-2 stores +inf).

    Returns:
        out [B, S, H, d], or (out, lse, empty).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return _flash(
        "flash_attn_func", q, k, v, None, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` on a fused projection qkv [B, S, 3, H, d] -> [B, S, H, d]."""
    op = "flash_attn_qkvpacked_func"
    check_tensor(op, "qkv", qkv, ("B", "S", 3, "H", "d"))
    q, k, v = qkv.unbind(2)
    return _flash(
        op, q, k, v, None, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` on q [B, S, H, d] and a fused projection kv [B, Sk, 2, Hk, d] -> [B, S, H, d]."""
    op = "flash_attn_kvpacked_func"
    check_tensor(op, "kv", kv, ("B", "Sk", 2, "Hk", "d"))
    k, v = kv.unbind(2)
    return _flash(
        op, q, k, v, None, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of a packed batch; signature and semantics of FlashAttention-2.

    Sample b's queries are rows cu_seqlens_q[b]:cu_seqlens_q[b+1] of q, its keys rows cu_seqlens_k[b]:cu_seqlens_k[b+1] of k and v.

    >>> q, k, v = torch.randn(3, 1600, 8, 64)
    >>> cu = torch.tensor([0, 256, 256, 1536], dtype=torch.int32)                  # 256, 0 and 1280 tokens; 64 rows of slack
    >>> flash_attn_varlen_func(q, k, v, cu, cu, 1280, 1280).shape
    torch.Size([1600, 8, 64])

    Args:
        q: [Nq, H, d].
        k, v: [Nk, Hk, d].
        cu_seqlens_q, cu_seqlens_k: int32 [B+1], from 0, never falling, at most Nq and Nk.
        max_seqlen_q, max_seqlen_k: taken for compatibility; the boundaries alone decide.
        block_table: must be None: there is no paged cache here.
        return_attn_probs: also return lse, float32 [H, Nq], and an empty tensor.

    The others are `flash_attn_func`'s.

    Returns:
        out [Nq, H, d], or (out, lse, empty).
    """
    op = "flash_attn_varlen_func"
    if block_table is not None:
        fail(op, "block_table", "None (no paged cache)", type(block_table).__name__)
    return _flash(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` on a fused projection qkv [N, 3, H, d] -> [N, H, d]."""
    op = "flash_attn_varlen_qkvpacked_func"
    check_tensor(op, "qkv", qkv, ("N", 3, "H", "d"))
    q, k, v = qkv.unbind(1)
    return _flash(
        op, q, k, v, cu_seqlens, cu_seqlens, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` on q [Nq, H, d] and a fused projection kv [Nk, 2, Hk, d] -> [Nq, H, d]."""
    op = "flash_attn_varlen_kvpacked_func"
    check_tensor(op, "kv", kv, ("Nk", 2, "Hk", "d"))
    k, v = kv.unbind(1)
    return _flash(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, return_attn_probs,
    )  # fmt: skip


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
) -> Any:
    """Packed attention with the signature of `torch.nn.attention.varlen.varlen_attn`, on any device.

    Args:
        query: [Nq, H, d].
        key, value: [Nk, Hk, d]; Hk may differ from H only with `enable_gqa`.
        cu_seq_q, cu_seq_k: int32 [B+1]; None for the keys means the same as the queries.
        return_aux: torch's `AuxRequest`; with `lse=True` returns (out, lse), lse float32 [H, Nq].
        window_size: (-1, 0) is causal, (L, R) a window, as in `flash_attn_func`.
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
    names = AttentionNames("query", "key", "value", "scale", "cu_seq_q", "cu_seq_k")
    result = _flash(op, query, key, value, cu_seq_q, cu_seq_k, 0.0, scale, False, window_size, 0.0, None, want_lse, names)
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

    Args:
        query: [..., H, S, d].
        key, value: [..., Hk, Sk, d]; Hk may differ from H only with `enable_gqa`.
        attn_mask: broadcastable to [..., H, S, Sk]: bool (True is seen) or float (added to the scores, as it
            is: autocast does not round it); not differentiable here.
        is_causal: key j is seen by query i iff j <= i (aligned to the top left); excludes `attn_mask`.
    """
    op = "scaled_dot_product_attention"
    check_tensor(op, "query", query)
    query, key, value = autocast(query, key, value)
    if query.ndim < 3:
        fail(op, "query", "shape [..., H, S, d]", str(list(query.shape)))
    lead = query.shape[:-3]
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(op, name, tensor, (*lead, "Hk", "Sk", "d"), like=query)
    if not check_bool(op, "enable_gqa", enable_gqa) and query.shape[-3] != key.shape[-3]:
        fail(op, "key", f"{query.shape[-3]} heads (or enable_gqa=True)", f"{key.shape[-3]}")
    batch = math.prod(lead)
    q, k, v = (x.reshape(batch, *x.shape[-3:]).transpose(1, 2) for x in (query, key, value))
    scores = (*lead, query.shape[-3], query.shape[-2], key.shape[-2])
    bias = None if attn_mask is None else _bias(op, attn_mask, scores, is_causal, q).reshape(batch, *scores[-3:])
    scale = check_qkv(op, q, k, v, dropout_p, scale, AttentionNames("query", "key", "value", "scale"))
    right = q.shape[1] - k.shape[1] if check_bool(op, "is_causal", is_causal) else UNBOUNDED
    out, *_ = attention_forward(q, k, v, None, None, bias, None, scale, UNBOUNDED, right, 0.0)
    return out.transpose(1, 2).reshape(query.shape)


def _flash(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    names: AttentionNames = AttentionNames(),  # noqa: B008
) -> Any:
    dense = op in ("flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func")
    check_tensor(op, "q", q, ("B", "S", "H", "d") if dense else ("Nq", "H", "d"))
    q, k, v = autocast(q, k, v)
    scale = check_qkv(op, q, k, v, dropout_p, softmax_scale, names)
    if not dense:
        check_cu_seqlens(op, names.cu_q, cu_q, q)  # type: ignore[arg-type]
        check_cu_seqlens(op, names.cu_k, cu_k, q, cu_q.shape[0])  # type: ignore[arg-type,union-attr]
    left, right = _decode_window(op, window_size, causal)
    softcap = check_number(op, "softcap", softcap)
    largest = math.inf if q.dtype == torch.float64 else _LARGEST
    softcap = min(max(softcap, _SMALLEST), largest) if softcap > 0 else 0.0
    return_attn_probs = check_bool(op, "return_attn_probs", return_attn_probs)
    alibi = None
    if alibi_slopes is not None:
        batch, heads = (q.shape[0] if dense else cu_q.shape[0] - 1), q.shape[-2]  # type: ignore[union-attr]
        check_tensor(op, "alibi_slopes", alibi_slopes, dtype=torch.float32, like=q)
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            fail(op, "alibi_slopes", f"shape [{heads}] or [{batch}, {heads}]", str(list(alibi_slopes.shape)))
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            fail(op, "alibi_slopes", "slopes that need no gradient", "requires_grad=True")
        alibi = alibi_slopes.expand(batch, heads)
    out, lse, _ = attention_forward(q, k, v, cu_q, cu_k, None, alibi, scale, left, right, softcap)
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


def _decode_window(op: str, window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not pair or any(isinstance(w, bool) or not isinstance(w, int) or w < -1 for w in window_size):
        fail(op, "window_size", "two sizes >= -1 (left, right)", repr(window_size))
    left, right = (UNBOUNDED if w == -1 else side(w) for w in window_size)
    return left, 0 if check_bool(op, "causal", causal) else right


def _bias(op: str, mask: Tensor, scores: tuple[int, ...], is_causal: bool, q: Tensor) -> Tensor:
    """The mask as numbers to add to the scores, expanded to their shape without copying."""
    check_tensor(op, "attn_mask", mask, dtype=(torch.bool, *FLOATS), like=q)
    if is_causal:
        fail(op, "attn_mask", "None with is_causal=True", "a mask")
    if mask.requires_grad and torch.is_grad_enabled():
        fail(op, "attn_mask", "a mask that needs no gradient", "requires_grad=True")
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=compute).masked_fill(~mask, float("-inf"))
    try:
        return mask.to(compute).expand(scores)
    except RuntimeError:
        fail(op, "attn_mask", f"a shape that broadcasts to {list(scores)}", str(list(mask.shape)))
