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
    clear,
    limited,
    loaded,
    missing,
    parameters,
    samples,
    store,
    stored_lse,
    wants_determinism,
    window,
)

TAKES_HINTS = True
LIMITS = Limits(head_dim=256, softcap=True)


def unavailable() -> str | None:
    return missing("flash_attn_interface", "flash_attn_3", "3.0.0b1", (9,))


def refuses(function: str, call: Call) -> str | None:
    return limited(call, LIMITS)


def _options(run: Callable, call: Call) -> dict:
    """Of both passes, under the names of the version at hand: its window was one pair and its backward had `causal` before."""
    takes = parameters(run)
    left, right = window(call)
    sides = (
        {"window_size_left": left, "window_size_right": right} if "window_size_left" in takes else {"window_size": (left, right)}
    )
    return {
        **samples(call),
        "softmax_scale": call["scale"],
        "is_causal" if "is_causal" in takes else "causal": (left, right) == (-1, 0),
        "softcap": call["softcap"],
        **sides,
    }


# What the older version wants to be passed, though it is nothing.
_NOTHING = (
    "k_new", "v_new", "qv", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos",
    "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale",
)  # fmt: skip


def attention_forward(**call: Any) -> None:
    run = loaded("flash_attn_interface")._flash_attn_forward
    q, k, v = (call[name] for name in "qkv")
    nothing = dict.fromkeys((*_NOTHING, "out" if "out" in parameters(run) else "out_"))
    # One split, as sums over keys that are split depend on how many samples there are.
    out, lse, *_ = run(q=q, k=k, v=v, **nothing, **_options(run, call), num_splits=1)
    store(call, out, lse)


def attention_backward(**call: Any) -> None:
    run = loaded("flash_attn_interface")._flash_attn_backward
    clear(call)
    tensors = {name: call[name] for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")}
    lse = stored_lse(call, of_blind=-torch.inf)
    used = {"sequed_q": None, "sequed_k": None}
    run(**tensors, softmax_lse=lse, **used, **_options(run, call), deterministic=wants_determinism())
