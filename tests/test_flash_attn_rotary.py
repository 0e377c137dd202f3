"""What FlashAttention documents of its rotary embedding holds for what stands in for it, against complex numbers in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from sora_kernels import backends
from sora_kernels.integrations.flash_attn import rotary
from sora_kernels.integrations.flash_attn.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

ROWS, WIDTH = 40, 16
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def tables(channels: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    angles = torch.rand(ROWS, channels // 2) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, first: int = 0) -> Tensor:
    """x [S, H, d], whose token s is at position first + s."""
    pairs = cos.shape[1]
    x = x.double()
    places = torch.arange(pairs)
    real, imaginary = (2 * places, 2 * places + 1) if interleaved else (places, places + pairs)
    factor = torch.complex(cos.double(), sin.double())[first : first + len(x), None]
    numbers = torch.complex(x[..., real], x[..., imaginary]) * factor
    out = x.clone()
    out[..., real], out[..., imaginary] = numbers.real, numbers.imag
    return out


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("channels", [2, 12, 16])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_first_channels_are_rotated(channels: int, interleaved: bool, inplace: bool) -> None:
    x, (cos, sin) = torch.randn(2, 9, 3, WIDTH), tables(channels)
    before = x.clone()
    with backends.record() as calls:
        out = apply_rotary_emb(x, cos, sin, interleaved=interleaved, inplace=inplace)
    assert {name for name, _ in calls} == {"apply_rope"}
    close(out, torch.stack([turned(sample, cos, sin, interleaved) for sample in before]))
    assert torch.equal(out[..., channels:], before[..., channels:])
    assert (out is x) == inplace
    assert torch.equal(x, out if inplace else before)
    close(rotary.apply_rotary_emb_torch(before, cos[:9], sin[:9], interleaved), out.double())
    assert rotary.apply_rotary_emb_func is apply_rotary_emb


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("inplace", [False, True])
def test_offsets(interleaved: bool, dtype: torch.dtype, inplace: bool) -> None:
    x, (cos, sin) = torch.randn(2, 9, 3, WIDTH), tables()
    before = x.clone()
    expected = torch.stack([turned(sample, cos, sin, interleaved, 5) for sample in before])
    close(apply_rotary_emb(x.clone(), cos, sin, interleaved, inplace, seqlen_offsets=5), expected)
    expected = torch.stack([turned(sample, cos, sin, interleaved, n) for sample, n in zip(before, (0, 31), strict=True)])
    close(apply_rotary_emb(x, cos, sin, interleaved, inplace, torch.tensor([0, 31], dtype=dtype)), expected)
    close(rotary.apply_rotary_emb_torch(before, *(torch.stack((t[:9], t[31:])) for t in (cos, sin)), interleaved), expected)


@LAYOUTS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, (4, 0, 20)])
def test_packed(interleaved: bool, inplace: bool, offsets: Any) -> None:
    """Samples of 5, 0 and 6 tokens, and 2 that are of none, which stay as they are."""
    x, (cos, sin) = torch.randn(13, 3, WIDTH), tables()
    before, cu = x.clone(), torch.tensor([0, 5, 5, 11], dtype=torch.int32)
    first = (offsets,) * 3 if isinstance(offsets, int) else offsets
    given = offsets if isinstance(offsets, int) else torch.tensor(offsets)
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, given, cu_seqlens=cu, max_seqlen=6)
    parts = [turned(before[a:b], cos, sin, interleaved, n) for a, b, n in zip((0, 5, 5), (5, 5, 11), first, strict=True)]
    close(out, torch.cat([*parts, before[11:].double()]))
    assert (out is x) == inplace


@LAYOUTS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(interleaved: bool, inplace: bool, packed: bool) -> None:
    """Of a leaf, too, which FlashAttention rotates in place."""
    (x, dout), (cos, sin) = torch.randn(2, 9, 3, WIDTH), tables()
    wanted = x.double().requires_grad_()
    turned(wanted, cos, sin, interleaved, 4).backward(dout.double())
    leaf, given = x.clone().requires_grad_(), dout.clone()
    if packed:
        cu = torch.tensor([0, 9], dtype=torch.int32)
        out = apply_rotary_emb(leaf, cos, sin, interleaved, inplace, 4, cu, 9)
    else:
        out = apply_rotary_emb(leaf[None], cos, sin, interleaved, inplace, 4)[0]
    assert (out.data_ptr() == leaf.data_ptr()) == inplace
    out.backward(given)
    assert leaf.grad is not None
    assert wanted.grad is not None
    close(leaf.grad, wanted.grad)
    assert torch.equal(given, dout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("of_tables", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tables_of_any_dtype(dtype: torch.dtype, of_tables: torch.dtype) -> None:
    x, (cos, sin) = torch.randn(1, 9, 3, WIDTH).to(dtype), tables(dtype=of_tables)
    out = apply_rotary_emb(x, cos, sin)
    assert out.dtype == dtype
    expected = turned(x[0], cos, sin, False)[None]
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps + 1e-6, atol=1e-5)


# Fused projections.


@LAYOUTS
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("offsets", [3, (4, 11)])
@pytest.mark.parametrize("grouped", [False, True])
def test_queries_and_keys_of_a_projection(interleaved: bool, own_tables: bool, offsets: Any, grouped: bool) -> None:
    torch.manual_seed(0)
    cos, sin = tables()
    cos_k, sin_k = (cos / 2, sin / 2) if own_tables else (cos, sin)
    options: dict[str, Any] = {"cos_k": cos_k, "sin_k": sin_k} if own_tables else {}
    q, k, v = torch.randn(2, 9, 4, WIDTH), *torch.randn(2, 2, 9, 2 if grouped else 4, WIDTH)
    qkv = torch.cat((q, k, v), 2) if grouped else torch.stack((q, k, v), 2)
    if grouped:
        options["num_heads_q"] = 4
    first = (offsets, offsets) if isinstance(offsets, int) else offsets
    given = offsets if isinstance(offsets, int) else torch.tensor(offsets)
    turned_q = torch.stack([turned(x, cos, sin, interleaved, n) for x, n in zip(q, first, strict=True)])
    turned_k = torch.stack([turned(x, cos_k, sin_k, interleaved, n) for x, n in zip(k, first, strict=True)])
    join: Callable = torch.cat if grouped else torch.stack
    expected = join((turned_q, turned_k, v.double()), 2)

    data = qkv.clone()
    out = apply_rotary_emb_qkv_(data, cos, sin, interleaved=interleaved, seqlen_offsets=given, **options)
    close(out, expected)
    assert out is data
    leaf = qkv.clone().requires_grad_()
    dout = torch.randn_like(qkv)
    apply_rotary_emb_qkv_(leaf, cos, sin, interleaved=interleaved, seqlen_offsets=given, **options).backward(dout)
    assert leaf.grad is not None
    # A rotation by tables times a factor has its transpose for a derivative: the dot product moves over to the other side.
    assert (leaf.grad.double() * qkv.double()).sum().item() == pytest.approx((dout.double() * expected).sum().item(), rel=1e-4)


@LAYOUTS
def test_keys_of_a_projection(interleaved: bool) -> None:
    cos, sin = tables()
    kv, dout = torch.randn(2, 2, 9, 2, 4, WIDTH)
    expected = torch.stack((torch.stack([turned(x, cos, sin, interleaved, 6) for x in kv[:, :, 0]]), kv[:, :, 1].double()), 2)
    leaf = kv.clone().requires_grad_()
    out = apply_rotary_emb_kv_(leaf, cos, sin, interleaved, 6)
    close(out, expected)
    assert out.data_ptr() == leaf.data_ptr()
    out.backward(dout)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[:, :, 1], dout[:, :, 1])
    back = torch.stack([turned(x, cos, -sin, interleaved, 6) for x in dout[:, :, 0]])
    close(leaf.grad[:, :, 0], back)


@pytest.mark.parametrize(
    "views",
    [
        lambda qkv: (qkv[:, :, 0], qkv[:, :, 1]),
        lambda qkv: qkv.unbind(2)[:2],
        lambda qkv: [x.squeeze(2) for x in qkv.chunk(3, dim=2)[:2]],
        lambda qkv: [x.squeeze(2) for x in qkv.split(1, dim=2)[:2]],
    ],
    ids=["indices", "unbind", "chunk", "split"],
)
def test_views_of_one_projection_turn_in_place_one_after_the_other(views: Callable) -> None:
    cos, sin = tables()
    x, weight = torch.randn(2, 9, 8), torch.randn(8, 3 * 4 * WIDTH, requires_grad=True)

    def loss(inplace: bool) -> Tensor:
        q, k = (apply_rotary_emb(part, cos, sin, inplace=inplace) for part in views((x @ weight).view(2, 9, 3, 4, WIDTH)))
        return (q * k).sin().sum()

    got, expected = (torch.autograd.grad(loss(inplace), weight)[0] for inplace in (True, False))
    torch.testing.assert_close(got, expected)


def test_an_op_that_has_kept_what_is_turned_in_place_is_found() -> None:
    """relu keeps its output for its backward, which would be silently wrong."""
    cos, sin = tables()
    x = torch.randn(2, 9, 4, WIDTH, requires_grad=True).relu()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        apply_rotary_emb(x, cos, sin, inplace=True).sum().backward()


def test_a_leaf_turned_in_place_by_a_compiled_function() -> None:
    cos, sin = tables()
    kv, dout = torch.randn(2, 2, 9, 2, 4, WIDTH)
    torch.compiler.reset()
    grads = []
    for turn in (apply_rotary_emb_kv_, torch.compile(apply_rotary_emb_kv_, backend="aot_eager")):
        leaf = kv.clone().requires_grad_()
        turn(leaf, cos, sin).backward(dout)
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("how", ["grad", "vmap", "jvp", "dual", "compile"])
def test_in_place_within_transforms(how: str) -> None:
    cos, sin = tables()
    x, t = torch.randn(2, 2, 9, 4, WIDTH)

    def f(x: Tensor, inplace: bool = True) -> Tensor:
        return apply_rotary_emb(x * 2, cos, sin, inplace=inplace).sin().sum()

    def run(f: Callable) -> Any:
        if how == "grad":
            return torch.func.grad(f)(x)
        if how == "vmap":
            return torch.func.vmap(f)(x[:, None])
        if how == "jvp":
            return torch.func.jvp(f, (x,), (t,))[1]
        if how == "dual":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(f(forward_ad.make_dual(x.clone().requires_grad_(), t))).tangent
        leaf = x.clone().requires_grad_()
        torch.compile(f, fullgraph=True, backend="aot_eager")(leaf).backward()
        return leaf.grad

    torch.testing.assert_close(run(f), run(partial(f, inplace=False)))


# The module.


def frequencies(dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(ROWS).double(), base ** (-torch.arange(0, dim, 2).double() / dim))
    return angles.cos(), angles.sin()


@LAYOUTS
@pytest.mark.parametrize("base", [10000.0, 256.0])
def test_rotary_embedding(interleaved: bool, base: float) -> None:
    rotate = RotaryEmbedding(12, base, interleaved)
    cos, sin = frequencies(12, base)
    qkv = torch.randn(2, 9, 3, 4, WIDTH)
    q, k, v = qkv.clone().unbind(2)

    def expected(x: Tensor, first: int = 0) -> Tensor:
        return torch.stack([turned(sample, cos, sin, interleaved, first) for sample in x])

    out = rotate(qkv)
    assert out is qkv
    close(out, torch.stack((expected(q), expected(k), v.double()), 2))
    close(
        rotate(torch.cat((q, k[:, :, :2], v[:, :, :2]), 2), num_heads_q=4)[:, :, :6],
        torch.cat((expected(q), expected(k)[:, :, :2]), 2),
    )
    rotated_q, rotated_kv = rotate(q.clone(), torch.stack((k, v), 2), seqlen_offset=20)
    close(rotated_q, expected(q, 20))
    close(rotated_kv, torch.stack((expected(k, 20), v.double()), 2))
    assert not rotate.state_dict()
    close(rotate(torch.stack((q, k, v), 2), seqlen_offset=np.int64(20))[:, :, 0], expected(q, 20))
    with pytest.raises(ValueError, match=r"RotaryEmbedding: qkv: expected shape \[B, S, 3, H, d\], .*, got \[16\]"):
        rotate(torch.randn(WIDTH))


def test_offsets_of_the_module_are_a_tensor_with_the_length_of_its_tables() -> None:
    rotate, (cos, sin) = RotaryEmbedding(12), frequencies(12)
    qkv, offsets = torch.randn(2, 9, 3, 4, WIDTH), torch.tensor([3, 31])
    with pytest.raises(ValueError, match="RotaryEmbedding: max_seqlen: expected an int, as seqlen_offset is a tensor, got None"):
        rotate(qkv, seqlen_offset=offsets)
    expected = torch.stack([turned(x, cos, sin, False, n) for x, n in zip(qkv[:, :, 0], (3, 31), strict=True)])
    close(rotate(qkv.clone(), seqlen_offset=offsets, max_seqlen=ROWS)[:, :, 0], expected)
    close(rotate(qkv.clone(), seqlen_offset=offsets)[:, :, 0], expected)
    with pytest.raises(ValueError, match="seqlen_offsets: expected positions within the 40 rows of cos, got 3 to 40"):
        rotate(qkv, seqlen_offset=offsets + torch.tensor([0, 1]))


@LAYOUTS
@pytest.mark.parametrize("scale_base", [None, 8.0])
def test_products_depend_on_the_distance(interleaved: bool, scale_base: float | None) -> None:
    """With XPos they also decay by zeta_i ** (distance / scale_base)."""
    dim = WIDTH
    q, k = torch.randn(2, dim).double()
    rotate = RotaryEmbedding(dim, interleaved=interleaved, scale_base=scale_base)
    qkv = torch.stack((q, k, k)).expand(1, ROWS, 3, dim)[..., None, :].contiguous()
    out = rotate(qkv)[0, :, :, 0]
    products = out[:, 0] @ out[:, 1].T
    places, angles = torch.arange(dim // 2), 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    real, imaginary = (2 * places, 2 * places + 1) if interleaved else (places, places + dim // 2)
    product = torch.complex(q[real], q[imaginary]) * torch.complex(k[real], -k[imaginary])
    distance = torch.arange(ROWS).double()[:, None] - torch.arange(ROWS)
    factor = torch.polar(torch.ones(()).double(), distance[..., None] * angles)
    if scale_base is not None:
        middle = rotate._cos_cached[ROWS // 2]
        torch.testing.assert_close(middle.double(), (ROWS // 2 * angles).cos(), rtol=1e-5, atol=1e-5)  # no factor there
        factor = factor * ((2 * places + 0.4 * dim) / (1.4 * dim)) ** (distance / scale_base)[..., None]
    torch.testing.assert_close(products, (product * factor).real.sum(-1), rtol=1e-4, atol=1e-4)


def test_tables_are_made_once() -> None:
    rotate = RotaryEmbedding(12).bfloat16()
    qkv = torch.randn(1, 9, 3, 4, WIDTH)
    with torch.inference_mode():
        rotate(qkv.clone(), max_seqlen=ROWS)
    first = rotate._cos_cached
    rotate.eval()(qkv.clone())
    assert rotate._cos_cached is first
    torch.testing.assert_close(first.double(), frequencies(12)[0], rtol=0, atol=1e-5)  # of exact frequencies, all the same
    rotate.train()(qkv.clone().requires_grad_()).sum().backward()
    assert rotate._cos_cached is not first
    rotate(qkv.bfloat16())
    assert rotate._cos_cached.dtype == torch.bfloat16


X, COS, SIN = torch.zeros(2, 9, 4, WIDTH), *torch.zeros(2, ROWS, 6)
QKV = torch.zeros(2, 9, 3, 4, WIDTH)


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"),
    [
        ("apply_rotary_emb", (X[0], COS, SIN), {}, r"x: expected shape \[B, S, H, d\], got \[9, 4, 16\]"),
        ("apply_rotary_emb", (X, COS[:8], SIN[:8]), {}, "cos: expected at least 9 rows, as many as tokens, got 8"),
        ("apply_rotary_emb", (X, COS.repeat(1, 2), SIN.repeat(1, 2)), {}, "cos: expected at most 8 columns, .*, got 12"),
        ("apply_rotary_emb", (X, COS, SIN[1:]), {}, r"sin: expected shape \[40, 6\], got \[39, 6\]"),
        ("apply_rotary_emb", (X, COS[None], SIN), {}, r"cos: expected shape \[R, r/2\]"),
        ("apply_rotary_emb", (X, COS, SIN), {"seqlen_offsets": 32}, "seqlen_offsets: expected an int <= 31, got 32"),
        ("apply_rotary_emb", (X, COS, SIN), {"seqlen_offsets": -1}, "seqlen_offsets: expected an int >= 0, got -1"),
        ("apply_rotary_emb", (X, COS, SIN), {"seqlen_offsets": torch.tensor([0, 32])}, "seqlen_offsets: expected positions within"),
        ("apply_rotary_emb", (X, COS, SIN), {"seqlen_offsets": torch.tensor([0, -1])}, "seqlen_offsets: expected positions within"),
        ("apply_rotary_emb", (X, COS, SIN), {"seqlen_offsets": torch.tensor([0])}, r"seqlen_offsets: expected shape \[2\]"),
        ("apply_rotary_emb", (X, COS, SIN), {"inplace": "no"}, "inplace: expected a bool, got 'no'"),
        ("apply_rotary_emb", (X[0], COS, SIN), {"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens: expected dtype int32, got int64"),
        (
            "apply_rotary_emb",
            (X[0], COS[:5], SIN[:5]),
            {"cu_seqlens": torch.tensor([0, 3, 9], dtype=torch.int32)},
            "seqlen_offsets: expected positions within the 5 rows of cos, got 0 to 5",
        ),
        ("apply_rotary_emb_qkv_", (QKV[:, :, :2], COS, SIN), {}, r"qkv: expected shape \[B, S, 3, H, d\]"),
        ("apply_rotary_emb_qkv_", (X, COS, SIN), {}, r"num_heads_q: expected an int, as qkv is \[2, 9, 4, 16\], got None"),
        ("apply_rotary_emb_qkv_", (X, COS, SIN), {"num_heads_q": 1}, "num_heads_q: expected a number that leaves as many keys"),
        ("apply_rotary_emb_qkv_", (X, COS, SIN), {"num_heads_q": 5}, "num_heads_q: expected an int <= 4, got 5"),
        ("apply_rotary_emb_kv_", (QKV, COS, SIN), {}, r"kv: expected shape \[B, S, 2, H, d\]"),
        (
            "apply_rotary_emb",
            (X[:1].expand(2, -1, -1, -1), COS, SIN),
            {"inplace": True},
            "x: expected a tensor to write to, .*, got ",
        ),
        (
            "apply_rotary_emb",
            (X[0], COS[:0], SIN[:0]),
            {"cu_seqlens": torch.tensor([0, 0], dtype=torch.int32)},
            "cos: expected at least one row, got none",
        ),
        ("RotaryEmbedding", (8,), {"base": 0}, "base: expected a number above 0, got 0"),
        ("RotaryEmbedding", (8,), {"base": "a"}, "base: expected a number, got 'a'"),
        ("RotaryEmbedding", (8,), {"scale_base": -1.0}, r"scale_base: expected a number above 0, got -1\.0"),
        ("RotaryEmbedding", (7,), {}, "dim: expected an even int, got 7"),
        ("RotaryEmbedding", (8,), {"interleaved": 3}, "interleaved: expected a bool, got 3"),
    ],
)
def test_bad_arguments(name: str, arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: {message}"):
        getattr(rotary, name)(*arguments, **options)


@pytest.mark.parametrize("needs", [True, False])
def test_tables_need_no_gradient_where_x_is_written_to(needs: bool) -> None:
    """It would be lost."""
    cos, sin = torch.randn(2, 8, 4)
    x = torch.randn(2, 8, 3, 8, requires_grad=needs)
    with pytest.raises(ValueError, match="apply_rotary_emb: cos, sin: expected tables that need no gradient where x is written to"):
        rotary.apply_rotary_emb(x * 1, cos.requires_grad_(), sin, inplace=True)
