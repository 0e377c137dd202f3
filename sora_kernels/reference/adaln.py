"""adaLN: normalize and modulate, gate and add, and both in one; row r of a modulation serves the tokens of sample r.

norm(x) = (x - mean) / sqrt(var + eps) · weight + bias      ("rms": x / sqrt(mean(x²) + eps) · weight + bias)
layer_norm_modulate = norm(x) · (1 + scale[r]) + shift[r]
gate_residual = residual + gate[r] · x
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import widen, write, write_gradients, zero_rows


def per_token(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """rows [R,D] -> [n,D], in the dtype of computation: row r once for each token of sample r."""
    lengths = cu_seqlens.diff().tolist()
    # expand and cat rather than an index, whose backward sums in an order that differs from run to run on a GPU
    return torch.cat([widen(rows[:0]), *(widen(rows[r]).expand(n, -1) for r, n in enumerate(lengths))])


def moments(x: Tensor, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mean [N,1] (0 for RMSNorm), x - mean [N,D] and its mean square [N,1]."""
    x = widen(x)
    mean = torch.zeros_like(x[:, :1]) if rms else x.mean(dim=-1, keepdim=True)
    if not rms:  # exact for a row of one value
        mean = mean + (x - mean).mean(dim=-1, keepdim=True)
    return mean, x - mean, (x - mean).square().mean(dim=-1, keepdim=True)


def eps_of_forward(x: Tensor, cu_seqlens: Tensor, rms: bool, rstd: Tensor) -> Tensor:
    """The eps [n,1] with which the forward pass reached `rstd`: the backward functions are given rstd but not eps."""
    count = int(cu_seqlens[-1])
    return rstd[:count, None].detach() ** -2 - moments(x[:count].detach(), rms)[2]


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N,D], shift and scale [R,D], weight and bias [D] -> y [N,D], mean [N], rstd [N]; the mean of RMSNorm is 0."""
    shift, scale = per_token(shift, cu_seqlens), per_token(scale, cu_seqlens)
    mean, centred, variance = moments(x[: len(shift)], rms)
    rstd = torch.rsqrt(variance + eps)
    normed = centred * rstd
    if weight is not None:
        normed = normed * widen(weight)
    if bias is not None:
        normed = normed + widen(bias)
    y, mean, rstd = (zero_rows(rows, len(x)) for rows in (normed * (1 + scale) + shift, mean, rstd))
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    """residual and x [N,D], gate [R,D] -> [N,D]."""
    gate = per_token(gate, cu_seqlens)
    return zero_rows(widen(residual[: len(gate)]) + gate * widen(x[: len(gate)]), len(x))


def gate_residual_layer_norm_modulate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_residual, then norm and modulation of the unrounded sum -> residual_out and y [N,D], mean [N], rstd [N]."""
    added = gate_residual(residual, x, gate, cu_seqlens)
    y, mean, rstd = layer_norm_modulate(added, shift, scale, cu_seqlens, rms, weight, bias, eps)
    return added, y, mean, rstd


def layer_norm_modulate_forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    write(layer_norm_modulate(x, shift, scale, cu_seqlens, rms, weight, bias, eps), (out, mean, rstd))


def layer_norm_modulate_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    eps = eps_of_forward(x, cu_seqlens, rms, rstd)

    def function(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor]:
        return layer_norm_modulate(x, shift, scale, cu_seqlens, rms, weight, bias, eps)

    # any shift has the same gradients
    inputs = (x, torch.zeros_like(scale), scale, weight, bias)
    write_gradients(function, inputs, (dout, None, None), (dx, dshift, dscale, dweight, dbias))


def gate_residual_forward(residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor, out: Tensor) -> None:
    write([gate_residual(residual, x, gate, cu_seqlens)], [out])


def gate_residual_backward(
    dout: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor, dresidual: Tensor, dx: Tensor, dgate: Tensor
) -> None:
    def function(residual: Tensor, x: Tensor, gate: Tensor) -> Sequence[Tensor]:
        return [gate_residual(residual, x, gate, cu_seqlens)]

    # any residual has the same gradients
    write_gradients(function, (torch.zeros_like(x), x, gate), [dout], (dresidual, dx, dgate))


def gate_residual_layer_norm_modulate_forward(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual_out: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    added = gate_residual(residual, x, gate, cu_seqlens).to(residual_out.dtype)  # the norm is taken of the residual as stored
    normed = layer_norm_modulate(added, shift, scale, cu_seqlens, rms, weight, bias, eps)
    write((added, *normed), (residual_out, out, mean, rstd))


def gate_residual_layer_norm_modulate_backward(
    dresidual_out: Tensor,
    dout: Tensor,
    residual_out: Tensor,
    x: Tensor,
    gate: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor,
    dx: Tensor,
    dgate: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    eps = eps_of_forward(residual_out, cu_seqlens, rms, rstd)

    def function(
        residual: Tensor,
        x: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Sequence[Tensor]:
        return gate_residual_layer_norm_modulate(residual, x, gate, shift, scale, cu_seqlens, rms, weight, bias, eps)

    residual = widen(residual_out) - gate_residual(torch.zeros_like(x), x, gate, cu_seqlens)
    inputs = (residual, x, gate, torch.zeros_like(scale), scale, weight, bias)
    outputs = (dresidual, dx, dgate, dshift, dscale, dweight, dbias)
    write_gradients(function, inputs, (dresidual_out, dout, None, None), outputs)
