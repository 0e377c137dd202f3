"""Rotary position embedding from cosines and sines that the caller has, alone or fused with the norm of queries or keys.

Of the rotated part of a head, its first r channels, pair p turns by the angle whose cosine and sine stand in the tables:

    (u, v) <- (u cos - v sin, u sin + v cos)          in float32; the channels past r stay as they are

So Wan, Hunyuan, LTX, CogVideoX, Mochi, Flux and Z-Image have it in diffusers: one table per grid, computed once, serves queries and
keys of all layers. `rope_3d` needs no tables, as it computes angles from a layout. Queries and keys are separate calls, because
their lengths and tables may differ.

Source: Su et al., RoFormer (2021); Henry et al., Query-Key Normalization for Transformers (2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .checks import check_bool, check_choice, check_float32, check_tensor, fail, or_float32
from .library import Context, Grads, cotangent, of_one_dtype, register, rows, shaped_as, want_gradients
from .memory import empty_like


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """Rotates queries or keys by given cosines and sines.

    >>> angles = torch.outer(torch.arange(256.0), 10000 ** -torch.linspace(0, 1, 32))
    >>> x = torch.randn(2, 256, 8, 64)
    >>> apply_rope(x, angles.cos(), angles.sin()).shape
    torch.Size([2, 256, 8, 64])

    Args:
        x: [N, H, d] packed, or [B, S, H, d] dense; any strides with a contiguous last axis, as of a chunk of a fused projection.
        cos, sin: [M, r/2], a row per token, or [M, H, r/2], one per token and head, in float32 or x's dtype. The first r <= d
            channels of each head are rotated. M is N or B*S or, of a dense x, S: all samples share the tables.
        interleaved: pair i is channels (2i, 2i+1), diffusers' default; if False (the "half" or GPT-NeoX layout, flash_attn's
            default) channels (i, i + r/2).

    Returns:
        x's shape and dtype.

    Tables that require gradients get them in plain torch: products of float32 copies of x and of its gradient, which take several
    times as long as the kernel and as much memory as several x. Other tables cost nothing.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "apply_rope"
    heads = _check_heads(op, x)
    _check_rope_tables(op, x, heads, cos, sin)
    interleaved = check_bool(op, "interleaved", interleaved)
    return shaped_as(_apply_rope(heads, *of_one_dtype(x, cos, sin, float32=True), interleaved, False), x)


def norm_rope(
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str = "rms",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    across_heads: bool = False,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> Tensor:
    """Normalises the heads of queries or keys, then rotates them, in one pass.

        x <- apply_rope(x / sqrt(mean(x**2) + eps) * weight, cos, sin)                      norm "rms"
        x <- apply_rope((x - mean(x)) / sqrt(var(x) + eps) * weight + bias, cos, sin)       norm "layer"

    >>> angles = torch.outer(torch.arange(256.0), 10000 ** -torch.linspace(0, 1, 32))
    >>> q, context = torch.randn(2, 256, 8, 64), torch.randn(2, 77, 8, 64)
    >>> q = norm_rope(q, angles.cos(), angles.sin(), weight=torch.ones(64))
    >>> norm_rope(context, weight=torch.ones(64)).shape  # keys of a cross-attention: the norm alone
    torch.Size([2, 77, 8, 64])

    Args:
        cos, sin: as `apply_rope` takes them; None: no rotation.
        norm: "rms", or "layer" (CogVideoX).
        weight, bias: [d], or [H*d] with `across_heads`, in x's dtype or float32; None is 1 and 0. Only a LayerNorm has a bias.
        across_heads: take the mean over all heads of a token (Wan, LTX) instead of each head's d channels; of an RMS norm only.
        eps: added to the mean square or variance, at least 0.

    x and `interleaved`, what comes back, what gradients of tables cost and what is raised are as in `apply_rope`.
    """
    op = "norm_rope"
    heads = _check_heads(op, x)
    if cos is not None:
        _check_rope_tables(op, x, heads, cos, sin)
    elif sin is not None:
        fail(op, "sin", "None, as there is no cos", "a tensor" if isinstance(sin, Tensor) else type(sin).__name__)
    check_choice(op, "norm", norm, ("rms", "layer"))
    across_heads = check_bool(op, "across_heads", across_heads)
    if norm == "layer" and across_heads:
        fail(op, "across_heads", "False with norm 'layer'", "True")
    size = heads.shape[1] * heads.shape[2] if across_heads else heads.shape[2]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_tensor(op, name, parameter, (size,), dtype=or_float32(x), like=x)
    if norm == "rms" and bias is not None:
        fail(op, "bias", "None with norm 'rms'", "a tensor")
    rest = norm == "layer", across_heads, check_bool(op, "interleaved", interleaved), check_float32(op, "eps", eps, x, 0)
    tables = of_one_dtype(x, cos, sin, float32=True)
    return shaped_as(_norm_rope(heads, *of_one_dtype(x, weight, bias), *tables, *rest)[0], x)


def _check_heads(op: str, x: Tensor) -> Tensor:
    """x as [N, H, d]."""
    check_tensor(op, "x", x)
    if x.ndim not in (3, 4):
        fail(op, "x", "shape [N, H, d] or [B, S, H, d]", str(list(x.shape)))
    if x.shape[-1] == 0:
        fail(op, "x", "a head dim of at least 1", "0")
    return x if x.ndim == 3 else x.flatten(0, 1)


def _check_rope_tables(op: str, x: Tensor, heads: Tensor, cos: Tensor, sin: Tensor | None) -> None:
    check_tensor(op, "cos", cos, dtype=or_float32(x), like=x)
    if sin is None:
        fail(op, "sin", "a tensor, as there is cos", "None")
    n, h, d = heads.shape
    sizes = (n,) if x.ndim == 3 else (n, x.shape[1])
    shape = cos.shape
    if len(shape) not in (2, 3) or shape[0] not in sizes or 2 * shape[-1] > d or (len(shape) == 3 and shape[1] != h):
        m = " or ".join(map(str, dict.fromkeys(sizes)))
        fail(op, "cos", f"shape [{m}, r/2] or [{m}, {h}, r/2] with r <= {d}", str(list(shape)))
    check_tensor(op, "sin", sin, tuple(shape), dtype=or_float32(x), like=x)


def _run_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    (x,), (cos, sin) = rows(x), rows(cos, sin)
    out = empty_like(x)
    backends.call("apply_rope", x, x=x, cos=cos, sin=sin, interleaved=interleaved, inverse=inverse, out=out)
    return out


def _pairs(x: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    # What the vmap of is_grads_batched knows: a slice of all channels and unflatten are no such views.
    rotated = x if x.shape[-1] == 2 * pairs else x[..., : 2 * pairs]
    u, v = rotated.reshape(*rotated.shape[:-1], pairs, 2).unbind(-1) if interleaved else rotated.chunk(2, dim=-1)
    return u, v


def _table_gradients(dout: Tensor, x: Tensor, cos: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    """dcos = g_u u + g_v v and dsin = g_v u - g_u v, summed over what shares a row of the tables; x is in their dtype.

    In plain torch, which can differentiate it once more.
    """
    pairs = cos.shape[-1]
    (g_u, g_v), (u, v) = (_pairs(t, pairs, interleaved) for t in (dout.to(cos.dtype), x))
    found = g_u * u + g_v * v, g_u * v - g_v * u if inverse else g_v * u - g_u * v
    if cos.ndim == 2:
        found = found[0].sum(1), found[1].sum(1)
    if x.shape[0] == cos.shape[0]:
        return found
    dcos, dsin = (part.reshape(x.shape[0] // cos.shape[0], *cos.shape).sum(0) for part in found)
    return dcos, dsin


def _save_rope(ctx: Context, inputs: tuple, output: Tensor) -> None:
    x, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.of_tables = want_gradients(cos, sin)
    ctx.save_for_backward(x if ctx.of_tables else None, cos, sin)


def _grad_rope(ctx: Context, dout: Tensor) -> Grads:
    x, cos, sin = ctx.saved_tensors
    # A rotation's transpose is the rotation back.
    dx = _apply_rope(dout, cos, sin, ctx.interleaved, not ctx.inverse)
    dcos, dsin = _table_gradients(dout, x.to(cos.dtype), cos, ctx.interleaved, ctx.inverse) if ctx.of_tables else (None, None)
    return dx, dcos, dsin, None, None


_apply_rope = register(
    "apply_rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    _run_rope,
    lambda x, *_: empty_like(x),
    _grad_rope,
    _save_rope,
)


def _run_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layer: bool,
    across_heads: bool,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (x,), (weight, bias, cos, sin) = rows(x), rows(weight, bias, cos, sin)
    out, mean, rstd = _empty_norm_rope(x, layer, across_heads)
    backends.call(
        "norm_rope_forward",
        x,
        x=x,
        weight=weight,
        bias=bias,
        cos=cos,
        sin=sin,
        layer=layer,
        across_heads=across_heads,
        interleaved=interleaved,
        eps=eps,
        out=out,
        mean=mean if layer else None,
        rstd=rstd,
    )
    return out, mean, rstd


def _empty_norm_rope(x: Tensor, layer: bool, across_heads: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = x.shape[0], 1 if across_heads else x.shape[1]
    return empty_like(x), x.new_empty(shape if layer else 0, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _run_norm_rope_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    layer: bool,
    across_heads: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (dout, x), (weight, bias, cos, sin) = rows(dout, x), rows(weight, bias, cos, sin)
    dx, dweight, dbias = _fake_norm_rope_backward(dout, x, weight, bias)
    backends.call(
        "norm_rope_backward",
        x,
        dout=dout,
        x=x,
        weight=weight,
        bias=bias,
        cos=cos,
        sin=sin,
        mean=mean if layer else None,
        rstd=rstd,
        layer=layer,
        across_heads=across_heads,
        interleaved=interleaved,
        dx=dx,
        dweight=None if weight is None else dweight,
        dbias=None if bias is None else dbias,
    )
    return dx, dweight, dbias


def _fake_norm_rope_backward(
    dout: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return empty_like(x), dweight, dbias


def _save_norm_rope(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.layer, ctx.across_heads, ctx.interleaved, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.of_tables = want_gradients(*tensors[3:])
    ctx.save_for_backward(*tensors, *output[1:])


def _grad_norm_rope(ctx: Context, dout: Tensor | None, *_: None) -> Grads:
    x, weight, bias, cos, sin, mean, rstd = ctx.saved_tensors
    dout = cotangent(dout, x)
    options = ctx.layer, ctx.across_heads, ctx.interleaved
    dx, dweight, dbias = _norm_rope_backward(dout, x, weight, bias, cos, sin, mean, rstd, *options)
    dcos = dsin = None
    if ctx.of_tables:
        # Normalised anew from x, so that this can be differentiated once more.
        groups, (weight_, bias_) = x.to(cos.dtype), (p if p is None else p.to(cos.dtype) for p in (weight, bias))
        groups = groups.flatten(1) if ctx.across_heads else groups
        if ctx.layer:
            normed = F.layer_norm(groups, groups.shape[-1:], weight_, bias_, ctx.eps)
        else:
            normed = F.rms_norm(groups, groups.shape[-1:], weight_, ctx.eps)
        dcos, dsin = _table_gradients(dout, normed.view(x.shape), cos, ctx.interleaved, False)
    return dx, None if weight is None else dweight, None if bias is None else dbias, dcos, dsin, *(None,) * 4


_PARAMETERS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin"
_norm_rope_backward = register(
    f"norm_rope_backward(Tensor dout, {_PARAMETERS}, Tensor mean, Tensor rstd, bool layer, bool across_heads, bool interleaved) "
    "-> (Tensor, Tensor, Tensor)",
    _run_norm_rope_backward,
    _fake_norm_rope_backward,
)
_norm_rope = register(
    f"norm_rope_forward({_PARAMETERS}, bool layer, bool across_heads, bool interleaved, float eps) -> (Tensor, Tensor, Tensor)",
    _run_norm_rope,
    lambda x, weight, bias, cos, sin, layer, across_heads, *_: _empty_norm_rope(x, layer, across_heads),
    _grad_norm_rope,
    _save_norm_rope,
)
