"""The attention backends "sora" and "sora_varlen" of diffusers' dispatch.

diffusers has no public way to add a backend. So this is the one file that knows its private parts: the enumeration of names, and
the registry's `register` and `set_active_backend`. It refuses versions that are not among TESTED.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...attention import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention
from ...checks import fail
from ..key_mask import packed_keys

TESTED = ("0.42",)
"""Versions of diffusers that the tests ran with."""
BACKENDS = ("sora", "sora_varlen")


def sora(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """Attention of a dense batch, with torch's semantics of masks and causality.

    Args:
        query: [B, S, H, d].
        key, value: [B, Sk, Hk, d].
        attn_mask: [B, Sk] of keys, or anything that broadcasts to [B, H, S, Sk]: bool, or numbers to add to the scores. A
            mask that broadcasts is not expanded.
        dropout_p: must be 0.
        return_lse: return (out, lse [B, H, S]); not with a mask, and causal only for S = Sk.
        _parallel_config: must be None: there is no context parallelism.

    Returns:
        [B, S, H, d].

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check("sora", query, key, dropout_p, enable_gqa, _parallel_config)
    return _dense(
        "sora", query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse
    )


def sora_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """The same, which skips masked keys instead of computing them: the others are packed, wherever the padding is.

    attn_mask is one of keys: bool [B, Sk], [B, 1, Sk] or [B, 1, 1, Sk]. A query of a sample without any keys gets 0, and an lse of
    -inf. With a mask there is no causality.
    """
    op = "sora_varlen"
    _check(op, query, key, dropout_p, enable_gqa, _parallel_config)
    if attn_mask is None:
        return _dense(op, query, key, value, None, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse)
    if is_causal:
        fail(op, "attn_mask", "None with is_causal=True", "a mask")
    batch, num_queries, num_keys = *query.shape[:2], key.shape[1]
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[0] not in (1, batch) or x.shape[1:3] != key.shape[1:3]:
            fail(op, name, f"shape [{batch} or 1, {num_keys}, {key.shape[2]}, d]", str(list(x.shape)))
    key, value = (x.expand(batch, -1, -1, -1) for x in (key, value))
    order, cu_k = packed_keys(op, attn_mask, batch, num_keys)
    cu_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * num_queries
    key, value = (x.flatten(0, 1).index_select(0, order) for x in (key, value))
    out, lse, _ = flash_attn_varlen_func(
        query.flatten(0, 1), key, value, cu_q, cu_k, num_queries, num_keys, 0.0, scale, return_attn_probs=True
    )
    out = out.unflatten(0, (batch, num_queries))
    return (out, lse.unflatten(1, (batch, num_queries)).transpose(0, 1)) if return_lse else out


def _dense(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> Any:
    if return_lse:
        if attn_mask is not None:
            fail(op, "return_lse", "False with an attn_mask", "True")
        if is_causal and query.shape[1] != key.shape[1]:
            fail(op, "return_lse", f"False with is_causal and {query.shape[1]} queries of {key.shape[1]} keys", "True")
        out, lse, _ = flash_attn_func(query, key, value, 0.0, scale, is_causal, return_attn_probs=True)
        return out, lse
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)


def _check(op: str, query: Tensor, key: Tensor, dropout_p: float, enable_gqa: bool, parallel_config: Any) -> None:
    if dropout_p != 0:
        fail(op, "dropout_p", "0 (attention dropout is not supported)", str(dropout_p))
    if parallel_config is not None:
        fail(op, "_parallel_config", "None, as there is no context parallelism", type(parallel_config).__name__)
    for name, x in (("query", query), ("key", key)):
        if x.ndim != 4:
            fail(op, name, "shape [B, S, H, d]", str(list(x.shape)))
    if query.shape[2] != key.shape[2] and not enable_gqa:
        fail(op, "enable_gqa", f"True for {query.shape[2]} query heads and {key.shape[2]} key heads", "False")


def _import_dispatch() -> ModuleType:
    """diffusers' dispatch. It reads DIFFUSERS_ATTN_BACKEND on import, and would refuse a name of ours."""
    name, wanted = "diffusers.models.attention_dispatch", os.environ.get("DIFFUSERS_ATTN_BACKEND")
    if name in sys.modules or wanted not in BACKENDS:
        return importlib.import_module(name)
    del os.environ["DIFFUSERS_ATTN_BACKEND"]
    try:
        return importlib.import_module(name)
    finally:
        os.environ["DIFFUSERS_ATTN_BACKEND"] = wanted


def _check_version() -> None:
    import diffusers

    if not diffusers.__version__.startswith(tuple(f"{version}." for version in TESTED)):
        fail("sora_kernels.integrations.diffusers", "diffusers", f"a version of {', '.join(TESTED)}", diffusers.__version__)


def _member(names: Any, value: str) -> Any:
    """A new member of the enumeration `names`, of str."""
    if value in names._value2member_map_:
        return names(value)
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    names._member_map_[member._name_] = names._value2member_map_[value] = member
    names._member_names_.append(member._name_)
    type.__setattr__(names, member._name_, member)
    return member


def _register() -> None:
    dispatch = _import_dispatch()
    _check_version()
    for function in (sora, sora_varlen):
        member = _member(dispatch.AttentionBackendName, function.__name__)
        dispatch._AttentionBackendRegistry.register(member)(function)
    if (wanted := os.environ.get("DIFFUSERS_ATTN_BACKEND")) in BACKENDS:
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName(wanted))


_register()
