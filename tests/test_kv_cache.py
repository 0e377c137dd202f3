"""flash_attn_with_kvcache: what it writes, what it attends to, and what it refuses."""

import inspect

import pytest
import torch
from tolerance import Target, assert_bit_equal, check_rejected
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_kernels.attention import flash_attn_func
from sora_kernels.kv_cache import flash_attn_with_kvcache

FUNCTION = "attention_forward"
ROOM, LENGTHS = 40, (17, 0, 35)


def cache(target: Target, width: int = 16) -> tuple[Tensor, Tensor]:
    """Caches of 3 samples; past what they hold is NaN."""
    k, v = target.randn(3, ROOM, 2, 16), target.randn(3, ROOM, 2, width)
    for b, n in enumerate(LENGTHS):
        k[b, n:] = v[b, n:] = torch.nan
    return k, v


def lengths(target: Target) -> Tensor:
    return torch.tensor(LENGTHS, dtype=torch.int32, device=target.device)


SLOPES = torch.tensor([[0.5, 0.1, 0.0, 1.0], [0.2] * 4, [1.0, 2.0, 3.0, 4.0]])
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (6, 0)},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
    "softcap": {"softcap": 2.0, "softmax_scale": 0.5},
    "values": {"causal": True, "width": 24},
}


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_new_keys_are_written_and_seen(target: Target, name: str, queries: int) -> None:
    """The bits of each sample alone with the keys it holds and the new ones, which are in the cache afterwards, and no others."""
    options = {key: x.to(target.device) if isinstance(x, Tensor) else x for key, x in OPTIONS[name].items()}
    k_cache, v_cache = cache(target, options.pop("width", 16))
    slopes = options.pop("alibi_slopes", None)
    q, k, v = target.randn(3, queries, 4, 16), target.randn(3, 5, 2, 16), target.randn(3, 5, 2, v_cache.shape[-1])
    expected = [x.clone() for x in (k_cache, v_cache)]
    for whole, new in zip(expected, (k, v), strict=True):
        for b, n in enumerate(LENGTHS):
            whole[b, n : n + 5] = new[b]
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths(target), alibi_slopes=slopes, return_softmax_lse=True, **options
    )
    assert_bit_equal([k_cache, v_cache], expected)
    for b, n in enumerate(LENGTHS):
        keys, values = (x[b : b + 1, : n + 5] for x in expected)
        own = None if slopes is None else slopes[b]
        alone = flash_attn_func(q[b : b + 1], keys, values, alibi_slopes=own, return_attn_probs=True, **options)
        assert_bit_equal([out[b], lse[b]], [alone[0][0], alone[1][0]])


def test_what_the_cache_holds(target: Target) -> None:
    """Without new keys: lengths of samples, one length, or all."""
    q, (k_cache, v_cache) = target.randn(3, 2, 4, 16), cache(target)
    some = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths(target))
    assert not some[1].any()  # no keys
    assert_bit_equal([some[2:]], [flash_attn_func(q[2:], k_cache[2:, :35], v_cache[2:, :35])])
    held = k_cache.nan_to_num(), v_cache.nan_to_num()
    assert_bit_equal([flash_attn_with_kvcache(q, *held, cache_seqlens=9)], [flash_attn_func(q, *(x[:, :9] for x in held))])
    assert_bit_equal([flash_attn_with_kvcache(q, *held, causal=True)], [flash_attn_func(q, *held, causal=True)])
    out, lse = flash_attn_with_kvcache(q, *held, return_softmax_lse=True)
    assert_bit_equal([out, lse], flash_attn_func(q, *held, return_attn_probs=True)[:2])


def test_decoding_is_causal_attention(target32: Target) -> None:
    """Token by token what one causal pass gives."""
    q, k, v = (target32.randn(2, 6, h, 16) for h in (4, 2, 2))
    k_cache, v_cache = (target32.randn(2, 9, 2, 16) for _ in range(2))
    steps = [
        flash_attn_with_kvcache(q[:, i : i + 1], k_cache, v_cache, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i)
        for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), flash_attn_func(q, k, v, causal=True))


def test_compiled(target32: Target) -> None:
    """One graph, which writes into the caches."""
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    q, k, v = (target32.randn(3, 2, h, 16) for h in (4, 2, 2))
    ours = cache(target32)
    theirs = tuple(x.clone() for x in ours)
    actual = compiled(q, *ours, k, v, cache_seqlens=lengths(target32), causal=True)
    expected = flash_attn_with_kvcache(q, *theirs, k, v, cache_seqlens=lengths(target32), causal=True)
    assert_bit_equal([actual, *ours], [expected, *theirs])


def test_signature() -> None:
    """flash_attn's parameters, by name and position."""
    names = (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale causal "
        "window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    )
    assert list(inspect.signature(flash_attn_with_kvcache).parameters) == names.split()


Q, CACHE, NEW, TWO = torch.zeros(2, 1, 4, 8), torch.zeros(2, 6, 2, 8), torch.zeros(2, 2, 2, 8), torch.tensor([1, 4]).int()
ROWS = torch.zeros(13, 2, 8)
with torch.inference_mode():
    MADE_IN_INFERENCE = CACHE.clone()
BAD = [
    ({"k_cache": CACHE[:1].expand(CACHE.shape)}, "k_cache: expected elements that do not overlap~, got strides [0, 16, 8, 1]"),
    ({"k_cache": CACHE, "v_cache": CACHE}, "v_cache: expected memory of its own~, got some of k_cache's"),
    (
        {"k_cache": ROWS[:12].view(CACHE.shape), "v_cache": ROWS[1:].view(CACHE.shape)},
        "v_cache: expected memory of its own~, got some of k_cache's",
    ),
    ({"v_cache": MADE_IN_INFERENCE}, "v_cache: expected a tensor that was made outside~, got one that was made in it"),
    ({"rotary_cos": CACHE}, "rotary_cos: expected None (not supported), got Tensor"),
    ({"rotary_sin": CACHE}, "rotary_sin: expected None (not supported), got Tensor"),
    ({"cache_batch_idx": TWO}, "cache_batch_idx: expected None (not supported), got Tensor"),
    ({"cache_leftpad": TWO}, "cache_leftpad: expected None (not supported), got Tensor"),
    ({"block_table": TWO}, "block_table: expected None (no paged cache), got Tensor"),
    ({"num_splits": -1}, "num_splits: expected an int >= 0, got -1"),
    ({"rotary_interleaved": "no"}, "rotary_interleaved: expected a bool, got 'no'"),
    ({"q": Q[0]}, "q: expected shape [B, S, H, d], got [1, 4, 8]"),
    ({"k_cache": CACHE[:1]}, "k_cache: expected shape [2, Nk, Hk, 8], got [1, 6, 2, 8]"),
    ({"v_cache": CACHE.half()}, "v_cache: expected dtype float32, got float16"),
    ({"k": NEW[:, :, :1]}, "k: expected shape [2, Sn, 2, 8], got [2, 2, 1, 8]"),
    ({"v": NEW[:, :1]}, "v: expected shape [2, 2, 2, 8], got [2, 1, 2, 8]"),
    ({"v": None}, "v: expected a torch.Tensor, as k is one, got None"),
    ({"k": None}, "v: expected None, as k is, got Tensor"),
    ({"k": CACHE[:, [0] * 7], "v": CACHE[:, [0] * 7]}, "k: expected at most 6 tokens~, got 7"),
    ({"cache_seqlens": None}, "cache_seqlens: expected an int or ~, got None"),
    ({"cache_seqlens": 5}, "cache_seqlens: expected an int <= 4, got 5"),
    ({"cache_seqlens": TWO.long()}, "cache_seqlens: expected dtype int32, got int64"),
    ({"cache_seqlens": TWO[:1]}, "cache_seqlens: expected shape [2], got [1]"),
    ({"cache_seqlens": TWO + 1}, "cache_seqlens: expected 0 to 4 keys in sample 1, got 5"),
    ({"cache_seqlens": TWO - 2}, "cache_seqlens: expected 0 to 4 keys in sample 0, got -1"),
    ({"q": Q.clone().requires_grad_()}, "q: expected a tensor that needs no gradient, got requires_grad=True"),
    ({"v": NEW.clone().requires_grad_()}, "v: expected a tensor that needs no gradient, got requires_grad=True"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input(wrong: dict, message: str) -> None:
    """Nothing is written before everything is checked."""
    k_cache, v_cache = CACHE.clone(), CACHE.clone()
    good = {"q": Q, "k_cache": k_cache, "v_cache": v_cache, "k": NEW + 1, "v": NEW + 1, "cache_seqlens": TWO}
    check_rejected(flash_attn_with_kvcache, {**good, **wrong}, f"flash_attn_with_kvcache: {message}")
    assert not k_cache.any()
    assert not v_cache.any()


UNEVEN = torch.zeros(2, 6, 24)  # room for heads of two widths


@pytest.mark.parametrize(
    "caches",
    [
        torch.zeros(2, 2, 6, 2, 8).unbind(0),
        torch.zeros(2, 6, 2, 2, 8).unbind(2),
        torch.zeros(2, 6, 2, 16).split(8, dim=-1),
        (UNEVEN[..., :16].unflatten(2, (2, 8)), UNEVEN[..., 16:].unflatten(2, (2, 4))),
        (UNEVEN[..., :8].unsqueeze(2), UNEVEN[..., 8:].unflatten(2, (1, 16))),
    ],
)
def test_caches_can_be_parts_of_one_tensor(caches: tuple[Tensor, Tensor]) -> None:
    k_cache, v_cache = caches
    k, v = (torch.randn(2, 2, *x.shape[2:]) for x in caches)
    flash_attn_with_kvcache(Q, k_cache, v_cache, k, v, cache_seqlens=1)
    assert torch.equal(k_cache[:, 1:3], k)
    assert torch.equal(v_cache[:, 1:3], v)


def test_caches_without_memory() -> None:
    q, k_cache, v_cache, k, v = (x.to("meta") for x in (Q, CACHE, CACHE, NEW, NEW))
    assert flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=1).shape == Q.shape


def test_fake_caches() -> None:
    with FakeTensorMode():
        q, k_cache, v_cache, k, v = (torch.empty(x.shape) for x in (Q, CACHE, CACHE, NEW, NEW))
        assert flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=1).shape == Q.shape


def test_mapped_caches_are_written() -> None:
    q, k_cache, v_cache, k, v = (torch.randn(3, *x.shape) for x in (Q, CACHE, CACHE, NEW, NEW))
    caches, apart = (k_cache, v_cache), (k_cache.clone(), v_cache.clone())
    outs = torch.func.vmap(lambda *one: flash_attn_with_kvcache(*one, cache_seqlens=1))(q, *caches, k, v)
    for i, out in enumerate(outs):
        assert torch.equal(out, flash_attn_with_kvcache(q[i], apart[0][i], apart[1][i], k[i], v[i], cache_seqlens=1))
    assert_bit_equal(caches, apart)


def test_new_keys_can_be_keys_of_the_cache() -> None:
    k_cache, v_cache = torch.randn(2, *CACHE.shape)
    k, v = k_cache[:, :3], v_cache[:, :3]
    before = k.clone(), v.clone()
    flash_attn_with_kvcache(Q, k_cache, v_cache, k, v, cache_seqlens=1)
    assert torch.equal(k_cache[:, 1:4], before[0])
    assert torch.equal(v_cache[:, 1:4], before[1])


def test_queries_can_be_keys_of_the_cache() -> None:
    """They count as they were, though the new keys take their place."""
    k_cache, v_cache, k, v = (torch.randn(2, 6, 2, 8) for _ in range(4))
    q = k_cache[:, 3:4]
    expected = flash_attn_with_kvcache(q.clone(), k_cache.clone(), v_cache.clone(), k[:, :2], v[:, :2], cache_seqlens=3)
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, k[:, :2], v[:, :2], cache_seqlens=3), expected)


def test_a_subclass_beside_the_caches_leaves_them_checked() -> None:
    class Subclass(Tensor):
        pass

    cache = CACHE[:1].expand(CACHE.shape)
    with pytest.raises(ValueError, match="k_cache: expected elements that do not overlap"):
        flash_attn_with_kvcache(Q.as_subclass(Subclass), cache, CACHE.clone(), NEW, NEW, cache_seqlens=1)


def test_caches_of_inference_mode_are_written_in_it() -> None:
    with torch.inference_mode():
        k_cache, v_cache = MADE_IN_INFERENCE.clone(), MADE_IN_INFERENCE.clone()
        flash_attn_with_kvcache(Q, k_cache, v_cache, NEW + 1, NEW + 1, cache_seqlens=TWO)
    assert (k_cache[0, 1:3] == 1).all()


def test_nothing_is_written_where_an_option_is_wrong() -> None:
    k_cache = CACHE.clone()
    for wrong in ({"softcap": "1"}, {"window_size": 3}, {"alibi_slopes": torch.ones(3)}, {"causal": "no"}):
        with pytest.raises((TypeError, ValueError), match=f"flash_attn_with_kvcache: {next(iter(wrong))}: expected"):
            flash_attn_with_kvcache(Q, k_cache, CACHE, NEW + 1, NEW, cache_seqlens=TWO, **wrong)
    assert not k_cache.any()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_views_of_the_caches_count_as_they_were(backend: str | None) -> None:
    """Compiled, too, where no addresses can be compared."""

    def decode(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        new = v_cache[:, 2:4], k_cache[:, 2:4]
        return flash_attn_with_kvcache(k_cache[:, 3:4], k_cache, v_cache, *new, cache_seqlens=3)

    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, *CACHE.shape)
    q, k, v = k_cache[:, 3:4].clone(), v_cache[:, 2:4].clone(), k_cache[:, 2:4].clone()
    expected = flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=3)
    call = decode if backend is None else torch.compile(decode, backend=backend)
    assert torch.equal(call(k_cache, v_cache), expected)
    assert torch.equal(k_cache[:, 3:5], k)
    assert torch.equal(v_cache[:, 3:5], v)
