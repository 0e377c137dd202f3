"""The registered ops under adaLN's story, forward and backward: what is checked and what dtypes mean is told in adaln.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .checks import check_boundaries
from .library import Context, Grads, cotangent, register, rows
from .memory import empty, empty_like


def _check_values(op: str, x: Tensor, cu_rows: Tensor | None) -> None:
    if cu_rows is not None:
        check_boundaries(op, "cu_rows", cu_rows, x.shape[0])


# An op cannot return None: the gradient of an absent argument is a tensor without elements. Backends get None for it. An argument
# of which a backward needs no values, the shift, is there as its dtype.
Given = Tensor | torch.dtype | None


def _gradients(like: Tensor, shape: tuple[int, ...], *inputs: Given) -> tuple[Tensor, ...]:
    """Uninitialised gradients of inputs of one shape, in their dtypes."""
    return tuple(
        like.new_empty(0) if x is None else like.new_empty(shape, dtype=x) if isinstance(x, torch.dtype) else empty(x, shape)
        for x in inputs
    )


def _present(grads: Sequence[Tensor], *inputs: Given) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else grad for grad, x in zip(grads, inputs, strict=True))


def _rows_shape(x: Tensor, cu_rows: Tensor | None) -> tuple[int, int]:
    """[R, D]; without boundaries one row serves all tokens."""
    return 1 if cu_rows is None else cu_rows.shape[0] - 1, x.shape[1]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and rstd [N]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def _run_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    _check_values("layer_norm_modulate", x, cu_rows)
    (x,), (shift, scale, cu_rows, weight, bias) = rows(x), rows(shift, scale, cu_rows, weight, bias)
    out, mean, rstd = empty_like(x), *_statistics(x)
    backends.call(
        "layer_norm_modulate_forward", x, x=x, shift=shift, scale=scale, cu_rows=cu_rows, rms=rms, weight=weight, bias=bias,
        eps=eps, out=out, mean=mean, rstd=rstd,
    )  # fmt: skip
    return out, mean, rstd


def _run_modulate_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: torch.dtype | None,
) -> tuple[Tensor, ...]:
    (dout, x), (scale, cu_rows, weight, bias) = rows(dout, x), rows(scale, cu_rows, weight, bias)
    grads = dx, *others = _fake_modulate_backward(dout, x, scale, cu_rows, rms, weight, bias, mean, rstd, shift)
    dshift, dscale, dweight, dbias = _present(others, shift, scale, weight, bias)
    backends.call(
        "layer_norm_modulate_backward", x, dout=dout, x=x, scale=scale, cu_rows=cu_rows, rms=rms, weight=weight, bias=bias,
        mean=mean, rstd=rstd, dx=dx, dshift=dshift, dscale=dscale, dweight=dweight, dbias=dbias,
    )  # fmt: skip
    return grads


def _fake_modulate_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: torch.dtype | None,
) -> tuple[Tensor, ...]:
    of_rows = _gradients(x, _rows_shape(x, cu_rows), shift, scale)
    return empty_like(x), *of_rows, *_gradients(x, x.shape[1:], weight, bias)


def _save_modulate(ctx: Context, inputs: tuple, output: tuple) -> None:
    x, shift, scale, cu_rows, ctx.rms, weight, bias, _ = inputs
    ctx.shift = None if shift is None else shift.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, scale, cu_rows, weight, bias, *output[1:])


def _grad_modulate(ctx: Context, dout: Tensor | None, *_: object) -> Grads:
    x, scale, cu_rows, weight, bias, mean, rstd = ctx.saved_tensors
    args = x, scale, cu_rows, ctx.rms, weight, bias, mean, rstd, ctx.shift
    dx, *others = _modulate_backward(cotangent(dout, x), *args)
    dshift, dscale, *affine = _present(others, ctx.shift, scale, weight, bias)
    return dx, dshift, dscale, None, None, *affine, None


_NORM = "Tensor? cu_rows, bool rms, Tensor? weight, Tensor? bias"
_modulate_backward = register(
    f"layer_norm_modulate_backward(Tensor dout, Tensor x, Tensor? scale, {_NORM}, Tensor mean, Tensor rstd, ScalarType? shift) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_modulate_backward,
    _fake_modulate_backward,
)
modulate = register(
    f"layer_norm_modulate_forward(Tensor x, Tensor? shift, Tensor? scale, {_NORM}, float eps) -> (Tensor, Tensor, Tensor)",
    _run_modulate,
    lambda x, *_: (empty_like(x), *_statistics(x)),
    _grad_modulate,
    _save_modulate,
)


# Without a gate, x and the residual have the same gradient: the backward takes no x and gives that of the residual alone.


def _run_gate(residual: Tensor, x: Tensor, gate: Tensor | None, cu_rows: Tensor | None) -> Tensor:
    _check_values("gate_residual", x, cu_rows)
    (residual, x), (gate, cu_rows) = rows(residual, x), rows(gate, cu_rows)
    out = empty_like(residual)
    backends.call("gate_residual_forward", x, residual=residual, x=x, gate=gate, cu_rows=cu_rows, out=out)
    return out


def _run_gate_backward(dout: Tensor, x: Tensor | None, gate: Tensor | None, cu_rows: Tensor | None) -> tuple[Tensor, ...]:
    (dout,), (x, gate, cu_rows) = rows(dout), rows(x, gate, cu_rows)
    grads = dresidual, *others = _fake_gate_backward(dout, x, gate, cu_rows)
    dx, dgate = _present(others, gate, gate)
    backends.call(
        "gate_residual_backward", dout, dout=dout, x=x, gate=gate, cu_rows=cu_rows, dresidual=dresidual, dx=dx, dgate=dgate
    )
    return grads


def _fake_gate_backward(dout: Tensor, x: Tensor | None, gate: Tensor | None, cu_rows: Tensor | None) -> tuple[Tensor, ...]:
    return empty_like(dout), *_gradients(dout, dout.shape, x), *_gradients(dout, _rows_shape(dout, cu_rows), gate)


def _save_gate(ctx: Context, inputs: tuple, output: Tensor) -> None:
    _, x, gate, cu_rows = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(None if gate is None else x, gate, cu_rows)


def _grad_gate(ctx: Context, dout: Tensor | None) -> Grads:
    x, gate, cu_rows = ctx.saved_tensors
    dresidual, dx, dgate = _gate_backward(dout, x, gate, cu_rows)
    return dresidual, dresidual.to(ctx.dtype) if gate is None else dx, None if gate is None else dgate, None


_gate_backward = register(
    "gate_residual_backward(Tensor dout, Tensor? x, Tensor? gate, Tensor? cu_rows) -> (Tensor, Tensor, Tensor)",
    _run_gate_backward,
    _fake_gate_backward,
)
gate_add = register(
    "gate_residual_forward(Tensor residual, Tensor x, Tensor? gate, Tensor? cu_rows) -> Tensor",
    _run_gate,
    lambda residual, *_: empty_like(residual),
    _grad_gate,
    _save_gate,
)


def _run_gate_modulate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    _check_values("gate_residual_layer_norm_modulate", x, cu_rows)
    residual, x = rows(residual, x)
    gate, shift, scale, cu_rows, weight, bias = rows(gate, shift, scale, cu_rows, weight, bias)
    residual_out, out, mean, rstd = empty_like(residual), empty_like(x), *_statistics(x)
    backends.call(
        "gate_residual_layer_norm_modulate_forward", x, residual=residual, x=x, gate=gate, shift=shift, scale=scale,
        cu_rows=cu_rows, rms=rms, weight=weight, bias=bias, eps=eps, residual_out=residual_out, out=out, mean=mean, rstd=rstd,
    )  # fmt: skip
    return residual_out, out, mean, rstd


def _run_gate_modulate_backward(
    dresidual_out: Tensor,
    dout: Tensor,
    residual_out: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: torch.dtype | None,
) -> tuple[Tensor, ...]:
    dresidual_out, dout, residual_out = rows(dresidual_out, dout, residual_out)
    x, gate, scale, cu_rows, weight, bias = rows(x, gate, scale, cu_rows, weight, bias)
    grads = dresidual, *others = _fake_gate_modulate_backward(
        dresidual_out, dout, residual_out, x, gate, scale, cu_rows, rms, weight, bias, mean, rstd, shift
    )
    dx, dgate, dshift, dscale, dweight, dbias = _present(others, gate, gate, shift, scale, weight, bias)
    backends.call(
        "gate_residual_layer_norm_modulate_backward", dout, dresidual_out=dresidual_out, dout=dout, residual_out=residual_out, x=x,
        gate=gate, scale=scale, cu_rows=cu_rows, rms=rms, weight=weight, bias=bias, mean=mean, rstd=rstd, dresidual=dresidual,
        dx=dx, dgate=dgate, dshift=dshift, dscale=dscale, dweight=dweight, dbias=dbias,
    )  # fmt: skip
    return grads


def _fake_gate_modulate_backward(
    dresidual_out: Tensor,
    dout: Tensor,
    residual_out: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: torch.dtype | None,
) -> tuple[Tensor, ...]:
    of_tokens = empty_like(residual_out), *_gradients(dout, dout.shape, x)
    of_rows = _gradients(dout, _rows_shape(dout, cu_rows), gate, shift, scale)
    return *of_tokens, *of_rows, *_gradients(dout, dout.shape[1:], weight, bias)


def _save_gate_modulate(ctx: Context, inputs: tuple, output: tuple) -> None:
    _, x, gate, shift, scale, cu_rows, ctx.rms, weight, bias, _ = inputs
    residual_out, _, mean, rstd = output
    ctx.shift, ctx.dtype = None if shift is None else shift.dtype, x.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(residual_out, None if gate is None else x, gate, scale, cu_rows, weight, bias, mean, rstd)


def _grad_gate_modulate(ctx: Context, dresidual_out: Tensor | None, dout: Tensor | None, *_: object) -> Grads:
    residual_out, x, gate, scale, cu_rows, weight, bias, mean, rstd = ctx.saved_tensors
    dout = residual_out.new_zeros(residual_out.shape, dtype=ctx.dtype) if dout is None else dout
    args = (
        cotangent(dresidual_out, residual_out),
        dout,
        residual_out,
        x,
        gate,
        scale,
        cu_rows,
        ctx.rms,
        weight,
        bias,
        mean,
        rstd,
        ctx.shift,
    )
    dresidual, *others = _gate_modulate_backward(*args)
    dx, dgate, dshift, dscale, *affine = _present(others, gate, gate, ctx.shift, scale, weight, bias)
    return dresidual, dresidual.to(ctx.dtype) if gate is None else dx, dgate, dshift, dscale, None, None, *affine, None


_gate_modulate_backward = register(
    "gate_residual_layer_norm_modulate_backward(Tensor dresidual_out, Tensor dout, Tensor residual_out, Tensor? x, Tensor? gate, "
    f"Tensor? scale, {_NORM}, Tensor mean, Tensor rstd, ScalarType? shift) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_gate_modulate_backward,
    _fake_gate_modulate_backward,
)
gate_modulate = register(
    "gate_residual_layer_norm_modulate_forward(Tensor residual, Tensor x, Tensor? gate, Tensor? shift, Tensor? scale, "
    f"{_NORM}, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_gate_modulate,
    lambda residual, x, *_: (empty_like(residual), empty_like(x), *_statistics(x)),
    _grad_gate_modulate,
    _save_gate_modulate,
)


# Inside the boundaries the gradient of the residual is dout itself. Only where there may be tokens behind the last boundary, with
# `slack`, does the backward write one.


def _run_norm_gate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slack: bool,
) -> tuple[Tensor, ...]:
    _check_values("norm_gate_residual", x, cu_rows)
    (residual, x), (gate, cu_rows, weight, bias) = rows(residual, x), rows(gate, cu_rows, weight, bias)
    out, mean, rstd = empty_like(residual), *_statistics(x)
    backends.call(
        "norm_gate_residual_forward", x, residual=residual, x=x, gate=gate, cu_rows=cu_rows, rms=rms, weight=weight, bias=bias,
        eps=eps, out=out, mean=mean, rstd=rstd,
    )  # fmt: skip
    return out, mean, rstd


def _run_norm_gate_backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    slack: bool,
) -> tuple[Tensor, ...]:
    (dout, x), (gate, cu_rows, weight, bias) = rows(dout, x), rows(gate, cu_rows, weight, bias)
    grads = _fake_norm_gate_backward(dout, x, gate, cu_rows, rms, weight, bias, mean, rstd, slack)
    dresidual, dx, dgate, dweight, dbias = _present(grads, dout if slack else None, x, gate, weight, bias)
    backends.call(
        "norm_gate_residual_backward", x, dout=dout, x=x, gate=gate, cu_rows=cu_rows, rms=rms, weight=weight, bias=bias, mean=mean,
        rstd=rstd, dresidual=dresidual, dx=dx, dgate=dgate, dweight=dweight, dbias=dbias,
    )  # fmt: skip
    return grads


def _fake_norm_gate_backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    slack: bool,
) -> tuple[Tensor, ...]:
    of_tokens = _gradients(x, x.shape, dout if slack else None, x)
    return *of_tokens, *_gradients(x, _rows_shape(x, cu_rows), gate), *_gradients(x, x.shape[1:], weight, bias)


def _save_norm_gate(ctx: Context, inputs: tuple, output: tuple) -> None:
    _, x, gate, cu_rows, ctx.rms, weight, bias, _, ctx.slack = inputs
    ctx.dtype = output[0].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, gate, cu_rows, weight, bias, *output[1:])


def _grad_norm_gate(ctx: Context, dout: Tensor | None, *_: object) -> Grads:
    x, gate, cu_rows, weight, bias, mean, rstd = ctx.saved_tensors
    dout = x.new_zeros(x.shape, dtype=ctx.dtype) if dout is None else dout
    grads = _norm_gate_backward(dout, x, gate, cu_rows, ctx.rms, weight, bias, mean, rstd, ctx.slack)
    dresidual, dx, dgate, dweight, dbias = _present(grads, dout, x, gate, weight, bias)
    return dresidual if ctx.slack else dout, dx, dgate, None, None, dweight, dbias, None, None


_norm_gate_backward = register(
    f"norm_gate_residual_backward(Tensor dout, Tensor x, Tensor? gate, {_NORM}, Tensor mean, Tensor rstd, bool slack) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_norm_gate_backward,
    _fake_norm_gate_backward,
)
norm_gate = register(
    f"norm_gate_residual_forward(Tensor residual, Tensor x, Tensor? gate, {_NORM}, float eps, bool slack) "
    "-> (Tensor, Tensor, Tensor)",
    _run_norm_gate,
    lambda residual, x, *_: (empty_like(residual), *_statistics(x)),
    _grad_norm_gate,
    _save_norm_gate,
)
