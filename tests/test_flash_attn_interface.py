"""What FlashAttention documents of its attention holds for the functions that stand in for it, or is refused by name.

A test for each statement, in every form of call that has it, against the formula in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels.integrations.flash_attn import interface

Result = tuple[Tensor, Tensor]


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Callable[[Tensor, Tensor], Tensor] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> Result:
    """q [S, H, d], k and v [Sk, Hk, d] -> out [S, H, d], lse [H, S]: query head h reads key head h // (H / Hk)."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    i, j = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (i + len(k) - len(q) - j).abs()
    if visible is not None:
        scores = scores.masked_fill(~visible(i, j), -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    out, lse, _ = interface.flash_attn_func(q[None], k[None], v[None], return_attn_probs=True, **options)
    return out[0], lse[0]


def kvpacked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    kv = torch.stack((k, v), 1)[None]
    out, lse, _ = interface.flash_attn_kvpacked_func(q[None], kv, return_attn_probs=True, **options)
    return out[0], lse[0]


def qkvpacked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    qkv = torch.stack((q, k, v), 1)[None]
    out, lse, _ = interface.flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **options)
    return out[0], lse[0]


def behind_another(x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """x as the second sample of a packed batch, and its boundaries."""
    return torch.cat((torch.randn(tokens, *x.shape[1:]), x)), torch.tensor([0, tokens, tokens + len(x)], dtype=torch.int32)


def packed(q: Tensor, k: Tensor, v: Tensor, function: Callable, fused: Tensor, **options: Any) -> Result:
    (q, cu_q), (fused, cu_k) = behind_another(q, 3), behind_another(fused, 5)
    arguments = (q, fused, behind_another(v, 5)[0]) if fused.ndim == k.ndim else (q, fused)
    out, lse, _ = function(*arguments, cu_q, cu_k, len(q), len(k) + 5, return_attn_probs=True, **options)
    return out[3:], lse[:, 3:]


def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    return packed(q, k, v, interface.flash_attn_varlen_func, k, **options)


def varlen_kvpacked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    return packed(q, k, v, interface.flash_attn_varlen_kvpacked_func, torch.stack((k, v), 1), **options)


def varlen_qkvpacked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    qkv, cu = behind_another(torch.stack((q, k, v), 1), 4)
    out, lse, _ = interface.flash_attn_varlen_qkvpacked_func(qkv, cu, len(q), return_attn_probs=True, **options)
    return out[4:], lse[:, 4:]


def kvcache(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    """A cache with room behind the keys, which nobody sees."""
    caches = (torch.cat((x, torch.full_like(x, 9.0)))[None] for x in (k, v))
    out, lse = interface.flash_attn_with_kvcache(q[None], *caches, cache_seqlens=len(k), return_softmax_lse=True, **options)
    return out[0], lse[0]


SQUARE = {"qkvpacked": qkvpacked, "varlen_qkvpacked": varlen_qkvpacked}  # as many queries as keys, of as many heads
ANY = {"dense": dense, "kvpacked": kvpacked, "varlen": varlen, "varlen_kvpacked": varlen_kvpacked, "kvcache": kvcache}
every_form = pytest.mark.parametrize("call", [*ANY.values(), *SQUARE.values()], ids=[*ANY, *SQUARE])
forms_of_keys = pytest.mark.parametrize("call", ANY.values(), ids=list(ANY))


def close(got: Result, expected: Result) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def tokens(queries: int = 9, keys: int = 9, heads: int = 4, key_heads: int = 4, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries + keys)
    return torch.randn(queries, heads, width), *torch.randn(2, keys, key_heads, width)


@every_form
def test_it_is_attention_and_its_scale_is_that_of_the_head_dim(call: Callable) -> None:
    q, k, v = tokens()
    close(call(q, k, v), formula(q, k, v, scale=1 / math.sqrt(16)))
    close(call(q, k, v, softmax_scale=0.7), formula(q, k, v, scale=0.7))


@forms_of_keys
def test_consecutive_query_heads_share_a_key_head(call: Callable) -> None:
    """Of 6 heads of queries and 2 of keys, 0 to 2 read head 0, and 3 to 5 head 1."""
    q, k, v = tokens(heads=6, key_heads=2)
    out, lse = call(q, k, v)
    for head in range(6):
        one = slice(head // 3, head // 3 + 1)
        close((out[:, head : head + 1], lse[head : head + 1]), formula(q[:, head : head + 1], k[:, one], v[:, one]))
    close(call(q, k[:, :1], v[:, :1]), formula(q, k[:, :1], v[:, :1]))


@forms_of_keys
def test_key_heads_divide_query_heads(call: Callable) -> None:
    with pytest.raises(ValueError, match=r"expected a head count that divides .*'s 6, got 4"):
        call(*tokens(heads=6, key_heads=4))


@forms_of_keys
@pytest.mark.parametrize(
    ("queries", "keys", "mask"),
    [(2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]])],
)
def test_the_causal_mask_is_aligned_to_the_bottom_right(call: Callable, queries: int, keys: int, mask: list) -> None:
    q, k, v = tokens(queries, keys)
    close(call(q, k, v, causal=True), formula(q, k, v, lambda i, j: torch.tensor(mask).bool()))


@forms_of_keys
def test_a_row_without_keys_is_zero(call: Callable) -> None:
    """Its lse is -inf here, which nothing documents; FlashAttention-2 stores +inf."""
    q, k, v = tokens(5, 2)
    out, lse = call(q, k, v, causal=True)
    assert not out[:3].any()
    assert (lse[:, :3] == -math.inf).all()
    assert out[3:].all()


@forms_of_keys
@pytest.mark.parametrize("window", [(2, 1), (0, 0), (-1, 2), (3, -1), (-1, -1)])
def test_a_window_has_both_its_ends(call: Callable, window: tuple[int, int]) -> None:
    q, k, v = tokens(6, 11)
    left, right = (100 if side < 0 else side for side in window)
    close(call(q, k, v, window_size=window), formula(q, k, v, lambda i, j: (i + 5 - left <= j) & (j <= i + 5 + right)))


@every_form
def test_a_window_of_as_many_queries_as_keys(call: Callable) -> None:
    q, k, v = tokens()
    close(call(q, k, v, window_size=(2, 1)), formula(q, k, v, lambda i, j: (i - 2 <= j) & (j <= i + 1)))
    close(call(q, k, v, window_size=(2, 1), causal=True), formula(q, k, v, lambda i, j: (i - 2 <= j) & (j <= i)))


@every_form
def test_softcap_is_active_above_zero(call: Callable) -> None:
    q, k, v = tokens()
    close(call(q, k, v, softcap=0.5), formula(q, k, v, softcap=0.5))
    for off in (0.0, -1.0):
        close(call(q, k, v, softcap=off), formula(q, k, v))


@every_form
def test_alibi_is_subtracted(call: Callable) -> None:
    q, k, v = tokens()
    slopes = torch.tensor([0.0, 0.1, 0.5, 2.0])
    close(call(q, k, v, alibi_slopes=slopes), formula(q, k, v, slopes=slopes))
    with pytest.raises(TypeError, match="alibi_slopes: expected dtype float32, got bfloat16"):
        call(q, k, v, alibi_slopes=slopes.bfloat16())


@forms_of_keys
def test_alibi_is_aligned_to_the_last_key(call: Callable) -> None:
    q, k, v = tokens(3, 8)
    slopes = torch.tensor([0.0, 0.1, 0.5, 2.0])
    close(call(q, k, v, alibi_slopes=slopes, causal=True), formula(q, k, v, lambda i, j: j <= i + 5, slopes=slopes))


def test_alibi_of_each_sample() -> None:
    (q, k, v), slopes = torch.randn(3, 2, 9, 4, 16), torch.rand(2, 4)
    out, lse, _ = interface.flash_attn_func(q, k, v, alibi_slopes=slopes, return_attn_probs=True)
    cu = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    same, same_lse, _ = interface.flash_attn_varlen_func(*flat, cu, cu, 9, 9, alibi_slopes=slopes, return_attn_probs=True)
    for b in range(2):
        expected = formula(q[b], k[b], v[b], slopes=slopes[b])
        close((out[b], lse[b]), expected)
        close((same[9 * b : 9 * b + 9], same_lse[:, 9 * b : 9 * b + 9]), expected)


OF_DROPOUT = {**ANY, **SQUARE}
del OF_DROPOUT["kvcache"]


@pytest.mark.parametrize("call", OF_DROPOUT.values(), ids=list(OF_DROPOUT))
def test_dropout_is_refused(call: Callable) -> None:
    """And with it the mask of what was dropped, which FlashAttention returns for dropout alone."""
    with pytest.raises(ValueError, match=r"dropout_p: expected 0 \(attention dropout is not supported\), got 0.1"):
        call(*tokens(), dropout_p=0.1)


def test_probabilities_are_an_empty_tensor() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 16)
    out, lse, probabilities = interface.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.shape, lse.shape, lse.dtype, probabilities.numel()) == ((2, 9, 4, 16), (2, 4, 9), torch.float32, 0)
    assert torch.equal(interface.flash_attn_func(q, k, v), out)


def test_the_backward_is_deterministic_either_way() -> None:
    q, k, v = (x.bfloat16().requires_grad_() for x in torch.randn(3, 2, 150, 4, 32))
    results = []
    for deterministic in (True, False, False):
        out = interface.flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("fused", ["qkv", "kv"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_gradients_of_a_fused_projection_are_one_tensor(fused: str, layout: str) -> None:
    q, k, v = (x.double().requires_grad_() for x in tokens())
    formula(q, k, v)[0].square().sum().backward()
    wanted = torch.stack([x.grad for x in ((q, k, v) if fused == "qkv" else (k, v))], 1)
    leaf = torch.stack([x.detach() for x in ((q, k, v) if fused == "qkv" else (k, v))], 1).float().requires_grad_()
    query, cu = q.detach().float(), torch.tensor([0, 9], dtype=torch.int32)
    if layout == "dense":
        query, given, boundaries = query[None], leaf[None], []
    else:
        query, given, boundaries = query, leaf, [cu, 9] if fused == "qkv" else [cu, cu, 9, 9]
    name = f"flash_attn_{'varlen_' if layout == 'packed' else ''}{fused}packed_func"
    arguments = [given] if fused == "qkv" else [query, given]
    getattr(interface, name)(*arguments, *boundaries).square().sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_boundaries_are_int32_and_of_all_samples(name: str) -> None:
    q, k, v = tokens()
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    arguments = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    out = interface.flash_attn_varlen_func(q, k, v, **arguments)
    assert out.shape == q.shape
    for part in (slice(0, 4), slice(4, 9)):
        torch.testing.assert_close(out[part].double(), formula(q[part], k[part], v[part])[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=f"{name}: expected dtype int32, got int64"):
        interface.flash_attn_varlen_func(q, k, v, **{**arguments, name: cu.long()})
    with pytest.raises(ValueError, match=f"{name}: expected a last entry of at most 9"):
        interface.flash_attn_varlen_func(q, k, v, **{**arguments, name: cu + torch.tensor([0, 0, 1], dtype=torch.int32)})


def test_pages_are_refused() -> None:
    q, k, v = tokens()
    cu, table = torch.tensor([0, 9], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="flash_attn_varlen_func: block_table: expected None"):
        interface.flash_attn_varlen_func(q, k, v, cu, cu, 9, 9, block_table=table)
    with pytest.raises(ValueError, match="flash_attn_with_kvcache: block_table: expected None"):
        interface.flash_attn_with_kvcache(q[None], k[None], v[None], block_table=table)


# The cache.


def test_new_keys_are_written_behind_those_of_the_cache() -> None:
    """In place, from each sample's own length on, and are attended to in the same call."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 4, 16)
    caches = torch.randn(2, 2, 12, 4, 16)
    before, lengths = caches.clone(), torch.tensor([7, 0], dtype=torch.int32)
    out = interface.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True)
    for b, length in enumerate((7, 0)):
        for cache, was, new in zip(caches, before, (k, v), strict=True):
            assert torch.equal(cache[b, length : length + 3], new[b])
            assert torch.equal(cache[b, :length], was[b, :length])
            assert torch.equal(cache[b, length + 3 :], was[b, length + 3 :])
        keys, values = (cache[b, : length + 3] for cache in caches)
        expected = formula(q[b], keys, values, lambda i, j, n=length: j <= i + n)[0]
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [10, torch.tensor([4, 10], dtype=torch.int32)], ids=["an int", "a tensor"])
def test_a_cache_without_room_is_refused(lengths: Any) -> None:
    """Before anything is written."""
    q, k, v = torch.randn(3, 2, 3, 4, 16)
    caches = torch.randn(2, 2, 12, 4, 16)
    before = caches.clone()
    with pytest.raises(ValueError, match="flash_attn_with_kvcache: cache_seqlens: expected"):
        interface.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths)
    assert torch.equal(caches, before)


REFUSED = {
    "rotary_cos": torch.ones(12, 8),
    "rotary_sin": torch.zeros(12, 8),
    "cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32),
    "cache_leftpad": torch.tensor([1, 0], dtype=torch.int32),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cache_cannot_do_is_refused(name: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 4, 16)
    with pytest.raises(ValueError, match=rf"flash_attn_with_kvcache: {name}: expected None \(not supported\), got Tensor"):
        interface.flash_attn_with_kvcache(q, *torch.randn(2, 2, 12, 4, 16), k, v, cache_seqlens=4, **{name: REFUSED[name]})


def test_the_cache_has_no_backward() -> None:
    q, k, v = torch.randn(3, 2, 3, 4, 16)
    with pytest.raises(ValueError, match="q: expected a tensor that needs no gradient, got requires_grad=True"):
        interface.flash_attn_with_kvcache(q.requires_grad_(), k, v)


def test_splits_and_pairs_without_rotation_change_nothing() -> None:
    q, k, v = tokens()
    plain = kvcache(q, k, v)
    for options in ({"num_splits": 1}, {"num_splits": 5}, {"rotary_interleaved": False}):
        assert all(torch.equal(x, y) for x, y in zip(kvcache(q, k, v, **options), plain, strict=True))
