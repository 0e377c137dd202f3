"""Attention of packed videos and images through windows in space and time.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        over the tokens j that token i sees

Which these are is decided per axis of the grid of token i's span; see `spatiotemporal_attention`. The score matrix is never built,
blocks of keys that no query of a tile sees are skipped, and the backward is deterministic.

Source: Hassani et al., Neighborhood Attention Transformer (2023), whose window rule this follows.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from . import backends
from .attention_arguments import first_channels, of_one_head_dim
from .attention_op import Longest, attention_forward, statistics_like
from .checks import UNBOUNDED, check_cu_seqlens, check_qkv, check_tables, check_tensor, fail, side, triple
from .layout import PackedLayout
from .library import Context, Grads, autocast, cotangent, register, rows
from .memory import empty_like


def spatiotemporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    window: tuple[int | None, int | None, int | None] | None = None,
    causal: tuple[bool, bool, bool] = (False, False, False),
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of packed videos and images in which, inside a span, a token sees its (wt, wh, ww) neighbourhood.

    Along an axis of L tokens a query at i sees exactly w = min(window, L) keys, from clamp(i - w//2, 0, L - w): the window shifts
    inward at the borders (NATTEN's rule). Along a causal axis it sees max(i - w + 1, 0) to i. Between spans of one sample
    everything is seen, and so it is inside a span of step 0, whose tokens (text) all share one position.

    >>> layout = PackedLayout.from_grids([(16, 32, 32), (1, 64, 36)])
    >>> q, k, v = torch.randn(3, layout.num_tokens, 8, 64)
    >>> spatiotemporal_attention(q, k, v, layout, window=(5, 9, 9), causal=(True, False, False)).shape
    torch.Size([18688, 8, 64])

    Args:
        q: [N, H, d].
        k, v: [N, Hk, d]; v may have another head dim, which the output then has; see `flash_attn_func`.
        layout: of the N tokens.
        window: keys seen along T, H and W; None (for all or for one axis) is the whole axis.
        causal: per axis.
        softmax_scale: default 1/sqrt(d).
    """
    op = "spatiotemporal_attention"
    if not isinstance(layout, PackedLayout):
        fail(op, "layout", "a PackedLayout", type(layout).__name__, TypeError)
    check_tensor(op, "q", q, ("N", "H", "d"))
    if layout.num_tokens > q.shape[0]:
        fail(op, "layout", f"at most {q.shape[0]} tokens", f"{layout.num_tokens}")
    check_cu_seqlens(op, "layout.cu_seqlens", layout.cu_seqlens, q)
    q, k, v = autocast(q, k, v)
    check_tensor(op, "k", k, (q.shape[0], "Hk", "d"))
    scale = check_qkv(op, q, k, v, 0.0, softmax_scale)
    axes = (None, None, None) if window is None else window
    if (
        not isinstance(axes, tuple | list)
        or len(axes) != 3
        or any(w is not None and (isinstance(w, bool) or not isinstance(w, int | np.integer) or w < 1) for w in axes)
    ):
        fail(op, "window", "three sizes >= 1, or None for a whole axis", repr(window))
    width = v.shape[-1]
    q, k, v = of_one_head_dim(q, k, v)
    sizes = [0 if w is None else side(w if isinstance(w, int) else int(w)) for w in axes]
    causal_axes = triple(op, "causal", causal, bool)
    if not any(sizes) and not any(causal_axes):
        cu, longest = layout.cu_seqlens, Longest.of(layout.max_seqlen, layout.max_seqlen)
        out, *_ = attention_forward(q, k, v, cu, cu, None, None, scale, UNBOUNDED, UNBOUNDED, 0.0, *longest)
        return first_channels(out, width)
    tables = layout.cu_seqlens, layout.cu_spans, layout.grid, layout.step
    return first_channels(_forward(q, k, v, *tables, sizes, causal_axes, scale)[0], width)


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_spans: Tensor,
    grid: Tensor,
    step: Tensor,
    window: list[int],
    causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    check_tables("spatiotemporal_attention", q, cu_spans, grid, step)
    q, k, v = rows(q, k, v)
    out, statistics = _fake_forward(q)
    backends.call(
        "spatiotemporal_attention_forward",
        q,
        q=q,
        k=k,
        v=v,
        cu_seqlens=cu_seqlens,
        cu_spans=cu_spans,
        grid=grid,
        step=step,
        window=window,
        causal=causal,
        scale=scale,
        out=out,
        statistics=statistics,
    )
    return out, statistics


def _run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_seqlens: Tensor,
    cu_spans: Tensor,
    grid: Tensor,
    step: Tensor,
    window: list[int],
    causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = rows(dout, q, k, v)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    backends.call(
        "spatiotemporal_attention_backward",
        q,
        dout=dout,
        q=q,
        k=k,
        v=v,
        out=out,
        statistics=statistics,
        cu_seqlens=cu_seqlens,
        cu_spans=cu_spans,
        grid=grid,
        step=step,
        window=window,
        causal=causal,
        scale=scale,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


def _fake_forward(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_like(q), statistics_like(q)


def _save(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_spans, grid, step, *ctx.scalars = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_spans, grid, step)


def _grad(ctx: Context, dout: Tensor | None, _: None) -> Grads:
    q, *saved = ctx.saved_tensors
    return *_backward(cotangent(dout, q), q, *saved, *ctx.scalars), *(None,) * 7


_ARGUMENTS = "Tensor cu_seqlens, Tensor cu_spans, Tensor grid, Tensor step, SymInt[] window, bool[] causal, float scale"
_backward = register(
    "spatiotemporal_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda dout, q, k, v, *_: (empty_like(q), empty_like(k), empty_like(v)),
)
_forward = register(
    f"spatiotemporal_attention_forward(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    _grad,
    _save,
)
