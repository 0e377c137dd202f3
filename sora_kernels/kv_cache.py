"""Attention of new queries over a cache of keys and values, with the signature of flash_attn; the formulas are attention.py's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._torch_private import transforms_active
from .attention_arguments import check_options, check_unpaged, run
from .attention_op import Longest
from .checks import AttentionNames, check_bool, check_int, check_tensor, fail
from .used_keys import used_keys


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over the first keys of a cache, after new ones are written behind them; semantics of FlashAttention-2.

    Sample b has the keys k_cache[b, :n], n = cache_seqlens[b] + Sn, of which the last Sn are k[b], written by this call.

    >>> cache = torch.zeros(2, 2, 256, 4, 64)                                     # keys and values of 2 samples of up to 256 tokens
    >>> q = torch.randn(2, 1, 8, 64); k, v = torch.randn(2, 2, 1, 4, 64)
    >>> lengths = torch.tensor([17, 0], dtype=torch.int32)
    >>> flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=lengths, causal=True).shape
    torch.Size([2, 1, 8, 64])
    >>> torch.equal(cache[0, 0, 17], k[0, 0])
    True

    Args:
        q: [B, S, H, d].
        k_cache: [B, Sc, Hk, d], contiguous, or each call copies it.
        v_cache: [B, Sc, Hk, dv]; each call copies a cache of fewer channels than the other.
        k, v: [B, Sn, Hk, d] and [B, Sn, Hk, dv], written into the caches in place; both or neither. Where they are written, no two
            elements of the caches may be one (of subclasses of Tensor this is not checked), and caches made under
            torch.inference_mode are refused outside of it.
        cache_seqlens: int32 [B], or an int for all: tokens that the cache holds already; required with k. None is all of Sc. On the
            CPU one that is negative or leaves no room for k is an error, before anything is written; elsewhere it is not read and
            counts as the nearest possible one.
        causal, window_size, alibi_slopes: as in `flash_attn_func`, aligned to the end of the n keys.
        rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table: must be None: `rope_3d` rotates, and nothing is paged.
        rotary_interleaved, num_splits: taken for compatibility, without effect.
        return_softmax_lse: also return lse, float32 [B, H, S].

    The others are `flash_attn_func`'s. No gradient: a tensor that needs one is refused. Autocast changes no dtype here.

    Returns:
        out [B, S, H, dv], or (out, lse).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "flash_attn_with_kvcache"
    refused = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    for name, value in {**refused, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}.items():
        if value is not None:
            fail(op, name, "None (not supported)", type(value).__name__)
    check_unpaged(op, block_table, num_splits)
    check_bool(op, "rotary_interleaved", rotary_interleaved)
    wants_lse = check_bool(op, "return_softmax_lse", return_softmax_lse)
    check_tensor(op, "q", q, ("B", "S", "H", "d"))
    names = AttentionNames("q", "k_cache", "v_cache")
    options = check_options(
        op, q, k_cache, v_cache, q.shape[0], 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, names
    )
    new = _check_new(op, q, k_cache, v_cache, k, v)
    for name, x in {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            fail(op, name, "a tensor that needs no gradient", "requires_grad=True")
    lengths = _lengths(op, q, cache_seqlens, k_cache.shape[1], new)
    if lengths is None:
        out, lse = run(q, k_cache, v_cache, None, None, options)
        return (out, lse) if wants_lse else out

    (batch, length), room = q.shape[:2], k_cache.shape[1]
    cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32, device=q.device) * n for n in (length, room))
    cu_q, cu_k, lengths = used_keys(op, "cache_seqlens", cu_q, cu_k, lengths, (batch * length, batch * room), new)
    if k is not None and v is not None:
        caches = {name: x for name, x in (("k_cache", k_cache), ("v_cache", v_cache)) if _has_memory(x)}
        _check_writable(op, caches)
        q, k, v = (x.clone() if _may_share(x, caches) else x for x in (q, k, v))
        samples = torch.arange(batch, device=q.device)[:, None]
        places = lengths[:, None] + torch.arange(new, device=q.device)
        k_cache[samples, places] = k
        v_cache[samples, places] = v
    q, keys, values = (x.flatten(0, 1) for x in (q, k_cache, v_cache))
    out, lse = run(q, keys, values, cu_q, cu_k, options.of_used_keys(), Longest.of(length, room))
    out = out.unflatten(0, (batch, length))
    return (out, lse.unflatten(1, (batch, length)).transpose(0, 1).contiguous()) if wants_lse else out


def _check_new(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> int:
    """How many keys and values each sample gets."""
    if k is None:
        if v is not None:
            fail(op, "v", "None, as k is", type(v).__name__)
        return 0
    check_tensor(op, "k", k, (q.shape[0], "Sn", *k_cache.shape[2:]), dtype=q.dtype, like=q)
    if v is None:
        fail(op, "v", "a torch.Tensor, as k is one", "None")
    check_tensor(op, "v", v, (*k.shape[:2], *v_cache.shape[2:]), dtype=q.dtype, like=q)
    if k.shape[1] > k_cache.shape[1]:
        fail(op, "k", f"at most {k_cache.shape[1]} tokens, as many as the cache has room for", f"{k.shape[1]}")
    return k.shape[1]


def _may_share(x: Tensor, caches: dict[str, Tensor]) -> bool:
    """Whether x may be a view of a cache. caches: those that have memory."""
    if len(caches) < 2 or not _has_memory(x):
        return not x.is_meta
    return any(_overlap(_addresses(x), _addresses(cache)) for cache in caches.values())


def _has_memory(x: Tensor) -> bool:
    """Whether it has addresses that can be compared: not where it traces, transforms or stands for others, nor on meta."""
    return not torch.compiler.is_compiling() and not transforms_active() and type(x) in (Tensor, nn.Parameter) and not x.is_meta


def _check_writable(op: str, caches: dict[str, Tensor]) -> None:
    """Before anything is written: the caches can be, and no element of them is another one, too."""
    for name, cache in caches.items():
        if cache.is_inference() and not torch.is_inference_mode_enabled():
            fail(op, name, "a tensor that was made outside of torch.inference_mode, as k is written", "one that was made in it")
        if not cache.is_contiguous() and not _are_apart(*_axes(cache)):
            fail(op, name, "elements that do not overlap, as k is written", f"strides {list(cache.stride())}")
    if len(caches) == 2 and _overlap(*map(_addresses, caches.values())) and not _are_interleaved(*caches.values()):
        fail(op, "v_cache", "memory of its own, as k is written", "some of k_cache's")


Axis = tuple[int, int]  # stride and size


def _axes(x: Tensor) -> list[Axis]:
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _are_apart(*axes: Axis) -> bool:
    """Along the axes from the smallest stride on, each steps over all of those before."""
    reach = 0
    for stride, size in sorted(axes):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _addresses(x: Tensor) -> range:
    """From its first byte to its last."""
    count = x.numel() if x.is_contiguous() else 1 + sum((size - 1) * stride for stride, size in _axes(x))
    return range(x.data_ptr(), x.data_ptr() + count * x.element_size())


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _are_interleaved(one: Tensor, other: Tensor) -> bool:
    """Whether they are parts of one tensor, as cache[:, :, 0] and cache[:, :, 1] or cache[..., :d] and cache[..., d:] are."""
    lower, upper = sorted((one, other), key=Tensor.data_ptr)
    step, rest = divmod(upper.data_ptr() - lower.data_ptr(), lower.element_size())
    lowest, highest = (sum((size - 1) * stride for stride, size in _axes(x) if stride < step) for x in (lower, upper))
    outer = {axis for x in (lower, upper) for axis in _axes(x) if axis[0] >= step}
    # One block of both, from the first element to the last, is stepped over.
    return rest == 0 and lowest < step and _are_apart((1, step + highest + 1), *outer)


def _lengths(op: str, q: Tensor, cache_seqlens: object, room: int, new: int) -> Tensor | None:
    """Tokens in the cache before the new ones; None: it is full."""
    if cache_seqlens is None:
        if new:
            fail(op, "cache_seqlens", "an int or int32 [B], as k is written", "None")
        return None
    if isinstance(cache_seqlens, int):
        number = check_int(op, "cache_seqlens", cache_seqlens, 0, room - new)
        return torch.full(q.shape[:1], number, dtype=torch.int32, device=q.device)
    check_tensor(op, "cache_seqlens", cache_seqlens, q.shape[:1], dtype=torch.int32, like=q)  # type: ignore[arg-type]
    return cache_seqlens  # type: ignore[return-value]
