"""adaLN: normalize and modulate, gate and add, both in one; normalize, gate and add. Row r serves tokens cu_rows[r]:cu_rows[r+1].

norm(x) = (x - mean) / sqrt(var + eps) · weight + bias      ("rms": x / sqrt(mean(x²) + eps) · weight + bias)
layer_norm_modulate = norm(x) · (1 + scale[r]) + shift[r]
gate_residual = residual + gate[r] · x
norm_gate_residual = residual + gate[r] · norm(x)

Of shift, scale and gate each may be None: its factor or summand is left out. Without `cu_rows` one row serves all tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import widen, write, write_gradients, zero_rows


def num_used(x: Tensor, cu_rows: Tensor | None) -> int:
    """Tokens of x up to the last boundary."""
    return len(x) if cu_rows is None else int(cu_rows[-1])


def per_token(rows: Tensor, cu_rows: Tensor | None) -> Tensor:
    """rows [R,D] -> [n,D], in the dtype of computation: row r for tokens cu_rows[r]:cu_rows[r+1]; [1,D] without boundaries."""
    if cu_rows is None:
        return widen(rows)
    lengths = cu_rows.diff().tolist()
    # expand and cat rather than an index, whose backward sums in an order that differs from run to run on a GPU
    return torch.cat([widen(rows[:0]), *(widen(rows[r]).expand(n, -1) for r, n in enumerate(lengths))])


def moments(x: Tensor, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mean [..,1] (0 for RMSNorm), x - mean [..,D] and its mean square [..,1] of rows x [..,D]."""
    x = widen(x)
    mean = x.new_zeros(*x.shape[:-1], 1) if rms else x.mean(dim=-1, keepdim=True)
    if not rms:  # exact for a row of one value
        mean = mean + (x - mean).mean(dim=-1, keepdim=True)
    return mean, x - mean, (x - mean).square().mean(dim=-1, keepdim=True)


def eps_of_forward(x: Tensor, cu_rows: Tensor | None, rms: bool, rstd: Tensor) -> Tensor:
    """The eps [n,1] with which the forward pass reached `rstd`: the backward functions are given rstd but not eps."""
    count = num_used(x, cu_rows)
    return rstd[:count, None].detach() ** -2 - moments(x[:count].detach(), rms)[2]


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N,D], shift and scale [R,D], weight and bias [D] -> y [N,D], mean [N], rstd [N]; the mean of RMSNorm is 0."""
    mean, centred, variance = moments(x[: num_used(x, cu_rows)], rms)
    rstd = torch.rsqrt(variance + eps)
    normed = centred * rstd
    if weight is not None:
        normed = normed * widen(weight)
    if bias is not None:
        normed = normed + widen(bias)
    if scale is not None:
        normed = normed * (1 + per_token(scale, cu_rows))
    if shift is not None:
        normed = normed + per_token(shift, cu_rows)
    y, mean, rstd = (zero_rows(rows, len(x)) for rows in (normed, mean, rstd))
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor | None, cu_rows: Tensor | None) -> Tensor:
    """residual and x [N,D], gate [R,D] -> [N,D]."""
    count = num_used(x, cu_rows)
    added = widen(x[:count])
    if gate is not None:
        added = per_token(gate, cu_rows) * added
    return zero_rows(widen(residual[:count]) + added, len(x))


def gate_residual_layer_norm_modulate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_residual, then norm and modulation of the unrounded sum -> residual_out and y [N,D], mean [N], rstd [N]."""
    added = gate_residual(residual, x, gate, cu_rows)
    y, mean, rstd = layer_norm_modulate(added, shift, scale, cu_rows, rms, weight, bias, eps)
    return added, y, mean, rstd


def norm_gate_residual(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """residual and x [N,D], gate [R,D], weight and bias [D] -> [N,D], mean [N], rstd [N] of x."""
    normed, mean, rstd = layer_norm_modulate(x, None, None, cu_rows, rms, weight, bias, eps)
    return gate_residual(residual, normed, gate, cu_rows), mean, rstd


def layer_norm_modulate_forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    write(layer_norm_modulate(x, shift, scale, cu_rows, rms, weight, bias, eps), (out, mean, rstd))


def layer_norm_modulate_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dshift: Tensor | None,
    dscale: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    eps = eps_of_forward(x, cu_rows, rms, rstd)

    def function(
        x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Sequence[Tensor]:
        return layer_norm_modulate(x, shift, scale, cu_rows, rms, weight, bias, eps)

    # any shift has the same gradients
    inputs = (x, None if dshift is None else torch.zeros_like(dshift), scale, weight, bias)
    write_gradients(function, inputs, (dout, None, None), (dx, dshift, dscale, dweight, dbias))


def gate_residual_forward(residual: Tensor, x: Tensor, gate: Tensor | None, cu_rows: Tensor | None, out: Tensor) -> None:
    write([gate_residual(residual, x, gate, cu_rows)], [out])


def gate_residual_backward(
    dout: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    cu_rows: Tensor | None,
    dresidual: Tensor,
    dx: Tensor | None,
    dgate: Tensor | None,
) -> None:
    def function(residual: Tensor, x: Tensor, gate: Tensor | None) -> Sequence[Tensor]:
        return [gate_residual(residual, x, gate, cu_rows)]

    # any residual has the same gradients, and without a gate any x
    inputs = (torch.zeros_like(dout), torch.zeros_like(dout) if x is None else x, gate)
    write_gradients(function, inputs, [dout], (dresidual, dx, dgate))


def gate_residual_layer_norm_modulate_forward(
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
    residual_out: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    added = gate_residual(residual, x, gate, cu_rows).to(residual_out.dtype)  # the norm is taken of the residual as stored
    normed = layer_norm_modulate(added, shift, scale, cu_rows, rms, weight, bias, eps)
    write((added, *normed), (residual_out, out, mean, rstd))


def gate_residual_layer_norm_modulate_backward(
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
    dresidual: Tensor,
    dx: Tensor | None,
    dgate: Tensor | None,
    dshift: Tensor | None,
    dscale: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    eps = eps_of_forward(residual_out, cu_rows, rms, rstd)

    def function(
        residual: Tensor,
        x: Tensor,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Sequence[Tensor]:
        return gate_residual_layer_norm_modulate(residual, x, gate, shift, scale, cu_rows, rms, weight, bias, eps)

    # any x without a gate, and any shift, has the same gradients
    x = torch.zeros_like(dout) if x is None else x
    residual = widen(residual_out) - gate_residual(torch.zeros_like(x), x, gate, cu_rows)
    inputs = (residual, x, gate, None if dshift is None else torch.zeros_like(dshift), scale, weight, bias)
    outputs = (dresidual, dx, dgate, dshift, dscale, dweight, dbias)
    write_gradients(function, inputs, (dresidual_out, dout, None, None), outputs)


def norm_gate_residual_forward(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    write(norm_gate_residual(residual, x, gate, cu_rows, rms, weight, bias, eps), (out, mean, rstd))


def norm_gate_residual_backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    cu_rows: Tensor | None,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None,
    dx: Tensor,
    dgate: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    eps = eps_of_forward(x, cu_rows, rms, rstd)

    def function(residual: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor]:
        return norm_gate_residual(residual, x, gate, cu_rows, rms, weight, bias, eps)

    # any residual has the same gradients
    inputs = (torch.zeros_like(dout), x, gate, weight, bias)
    write_gradients(function, inputs, (dout, None, None), (dresidual, dx, dgate, dweight, dbias))
