"""The registered op under dense and packed attention, which both of attention's stories call; the formulas are attention.py's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .checks import check_boundaries, fail
from .library import Context, Grads, cotangent, register, rows
from .memory import empty_like


class Longest(NamedTuple):
    """Queries and keys of the longest sample of a packed batch, as the host knows them.

    Kernels of others, after `prefer("fastest")`, skip what comes behind them: then too small a number gives wrong results.
    """

    q: int | None = None
    k: int | None = None

    @classmethod
    def of(cls, q: object, k: object) -> Longest:
        """Of what was passed: a tensor, which reading would wait for, or a number that cannot be one is not known."""
        return cls(_length(q), _length(k))


_MOST = 2**31 - 1


def _length(n: object) -> int | None:
    if isinstance(n, np.integer):
        n = int(n)
    if not isinstance(n, int) or isinstance(n, bool):
        return None
    surely: Callable[[Any], bool] = bool
    if torch.compiler.is_compiling():  # a number that depends on data cannot be asked, and is not known
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # here, as it takes a second to import

        surely = guard_or_false
    return n if surely(n > 0) and surely(n <= _MOST) else None


def lse_like(q: Tensor, *leading: int) -> Tensor:
    """Uninitialised numbers per query: [*leading, B, H, S] for dense q [B, S, H, d], [*leading, H, N] for packed q [N, H, d]."""
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    return q.new_empty((*leading, *shape), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def statistics_like(q: Tensor) -> Tensor:
    """Uninitialised maximum and sum of each query's softmax, from which the backward computes the probabilities again.

    The maximum is of the products q.k where they are multiplied by a positive scale and nothing else, or else of the scores. It may
    be any number near it, as kernels do not raise it for every key; the sum is of exponentials less that very number.
    """
    return lse_like(q, 2)


def statistics_of_lse(lse: Tensor, scale: float, is_plain: bool = True) -> Tensor:
    """The statistics of softmaxes that only their lse is known of: that as the maximum, and the sum 1; 0 for a query without keys.

    is_plain: scores are products times the scale and nothing else.
    """
    return torch.stack([lse / scale if is_plain and scale > 0 else lse, (lse != float("-inf")).to(lse.dtype)])


def lse_of_statistics(statistics: Tensor, scale: float, is_plain: bool = True) -> Tensor:
    """-inf for a query without keys."""
    maximum, total = statistics
    return (maximum * scale if is_plain and scale > 0 else maximum) + total.log()


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    max_q: int | None,
    max_k: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_q is not None and cu_k is not None:
        check_boundaries("attention", "cu_seqlens_q", cu_q, q.shape[0])
        check_boundaries("attention", "cu_seqlens_k", cu_k, k.shape[0])
    (q, k, v), (cu_q, cu_k), bias = rows(q, k, v), rows(cu_q, cu_k), bias_of_all_scores(bias, q, k)
    out, lse, statistics = _fake(q)
    backends.call(
        "attention_forward",
        q,
        q=q,
        k=k,
        v=v,
        cu_q=cu_q,
        cu_k=cu_k,
        bias=bias,
        alibi=alibi,
        scale=scale,
        left=left,
        right=right,
        softcap=softcap,
        max_q=max_q,
        max_k=max_k,
        out=out,
        lse=lse,
        statistics=statistics,
    )
    return out, lse, statistics


def bias_of_all_scores(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A dense batch's bias as kernels take it, [B, H, Sq, Sk], without a copy of what is shared."""
    return bias if bias is None or q.ndim == 3 else bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


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
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    max_q: int | None,
    max_k: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (dout, q, k, v), (dlse, cu_q, cu_k), bias = rows(dout, q, k, v), rows(dlse, cu_q, cu_k), bias_of_all_scores(bias, q, k)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    backends.call(
        "attention_backward",
        q,
        dout=dout,
        dlse=dlse,
        q=q,
        k=k,
        v=v,
        out=out,
        statistics=statistics,
        cu_q=cu_q,
        cu_k=cu_k,
        bias=bias,
        alibi=alibi,
        scale=scale,
        left=left,
        right=right,
        softcap=softcap,
        max_q=max_q,
        max_k=max_k,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


def _save(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_q, cu_k, bias, alibi, *ctx.scores, ctx.max_q, ctx.max_k = inputs
    out, _, statistics = output
    ctx.wants_bias = bias is not None and bias.requires_grad
    if ctx.wants_bias and cu_q is not None:
        fail("attention", "bias", "one that needs no gradient, in a packed batch", "requires_grad=True")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(q, k, v, out, statistics, cu_q, cu_k, bias, alibi)


def _grad(ctx: Context, dout: Tensor | None, dlse: Tensor | None, _: None) -> Grads:
    if dout is None and dlse is None:
        return (None,) * 13
    q, k, v, out, statistics, cu_q, cu_k, bias, alibi = ctx.saved_tensors
    dout = cotangent(dout, q)
    grads = attention_backward(dout, dlse, q, k, v, out, statistics, cu_q, cu_k, bias, alibi, *ctx.scores, ctx.max_q, ctx.max_k)
    dbias = None
    if ctx.wants_bias:  # which no kernel computes
        with backends.without_autocast(q.device.type):
            dbias = backends.BACKENDS["reference"].load().bias_gradient(dout, dlse, q, k, v, bias, alibi, *ctx.scores)
    return *grads, None, None, dbias, *(None,) * 7


_ARGUMENTS = (
    "Tensor? cu_q, Tensor? cu_k, Tensor? bias, Tensor? alibi, float scale, SymInt left, SymInt right, float softcap, "
    "SymInt? max_q, SymInt? max_k"
)
attention_backward = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda dout, dlse, q, k, v, *_: (empty_like(q), empty_like(k), empty_like(v)),
)
attention_forward = register(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _run, _fake, _grad, _save
)
