"""FlashAttention-3 for Hopper, module flash_attn_interface. Source: Shah et al., FlashAttention-3 (2024),
https://github.com/Dao-AILab/flash-attention/tree/main/hopper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .common import (
    Call,
    Limits,
    limited,
    loaded,
    missing,
    parameters,
    samples,
    store,
    store_gradients,
    stored_lse,
    wants_determinism,
    window,
)

TAKES_HINTS = True
LIMITS = Limits(head_dim=256, softcap=True)
MODULE, FORWARD, BACKWARD = "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"
DETERMINISTIC_HEAD_DIM = 192  # at most: larger ones have no backward that adds in order


def unavailable() -> str | None:
    return missing(MODULE, "flash_attn_3", "3.0.0b1", (9,), (FORWARD, BACKWARD))


def refuses(function: str, call: Call) -> str | None:
    head_dim = call["q"].shape[-1]
    if function == "attention_backward" and head_dim > DETERMINISTIC_HEAD_DIM and wants_determinism():
        return f"has a deterministic backward for head dims of at most {DETERMINISTIC_HEAD_DIM}, not {head_dim}"
    return limited(call, LIMITS)


def _options(run: Callable, call: Call) -> dict:
    """Of both passes, under the names of the version at hand: its window was one pair and its backward had `causal` before."""
    takes = parameters(run)
    left, right = sides = window(call)
    named = (
        {"window_size_left": left, "window_size_right": right} if "window_size_left" in takes else {"window_size": (left, right)}
    )
    return {
        **samples(call),
        "softmax_scale": call["scale"],
        "is_causal" if "is_causal" in takes else "causal": sides.is_causal,
        "softcap": call["softcap"],
        **named,
    }


# What the older version wants to be passed, though it is nothing.
_NOTHING = (
    "k_new", "v_new", "qv", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos",
    "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale",
)  # fmt: skip


def attention_forward(**call: Any) -> None:
    run = getattr(loaded(MODULE), FORWARD)
    q, k, v = (call[name] for name in "qkv")
    nothing = dict.fromkeys((*_NOTHING, "out" if "out" in parameters(run) else "out_"))
    # One split, as sums over keys that are split depend on how many samples there are.
    out, lse, *_ = run(q=q, k=k, v=v, **nothing, **_options(run, call), num_splits=1)
    store(call, out, lse)


def attention_backward(**call: Any) -> None:
    run = getattr(loaded(MODULE), BACKWARD)
    tensors = {name: call[name] for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")}
    lse = stored_lse(call, of_masked=-torch.inf)
    used = {"sequed_q": None, "sequed_k": None}
    run(**tensors, softmax_lse=lse, **used, **_options(run, call), deterministic=wants_determinism())
    store_gradients(call, call["dq"], call["dk"], call["dv"])
