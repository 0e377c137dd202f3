"""Attention with int8 products of queries and keys: what the quantisation says to the rule, and near attention itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from contract import RecordOps
from test_attention import CROSS, exact_varlen, packed_case
from tolerance import Target, allowed_error, assert_bit_equal, assert_zero, check_rejected, error
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from sora_kernels import backends, flash_attn_varlen_func, int8_attention
from sora_kernels.int8_attention import KEYS, QUERIES
from sora_kernels.reference.int8_attention import int8_attention as reference

FUNCTION = "int8_attention_forward"
INFINITE = 2**30

PACKED = {
    **{f"d{d}": {"d": d} for d in (7, 16, 64, 72, 128, 256)},
    "cross": CROSS,
    "gqa": {"heads": (6, 2)},
    "mqa": {"heads": (5, 1), **CROSS},
    "empty": {"queries": (0, 37, 0, 3, 0), "keys": (3, 0, 0, 37, 1)},
    "nothing": {"queries": (0,), "keys": (0,)},
    "slack": {"slack": 9},
    "causal": {"causal": True, **CROSS},
    "window": {"window_size": (7, 3)},
    "window_causal": {"window_size": (9, 4), "causal": True, "slack": 3},
    "scale": {"softmax_scale": -0.3},
}


def plain_quantized(x: Tensor, block: int) -> Tensor:
    """A second writing of the quantisation, block by block and head by head: x [n,H,d]."""
    result = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for head, first in itertools.product(range(x.shape[1]), range(0, len(x), block)):
        numbers = x[first : first + block, head].float()
        scale = numbers.abs().max().clamp(min=2.0**-100)
        steps = (numbers.double() * (torch.full_like(scale, 127) / scale) + 0.5).float().floor()
        result[first : first + block, head] = (steps * scale.to(result.dtype) * (1 / 127)).to(result.dtype)
    return result


def plain_varlen(q, k, v, cu_q, cu_k, causal=False, window_size=(-1, -1), softmax_scale=None):
    """Scores and softmax in float32 at least, probabilities and values in q's dtype."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = (INFINITE if side < 0 else side for side in window_size)
    right = 0 if causal else right
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), torch.full(q.shape[1::-1], -torch.inf, dtype=wide, device=q.device)
    group = q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k)), strict=True):
        if q0 == q1 or k0 == k1:
            continue
        mean = k[k0:k1].float().mean(0).bfloat16().float()
        keys, values = (x.repeat_interleave(group, 1) for x in (plain_quantized(k[k0:k1].float() - mean, KEYS).to(wide), v[k0:k1]))
        scores = scale * torch.einsum("ihd,jhd->hij", plain_quantized(q[q0:q1], QUERIES), keys)
        i, j = torch.arange(q1 - q0, device=q.device)[:, None], torch.arange(k1 - k0, device=q.device)
        offset = i + (k1 - k0) - (q1 - q0) - j
        scores = scores.masked_fill((offset > left) | (offset < -right), -torch.inf)
        shift = scale * torch.einsum("ihd,hd->hi", q[q0:q1].to(wide), mean.to(wide).repeat_interleave(group, 0))
        lse[:, q0:q1] = torch.logsumexp(scores, -1) + shift
        weights = torch.softmax(scores, -1).nan_to_num(0).to(q.dtype)
        out[q0:q1] = torch.einsum("hij,jhd->ihd", weights, values)
    return out, lse


def exact_quantized(q, k, v, cu_q, cu_k, causal=False, window_size=(-1, -1), softmax_scale=None, bias=None):
    """The reference in float64, of the same steps."""
    left, right = (INFINITE if side < 0 else side for side in window_size)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    doubles = (x.double() for x in (q, k, v))
    return reference(*doubles, cu_q, cu_k, bias, scale, left, 0 if causal else right, QUERIES, KEYS)


@pytest.mark.parametrize("case", PACKED)
def test_packed(target: Target, case: str) -> None:
    """Of the same steps, out and lse obey the rule; slack rows and queries without keys are exactly 0 and -inf."""
    inputs, (cu_q, cu_k), options = packed_case(target, **PACKED[case])
    inputs["k"] = inputs["k"] + 3 * target.randn(*inputs["k"].shape[1:])  # channels that are large for all keys
    actual = int8_attention(**inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options)
    plain, exact = (function(*inputs.values(), cu_q, cu_k, **options) for function in (plain_varlen, exact_quantized))
    for got, rough, right in zip(actual, plain, exact, strict=True):
        assert error(got, right) <= allowed_error(rough, right, got.dtype) < torch.inf
    out, lse = actual
    blind = (lse == -torch.inf).T
    assert blind[cu_q[-1] :].all()
    assert_zero(out[blind])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 9)}], ids=["all", "causal", "window"])
@pytest.mark.parametrize("shape", [(2, 3, 150, 90), (1, 1, 150, 90), (3, 1, 90), (150, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(target: Target, shape: tuple[int, ...], kind: str, options: dict) -> None:
    """Of a dense batch. Of the same steps out and lse obey the rule; and they are near torch's attention."""
    q, k, v = (target.randn(2, n, heads, 24) for n, heads in ((150, 3), (90, 1), (90, 1)))
    mask = target.randn(*shape) < 0.5 if kind == "bool" else target.randn(*shape) * 3
    if shape[0] == 2:
        mask[1, 0, 7] = False if kind == "bool" else -torch.inf
    added = mask.double() if kind == "float" else torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    added = added.expand(2, 3, 150, 90)
    out, lse = int8_attention(q, k, v, attn_mask=mask, return_lse=True, **options)
    right, right_lse = exact_quantized(q, k, v, None, None, bias=added, **options)
    tolerance = 1e-5 if q.dtype == torch.float32 else 4e-2
    assert error(out, right) <= tolerance
    blind = lse == -torch.inf
    assert torch.equal(blind, right_lse == -torch.inf)
    assert error(lse[~blind], right_lse[~blind]) <= 1e-4
    assert_zero(out[blind.mT])
    offset = torch.arange(150, device=q.device)[:, None] + 90 - 150 - torch.arange(90, device=q.device)
    left, ahead = options.get("window_size", (INFINITE, INFINITE))
    seen = (offset <= left) & (offset >= (0 if "causal" in options else -ahead))
    heads_first = (x.double().transpose(1, 2) for x in (q, k, v))
    plain = scaled_dot_product_attention(*heads_first, added.masked_fill(~seen, -torch.inf), enable_gqa=True).transpose(1, 2)
    near = (out.double() - plain)[~blind.mT]
    assert near.norm() <= 0.03 * plain[~blind.mT].norm()


@pytest.mark.parametrize("offset", [0, 30])
def test_near_attention(target: Target, offset: float) -> None:
    """1% of the output, and as near where channels of the keys are 30 times what tells the keys apart."""
    inputs, (cu_q, cu_k), _ = packed_case(target, d=64)
    inputs["k"] = inputs["k"] + offset * target.randn(*inputs["k"].shape[1:])
    out, lse = int8_attention(**inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    right, right_lse = exact_varlen(*(x.double() for x in inputs.values()), cu_q, cu_k)
    assert (out - right).norm() <= 0.02 * right.norm()
    assert error(lse, right_lse) < 0.1


def sample_of(x: Tensor, cu: Tensor, b: int) -> Tensor:
    return x[cu[b] : cu[b + 1]]


def test_packed_equals_separate(target: Target) -> None:
    """To the bit, whatever is packed with it, NaNs and infinities among it; and so is a dense batch."""
    inputs, (cu_q, cu_k), _ = packed_case(target, queries=(120, 0, 129, 3), keys=(70, 5, 150, 64), heads=(2, 1), d=24)
    call = partial(int8_attention, causal=True, return_lse=True)
    together = call(**inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for b in range(len(cu_q) - 1):
        q, k, v = sample_of(inputs["q"], cu_q, b), sample_of(inputs["k"], cu_k, b), sample_of(inputs["v"], cu_k, b)
        mine = together[0][cu_q[b] : cu_q[b + 1]], together[1][:, cu_q[b] : cu_q[b + 1]]
        alone = call(q, k, v, target.boundaries(len(q)), target.boundaries(len(k)))
        assert_bit_equal(mine, alone)
        out, lse = call(q[None], k[None], v[None])
        assert_bit_equal(mine, [out[0], lse[0]])
        others = {name: torch.full_like(x, (torch.nan, torch.inf)[b % 2]) for name, x in inputs.items()}
        for name, cu in (("q", cu_q), ("k", cu_k), ("v", cu_k)):
            others[name][cu[b] : cu[b + 1]] = inputs[name][cu[b] : cu[b + 1]]
        out, lse = call(**others, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        assert_bit_equal(mine, [out[cu_q[b] : cu_q[b + 1]], lse[:, cu_q[b] : cu_q[b + 1]]])


def test_batches(target: Target) -> None:
    """A dense batch of several samples is as each of them; values may be wider or narrower than queries."""
    q, k = target.randn(2, 70, 4, 24), target.randn(2, 131, 2, 24)
    for width in (24, 40, 8):
        v = target.randn(2, 131, 2, width)
        out, lse = int8_attention(q, k, v, window_size=(40, 30), return_lse=True)
        assert out.shape == (2, 70, 4, width)
        for b in range(2):
            alone = int8_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], window_size=(40, 30), return_lse=True)
            assert_bit_equal([out[b], lse[b]], [alone[0][0], alone[1][0]])


def test_any_strides(target: Target) -> None:
    """Views of a fused projection, and a last axis of stride 2."""
    qkv, call = target.randn(1, 90, 3, 2, 24), partial(int8_attention, return_lse=True)
    expected = call(*(x.contiguous() for x in qkv.unbind(2)))
    assert_bit_equal(call(*qkv.unbind(2)), expected)
    assert_bit_equal(call(*torch.stack([qkv, torch.full_like(qkv, torch.nan)], -1)[..., 0].unbind(2)), expected)


def test_extreme_numbers(target: Target) -> None:
    """Zeros are exact; of numbers that are not finite, queries poison those of their step, and keys their sample."""
    q, k, v = (target.randn(1, 300, 1, 16) for _ in range(3))
    average = v.double().mean(1, keepdim=True)
    for factor in (0, 1e-30):
        out = int8_attention(q * factor, k, v)
        assert error(out, average.expand_as(out).contiguous()) < 2e-2
    for bad in (torch.nan, torch.inf):
        poisoned = q.clone()
        poisoned[0, QUERIES + 5] = bad
        out = int8_attention(poisoned, k, v)
        right = int8_attention(q, k, v)
        assert out[0, QUERIES : 2 * QUERIES].isnan().all()
        assert_bit_equal([out[:, :QUERIES], out[:, 2 * QUERIES :]], [right[:, :QUERIES], right[:, 2 * QUERIES :]])
        poisoned = k.clone()
        poisoned[0, 5] = bad
        assert int8_attention(q, poisoned, v).isnan().all()


def packed(target: Target) -> tuple[Callable, list[Tensor]]:
    inputs, (cu_q, cu_k), _ = packed_case(target)
    return lambda q, k, v: int8_attention(q, k, v, cu_q, cu_k, return_lse=True), list(inputs.values())


def test_repeatable(target: Target) -> None:
    call, inputs = packed(target)
    before = [x.clone() for x in inputs]
    assert_bit_equal(call(*inputs), call(*inputs))
    assert_bit_equal(inputs, before)


def test_default_backend() -> None:
    """The first one in the list that has it: here the reference or an emulated kernel, and no kernel of the CPU."""
    call, inputs = packed(Target("cpu", "any", torch.float32))
    asked = backends.candidates(FUNCTION, "cpu", torch.float32)
    with backends.record() as calls:
        call(*inputs)
    assert calls == [(FUNCTION, next(name for name, reason in asked if reason is None))]
    assert ("cpu", f"has no {FUNCTION}") in asked


def test_registration(target32: Target) -> None:
    call, inputs = packed(target32)
    with RecordOps() as recorded:
        call(*inputs)
    ((operator, arguments),) = recorded.calls
    assert operator.name() == f"sora_kernels::{FUNCTION}"
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(target32: Target, compiler: str) -> None:
    call, inputs = packed(target32)
    torch.compiler.reset()
    assert_bit_equal(torch.compile(call, fullgraph=True, backend=compiler)(*inputs), call(*inputs))


def test_gradients_are_refused(target32: Target) -> None:
    """Of every kind, and none where none is needed: never zero in silence."""
    call, inputs = packed(target32)
    wanted = [x.clone().requires_grad_() for x in inputs]
    message = r"expected a tensor that needs no gradient \(the op has none\), or torch.no_grad\(\), got requires_grad=True"
    for i, name in enumerate("qkv"):
        with pytest.raises(ValueError, match=f"int8_attention: {name}: {message}"):
            call(*inputs[:i], wanted[i], *inputs[i + 1 :])
    with torch.no_grad():
        assert_bit_equal(call(*wanted), call(*inputs))
    dense = [x[None, :3] for x in inputs[:3]]
    with pytest.raises(ValueError, match=f"int8_attention: attn_mask: {message}"):
        int8_attention(*dense, attn_mask=torch.zeros(3, 3, device=target32.device, requires_grad=True))
    with pytest.raises(ValueError, match=f"int8_attention: q: {message}"):
        torch.func.grad(lambda q: call(q, *inputs[1:])[0].sum())(inputs[0])
    with pytest.raises(ValueError, match="int8_attention: inputs"):
        torch.func.jvp(lambda q: call(q, *inputs[1:])[0], (inputs[0],), (inputs[0],))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="int8_attention: inputs: expected tensors without tangents"):
        call(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])
    torch.compiler.reset()
    with pytest.raises(Exception, match="int8_attention: q: expected a tensor that needs no gradient"):
        torch.compile(call, backend="aot_eager")(*wanted)


def test_autocast() -> None:
    call, inputs = packed(Target("cpu", "any", torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*inputs)[0].dtype == torch.bfloat16


P, CU = torch.zeros(12, 4, 8), torch.tensor([0, 6, 12], dtype=torch.int32)
GOOD = {"q": P, "k": P, "v": P, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
BAD = [
    ({"q": P[None]}, "q: expected shape [Nq, H, d], got [1, 12, 4, 8]"),
    ({"cu_seqlens_k": None}, "cu_seqlens_k: expected boundaries beside cu_seqlens_q, got None"),
    ({"cu_seqlens_q": None}, "cu_seqlens_q: expected boundaries beside cu_seqlens_k, got None"),
    ({"cu_seqlens_q": None, "cu_seqlens_k": None}, "cu_seqlens_q: expected boundaries of packed q [Nq, H, d], ~, got None"),
    ({"q": P[0], "cu_seqlens_q": None, "cu_seqlens_k": None}, "q: expected shape [B, S, H, d], got [4, 8]"),
    ({"cu_seqlens_q": CU.long()}, "cu_seqlens_q: expected dtype int32, got int64"),
    ({"cu_seqlens_k": CU[:2]}, "cu_seqlens_k: expected shape [3], got [2]"),
    ({"cu_seqlens_k": CU + 1}, "cu_seqlens_k: expected a first entry of 0, got 1"),
    ({"cu_seqlens_q": CU * 2}, "cu_seqlens_q: expected a last entry of at most 12 ~, got 24"),
    ({"k": P[..., 1:]}, "k: expected shape [Nk, Hk, 8], got [12, 4, 7]"),
    ({"v": P.half()}, "v: expected dtype float32, got float16"),
    ({"attn_mask": P.bool()}, "attn_mask: expected None in a packed batch, got a mask"),
    ({"window_size": 5}, "window_size: expected two sizes >= -1~, got 5"),
    ({"causal": "no"}, "causal: expected a bool, got 'no'"),
    ({"softmax_scale": "1"}, "softmax_scale: expected a number, got '1'"),
    ({"return_lse": 2}, "return_lse: expected a bool, got 2"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input(wrong: dict, message: str) -> None:
    check_rejected(int8_attention, {**GOOD, **wrong}, f"int8_attention: {message}")


def test_bad_masks() -> None:
    dense = dict.fromkeys("qkv", P[None])
    for mask, got in (
        (P.int(), "dtype bool~, got int32"),
        (P[:, 0].bool(), r"a shape that broadcasts to [1, 4, 12, 12], got [12, 8]"),
    ):
        check_rejected(int8_attention, {**dense, "attn_mask": mask}, f"int8_attention: attn_mask: expected {got}")


def test_arguments_mean_what_those_of_flash_attention_do() -> None:
    q, cu = torch.randn(12, 1, 16), torch.tensor([0, 12], dtype=torch.int32)
    near = flash_attn_varlen_func(q, q, q, cu, cu, causal=True, window_size=(3, 0), softmax_scale=0.5)
    assert error(int8_attention(q, q, q, cu, cu, causal=True, window_size=(3, 0), softmax_scale=0.5), near.double()) < 0.1
