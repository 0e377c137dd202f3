"""Attention over packed and dense batches, as drop-ins for flash_attn, torch's SDPA and varlen_attn.

    s_ij = scale * q_i . k_j                          (softcap: s_ij <- c * tanh(s_ij / c); then + mask or ALiBi)
    lse_i = log sum_j exp(s_ij)                       over the keys j that query i sees
    out_i = sum_j exp(s_ij - lse_i) v_j

computed with an online softmax over blocks of keys (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022): no S x S buffer
exists at any time. A query that sees no key gets out 0 and lse -inf. Tokens past the last boundary get zeros. Sums are float32
whatever the storage dtype, the backward is deterministic, and q, k and v may be views into one fused projection. Under autocast
they are taken in its lower dtype, as torch's own attention takes them.

Forward-mode derivatives, derivatives of gradients and the gradient of a mask are those of the formula in plain torch, which does
build the S x S scores.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention_arguments import attend, check_unpaged
from .attention_op import Longest
from .checks import AttentionNames, check_tensor
from .kv_cache import flash_attn_with_kvcache as flash_attn_with_kvcache
from .spatiotemporal_attention import spatiotemporal_attention as spatiotemporal_attention
from .torch_attention import scaled_dot_product_attention as scaled_dot_product_attention
from .torch_attention import varlen_attn as varlen_attn


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
        k: [B, Sk, Hk, d]; H is a multiple of Hk, and consecutive query heads share a key head.
        v: [B, Sk, Hk, dv]. Where dv differs from d, what is narrower is copied with zeros behind its channels, and the kernel takes
            the time of the longer head dim.
        dropout_p: must be 0: diffusion transformers train without attention dropout.
        softmax_scale: scale of q.k; default 1/sqrt(d).
        causal: key j is seen by query i iff j <= i + Sk - S (aligned to the bottom right).
        window_size: (L, R): keys i+Sk-S-L to i+Sk-S+R, both included, are seen; -1 is no limit. Integers of any kind: Python's,
            NumPy's, or a tensor's on the CPU.
        softcap: c > 0 caps scores smoothly at +-c.
        alibi_slopes: float32 [H] or [B, H]: subtracts slope * |i + Sk - S - j|.
        deterministic: taken for compatibility; the backward always is.
        return_attn_probs: also return lse, float32 [B, H, S], and an empty tensor where FlashAttention has its dropout mask.
            lse is differentiable. It is -inf for a query without keys (FlashAttention-2 stores +inf).

    Returns:
        out [B, S, H, dv], or (out, lse, empty).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return attend(
        "flash_attn_func", q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
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
    return attend(
        op, q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, AttentionNames(q="qkv", k="qkv", v="qkv"),
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
    check_tensor(op, "q", q, ("B", "S", "H", "d"))
    check_tensor(op, "kv", kv, (q.shape[0], "Sk", 2, "Hk", q.shape[3]))
    k, v = kv.unbind(2)
    return attend(
        op, q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, AttentionNames(k="kv", v="kv"),
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
    *,
    seqused_k: Tensor | None = None,
) -> Any:
    """Attention of a packed batch; signature and semantics of FlashAttention-2.

    Sample b's queries are rows cu_seqlens_q[b]:cu_seqlens_q[b+1] of q, its keys rows cu_seqlens_k[b]:cu_seqlens_k[b+1] of k and v.

    >>> q, k, v = torch.randn(3, 1600, 8, 64)
    >>> cu = torch.tensor([0, 256, 256, 1536], dtype=torch.int32)                  # 256, 0 and 1280 tokens; 64 rows of slack
    >>> flash_attn_varlen_func(q, k, v, cu, cu, 1280, 1280).shape
    torch.Size([1600, 8, 64])

    Args:
        q: [Nq, H, d].
        k, v: [Nk, Hk, d]; v may have another head dim, as in `flash_attn_func`.
        cu_seqlens_q, cu_seqlens_k: int32 [B+1], from 0, never falling, at most Nq and Nk.
        max_seqlen_q, max_seqlen_k: tokens of the longest sample, or more. This package's kernels do not need them. Those of others
            do, give wrong results where they are too small, as in flash_attn, and are left out where they are not numbers; see
            `sora_kernels.backends.prefer`.
        block_table: must be None: there is no paged cache here.
        seqused_k: int32 [B]: sample b has only its first seqused_k[b] keys, as in FlashAttention-3. Causal masks, windows and ALiBi
            are aligned to their end, and the other keys get zero gradients. On the CPU a number that is negative or more than the
            sample has is an error; elsewhere it is not read and counts as the nearest possible one.
        return_attn_probs: also return lse, float32 [H, Nq], and an empty tensor.

    The others are `flash_attn_func`'s.

    Returns:
        out [Nq, H, d], or (out, lse, empty).
    """
    op = "flash_attn_varlen_func"
    check_unpaged(op, block_table)
    return attend(
        op, q, k, v, (cu_seqlens_q, cu_seqlens_k), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, seqused_k=seqused_k, longest=Longest.of(max_seqlen_q, max_seqlen_k),
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
    return attend(
        op, q, k, v, (cu_seqlens, cu_seqlens), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, AttentionNames(q="qkv", k="qkv", v="qkv", cu_q="cu_seqlens", cu_k="cu_seqlens"),
        longest=Longest.of(max_seqlen, max_seqlen),
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
    check_tensor(op, "q", q, ("Nq", "H", "d"))
    check_tensor(op, "kv", kv, ("Nk", 2, "Hk", q.shape[2]))
    k, v = kv.unbind(1)
    return attend(
        op, q, k, v, (cu_seqlens_q, cu_seqlens_k), dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, return_attn_probs, AttentionNames(k="kv", v="kv"), longest=Longest.of(max_seqlen_q, max_seqlen_k),
    )  # fmt: skip
