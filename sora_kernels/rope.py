"""3D rotary position embedding of packed queries and keys, alone or fused with QK-norm.

Pair p of axis a (p = 0 .. n_a - 1, with n_a = axes_dim[a] / 2) of a token at position (x_t, x_h, x_w) turns by

    angle = x_a * theta_a ** (-p / n_a)               computed in float64, once per index along each axis of a span
    (u, v) <- (u cos - v sin, u sin + v cos)          in float32

Source: Su et al., RoFormer (2021), with the channels split among the three axes as video models do. Positions come from the layout:
a continuation in time is an `origin`, a change of resolution a `step`, and a token of text (origin and step 0) stays as it is.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from . import backends
from .checks import (
    check_bool,
    check_boundaries,
    check_cu_seqlens,
    check_float32,
    check_int,
    check_tables,
    check_tensor,
    fail,
    or_float32,
    triple,
)
from .layout import PackedLayout
from .library import Context, Grads, cotangent, of_one_dtype, register, rows
from .memory import empty_like

Theta = float | tuple[float, float, float]


def default_axes_dim(head_dim: int) -> tuple[int, int, int]:
    """Channels for T, H and W when none are given: of c = head_dim / 2 pairs, c - 2*(c//3), c//3 and c//3 (Wan's split).

    >>> default_axes_dim(64), default_axes_dim(128)
    ((24, 20, 20), (44, 42, 42))
    """
    head_dim = check_int("default_axes_dim", "head_dim", head_dim, 0)
    third = head_dim // 2 // 3
    return head_dim - 4 * third, 2 * third, 2 * third


def rope_3d(
    x: Tensor,
    layout: PackedLayout,
    *,
    theta: Theta = 10000.0,
    axes_dim: tuple[int, int, int] | None = None,
    interleaved: bool = True,
) -> Tensor:
    """Rotates packed queries or keys by their positions in space and time.

    >>> layout = PackedLayout.from_grids([(4, 8, 8), (1, 16, 9)])
    >>> rope_3d(torch.randn(400, 8, 64), layout).shape
    torch.Size([400, 8, 64])

    Args:
        x: [N, H, d], d even.
        layout: of the N tokens; tokens past its end give zeros.
        theta: base of the frequencies, one for all axes or one each for T, H, W.
        axes_dim: channels for T, H and W, even, together d; default `default_axes_dim(d)`.
        interleaved: pair i is channels (2i, 2i+1); if False (the "half" or GPT-NeoX layout) channels (i, i + d/2). Pairs are
            counted over the axes laid end to end.

    Returns:
        [N, H, d] in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "rope_3d"
    check_tensor(op, "x", x, ("N", "H", "d"))
    tables = _check_layout(op, layout, x)
    angles = _check_angles(op, x.shape[-1], theta, axes_dim)
    return _rope(x, *tables, *angles, check_bool(op, "interleaved", interleaved), False)


def qk_norm_rope_3d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    layout: PackedLayout,
    *,
    across_heads: bool = False,
    eps: float = 1e-6,
    theta: Theta = 10000.0,
    axes_dim: tuple[int, int, int] | None = None,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """RMS-normalises packed queries and keys, then rotates them, in one pass.

        q <- rope_3d(q / sqrt(mean(q**2) + eps) * q_weight), and k alike

    >>> layout = PackedLayout.from_grids([(4, 8, 8)])
    >>> q, k = torch.randn(2, 256, 8, 64)
    >>> q, k = qk_norm_rope_3d(q, k, torch.ones(64), torch.ones(64), layout)

    Args:
        q: [N, H, d].
        k: [N, Hk, d].
        q_weight, k_weight: scale after the norm, [d], or [H*d] and [Hk*d] with `across_heads`, in q's dtype or float32; None is
            1.
        layout: of the N tokens.
        across_heads: take the mean over all heads of a token (Wan) instead of each head's d channels (most others).
        eps: added to the mean square, at least 0.

    The others are `rope_3d`'s.

    Returns:
        q and k in their shapes and dtype.
    """
    op = "qk_norm_rope_3d"
    across_heads = check_bool(op, "across_heads", across_heads)
    check_tensor(op, "q", q, ("N", "H", "d"))
    check_tensor(op, "k", k, (q.shape[0], "Hk", q.shape[2]), dtype=q.dtype, like=q)
    for name, weight, x in (("q_weight", q_weight, q), ("k_weight", k_weight, k)):
        if weight is not None:
            size, all_heads = x.shape[2], x.shape[1] * x.shape[2]
            check_tensor(op, name, weight, dtype=or_float32(q), like=q)  # before its shape, which names the option for all heads
            if not across_heads and size != all_heads and weight.shape == (all_heads,):
                fail(op, name, f"shape [{size}], or across_heads=True for a norm of all heads", str(list(weight.shape)))
            check_tensor(op, name, weight, (all_heads if across_heads else size,), dtype=None)
    tables = _check_layout(op, layout, q)
    angles = _check_angles(op, q.shape[-1], theta, axes_dim)
    rest = check_bool(op, "interleaved", interleaved), across_heads, check_float32(op, "eps", eps, q, at_least=0)
    return _norm_rope(q, k, *of_one_dtype(q, q_weight, k_weight), *tables, *angles, *rest)[:2]


def _check_layout(op: str, layout: PackedLayout, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not isinstance(layout, PackedLayout):
        fail(op, "layout", "a PackedLayout", type(layout).__name__, TypeError)
    if layout.num_tokens > x.shape[0]:
        fail(op, "layout", f"at most {x.shape[0]} tokens", f"{layout.num_tokens}")
    check_cu_seqlens(op, "layout.cu_spans", layout.cu_spans, x, "S+1")
    return layout.cu_spans, layout.grid, layout.origin, layout.step


def _check_angles(op: str, d: int, theta: Theta, axes_dim: tuple[int, int, int] | None) -> tuple[list, list]:
    if d % 2 or d == 0:
        fail(op, "x" if op == "rope_3d" else "q", "an even head dim", f"{d}")
    axes = triple(op, "axes_dim", default_axes_dim(d) if axes_dim is None else axes_dim, int)
    if sum(axes) != d or any(n < 0 or n % 2 for n in axes):
        fail(op, "axes_dim", f"three even sizes that add up to {d}", repr(axes_dim))
    thetas = triple(op, "theta", (theta,) * 3 if isinstance(theta, (float, Real)) else theta, float)
    if not all(t > 0 for t in thetas):
        fail(op, "theta", "positive numbers", repr(theta))
    return thetas, axes


def _run_rope(
    x: Tensor,
    cu_spans: Tensor,
    grid: Tensor,
    origin: Tensor,
    step: Tensor,
    theta: list[float],
    axes_dim: list[int],
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    check_boundaries("rope_3d", "layout.cu_spans", cu_spans, x.shape[0])
    check_tables("rope_3d", x, cu_spans, grid, origin, step)
    (x,) = rows(x)
    out = empty_like(x)
    backends.call(
        "rope_3d",
        x,
        x=x,
        cu_spans=cu_spans,
        grid=grid,
        origin=origin,
        step=step,
        theta=theta,
        axes_dim=axes_dim,
        interleaved=interleaved,
        inverse=inverse,
        out=out,
    )
    return out


def _save_rope(ctx: Context, inputs: tuple, output: Tensor) -> None:
    _, *tables, ctx.theta, ctx.axes_dim, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(*tables)


def _grad_rope(ctx: Context, dout: Tensor) -> Grads:
    # A rotation's transpose is the rotation back.
    dx = _rope(dout, *ctx.saved_tensors, ctx.theta, ctx.axes_dim, ctx.interleaved, not ctx.inverse)
    return dx, *(None,) * 8


_TABLES = "Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, float[] theta, SymInt[] axes_dim, bool interleaved"
_rope = register(
    f"rope_3d(Tensor x, {_TABLES}, bool inverse) -> Tensor",
    _run_rope,
    lambda x, *_: empty_like(x),
    _grad_rope,
    _save_rope,
)


def _run_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cu_spans: Tensor,
    grid: Tensor,
    origin: Tensor,
    step: Tensor,
    theta: list[float],
    axes_dim: list[int],
    interleaved: bool,
    across_heads: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_boundaries("qk_norm_rope_3d", "layout.cu_spans", cu_spans, q.shape[0])
    check_tables("qk_norm_rope_3d", q, cu_spans, grid, origin, step)
    (q, k), (q_weight, k_weight) = rows(q, k), rows(q_weight, k_weight)
    q_out, k_out, q_rstd, k_rstd = _empty_norm_rope(q, k, across_heads)
    backends.call(
        "qk_norm_rope_3d_forward",
        q,
        q=q,
        k=k,
        q_weight=q_weight,
        k_weight=k_weight,
        cu_spans=cu_spans,
        grid=grid,
        origin=origin,
        step=step,
        theta=theta,
        axes_dim=axes_dim,
        interleaved=interleaved,
        across_heads=across_heads,
        eps=eps,
        q_out=q_out,
        k_out=k_out,
        q_rstd=q_rstd,
        k_rstd=k_rstd,
    )
    return q_out, k_out, q_rstd, k_rstd


def _empty_norm_rope(q: Tensor, k: Tensor, across_heads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_rstd, k_rstd = (x.new_empty((x.shape[0], 1 if across_heads else x.shape[1]), dtype=dtype) for x in (q, k))
    return empty_like(q), empty_like(k), q_rstd, k_rstd


def _run_norm_rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    cu_spans: Tensor,
    grid: Tensor,
    origin: Tensor,
    step: Tensor,
    theta: list[float],
    axes_dim: list[int],
    interleaved: bool,
    across_heads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (dq_out, dk_out, q, k), (q_weight, k_weight) = rows(dq_out, dk_out, q, k), rows(q_weight, k_weight)
    dq, dk, dq_weight, dk_weight = _fake_norm_rope_backward(dq_out, dk_out, q, k, q_weight, k_weight)
    backends.call(
        "qk_norm_rope_3d_backward",
        q,
        dq_out=dq_out,
        dk_out=dk_out,
        q=q,
        k=k,
        q_weight=q_weight,
        k_weight=k_weight,
        q_rstd=q_rstd,
        k_rstd=k_rstd,
        cu_spans=cu_spans,
        grid=grid,
        origin=origin,
        step=step,
        theta=theta,
        axes_dim=axes_dim,
        interleaved=interleaved,
        across_heads=across_heads,
        dq=dq,
        dk=dk,
        dq_weight=None if q_weight is None else dq_weight,
        dk_weight=None if k_weight is None else dk_weight,
    )
    return dq, dk, dq_weight, dk_weight


def _fake_norm_rope_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq_weight, dk_weight = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))
    return empty_like(q), empty_like(k), dq_weight, dk_weight


def _save_norm_rope(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, q_weight, k_weight, *tables, ctx.theta, ctx.axes_dim, ctx.interleaved, ctx.across_heads, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(q, k, q_weight, k_weight, *output[2:], *tables)


def _grad_norm_rope(ctx: Context, dq_out: Tensor | None, dk_out: Tensor | None, *_: None) -> Grads:
    q, k, q_weight, k_weight, *saved = ctx.saved_tensors
    cotangents = cotangent(dq_out, q), cotangent(dk_out, k)
    options = ctx.theta, ctx.axes_dim, ctx.interleaved, ctx.across_heads
    dq, dk, dq_weight, dk_weight = _norm_rope_backward(*cotangents, q, k, q_weight, k_weight, *saved, *options)
    return dq, dk, None if q_weight is None else dq_weight, None if k_weight is None else dk_weight, *(None,) * 9


_norm_rope_backward = register(
    "qk_norm_rope_3d_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, "
    f"Tensor q_rstd, Tensor k_rstd, {_TABLES}, bool across_heads) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_norm_rope_backward,
    _fake_norm_rope_backward,
)
_norm_rope = register(
    f"qk_norm_rope_3d_forward(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, {_TABLES}, bool across_heads, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run_norm_rope,
    lambda q, k, *rest: _empty_norm_rope(q, k, rest[-2]),
    _grad_norm_rope,
    _save_norm_rope,
)
