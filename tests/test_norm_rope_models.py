"""norm_rope and apply_rope against what diffusers' models compute between their projections and attention."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from test_norm_rope import plain_rope
from tolerance import run
from torch import Tensor

from sora_kernels import backends
from sora_kernels.norm_rope import apply_rope, norm_rope

# In plain torch, written as they write it: x [B, S, H, d] float32.


def wan(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
    """RMSNorm across heads, then pairs (2i, 2i+1) by tables whose entries stand twice."""
    x = F.rms_norm(x.flatten(2), (x.shape[2] * x.shape[3],), weight, 1e-6).view(x.shape)
    cos, sin = (t.repeat_interleave(2, dim=-1)[None, :, None] for t in (angles.cos(), angles.sin()))
    u, v = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = u * cos[..., 0::2] - v * sin[..., 1::2]
    out[..., 1::2] = u * sin[..., 1::2] + v * cos[..., 0::2]
    return out


def flux(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
    """RMSNorm of each head, then complex numbers, as of BFL's and of Z-Image's code."""
    x = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.view_as_real(turned).flatten(-2)


def cosmos(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
    """RMSNorm of each head, then rotate_half."""
    x = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    cos, sin = (torch.cat([t, t], dim=-1)[None, :, None] for t in (angles.cos(), angles.sin()))
    u, v = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-v, u], dim=-1) * sin


def cogvideox(x: Tensor, weight: Tensor, bias: Tensor, angles: Tensor, text: int) -> Tensor:
    """LayerNorm of each head, then the rotation of what follows the text."""
    x = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
    return torch.cat([x[:, :text], plain_rope(x[:, text:], angles.cos(), angles.sin())], dim=1)


def ltx(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
    """RMSNorm across heads, then one rotation over all of their channels: angles [S, H d / 2]."""
    inner = F.rms_norm(x.flatten(2), (x.shape[2] * x.shape[3],), weight, 1e-5)
    cos, sin = (t.repeat_interleave(2, dim=-1)[None] for t in (angles.cos(), angles.sin()))
    u, v = inner.unflatten(2, (-1, 2)).unbind(-1)
    return (inner * cos + torch.stack([-v, u], dim=-1).flatten(2) * sin).view(x.shape)


def mochi(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
    """RMSNorm of each head, then angles [S, H, d / 2] that each head learns."""
    x = F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos = even * angles.cos() - odd * angles.sin()
    sin = even * angles.sin() + odd * angles.cos()
    return torch.stack([cos, sin], dim=-1).flatten(-2)


B, S, H, D, TEXT = 2, 6, 3, 16, 4


def check_model(model: Callable, ours: Callable, *shapes: tuple[int, ...], learned: bool = False) -> None:
    """Outputs and gradients, in float64; the last shape is that of angles, whose tables a model learns or has once."""
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    angles = inputs.pop()
    if learned:
        actual, expected = run(ours, [*inputs, angles]), run(model, [*inputs, angles])
    else:
        actual, expected = run(partial(with_angles, ours, angles), inputs), run(partial(with_angles, model, angles), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    with backends.use_backend("cpu"):
        single = run(
            ours if learned else partial(with_angles, ours, angles.float()), [t.float() for t in (*inputs, *[angles] * learned)]
        )
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def with_angles(function: Callable, angles: Tensor, *inputs: Tensor) -> Tensor:
    return function(*inputs, angles)


X4 = (B, S, H, D)


def test_wan() -> None:
    check_model(wan, lambda x, w, a: norm_rope(x, a.cos(), a.sin(), weight=w, across_heads=True), X4, (H * D,), (S, D // 2))


def test_flux() -> None:
    check_model(flux, lambda x, w, a: norm_rope(x, a.cos(), a.sin(), weight=w), X4, (D,), (S, D // 2))


def test_cosmos() -> None:
    check_model(cosmos, lambda x, w, a: norm_rope(x, a.cos(), a.sin(), weight=w, interleaved=False), X4, (D,), (S, D // 2))


def test_cogvideox() -> None:
    """The text stays as it is where its rows have cosines of 1 and sines of 0."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor, angles: Tensor) -> Tensor:
        cos, sin = F.pad(angles.cos(), (0, 0, TEXT, 0), value=1), F.pad(angles.sin(), (0, 0, TEXT, 0))
        return norm_rope(x, cos, sin, norm="layer", weight=weight, bias=bias)

    check_model(partial(cogvideox, text=TEXT), ours, (B, TEXT + S, H, D), (D,), (D,), (S, D // 2))


def test_ltx() -> None:
    def ours(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
        cos, sin = (t.unflatten(1, (H, -1)) for t in (angles.cos(), angles.sin()))
        return norm_rope(x, cos, sin, weight=weight, across_heads=True, eps=1e-5)

    check_model(ltx, ours, X4, (H * D,), (S, H * D // 2))


def test_mochi() -> None:
    check_model(mochi, lambda x, w, a: norm_rope(x, a.cos(), a.sin(), weight=w, eps=1e-5), X4, (D,), (S, H, D // 2), learned=True)


def test_partial_rotation() -> None:
    """96 of 128 channels."""

    def model(x: Tensor, angles: Tensor) -> Tensor:
        return torch.cat([flux(x[..., :96], torch.ones(96).to(x), angles), x[..., 96:]], dim=-1)

    def ours(x: Tensor, angles: Tensor) -> Tensor:
        normed = torch.cat([F.rms_norm(x[..., :96], (96,), eps=1e-6), x[..., 96:]], dim=-1)
        return apply_rope(normed, angles.cos(), angles.sin())

    check_model(model, ours, (1, S, 2, 128), (S, 48))
