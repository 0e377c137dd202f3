"""Attention for inference with int8 products of queries and keys, as SageAttention has them.

    out_i = sum_j softmax_j(scale * q'_i . k'_j) v_j

q' is q, and k' is k less the mean of the sample's keys, each rounded to one of 255 steps of c = max |x| / 127, for each 128 queries
and each 64 keys of a head. Their products are exact, in int32. Probabilities and values are multiplied in the dtype of v. lse is
that of scale * (q'_i . k'_j + q_i . mean).

The mean changes no probability, as it takes the same number, scale * q_i . mean, from all scores of a query. But keys often have
large channels that are nearly the same for all tokens, and without them steps are smaller: docs/model.md has errors with and
without.

Why a function of its own: its results are close to those of attention but not within its tolerance, and it has no gradients. So a
caller chooses it by name, and nothing chooses it for him.

Sources: Zhang et al., SageAttention: Accurate 8-bit attention for plug-and-play inference acceleration (ICLR 2025).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import backends
from .attention_arguments import bias_of_mask, decode_window, first_channels, of_one_head_dim
from .attention_op import bias_of_all_scores, lse_like
from .checks import check_bool, check_boundaries, check_cu_seqlens, check_qkv, check_tensor, fail
from .library import autocast, register_inference, rows
from .memory import empty_like

# Tokens of a sample and head that share a scale. Blocks of the kernels divide them.
QUERIES, KEYS = 128, 64


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
) -> Any:
    """Attention with int8 products of queries and keys, of a packed batch, or of a dense one without boundaries.

    >>> q, k, v = torch.randn(3, 1600, 8, 64)
    >>> cu = torch.tensor([0, 256, 256, 1536], dtype=torch.int32)                  # 256, 0 and 1280 tokens; 64 rows of slack
    >>> int8_attention(q, k, v, cu, cu).shape
    torch.Size([1600, 8, 64])

    Only GPUs have a kernel for it. Elsewhere the reference computes the same numbers, in plain torch, for a look at their error.

    Args:
        q: [Nq, H, d], or [B, S, H, d].
        k, v: [Nk, Hk, d], or [B, Sk, Hk, d]; consecutive query heads share a key head. v may have another head dim; see
            `flash_attn_func`.
        cu_seqlens_q, cu_seqlens_k: int32 [B+1], from 0, never falling, at most Nq and Nk; both or none.
        attn_mask: of a dense batch, broadcastable to [B, H, S, Sk]: bool (True is seen) or float, added to the scores.
        softmax_scale, causal, window_size: `flash_attn_func`'s; a query sees what they and the mask let it see.
        return_lse: also return lse, float32 [H, Nq], or [B, H, S].

    Returns:
        out [Nq, H, dv] or [B, S, H, dv], or (out, lse). A query that sees no key gets out 0 and lse -inf, and so do tokens past the
        last boundary. A query that is not finite makes NaN of those that share its scale, and a key of all queries of its sample.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; ValueError also where a gradient is needed.
    """
    op = "int8_attention"
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        absent, present = ("cu_seqlens_k", "cu_seqlens_q") if cu_seqlens_k is None else ("cu_seqlens_q", "cu_seqlens_k")
        fail(op, absent, f"boundaries beside {present}", "None")
    if cu_seqlens_q is None and isinstance(q, Tensor) and q.ndim == 3:
        fail(op, "cu_seqlens_q", "boundaries of packed q [Nq, H, d], or q [B, S, H, d]", "None")
    check_tensor(op, "q", q, ("B", "S", "H", "d") if cu_seqlens_q is None else ("Nq", "H", "d"))
    q, k, v = autocast(q, k, v)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q)
        check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q, cu_seqlens_q.shape[0])
    scale = check_qkv(op, q, k, v, 0.0, softmax_scale)
    left, right = decode_window(op, window_size, causal)
    bias = None
    if attn_mask is not None:
        if cu_seqlens_q is not None:
            fail(op, "attn_mask", "None in a packed batch", "a mask")
        bias = bias_of_mask(op, attn_mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), q)
    want_lse = check_bool(op, "return_lse", return_lse)
    width = v.shape[-1]
    q, k, v = of_one_head_dim(q, k, v)
    out, lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, bias, scale, left, right)
    out = first_channels(out, width)
    return (out, lse) if want_lse else out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    bias: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    if cu_q is not None and cu_k is not None:
        check_boundaries("int8_attention", "cu_seqlens_q", cu_q, q.shape[0])
        check_boundaries("int8_attention", "cu_seqlens_k", cu_k, k.shape[0])
    (q, k, v), (cu_q, cu_k), bias = rows(q, k, v), rows(cu_q, cu_k), bias_of_all_scores(bias, q, k)
    out, lse = _fake(q)
    backends.call(
        "int8_attention_forward",
        q,
        q=q,
        k=k,
        v=v,
        cu_q=cu_q,
        cu_k=cu_k,
        bias=bias,
        scale=scale,
        left=left,
        right=right,
        block_q=QUERIES,
        block_k=KEYS,
        out=out,
        lse=lse,
    )
    return out, lse


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_like(q), lse_like(q)


_forward = register_inference(
    "int8_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_q, Tensor? cu_k, Tensor? attn_mask, float scale, SymInt left, "
    "SymInt right) -> (Tensor, Tensor)",
    _run,
    _fake,
)
