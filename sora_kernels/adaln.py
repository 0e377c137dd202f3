"""adaLN: normalisation, modulation and gated residuals whose shift, scale and gate rows follow the packing.

    layer_norm_modulate                  y = norm(x) * (1 + scale[r]) + shift[r]
    gate_residual                        residual + gate[r] * x
    gate_residual_layer_norm_modulate    residual <- residual + gate[r] * x;  y = norm(residual) * (1 + scale[r]) + shift[r]
    norm_gate_residual                   residual + gate[r] * norm(x)

Of packed tokens [N, D], row r of shift, scale and gate serves tokens cu_rows[r]:cu_rows[r+1]: a sample, a latent frame
(`layout.cu_frames`) or a single token alike. Of a dense batch [B, S, D], each of a sample's F rows serves S / F tokens, in order.
Each of the three may be None: its factor or summand is left out. Without shift and scale the first is a plain norm, without a gate
the second is residual + x and the last residual + norm(x). norm is LayerNorm or RMSNorm over the last axis, with or without its own
weight and bias. Each function reads its inputs once, and sums in float32.

Beside bfloat16 or float16 x, the rows, weight and bias may be float32, as Wan, Kandinsky and Cosmos have them, and so may the
residual: nothing is rounded to x's dtype that was not there before. Each gradient has its input's dtype.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers (2023), adaLN-Zero.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .adaln_op import gate_add, gate_modulate, modulate, norm_gate
from .checks import check_bool, check_choice, check_cu_seqlens, check_float32, check_tensor, fail, or_float32
from .library import of_one_dtype, shaped_as


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    cu_rows: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """norm(x) * (1 + scale[r]) + shift[r].

    >>> x, cu_rows = torch.randn(400, 1152), torch.tensor([0, 256, 400], dtype=torch.int32)
    >>> shift, scale, gate = torch.randn(2, 3 * 1152).chunk(3, dim=1)
    >>> layer_norm_modulate(x, shift, scale, cu_rows).shape
    torch.Size([400, 1152])
    >>> layer_norm_modulate(x, norm="rms").shape
    torch.Size([400, 1152])

    Args:
        x: [N, D] packed, or [B, S, D] dense.
        shift, scale: [R, D] in x's dtype or float32; views into one projection are fine. Of a dense x: [B, D], or [B, F, D] whose F
            divides S. None: no summand, no factor.
        cu_rows: int32 [R+1], from 0, never falling, at most N. Tokens past its end give zeros. None, which takes no shift and no
            scale: all N tokens. A dense x has none.
        norm: "layer" subtracts the mean and divides by the standard deviation; "rms" divides by the root mean square.
        weight, bias: the norm's own, [D] in x's dtype or float32, before the modulation. "rms" takes no bias.
        eps: added to the variance or mean square, at least 0.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "layer_norm_modulate"
    (tokens, shift, scale), cu_rows = _check(op, x, cu_rows, shift=shift, scale=scale)
    rms, eps = _check_norm(op, x, norm, weight, bias, eps)
    shift, scale, weight, bias = of_one_dtype(x, shift, scale, weight, bias)
    return shaped_as(modulate(tokens, shift, scale, cu_rows, rms, weight, bias, eps)[0], x)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor | None = None, cu_rows: Tensor | None = None) -> Tensor:
    """residual + gate[r] * x.

    Args:
        residual: x's shape, in x's dtype, or float32 beside bfloat16 or float16 x.
        x: [N, D], or [B, S, D].
        gate: [R, D] in x's dtype or float32. Of a dense x: [B, D], or [B, F, D]. None: residual + x.
        cu_rows: int32 [R+1]. None, which takes no gate: all N tokens. A dense x has none.

    Returns:
        x's shape, in the residual's dtype; tokens past the last boundary give zeros.
    """
    op = "gate_residual"
    (tokens, gate), cu_rows = _check(op, x, cu_rows, gate=gate)
    _check_residual(op, residual, x)
    (gate,) = of_one_dtype(x, gate, float32=residual.dtype is torch.float32)
    return shaped_as(gate_add(shaped_as(residual, tokens), tokens, gate, cu_rows), x)


def gate_residual_layer_norm_modulate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    cu_rows: Tensor | None = None,
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
        (residual, y), both of x's shape: the residual in its own dtype, y in x's.
    """
    op = "gate_residual_layer_norm_modulate"
    (tokens, gate, shift, scale), cu_rows = _check(op, x, cu_rows, gate=gate, shift=shift, scale=scale)
    _check_residual(op, residual, x)
    rms, eps = _check_norm(op, x, norm, weight, bias, eps)
    wide = residual.dtype is torch.float32
    gate, shift, scale, weight, bias = of_one_dtype(x, gate, shift, scale, weight, bias, float32=wide)
    added = shaped_as(residual, tokens)
    out, y = gate_modulate(added, tokens, gate, shift, scale, cu_rows, rms, weight, bias, eps)[:2]
    return shaped_as(out, x), shaped_as(y, x)


def norm_gate_residual(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    cu_rows: Tensor | None = None,
    *,
    tanh: bool = False,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """residual + g[r] * norm(x), where g is the gate or its tanh.

    >>> residual, attn = torch.randn(2, 2, 400, 1152)
    >>> gate, weight = torch.randn(2, 1, 1152), torch.ones(1152)
    >>> norm_gate_residual(residual, attn, gate, tanh=True, norm="rms", weight=weight).shape
    torch.Size([2, 400, 1152])

    Args:
        residual, x, gate, cu_rows: those of `gate_residual`. Without a gate: residual + norm(x).
        tanh: multiply by tanh(gate), taken in float32, instead of the gate.
        norm, weight, bias, eps: those of `layer_norm_modulate`.

    Returns:
        x's shape, in the residual's dtype; tokens past the last boundary give zeros.

    Source: the norms behind attention and feed-forward layers of Z-Image (with tanh and a weight) and Mochi.
    """
    op = "norm_gate_residual"
    (tokens, gate), boundaries = _check(op, x, cu_rows, gate=gate)
    _check_residual(op, residual, x)
    rms, eps = _check_norm(op, x, norm, weight, bias, eps)
    if check_bool(op, "tanh", tanh) and gate is not None:
        gate = torch.tanh(gate if gate.dtype is torch.float64 else gate.float())
    gate, weight, bias = of_one_dtype(x, gate, weight, bias, float32=residual.dtype is torch.float32)
    # A dense batch has no tokens past its last boundary.
    out = norm_gate(shaped_as(residual, tokens), tokens, gate, boundaries, rms, weight, bias, eps, cu_rows is not None)[0]
    return shaped_as(out, x)


def _check(op: str, x: Tensor, cu_rows: Tensor | None, **rows: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """[x as [N, D], and each of its rows as [R, D] or None], and their boundaries."""
    check_tensor(op, "x", x)
    if x.ndim == 3:
        return _check_dense(op, x, cu_rows, rows)
    if x.ndim != 2:
        fail(op, "x", "shape [N, D] or [B, S, D]", str(list(x.shape)))
    if cu_rows is not None:
        check_cu_seqlens(op, "cu_rows", cu_rows, x, "R+1")
    num_rows = "R" if cu_rows is None else cu_rows.shape[0] - 1
    for name, row in rows.items():
        if row is not None:
            check_tensor(op, name, row, (num_rows, x.shape[1]), dtype=or_float32(x), like=x)
            if cu_rows is None:
                fail(op, "cu_rows", f"int32 boundaries [R+1] of the rows of {name}", "None")
    return cast(list[Tensor], [x, *rows.values()]), cu_rows


def _check_dense(op: str, x: Tensor, cu_rows: Tensor | None, rows: dict[str, Tensor | None]) -> tuple[list[Tensor], Tensor | None]:
    """The same of a batch [B, S, D], whose boundaries follow from the shapes."""
    if cu_rows is not None:
        fail(op, "cu_rows", "None with x [B, S, D]", "a tensor")
    b, s, d = x.shape
    f = 0
    flat = [x.flatten(0, 1)]
    for name, row in rows.items():
        if row is not None:
            check_tensor(op, name, row, dtype=or_float32(x), like=x)
            f = f or (row.shape[1] if row.ndim == 3 else 1)
            # Not `in`, by which torch.compile takes a fixed B of x for another one than a row's.
            right = row.shape == (b, f, d) or (f == 1 and row.shape == (b, d))
            if not right or f == 0 or s % f:
                fail(op, name, f"shape [{b}, {d}] or [{b}, F, {d}], of one F that divides {s}", str(list(row.shape)))
            row = row.reshape(b * f, d)
        flat.append(cast(Tensor, row))
    if f == 0:
        return flat, None
    if s == 0:
        return flat, torch.zeros(b * f + 1, dtype=torch.int32, device=x.device)
    return flat, torch.arange(0, b * s + 1, s // f, dtype=torch.int32, device=x.device)


def _check_residual(op: str, residual: Tensor, x: Tensor) -> None:
    dtype = x.dtype if x.dtype is torch.float64 else or_float32(x)
    check_tensor(op, "residual", residual, tuple(x.shape), dtype=dtype, like=x)


def _check_norm(op: str, x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[bool, float]:
    """Whether the norm is RMS, and eps."""
    check_choice(op, "norm", norm, ("layer", "rms"))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(op, name, value, (x.shape[-1],), dtype=or_float32(x), like=x)
    if norm == "rms" and bias is not None:
        fail(op, "bias", 'None with norm="rms"', "a tensor")
    return norm == "rms", check_float32(op, "eps", eps, x, at_least=0)
