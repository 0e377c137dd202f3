"""3D rotary position embedding, and RMSNorm of queries and keys fused with it.

A token at position (t, h, w) turns pair p of axis a, of that axis' n_a pairs, by position_a · theta_a^(-p/n_a).
"""

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from .common import widen, write, write_gradients, zero_rows


def token_coordinates(cu_spans: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Span index [n] and (t, h, w) index in its span [n,3] of each of the n tokens before the last boundary."""
    cu = cu_spans.long()
    span = torch.repeat_interleave(torch.arange(len(grid), device=cu.device), cu.diff())
    raster = torch.arange(len(span), device=cu.device) - cu[span]
    _, height, width = grid.long()[span].unbind(-1)
    return span, torch.stack([raster // (height * width), raster // width % height, raster % width], dim=-1)


def rotary_angles(
    cu_spans: Tensor, grid: Tensor, origin: Tensor, step: Tensor, theta: Sequence[float], axes_dim: Sequence[int]
) -> Tensor:
    """Angle of each token and channel pair, float64 [n, d/2], the axes' pairs one after the other."""
    span, coordinate = token_coordinates(cu_spans, grid)
    position = origin.double()[span] + step.double()[span] * coordinate
    angles = []
    for axis, (base, channels) in enumerate(zip(theta, axes_dim, strict=True)):
        pair = torch.arange(channels // 2, dtype=torch.float64, device=grid.device)
        angles.append(position[:, axis, None] * base ** (-pair / (channels // 2)))
    return torch.cat(angles, dim=-1)


def rotate(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Turn each channel pair of x [N,H,d] by its angle [n, d/2]; the tokens past n become zeros."""
    cos, sin = (rearrange(f(angles), "n i -> n 1 i") for f in (torch.cos, torch.sin))
    return zero_rows(rotate_pairs(x[: len(angles)], cos, sin, interleaved), len(x))


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(a, b) -> (a·cos - b·sin, a·sin + b·cos) of x [N,H,d] and cos, sin [N,H or 1,d/2].

    Pair i is channels (2i, 2i+1), or (i, i+d/2) if not interleaved.
    """
    split, join = ("n h (i two)", "two n h i") if interleaved else ("n h (two i)", "two n h i")
    a, b = rearrange(widen(x), f"{split} -> {join}", two=2)
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    return rearrange(torch.stack([a * cos - b * sin, a * sin + b * cos]), f"{join} -> {split}")


def norm_groups(x: Tensor, across_heads: bool) -> Tensor:
    """x [N,H,d] as the groups of channels that are normalized together: [N,H,d] per head, [N,1,H·d] across heads."""
    return rearrange(widen(x), "n h d -> n 1 (h d)" if across_heads else "n h d -> n h d")


def norm_rope(
    x: Tensor, weight: Tensor | None, angles: Tensor, interleaved: bool, across_heads: bool, eps: float | Tensor
) -> tuple[Tensor, Tensor]:
    """RMSNorm, then rotation, of queries or keys x [N,H,d] -> [N,H,d] and rstd [N,H], or [N,1] across heads.

    weight is [d], or [H·d] across heads; the tokens past the angles become zeros.
    """
    groups = norm_groups(x[: len(angles)], across_heads)
    rstd = torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + eps)
    normed = groups * rstd if weight is None else groups * rstd * widen(weight)
    turned = rotate(normed.reshape(len(groups), *x.shape[1:]), angles, interleaved)
    return zero_rows(turned, len(x)), zero_rows(rstd.squeeze(-1), len(x))


def rope_3d(
    x: Tensor,
    cu_spans: Tensor,
    grid: Tensor,
    origin: Tensor,
    step: Tensor,
    theta: Sequence[float],
    axes_dim: Sequence[int],
    interleaved: bool,
    inverse: bool,
    out: Tensor,
) -> None:
    angles = rotary_angles(cu_spans, grid, origin, step, theta, axes_dim)
    write([rotate(x, -angles if inverse else angles, interleaved)], [out])


def qk_norm_rope_3d_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cu_spans: Tensor,
    grid: Tensor,
    origin: Tensor,
    step: Tensor,
    theta: Sequence[float],
    axes_dim: Sequence[int],
    interleaved: bool,
    across_heads: bool,
    eps: float,
    q_out: Tensor,
    k_out: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
) -> None:
    angles = rotary_angles(cu_spans, grid, origin, step, theta, axes_dim)
    for x, weight, out, rstd in ((q, q_weight, q_out, q_rstd), (k, k_weight, k_out, k_rstd)):
        write(norm_rope(x, weight, angles, interleaved, across_heads, eps), (out, rstd))


def qk_norm_rope_3d_backward(
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
    theta: Sequence[float],
    axes_dim: Sequence[int],
    interleaved: bool,
    across_heads: bool,
    dq: Tensor,
    dk: Tensor,
    dq_weight: Tensor | None,
    dk_weight: Tensor | None,
) -> None:
    angles = rotary_angles(cu_spans, grid, origin, step, theta, axes_dim)
    sides = ((q, q_weight, q_rstd, dq_out, dq, dq_weight), (k, k_weight, k_rstd, dk_out, dk, dk_weight))
    for side, weight, rstd, dout, dx, dweight in sides:
        # the eps of the forward pass, which is not passed on: 1/rstd² = mean(x²) + eps
        count = len(angles)
        mean_square = norm_groups(side[:count].detach(), across_heads).square().mean(dim=-1, keepdim=True)
        eps = rstd[:count, :, None].detach() ** -2 - mean_square
        function = partial(norm_rope, angles=angles, interleaved=interleaved, across_heads=across_heads, eps=eps)
        write_gradients(function, (side, weight), (dout, None), (dx, dweight))
