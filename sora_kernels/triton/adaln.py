"""adaLN: gated residual, normalisation and modulation of packed tokens [N, D], rows of shift, scale and gate by cu_rows.

Forward: a program owns TOKENS whole rows of D elements, held in registers between mean, variance and result, so memory sees each
input once. The row r of a token is a binary search in cu_rows whose latency hides behind the loads of x. Bytes moved per token:
2 D elements (modulate), 3 D (gate; norm and gate), 4 D (gate and modulate), and D or 2 D or 3 D that the caches serve when
neighbours share a row.

A gate of the norm itself, GATES_NORM, is passed as the scale, but multiplies as it is; the residual is added behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .adaln_backward import Gradients, backward
from .adaln_rows import NO_NORM, Modulation, Norm, count_rows, load_columns, load_rows, matrix, store_rows, tile
from .common import find_row


@triton.jit
def _find_row(p_cu, num_rows, token, search_steps):
    """Without boundaries one row serves all tokens."""
    if p_cu is None:
        return token * 0
    else:
        return find_row(p_cu, num_rows, token, search_steps)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "search_steps"])
def forward_kernel(
    residual, x, gate, shift, scale, norm, p_cu, p_residual_out, p_out, num_tokens, num_rows, search_steps, eps,
    D: tl.constexpr, RMS: tl.constexpr, GATES_NORM: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    norm = Norm(*norm)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK_D)
    in_row = (cols < D)[None, :]
    in_tokens = token < num_tokens
    load = in_tokens[:, None] & in_row
    h = load_rows(x, token, cols, load)  # before the search, which it hides
    if residual is not None:
        before = load_rows(residual, token, cols, load)
    row = _find_row(p_cu, num_rows, token, search_steps)
    used = row < num_rows
    inside = used[:, None] & load
    if p_residual_out is not None:
        if gate is not None:
            h = load_rows(gate, row, cols, inside) * h
        h = tl.where(inside, before + h, 0.0).to(p_residual_out.dtype.element_ty)
        store_rows(p_residual_out, token, cols, load, h, D)
        h = h.to(tl.float32)  # the norm is of the residual as stored
    if norm.mean is not None:
        if RMS:
            mean = tl.zeros([TOKENS], tl.float32)
            centred = h
        else:
            mean = tl.sum(h, axis=1) * (1 / D)
            # The mean of what is left corrects the rounding of the sum: a row of one large value has that very mean.
            mean += tl.sum(tl.where(in_row, h - mean[:, None], 0.0), axis=1) * (1 / D)
            centred = tl.where(in_row, h - mean[:, None], 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, axis=1) * (1 / D) + eps))
        y = centred * rstd[:, None]
        if norm.weight is not None:
            y *= load_columns(norm.weight, cols, D)[None, :]
        if norm.bias is not None:
            y += load_columns(norm.bias, cols, D)[None, :]
        if scale is not None:
            if GATES_NORM:
                y *= load_rows(scale, row, cols, inside)
            else:
                y *= 1 + load_rows(scale, row, cols, inside)
        if shift is not None:
            y += load_rows(shift, row, cols, inside)
        if GATES_NORM:
            y += before
        store_rows(p_out, token, cols, load, tl.where(inside, y, 0.0), D)
        tl.store(norm.mean + token, tl.where(used, mean, 0.0), mask=in_tokens)
        tl.store(norm.rstd + token, tl.where(used, rstd, 0.0), mask=in_tokens)


def _forward(
    x: Tensor,
    modulation: Modulation,
    cu_rows: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    norm: Norm = NO_NORM,
    rms: bool = False,
    eps: float = 0.0,
    out: Tensor | None = None,
    gates_norm: bool = False,
) -> None:
    (num_tokens, width), num_rows, block = x.shape, count_rows(cu_rows), tile(x.shape[1])
    if num_tokens and width:
        forward_kernel[(triton.cdiv(num_tokens, block["TOKENS"]),)](
            matrix(residual), matrix(x), *map(matrix, modulation), tuple(norm), cu_rows, residual_out, out, num_tokens, num_rows,
            num_rows.bit_length(), eps, D=width, RMS=rms, GATES_NORM=gates_norm, **block,
        )  # fmt: skip


def layer_norm_modulate_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_rows: Tensor | None, rms: bool, weight: Tensor | None,
    bias: Tensor | None, eps: float, out: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    modulation = Modulation(shift=shift, scale=scale)
    _forward(x, modulation, cu_rows, norm=Norm(weight, bias, mean, rstd), rms=rms, eps=eps, out=out)


def layer_norm_modulate_backward(
    dout: Tensor, x: Tensor, scale: Tensor | None, cu_rows: Tensor | None, rms: bool, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, dx: Tensor, dshift: Tensor | None, dscale: Tensor | None, dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:  # fmt: skip
    gradients = Gradients(shift=dshift, scale=dscale, weight=dweight, bias=dbias)
    norm = Norm(weight, bias, mean, rstd)
    backward(dout, Modulation(scale=scale), cu_rows, gradients, normed=x, norm=norm, rms=rms, dx=dx)


def gate_residual_forward(residual: Tensor, x: Tensor, gate: Tensor | None, cu_rows: Tensor | None, out: Tensor) -> None:
    _forward(x, Modulation(gate=gate), cu_rows, residual=residual, residual_out=out)


def gate_residual_backward(
    dout: Tensor, x: Tensor | None, gate: Tensor | None, cu_rows: Tensor | None, dresidual: Tensor, dx: Tensor | None,
    dgate: Tensor | None,
) -> None:  # fmt: skip
    backward(dout, Modulation(gate=gate), cu_rows, Gradients(gate=dgate), x=x, dresidual=dresidual, dx=dx)


def gate_residual_layer_norm_modulate_forward(
    residual: Tensor, x: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, cu_rows: Tensor | None,
    rms: bool, weight: Tensor | None, bias: Tensor | None, eps: float, residual_out: Tensor, out: Tensor, mean: Tensor,
    rstd: Tensor,
) -> None:  # fmt: skip
    modulation = Modulation(gate=gate, shift=shift, scale=scale)
    norm = Norm(weight, bias, mean, rstd)
    _forward(x, modulation, cu_rows, residual=residual, residual_out=residual_out, norm=norm, rms=rms, eps=eps, out=out)


def gate_residual_layer_norm_modulate_backward(
    dresidual_out: Tensor, dout: Tensor, residual_out: Tensor, x: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    cu_rows: Tensor | None, rms: bool, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    dresidual: Tensor, dx: Tensor | None, dgate: Tensor | None, dshift: Tensor | None, dscale: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    modulation = Modulation(gate=gate, scale=scale)
    gradients = Gradients(dgate, dshift, dscale, dweight, dbias)
    backward(
        dout, modulation, cu_rows, gradients, dresidual_out=dresidual_out, normed=residual_out, x=x,
        norm=Norm(weight, bias, mean, rstd), rms=rms, dresidual=dresidual, dx=dx,
    )  # fmt: skip


def norm_gate_residual_forward(
    residual: Tensor, x: Tensor, gate: Tensor | None, cu_rows: Tensor | None, rms: bool, weight: Tensor | None, bias: Tensor | None,
    eps: float, out: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    modulation, norm = Modulation(scale=gate), Norm(weight, bias, mean, rstd)
    _forward(x, modulation, cu_rows, residual=residual, norm=norm, rms=rms, eps=eps, out=out, gates_norm=True)


def norm_gate_residual_backward(
    dout: Tensor, x: Tensor, gate: Tensor | None, cu_rows: Tensor | None, rms: bool, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, dresidual: Tensor | None, dx: Tensor, dgate: Tensor | None, dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:  # fmt: skip
    gradients = Gradients(scale=dgate, weight=dweight, bias=dbias)
    backward(
        dout, Modulation(scale=gate), cu_rows, gradients, normed=x, norm=Norm(weight, bias, mean, rstd), rms=rms,
        dresidual=dresidual, dx=dx, gates_norm=True,
    )  # fmt: skip
