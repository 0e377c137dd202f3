"""adaLN: normalisation, modulation and gated residuals whose shift, scale and gate rows follow the packing.

    layer_norm_modulate                  y = norm(x) * (1 + scale[r]) + shift[r]
    gate_residual                        residual + gate[r] * x
    gate_residual_layer_norm_modulate    residual <- residual + gate[r] * x;  y = norm(residual) * (1 + scale[r]) + shift[r]

Row r of shift, scale and gate serves tokens cu_seqlens[r]:cu_seqlens[r+1]: a sample, a latent frame (`layout.cu_frames`) or a
single token alike. norm is LayerNorm or RMSNorm over the last axis, with or without its own weight and bias. Each function reads
its inputs once; sums and the gradients of shift, scale and gate are float32.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers (2023), adaLN-Zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .checks import check_boundaries, check_choice, check_cu_seqlens, check_number, check_tensor, fail
from .library import cotangent, register, rows
from .memory import empty_like


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """norm(x) * (1 + scale[r]) + shift[r].

    >>> x, cu = torch.randn(400, 1152), torch.tensor([0, 256, 400], dtype=torch.int32)
    >>> shift, scale, gate = torch.randn(2, 3 * 1152).chunk(3, dim=1)
    >>> layer_norm_modulate(x, shift, scale, cu).shape
    torch.Size([400, 1152])

    Args:
        x: [N, D].
        shift, scale: [R, D] in x's dtype; views into one projection are fine.
        cu_seqlens: int32 [R+1], from 0, never falling, at most N. Tokens past its end give zeros.
        norm: "layer" subtracts the mean and divides by the standard deviation; "rms" divides by the root mean square.
        weight, bias: the norm's own, [D] in x's dtype, before the modulation. "rms" takes no bias.
        eps: added to the variance or mean square, at least 0.

    Returns:
        [N, D] in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "layer_norm_modulate"
    _check(op, x, cu_seqlens, {"shift": shift, "scale": scale})
    options = _check_norm(op, x, norm, weight, bias, eps)
    return _modulate(x, shift, scale, cu_seqlens, *options)[0]


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    """residual + gate[r] * x.

    Args:
        residual, x: [N, D].
        gate: [R, D].
        cu_seqlens: int32 [R+1].

    Returns:
        [N, D] in x's dtype; tokens past the last boundary give zeros.
    """
    op = "gate_residual"
    _check(op, x, cu_seqlens, {"gate": gate})
    check_tensor(op, "residual", residual, tuple(x.shape), dtype=x.dtype, like=x)
    return _gate(residual, x, gate, cu_seqlens)


def gate_residual_layer_norm_modulate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Both in one pass: residual <- residual + gate[r] * x, then y = norm(residual) * (1 + scale[r]) + shift[r].

    >>> residual, attn = torch.randn(2, 400, 1152)
    >>> gate, shift, scale = torch.randn(2, 3 * 1152).chunk(3, dim=1)
    >>> cu_rows = torch.tensor([0, 256, 400], dtype=torch.int32)
    >>> residual, y = gate_residual_layer_norm_modulate(residual, attn, gate, shift, scale, cu_rows)

    The arguments are those of the two functions above. The norm is taken of the residual as stored, so that the result equals
    calling one after the other.

    Returns:
        (residual, y), both [N, D] in x's dtype.
    """
    op = "gate_residual_layer_norm_modulate"
    _check(op, x, cu_seqlens, {"gate": gate, "shift": shift, "scale": scale})
    check_tensor(op, "residual", residual, tuple(x.shape), dtype=x.dtype, like=x)
    options = _check_norm(op, x, norm, weight, bias, eps)
    return _gate_modulate(residual, x, gate, shift, scale, cu_seqlens, *options)[:2]


def _check(op: str, x: Tensor, cu_seqlens: Tensor, rows: dict[str, Tensor]) -> None:
    check_tensor(op, "x", x, ("N", "D"))
    check_cu_seqlens(op, "cu_seqlens", cu_seqlens, x, "R+1")
    for name, row in rows.items():
        check_tensor(op, name, row, (cu_seqlens.shape[0] - 1, x.shape[1]), dtype=x.dtype, like=x)


def _check_norm(
    op: str, x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[bool, Tensor | None, Tensor | None, float]:
    """The norm as the registered ops take it: whether it is RMS, its weight and bias, eps."""
    check_choice(op, "norm", norm, ("layer", "rms"))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(op, name, value, (x.shape[1],), dtype=x.dtype, like=x)
    if norm == "rms" and bias is not None:
        fail(op, "bias", 'None with norm="rms"', "a tensor")
    return norm == "rms", weight, bias, check_number(op, "eps", eps, at_least=0)


def _empty(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(empty_like, tensors))


def _empty_affine(x: Tensor, *affine: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the norm's weight and bias; empty where there is none, as an op cannot return None."""
    return tuple(x.new_empty(0 if tensor is None else tensor.shape) for tensor in affine)


def _present(grads: tuple[Tensor, ...], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else grad for grad, tensor in zip(grads, inputs, strict=True))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and rstd [N]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def _run_modulate(x, shift, scale, cu_seqlens, rms, weight, bias, eps):
    check_boundaries("layer_norm_modulate", "cu_seqlens", cu_seqlens, x.shape[0])
    x, shift, scale, cu_seqlens, weight, bias = rows(x, shift, scale, cu_seqlens, weight, bias)
    outputs = *_empty(x), *_statistics(x)
    backends.call("layer_norm_modulate_forward", x, x, shift, scale, cu_seqlens, rms, weight, bias, eps, *outputs)
    return outputs


def _run_modulate_backward(dout, x, scale, cu_seqlens, rms, weight, bias, mean, rstd):
    dout, x, scale, cu_seqlens, weight, bias = rows(dout, x, scale, cu_seqlens, weight, bias)
    grads = _fake_modulate_backward(dout, x, scale, cu_seqlens, rms, weight, bias)
    args = dout, x, scale, cu_seqlens, rms, weight, bias, mean, rstd
    backends.call("layer_norm_modulate_backward", x, *args, *grads[:3], *_present(grads[3:], weight, bias))
    return grads


def _fake_modulate_backward(dout, x, scale, cu_seqlens, rms, weight, bias, *_):
    return *_empty(x, scale, scale), *_empty_affine(x, weight, bias)


def _save_modulate(ctx, inputs, output):
    x, _, scale, cu_seqlens, ctx.rms, weight, bias, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, scale, cu_seqlens, weight, bias, *output[1:])


def _grad_modulate(ctx, dout, *_):
    x, scale, cu_seqlens, weight, bias, mean, rstd = ctx.saved_tensors
    dx, *grads = _modulate_backward(cotangent(dout, x), x, scale, cu_seqlens, ctx.rms, weight, bias, mean, rstd)
    return dx, *grads[:2], None, None, *_present(grads[2:], weight, bias), None


_NORM = "Tensor cu_seqlens, bool rms, Tensor? weight, Tensor? bias"
_modulate_backward = register(
    f"layer_norm_modulate_backward(Tensor dout, Tensor x, Tensor scale, {_NORM}, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_modulate_backward,
    _fake_modulate_backward,
)
_modulate = register(
    f"layer_norm_modulate_forward(Tensor x, Tensor shift, Tensor scale, {_NORM}, float eps) -> (Tensor, Tensor, Tensor)",
    _run_modulate,
    lambda x, *_: (*_empty(x), *_statistics(x)),
    _grad_modulate,
    _save_modulate,
)


def _run_gate(residual, x, gate, cu_seqlens):
    check_boundaries("gate_residual", "cu_seqlens", cu_seqlens, x.shape[0])
    residual, x, gate, cu_seqlens = rows(residual, x, gate, cu_seqlens)
    (out,) = _empty(x)
    backends.call("gate_residual_forward", x, residual, x, gate, cu_seqlens, out)
    return out


def _run_gate_backward(dout, x, gate, cu_seqlens):
    dout, x, gate, cu_seqlens = rows(dout, x, gate, cu_seqlens)
    grads = _empty(x, x, gate)
    backends.call("gate_residual_backward", x, dout, x, gate, cu_seqlens, *grads)
    return grads


def _save_gate(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _grad_gate(ctx, dout):
    return *_gate_backward(dout, *ctx.saved_tensors), None


_gate_backward = register(
    "gate_residual_backward(Tensor dout, Tensor x, Tensor gate, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _run_gate_backward,
    lambda dout, x, gate, cu_seqlens: _empty(x, x, gate),
)
_gate = register(
    "gate_residual_forward(Tensor residual, Tensor x, Tensor gate, Tensor cu_seqlens) -> Tensor",
    _run_gate,
    lambda residual, x, *_: _empty(x)[0],
    _grad_gate,
    _save_gate,
)


def _run_gate_modulate(residual, x, gate, shift, scale, cu_seqlens, *norm):
    check_boundaries("gate_residual_layer_norm_modulate", "cu_seqlens", cu_seqlens, x.shape[0])
    args = *rows(residual, x, gate, shift, scale, cu_seqlens), norm[0], *rows(*norm[1:3]), norm[3]
    outputs = *_empty(x, x), *_statistics(x)
    backends.call("gate_residual_layer_norm_modulate_forward", x, *args, *outputs)
    return outputs


def _run_gate_modulate_backward(dresidual_out, dout, residual_out, x, gate, scale, cu_seqlens, rms, weight, bias, mean, rstd):
    tensors = rows(dresidual_out, dout, residual_out, x, gate, scale, cu_seqlens)
    args = *tensors, rms, *rows(weight, bias)
    grads = _fake_gate_modulate_backward(*args)
    outputs = *grads[:5], *_present(grads[5:], weight, bias)
    backends.call("gate_residual_layer_norm_modulate_backward", x, *args, mean, rstd, *outputs)
    return grads


def _fake_gate_modulate_backward(dresidual_out, dout, residual_out, x, gate, scale, cu_seqlens, rms, weight, bias, *_):
    return *_empty(x, x, gate, gate, gate), *_empty_affine(x, weight, bias)


def _save_gate_modulate(ctx, inputs, output):
    _, x, gate, _, scale, cu_seqlens, ctx.rms, weight, bias, _ = inputs
    residual_out, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(residual_out, x, gate, scale, cu_seqlens, weight, bias, mean, rstd)


def _grad_gate_modulate(ctx, dresidual_out, dout, *_):
    residual_out, x, gate, scale, cu_seqlens, weight, bias, mean, rstd = ctx.saved_tensors
    douts = cotangent(dresidual_out, x), cotangent(dout, x)
    args = *douts, residual_out, x, gate, scale, cu_seqlens, ctx.rms, weight, bias, mean, rstd
    dresidual, dx, dgate, dshift, dscale, *affine = _gate_modulate_backward(*args)
    return dresidual, dx, dgate, dshift, dscale, None, None, *_present(affine, weight, bias), None


_gate_modulate_backward = register(
    "gate_residual_layer_norm_modulate_backward(Tensor dresidual_out, Tensor dout, Tensor residual_out, Tensor x, Tensor gate, "
    f"Tensor scale, {_NORM}, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_gate_modulate_backward,
    _fake_gate_modulate_backward,
)
_gate_modulate = register(
    f"gate_residual_layer_norm_modulate_forward(Tensor residual, Tensor x, Tensor gate, Tensor shift, Tensor scale, {_NORM}, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_gate_modulate,
    lambda residual, x, *_: (*_empty(x, x), *_statistics(x)),
    _grad_gate_modulate,
    _save_gate_modulate,
)
