"""The passes of attention that rings of devices call: forward, and backward with an output of more keys than are given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_flash_attn_interface import formula
from tolerance import assert_bit_equal
from torch import Tensor

from sora_kernels.integrations.flash_attn import interface

OPTIONS: dict[str, dict] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1)},
    "softcap": {"softcap": 0.8},
    "alibi": {"slopes": torch.tensor([0.0, 0.1, 0.5, 2.0])},
    "scale": {"scale": -0.3},
}


def in_full(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=0.25
) -> list[Tensor]:
    """out [1, S, H, d], lse [1, H, S], dq, dk and dv of the formula, in float64."""
    q, k, v = (x[0].double().requires_grad_() for x in (q, k, v))
    left, right = (100 if side < 0 else side for side in window)
    right, last = 0 if causal else right, len(k) - len(q)
    out, lse = formula(q, k, v, lambda i, j: (i + last - left <= j) & (j <= i + last + right), scale, softcap, slopes)
    out.backward(dout[0].double())
    return [x.detach()[None] for x in (out, lse, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_passes(layout: str, options: dict) -> None:
    torch.manual_seed(0)
    (q, dout), (k, v) = torch.randn(2, 1, 7, 4, 16), torch.randn(2, 1, 12, 2, 16)
    expected = in_full(q, k, v, dout, **options)
    scale, slopes = options.get("scale", 0.25), options.get("slopes")
    rest = 0.0, scale, options.get("causal", False), *options.get("window", (-1, -1)), options.get("softcap", 0.0), slopes, False
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    if layout == "dense":
        out, lse, mask, state = interface._wrapped_flash_attn_forward(q, k, v, *rest)
        delta = interface._wrapped_flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, *rest)
    else:
        bounds = (*(torch.tensor([0, n], dtype=torch.int32) for n in (7, 12)), 7, 12)
        out, lse, mask, state = interface._wrapped_flash_attn_varlen_forward(q[0], k[0], v[0], *bounds, *rest)
        tensors = dout[0], q[0], k[0], v[0], out, lse, dq[0], dk[0], dv[0]
        delta = interface._wrapped_flash_attn_varlen_backward(*tensors, *bounds, *rest)
        out, lse, delta = out[None], lse[None], delta[None]
    assert (mask.numel(), state.numel()) == (0, 0)
    for got, right in zip((out, lse, dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["softcap"]], ids=["plain", "softcap"])
def test_gradients_of_a_part_of_the_keys(options: dict) -> None:
    """As in a ring of devices: out and lse are those of all keys, and each part's gradients add up to the whole."""
    torch.manual_seed(0)
    (q, dout), (k, v) = torch.randn(2, 1, 7, 4, 16), torch.randn(2, 1, 12, 2, 16)
    out, lse, *wanted = in_full(q, k, v, dout, **options)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    rest = 0.0, 0.25, False, -1, -1, options.get("softcap", 0.0), None, False
    for part in (slice(0, 5), slice(5, 12)):
        of_part, *others = torch.empty_like(q), dk[:, part], dv[:, part]
        keys, values = k[:, part], v[:, part]
        interface._flash_attn_backward(dout, q, keys, values, out.float(), lse.float(), of_part, *others, *rest)
        dq += of_part
    for got, right in zip((dq, dk, dv), wanted, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sign", [-1, 1], ids=["as here", "as in FlashAttention-2"])
def test_rows_without_keys_have_no_gradients(sign: int) -> None:
    q, k, v, dout = torch.randn(4, 1, 5, 2, 16)
    k, v = k[:, :2], v[:, :2]
    out, lse, *_ = interface._flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    dq, dk = torch.full_like(q, math.nan), torch.full_like(k, math.nan)
    lse = lse.masked_fill(lse.isinf(), sign * math.inf)
    interface._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, None, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    wanted = in_full(q[:, 3:], k, v, dout[:, 3:], causal=True)[2:4]
    assert not dq[:, :3].any()
    torch.testing.assert_close(dq[:, 3:].double(), wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dk.double(), wanted[1], rtol=1e-4, atol=1e-5)


def test_passes_in_inference_mode() -> None:
    tensors = [*torch.randn(4, 6, 2, 16), torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0.5, 0.1])]

    def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, cu: Tensor, slopes: Tensor) -> list[Tensor]:
        sizes = cu, cu, 4, 4
        out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, *sizes, 0.0, 0.25, True, -1, -1, 0.0, slopes, False)
        found = [torch.empty_like(x) for x in (q, k, v)]
        interface._flash_attn_varlen_backward(dout, q, k, v, out, lse, *found, *sizes, 0.0, 0.25, True, -1, -1, 0.0, slopes, False)
        return found

    expected = gradients(*tensors)
    with torch.inference_mode():
        assert_bit_equal(gradients(*(x.clone() for x in tensors)), expected)
        assert_bit_equal(gradients(*tensors), expected)


def test_passes_have_no_derivatives() -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 16, requires_grad=True)
    results = interface._flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    assert not any(x.requires_grad for x in results)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("leftpad_k", torch.zeros(1, dtype=torch.int32), "leftpad_k: expected None"),
        ("num_splits", 2, "num_splits: expected 0 or 1, as keys are not split, got 2"),
        ("block_table", torch.zeros(1, 1, dtype=torch.int32), "block_table: expected None"),
    ],
)
def test_what_a_packed_pass_cannot_do_is_refused(name: str, value: Any, message: str) -> None:
    q, k, v = torch.randn(3, 9, 4, 16)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        interface._flash_attn_varlen_forward(q, k, v, cu, cu, 9, 9, 0.0, 0.25, False, **{name: value})


def test_a_packed_pass_over_the_first_keys() -> None:
    q, k, v = torch.randn(3, 9, 4, 16)
    cu, used = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, cu, cu, 9, 9, 0.0, 0.25, False, seqused_k=used)
    for got, right in zip((out, lse), formula(q, k[:4], v[:4]), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(1, 5, 2, 8), r"_flash_attn_backward: dout: expected shape \[1, 5, 2, 16\], got \[1, 5, 2, 8\]"),
        (5, torch.zeros(1, 5, 2), r"_flash_attn_backward: softmax_lse: expected shape \[1, 2, 5\], got \[1, 5, 2\]"),
        (7, torch.zeros(1, 5, 2, 16).half(), "_flash_attn_backward: dk: expected dtype float32, got float16"),
        (9, 0.5, "_flash_attn_backward: dropout_p: expected 0"),
    ],
)
def test_bad_arguments_of_the_backward(position: int, value: Any, message: str) -> None:
    x, lse = torch.randn(1, 5, 2, 16), torch.randn(1, 2, 5)
    arguments = [x, x, x, x, x, lse, *torch.empty(3, 1, 5, 2, 16), 0.0, 0.25, False, -1, -1, 0.0, None, False]
    arguments[position] = value
    with pytest.raises((ValueError, TypeError), match=message):
        interface._flash_attn_backward(*arguments)
