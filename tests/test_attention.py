"""Attention: FlashAttention's names, torch's SDPA and varlen_attn."""

import inspect
import itertools
from functools import partial

import pytest
import torch
from contract import PackedContract
from tolerance import (
    Case,
    Run,
    Target,
    assert_bit_equal,
    assert_zero,
    check_accuracy,
    check_rejected,
    check_threads,
    run,
)
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest
from torch.nn.attention.varlen import varlen_attn as torch_varlen_attn
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from sora_kernels import attention as ops
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.reference import attention as reference

FUNCTION = "attention_forward"
INFINITE = 2**30


def plain_sample(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float = 0.0, added: Tensor | None = None):
    """Eager attention in q's dtype, a second writing of it: q [i,H,d], k, v [j,Hk,d] -> out [i,H,d], lse [H,i]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added.to(scores.dtype)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(~visible, 0)
    return torch.einsum("hij,jhd->ihd", weights, v), torch.logsumexp(scores, dim=-1)


def plain_varlen(q, k, v, cu_q, cu_k, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    """`plain_sample` on each sample; tokens past the last boundary get out 0 and lse -inf."""
    out, lse = torch.zeros_like(q), torch.full(q.shape[1::-1], -torch.inf, dtype=q.dtype, device=q.device)
    left, right = (INFINITE if side < 0 else side for side in window_size)
    right = 0 if causal else right
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(*(itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k)), strict=True)):
        shift = (k1 - k0) - (q1 - q0)
        offset = torch.tensor([[i + shift - j for j in range(k1 - k0)] for i in range(q1 - q0)], device=q.device)
        offset = offset.reshape(q1 - q0, k1 - k0)
        slopes = None if alibi_slopes is None else alibi_slopes.expand(len(cu_q) - 1, -1)[b]
        added = None if slopes is None else -slopes.to(torch.promote_types(q.dtype, slopes.dtype))[:, None, None] * offset.abs()
        visible = (-right <= offset) & (offset <= left)
        out[q0:q1], lse[:, q0:q1] = plain_sample(q[q0:q1], k[k0:k1], v[k0:k1], visible, softcap, added)
    return out, lse


def exact_varlen(q, k, v, cu_q, cu_k, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    left, right = (INFINITE if side < 0 else side for side in window_size)
    alibi = None if alibi_slopes is None else alibi_slopes.expand(len(cu_q) - 1, -1)
    scale = q.shape[-1] ** -0.5
    return reference.attention(q, k, v, cu_q, cu_k, None, alibi, scale, left, 0 if causal else right, softcap)[:2]


CROSS = {"queries": (37, 1, 199, 20), "keys": (5, 64, 37, 0)}
SLOPES = (0.5, 0.1)
PACKED = {
    **{f"d{d}": {"d": d} for d in (7, 8, 16, 64, 72, 80, 96, 128, 256)},
    "cross": CROSS,
    "gqa": {"heads": (6, 2)},
    "mqa": {"heads": (5, 1), **CROSS},
    "empty": {"queries": (0, 37, 0, 3, 0), "keys": (3, 0, 0, 37, 1)},
    "nothing": {"queries": (0,), "keys": (0,)},
    "slack": {"slack": 9},
    "causal": {"causal": True},
    "causal_cross": {"causal": True, **CROSS},
    "window": {"window_size": (7, 3)},
    "window_left": {"window_size": (16, -1), **CROSS},
    "window_right": {"window_size": (-1, 5), **CROSS},
    "window_causal": {"window_size": (9, 4), "causal": True, "slack": 3},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi_rows": {"alibi_slopes": (SLOPES, (1.0, 0.0), (0.2, 2.0))},
    "everything": {
        "heads": (4, 2),
        "window_size": (20, 2),
        "softcap": 2.0,
        "alibi_slopes": (0.5, 0.1, 0.0, 1.0),
        **CROSS,
    },
}


def packed_case(target, queries=(37, 1, 199), keys=None, heads=(2, 2), d=32, slack=0, alibi_slopes=None, **options):
    """Inputs by name, boundaries and options of one entry of PACKED; the slack rows of the inputs are NaN."""
    cu_q, cu_k = target.boundaries(*queries), target.boundaries(*(keys or queries))
    inputs = {
        name: target.randn(int(cu[-1]) + slack, h, d)
        for name, cu, h in (("q", cu_q, heads[0]), ("k", cu_k, heads[1]), ("v", cu_k, heads[1]))
    }
    for x, cu in zip(inputs.values(), (cu_q, cu_k, cu_k), strict=True):
        x[int(cu[-1]) :] = torch.nan
    if alibi_slopes is not None:
        options["alibi_slopes"] = torch.tensor(alibi_slopes, device=target.device)
    return inputs, (cu_q, cu_k), options


@pytest.mark.parametrize("case", PACKED)
def test_packed(target: Target, case: str) -> None:
    """out, lse and the gradients of both obey the rule; slack rows and queries without keys are exactly 0 and -inf."""
    inputs, (cu_q, cu_k), options = packed_case(target, **PACKED[case])

    def op(q: Tensor, k: Tensor, v: Tensor) -> Run:
        lengths = int(cu_q.diff().max()), int(cu_k.diff().max())
        return ops.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *lengths, return_attn_probs=True, **options)[:2]

    plain, exact = (partial(function, cu_q=cu_q, cu_k=cu_k, **options) for function in (plain_varlen, exact_varlen))
    (out, lse), (dq, dk, dv) = check_accuracy(op, plain, exact, inputs)
    blind = (lse == -torch.inf).T
    assert blind[cu_q[-1] :].all()
    assert_zero(out[blind], dq[blind], dk[cu_k[-1] :], dv[cu_k[-1] :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Work is cut differently for many threads: smaller items; dq apart from dk and dv."""
    target = Target("cpu", "cpu", dtype)
    for heads, length, d in (((1, 1), 700, 64), ((6, 2), 130, 32)):
        inputs = [target.randn(1, length, h, d) for h in (heads[0], heads[1], heads[1])]
        check_threads(ops.flash_attn_func, inputs)


POISONED = {
    "softcap": {"softcap": 1.5, "queries": (37, 5), "keys": (41, 65)},
    "causal": {"causal": True, "queries": (37, 100)},
    "window": {"window_size": (7, 3), "queries": (75, 17)},
    "gqa": {"heads": (4, 2), "queries": (49, 1)},
    "odd_keys": {"queries": (128, 3), "keys": (37, 65)},
}


@pytest.mark.parametrize("name", POISONED)
def test_leftovers_do_not_matter(target: Target, name: str) -> None:
    """Kernels keep scratch memory between calls; what a call of NaNs leaves there changes no bit of the next one."""
    inputs, (cu_q, cu_k), options = packed_case(target, **POISONED[name])

    def call(*qkv: Tensor) -> Run:
        lengths = int(cu_q.diff().max()), int(cu_k.diff().max())
        return run(lambda q, k, v: ops.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *lengths, **options), qkv)

    expected = call(*inputs.values())
    nan = torch.full((1, 300, 2, inputs["q"].shape[-1]), torch.nan, device=target.device, dtype=target.dtype)
    run(partial(ops.flash_attn_func, softcap=1.5), [nan, nan, nan])
    actual = call(*inputs.values())
    assert_bit_equal(actual[0] + actual[1], expected[0] + expected[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(37, 37), (1, 64), (64, 5), (3, 0)])
def test_dense(target: Target, lengths: tuple[int, int], causal: bool) -> None:
    """A dense batch gives what the same samples give packed; here lse has no gradient."""
    (n, m), batch = lengths, 2
    inputs = {name: target.randn(batch, length, h, 64) for name, length, h in (("q", n, 4), ("k", m, 2), ("v", m, 2))}
    cu_q, cu_k = target.boundaries(n, n), target.boundaries(m, m)

    def by_sample(function):
        return lambda q, k, v: function(*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, causal)[0].reshape(q.shape)

    check_accuracy(partial(ops.flash_attn_func, causal=causal), by_sample(plain_varlen), by_sample(exact_varlen), inputs)


def test_softmax_scale(target: Target) -> None:
    """The scale is 1/sqrt(d) by default, and what the caller says otherwise."""
    q, k, v = (target.randn(2, 19, 2, 16) for _ in range(3))
    scaled = ops.flash_attn_func(q, k, v, softmax_scale=0.5)
    assert_bit_equal([scaled], [ops.flash_attn_func(2 * q, k, v)])


def test_names(target: Target) -> None:
    """Every FlashAttention name, on fused views and on separate tensors, gives the same bits, forward and backward."""
    batch, n, h, d = 2, 37, 3, 16
    cu = target.boundaries(n, n)
    qkv, options = target.randn(batch, n, 3, h, d), {"causal": True, "window_size": (9, -1)}

    def packed(function):
        return lambda x: function(x.flatten(0, 1)).reshape(batch, n, h, d)

    names = {
        "separate": lambda x: ops.flash_attn_func(*(y.contiguous() for y in x.unbind(2)), **options),
        "views": lambda x: ops.flash_attn_func(*x.unbind(2), **options),
        "kvpacked": lambda x: ops.flash_attn_kvpacked_func(x[:, :, 0], x[:, :, 1:], **options),
        "qkvpacked": lambda x: ops.flash_attn_qkvpacked_func(x, **options),
        "varlen": packed(lambda x: ops.flash_attn_varlen_func(*x.unbind(1), cu, cu, n, n, **options)),
        "varlen_kv": packed(lambda x: ops.flash_attn_varlen_kvpacked_func(x[:, 0], x[:, 1:], cu, cu, n, n, **options)),
        "varlen_qkv": packed(lambda x: ops.flash_attn_varlen_qkvpacked_func(x, cu, n, **options)),
        "varlen_attn": packed(lambda x: ops.varlen_attn(*x.unbind(1), cu, None, n, n, window_size=(9, 0))),
    }
    results = {name: run(function, [qkv]) for name, function in names.items()}
    expected = results.pop("separate")
    for result in results.values():
        assert_bit_equal(result[0] + result[1], expected[0] + expected[1])


TAIL = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
BOUNDS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q k v {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv {TAIL}",
    "flash_attn_kvpacked_func": f"q kv {TAIL}",
    "flash_attn_varlen_func": f"q k v {BOUNDS} {TAIL} block_table seqused_k",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {TAIL}",
    "flash_attn_varlen_kvpacked_func": f"q kv {BOUNDS} {TAIL}",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale enable_gqa",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """Drop-in: the peers' parameters, by name and position."""
    assert list(inspect.signature(getattr(ops, name)).parameters) == SIGNATURES[name].split()


def test_varlen_attn(target: Target) -> None:
    """torch's parameters; lse on request; key heads may differ only with enable_gqa; causal is window (-1, 0)."""
    ours, theirs = (inspect.signature(f).parameters for f in (ops.varlen_attn, torch_varlen_attn))
    assert list(ours)[:7] == list(theirs)[:7]
    keywords, newer = {"return_aux", "scale", "window_size"}, {"enable_gqa", "seqused_k", "block_table", "num_splits"}
    assert set(ours) == {*list(theirs)[:7], *keywords, *newer}
    assert set(theirs) >= keywords, "the others are newer than torch 2.11"
    inputs, (cu_q, cu_k), _ = packed_case(target, heads=(4, 2), **CROSS)
    out, lse = ops.varlen_attn(
        *inputs.values(), cu_q, cu_k, 199, 64, return_aux=AuxRequest(lse=True), window_size=(-1, 0), enable_gqa=True
    )
    flash = ops.flash_attn_varlen_func(*inputs.values(), cu_q, cu_k, causal=True, return_attn_probs=True)
    assert_bit_equal([out, lse], flash[:2])


def masks(kind: str, target: Target, *shape: int) -> Tensor:
    seen = torch.rand(shape, device=target.device) < 0.7
    return seen if kind == "bool" else target.randn(*shape).masked_fill(~seen, -torch.inf)


SDPA = {
    "full": {},
    "self": {"keys": 37},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "causal_square": {"is_causal": True, "keys": 37},
    "causal_short": {"is_causal": True, "keys": 11},
    "gqa": {"enable_gqa": True, "key_heads": 2},
    "bool_mask": {"mask": ("bool", 2, 4, 37, 53)},
    "bool_mask_shared": {"mask": ("bool", 37, 53)},
    "bool_mask_of_keys": {"mask": ("bool", 2, 1, 1, 53)},
    "float_mask": {"mask": ("float", 2, 1, 37, 53)},
    "float_mask_shared": {"mask": ("float", 1, 53), "enable_gqa": True, "key_heads": 1},
}


@pytest.mark.parametrize("case", SDPA)
def test_scaled_dot_product_attention(target: Target, case: str) -> None:
    """torch's own function is the oracle, in float64, and the peer."""
    options = dict(SDPA[case])
    keys, key_heads, mask = options.pop("keys", 53), options.pop("key_heads", 4), options.pop("mask", None)
    mask = None if mask is None else masks(mask[0], target, *mask[1:])
    inputs = {name: target.randn(2, h, n, 24) for name, h, n in (("q", 4, 37), ("k", key_heads, keys), ("v", key_heads, keys))}

    def call(function):
        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
            return function(q, k, v, attn_mask=own, **options)

        return sdpa

    check_accuracy(call(ops.scaled_dot_product_attention), call(torch_sdpa), call(torch_sdpa), inputs)


def test_sdpa_leading_dimensions(target: Target) -> None:
    """No batch dimension, or several, and a query whose mask shows it no key."""
    q, k, v = (target.randn(2, 3, 4, n, 16) for n in (9, 11, 11))
    seen = torch.rand(2, 3, 1, 9, 11, device=target.device) < 0.5
    seen[..., 4, :] = False
    out = ops.scaled_dot_product_attention(q, k, v, seen)
    assert_zero(out[..., 4, :])
    assert_bit_equal([out[1, 2]], [ops.scaled_dot_product_attention(q[1, 2], k[1, 2], v[1, 2], seen[1, 2])])


def full(layout: PackedLayout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.flash_attn_varlen_func(q, k, v, layout.cu_seqlens, layout.cu_seqlens, causal=True)


def case(target: Target) -> Case:
    layout = PackedLayout.from_spans([[Span.text(n)] if n else [] for n in (120, 129, 0, 8, 3)], target.device)
    inputs = [layout.unpack(target.randn(layout.num_tokens, h, 24)) for h in (2, 1, 1)]
    parts = [(layout.select([b]), list(sample)) for b, sample in enumerate(zip(*inputs, strict=True))]
    return Case.of_samples(full, layout, parts, {"attention_forward", "attention_backward"})


OPS = {"full": case}


X, P, CU = torch.zeros(2, 6, 4, 8), torch.zeros(12, 4, 8), torch.tensor([0, 6, 12], dtype=torch.int32)
GOOD = {
    "flash_attn_func": {"q": X, "k": X, "v": X},
    "flash_attn_qkvpacked_func": {"qkv": X[:, :, None].expand(2, 6, 3, 4, 8)},
    "flash_attn_kvpacked_func": {"q": X, "kv": X[:, :, None].expand(2, 6, 2, 4, 8)},
    "flash_attn_varlen_func": {"q": P, "k": P, "v": P, "cu_seqlens_q": CU, "cu_seqlens_k": CU},
    "flash_attn_varlen_kvpacked_func": {"q": P, "kv": P[:, None].expand(12, 2, 4, 8), "cu_seqlens_q": CU, "cu_seqlens_k": CU},
    "flash_attn_varlen_qkvpacked_func": {"qkv": P[:, None].expand(12, 3, 4, 8), "cu_seqlens": CU},
    "varlen_attn": {"query": P, "key": P, "value": P, "cu_seq_q": CU, "cu_seq_k": CU},
    "scaled_dot_product_attention": {"query": X, "key": X, "value": X},
}
BAD = [
    ("flash_attn_func", {"q": [1]}, "q: expected a torch.Tensor, got list"),
    ("flash_attn_func", {"q": X.int()}, "q: expected dtype float32 or ~, got int32"),
    ("flash_attn_func", {"q": P}, "q: expected shape [B, S, H, d], got [12, 4, 8]"),
    ("flash_attn_func", {"k": X.half()}, "k: expected dtype float32, got float16"),
    ("flash_attn_func", {"v": X[:, 1:]}, "v: expected shape [2, 6, 4, dv], got [2, 5, 4, 8]"),
    ("flash_attn_func", {"v": X[..., :0]}, "v: expected a head dim of at least 1, got 0"),
    ("flash_attn_func", {"k": X[:, :, :3], "v": X[:, :, :3]}, "k: expected a head count that divides q's 4, got 3"),
    ("flash_attn_func", {"dropout_p": 0.1}, "dropout_p: expected 0~, got 0.1"),
    ("flash_attn_func", {"window_size": (-2, 0)}, "window_size: expected two sizes >= -1~, got (-2, 0)"),
    ("flash_attn_func", {"window_size": 5}, "window_size: expected two sizes >= -1~, got 5"),
    ("flash_attn_func", {"softcap": "1"}, "softcap: expected a number, got '~'"),
    ("flash_attn_func", {"alibi_slopes": torch.ones(3)}, "alibi_slopes: expected shape [4] or [2, 4], got [3]"),
    ("flash_attn_qkvpacked_func", {"qkv": X}, "qkv: expected shape [B, S, 3, H, d], got [2, 6, 4, 8]"),
    ("flash_attn_varlen_func", {"cu_seqlens_q": CU.long()}, "cu_seqlens_q: expected dtype int32, got int64"),
    ("flash_attn_varlen_func", {"cu_seqlens_k": CU[:2]}, "cu_seqlens_k: expected shape [3], got [2]"),
    ("flash_attn_varlen_func", {"block_table": CU}, "block_table: expected None~, got Tensor"),
    ("flash_attn_varlen_kvpacked_func", {"kv": P}, "kv: expected shape [Nk, 2, Hk, 8], got [12, 4, 8]"),
    (
        "flash_attn_varlen_kvpacked_func",
        {"kv": P[:, None, :, :4].expand(12, 2, 4, 4)},
        "kv: expected shape [Nk, 2, Hk, 8], got [12, 2, 4, 4]",
    ),
    (
        "flash_attn_kvpacked_func",
        {"kv": X[:, :, None, :, :4].expand(2, 6, 2, 4, 4)},
        "kv: expected shape [2, Sk, 2, Hk, 8], got [2, 6, 2, 4, 4]",
    ),
    ("varlen_attn", {"key": P[:, :2], "value": P[:, :2]}, "key: expected 4 heads (or enable_gqa=True), got 2"),
    ("scaled_dot_product_attention", {"key": X[0, 0, 0]}, "key: expected shape [..., H, S, d] or [S, d], got [8]"),
    ("scaled_dot_product_attention", {"attn_mask": X[0]}, "attn_mask: expected a shape that ~, got [6, 4, 8]"),
]


@pytest.mark.parametrize(
    ("name", "wrong", "argument"),
    [
        ("flash_attn_varlen_func", {"cu_seqlens_k": CU.flip(0)}, "cu_seqlens_k"),
        ("flash_attn_varlen_qkvpacked_func", {"cu_seqlens": CU.flip(0)}, "cu_seqlens"),
        ("flash_attn_varlen_kvpacked_func", {"cu_seqlens_q": CU.flip(0)}, "cu_seqlens_q"),
        ("varlen_attn", {"cu_seq_q": CU.flip(0)}, "cu_seq_q"),
        ("varlen_attn", {"cu_seq_k": CU.flip(0), "seqused_k": CU[1:]}, "cu_seq_k"),
    ],
)
def test_boundaries_are_named_as_the_caller_does(name: str, wrong: dict, argument: str) -> None:
    check_rejected(getattr(ops, name), {**GOOD[name], **wrong}, f"{name}: {argument}: expected a first entry of 0, got 12")


@pytest.mark.parametrize(("name", "wrong", "message"), BAD)
def test_bad_input(name: str, wrong: dict, message: str) -> None:
    check_rejected(getattr(ops, name), {**GOOD[name], **wrong}, f"{name}: {message}")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (CU + 1, "expected a first entry of 0, got 1"),
        (CU * 2, "expected a last entry of at most 12 (the number of tokens), got 24"),
        (CU[[0, 2, 1]], "expected entries that never fall, got 12 then 6 at entry 2"),
    ],
)
@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
def test_bad_boundaries(argument: str, bounds: Tensor, message: str) -> None:
    arguments = {**GOOD["flash_attn_varlen_func"], argument: bounds}
    check_rejected(ops.flash_attn_varlen_func, arguments, f"flash_attn_varlen_func: {argument}: {message}")


def test_more_boundaries_than_are_counted() -> None:
    bounds = torch.zeros(1, dtype=torch.int32).expand(2**62)
    with pytest.raises(ValueError, match=rf"qkvpacked_func: cu_seqlens: expected at most 2\*\*31 entries, got {2**62}"):
        ops.flash_attn_varlen_qkvpacked_func(torch.zeros(4, 3, 2, 8), bounds, 4)


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""
