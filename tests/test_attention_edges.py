"""Attention where numbers and sizes are at their edges: masks and logits of any size, empty axes, autocast, windows without end."""

import sys

import pytest
import torch
from tolerance import Target, check_rejected
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from sora_kernels.attention import flash_attn_func, scaled_dot_product_attention, spatiotemporal_attention, varlen_attn
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.patch_embed import patch_embed_3d

FUNCTION = "attention_forward"
LARGE = (-1e4, -5e9, -1e10, -9e15, -1e20, -1e30, torch.finfo(torch.float32).min)


def attend(target: Target, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one query, which is zero: output [d], its gradient [d], k and v [Sk, d]."""
    q = torch.zeros(1, 1, 1, 8, device=target.device, dtype=target.dtype, requires_grad=True)
    k, v = (target.randn(1, 1, mask.shape[1], 8) for _ in range(2))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask.to(target.device))
    (dq,) = torch.autograd.grad(out.sum(), q)
    return out[0, 0, 0], dq[0, 0, 0], k[0, 0], v[0, 0]


@pytest.mark.parametrize("value", LARGE)
def test_masked_keys_are_not_seen(target: Target, value: float) -> None:
    """Whole blocks of keys masked by a finite number, of which one key is not."""
    mask = torch.zeros(1, 129)
    mask[:, :-1] = value
    out, dq, _, v = attend(target, mask)
    assert (out - v[-1]).abs().max() <= 1e-6 * v.abs().max()
    assert dq.abs().max() <= 1e-2  # nothing can make a difference but rounding


@pytest.mark.parametrize("value", LARGE[1:])
def test_rows_masked_whole_by_one_value_are_means(target: Target, value: float) -> None:
    """As torch gives: the mean of v, and the gradient of a mean's scores."""
    mask = torch.full((1, 129), value)
    if target.dtype == torch.float64:  # where the scores still count beside smaller ones
        mask = mask.double().fill_(torch.finfo(torch.float64).min)
    out, dq, k, v = attend(target, mask)
    k, v = k.double(), v.double()
    tolerance = 1e-5 if target.dtype in (torch.float32, torch.float64) else 2e-2
    assert (out.double() - v.mean(dim=0)).abs().max() < tolerance
    dp = v.sum(dim=1)
    assert (dq.double() - (dp - dp.mean()) @ k / 129 * 8**-0.5).abs().max() < tolerance


@pytest.mark.parametrize("size", [1e5, 8e10, 1e20, 1e36])
def test_large_logits(target: Target, size: float) -> None:
    """All logits equal, and a last one larger."""
    if target.dtype == torch.float16:
        size = min(size, 1e9)
    q = torch.full((1, 1, 2, 1), size**0.5, device=target.device, dtype=target.dtype)
    k = q[:, :, :1].expand(1, 1, 130, 1).clone()
    v = target.randn(1, 1, 130, 4)[..., :1]
    out = scaled_dot_product_attention(q, k, v, scale=1.0)
    assert (out.double() - v.double().mean()).abs().max() < 2e-2
    k[:, :, -1] *= 2
    assert (scaled_dot_product_attention(q, k, v, scale=1.0) - v[0, 0, -1]).abs().max() <= 1e-6 * v.abs().max()


@pytest.mark.parametrize("word", [-1, "positive"])
def test_nans_stay_nans_whatever_their_bits(target: Target, word: int | str) -> None:
    """All ones, as memory that was filled with them has, or all but the sign: rounding such a number up makes it zero."""
    q, k, v = (target.randn(1, 40, 1, 16) for _ in range(3))
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[target.dtype.itemsize]
    k.view(integer)[0, 3] = torch.iinfo(integer).max if word == "positive" else word
    assert k[0, 3].isnan().all()
    assert flash_attn_func(q, k, v).isnan().all()
    assert not flash_attn_func(q, k[:, 4:], v[:, 4:]).isnan().any()


def test_spans_that_see_all_beside_windowed_ones() -> None:
    """dK of text beside a windowed grid, in a sample of fewer tokens than a block has."""
    layout = PackedLayout([[Span((1, 4, 4)), Span.text(3)]])
    q, k, v = (torch.randn(19, 1, 16, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(19, 1, 16)
    seen = torch.ones(19, 19, dtype=torch.bool)
    near = torch.zeros(4, 4, dtype=torch.bool)
    for i in range(4):
        near[i, min(max(i - 1, 0), 1) : min(max(i - 1, 0), 1) + 3] = True
    seen[:16, :16] = torch.kron(near, near)
    exact = torch_sdpa(*(x.double().transpose(0, 1) for x in (q, k, v)), attn_mask=seen).transpose(0, 1)
    got = torch.autograd.grad((spatiotemporal_attention(q, k, v, layout, window=(1, 3, 3)) * cotangent).sum(), (q, k, v))
    right = torch.autograd.grad((exact * cotangent).sum(), (q, k, v))
    for ours, theirs in zip(got, right, strict=True):
        assert (ours - theirs).abs().max() < 2e-6


@pytest.mark.parametrize("side", [40, 2**30, 2**31, 2**40, sys.maxsize])
def test_windows_may_be_longer_than_any_batch(target: Target, side: int) -> None:
    q, k, v = (target.randn(1, n, 2, 16) for n in (40, 30, 30))
    assert torch.equal(flash_attn_func(q, k, v, window_size=(side, 0)), flash_attn_func(q, k, v, window_size=(-1, 0)))
    assert torch.equal(flash_attn_func(q, k, v, window_size=(0, side)), flash_attn_func(q, k, v, window_size=(0, -1)))
    packed = q[0], k[0], v[0], target.boundaries(40), target.boundaries(30)
    assert torch.equal(varlen_attn(*packed, window_size=(side, side)), varlen_attn(*packed))


def test_windows_in_space_may_be_longer_than_any_axis() -> None:
    layout = PackedLayout.from_grids([(2, 3, 4)])
    q, k, v = torch.randn(3, 24, 1, 8)
    wide = spatiotemporal_attention(q, k, v, layout, window=(sys.maxsize, 2, 2**31))
    assert torch.equal(wide, spatiotemporal_attention(q, k, v, layout, window=(None, 2, None)))


@pytest.mark.parametrize("sizes", [(0, 5, 2, 1), (5, 0, 2, 1), (5, 5, 0, 1), (5, 5, 2, 0), (0, 0, 0, 0)])
def test_sizes_of_0(target: Target, sizes: tuple[int, int, int, int]) -> None:
    """Queries, keys, heads and batch, as torch's own: zeros where there are no keys, or nothing at all."""
    n, m, heads, batch = sizes
    inputs = [target.randn(batch, heads, length, 8).requires_grad_() for length in (n, m, m)]
    out = scaled_dot_product_attention(*inputs)
    assert out.shape == (batch, heads, n, 8)
    assert m or not out.any()
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not any(g.isnan().any() for g in grads)


@pytest.mark.parametrize("strided", ["one query", "every other", "one number"])
def test_gradients_of_lse_have_any_strides(target: Target, strided: str) -> None:
    n = 1 if strided == "one query" else 5
    q, k, v = (target.randn(1, length, 2, 8).requires_grad_() for length in (n, 7, 7))
    lse = flash_attn_func(q, k, v, return_attn_probs=True)[1]
    given = {
        "one query": torch.arange(4.0).reshape(1, 2, 2)[:, :, :1],
        "every other": torch.arange(20.0).reshape(1, 2, 10)[:, :, ::2],
        "one number": torch.ones(1, 1, 1).expand(1, 2, 5),
    }[strided].to(lse)
    got, right = (torch.autograd.grad(lse, (q, k), g, retain_graph=True) for g in (given, given.clone()))
    assert all(map(torch.equal, got, right))
    assert got[0].any()


def test_gradient_of_a_query_with_one_key(target: Target) -> None:
    """out = v and lse = scale q . k, so dq = scale dlse k, however large dout is; GPU kernels round dout . (v - out)."""
    q, k, v = (target.randn(3, 1, 2, 64) for _ in range(3))
    q.requires_grad_()
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    dout, dlse = 1000 * torch.randn_like(out), torch.randn_like(lse)
    (dq,) = torch.autograd.grad((out, lse), q, (dout, dlse))
    expected = 64**-0.5 * dlse.transpose(1, 2)[..., None] * k.double()
    rounding = torch.finfo(target.dtype).eps * expected.abs()
    if target.backend not in ("cpu", "reference"):
        rounding += torch.finfo(torch.float32).eps * (dout * v).double().abs().sum(-1, keepdim=True) * k.double().abs()
    assert ((dq.double() - expected).abs() <= 2 * rounding).all()


def test_autocast_takes_the_lower_dtype() -> None:
    """As torch's own attention does, of any mixture of dtypes; float64 stays."""
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    low = [x.bfloat16() for x in (q, k, v)]
    layout = PackedLayout.from_grids([(1, 3, 3)])
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(q, k, v.bfloat16())
        assert out.dtype == torch_sdpa(q, k, v).dtype == torch.bfloat16
        assert torch.equal(out, scaled_dot_product_attention(*low))
        assert torch.equal(flash_attn_func(q, k, v), flash_attn_func(*low))
        assert scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64
        assert (
            spatiotemporal_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), layout, window=(1, 2, 2)).dtype == torch.bfloat16
        )
        videos, weight = [torch.randn(4, 1, 4, 4)], torch.randn(8, 4, 1, 2, 2)
        assert patch_embed_3d(videos, weight, torch.zeros(8), patch_size=(1, 2, 2))[0].dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(out.sum(), (q, k, v))] == [torch.float32] * 3
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert flash_attn_func(q, k, v).dtype == torch.float32


X = torch.zeros(2, 6, 4, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"softmax_scale": torch.nn.Parameter(torch.ones(()))}, "softmax_scale: expected a number, got a Parameter"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes: expected slopes that need no gradient, got ~"),
        ({"softmax_scale": float("nan")}, "softmax_scale: expected a finite number, got nan"),
        ({"softmax_scale": 1e300}, "softmax_scale: expected a number that float32 has, got 1e+300"),
        ({"softmax_scale": -1e-60}, "softmax_scale: expected a number that float32 has, got -1e-60"),
        ({"dropout_p": torch.zeros(2)}, "dropout_p: expected a number, got a Tensor"),
        ({"return_attn_probs": "no"}, "return_attn_probs: expected a bool, got 'no'"),
        ({"softcap": float("inf")}, "softcap: expected a finite number, got inf"),
        ({"causal": "no"}, "causal: expected a bool, got 'no'"),
        ({"window_size": (True, 0)}, "window_size: expected two sizes >= -1~, got (True, 0)"),
    ],
)
def test_bad_numbers(wrong: dict, message: str) -> None:
    check_rejected(flash_attn_func, {"q": X, "k": X, "v": X, **wrong}, f"flash_attn_func: {message}")


def test_softcap_beyond_float32_caps_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 4, 8)
    expected = flash_attn_func(q, k, v)
    for softcap in (1e38, 1e39, 1e300):
        torch.testing.assert_close(flash_attn_func(q, k, v, softcap=softcap), expected)


def test_bad_options_of_torchs_signatures() -> None:
    cu = torch.tensor([0, 6], dtype=torch.int32)
    for options, message in (
        ({"return_aux": True}, "return_aux: expected None or torch's AuxRequest, got True"),
        ({"enable_gqa": "no"}, "enable_gqa: expected a bool, got 'no'"),
    ):
        with pytest.raises(TypeError, match=f"varlen_attn: {message}"):
            varlen_attn(X[0], X[0], X[0], cu, cu, **options)
    with pytest.raises(TypeError, match="scaled_dot_product_attention: enable_gqa: expected a bool, got 'no'"):
        scaled_dot_product_attention(X, X, X, enable_gqa="no")


def test_alibi_is_as_exact_as_the_queries() -> None:
    """Slopes are float32, but their product with a distance is of float64 where queries are."""
    q, k, v = (torch.zeros(1, n, 1, 1, dtype=torch.float64) for n in (1, 40, 40))
    v = v + torch.arange(40.0, dtype=torch.float64)[:, None, None]
    slopes = torch.tensor([0.6435])
    out = flash_attn_func(q, k, v, alibi_slopes=slopes)
    weights = torch.softmax(-slopes.double() * torch.arange(39.0, -1.0, -1.0, dtype=torch.float64), 0)
    assert abs(out.item() - (weights * v.flatten()).sum().item()) < 1e-13
