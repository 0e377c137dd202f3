"""Rotary position embedding from given cosines and sines, alone or after a norm of each token's heads; or the norm alone."""

from functools import partial

import torch
from einops import repeat
from torch import Tensor

from .adaln import moments
from .common import widen, write, write_gradients
from .rope import norm_groups, rotate_pairs


def rotate_by_tables(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """Turn the first r channels of x [N,H,d] by cos and sin, [M,r/2] or [M,H,r/2]; token n has row n % M, the others pass."""
    x = widen(x)
    if cos is None or sin is None or len(x) == 0:
        return x
    r = 2 * cos.shape[-1]
    pattern = "m h i -> (b m) h i" if cos.ndim == 3 else "m i -> (b m) 1 i"
    cos, sin = (repeat(table, pattern, b=len(x) // len(table)) for table in (cos, sin))
    return torch.cat([rotate_pairs(x[..., :r], cos, sin, interleaved), x[..., r:]], dim=-1)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layer: bool,
    across_heads: bool,
    interleaved: bool,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, then rotation, of x [N,H,d] -> [N,H,d], mean (0 for RMSNorm) and rstd [N,H], or [N,1] across heads.

    weight and bias are [d], or [H·d] across heads.
    """
    mean, centred, variance = moments(norm_groups(x, across_heads), rms=not layer)
    rstd = torch.rsqrt(variance + eps)
    normed = centred * rstd
    if weight is not None:
        normed = normed * widen(weight)
    if bias is not None:
        normed = normed + widen(bias)
    turned = rotate_by_tables(normed.reshape(x.shape), cos, sin, interleaved)
    return turned, mean.squeeze(-1), rstd.squeeze(-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, out: Tensor) -> None:
    write([rotate_by_tables(x, cos, -sin if inverse else sin, interleaved)], [out])


def norm_rope_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layer: bool,
    across_heads: bool,
    interleaved: bool,
    eps: float,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> None:
    write(norm_rope(x, weight, bias, cos, sin, layer, across_heads, interleaved, eps), (out, mean, rstd))


def norm_rope_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    layer: bool,
    across_heads: bool,
    interleaved: bool,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    # the eps of the forward pass, which is not passed on: 1/rstd² = variance (or mean square) + eps
    variance = moments(norm_groups(x.detach(), across_heads), rms=not layer)[2]
    eps = rstd[..., None].detach() ** -2 - variance
    function = partial(norm_rope, cos=cos, sin=sin, layer=layer, across_heads=across_heads, interleaved=interleaved, eps=eps)
    write_gradients(function, (x, weight, bias), (dout, None, None), (dx, dweight, dbias))
