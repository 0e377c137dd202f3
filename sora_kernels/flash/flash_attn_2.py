"""FlashAttention-2 of the package flash_attn. Source: Dao, FlashAttention-2 (2023), https://github.com/Dao-AILab/flash-attention."""

from __future__ import annotations

from typing import Any

import torch

from .common import Call, Limits, clear, limited, loaded, missing, samples, store, stored_lse, wants_determinism, window

TAKES_HINTS = True
LIMITS = Limits(head_dim=256, softcap=True, alibi=True)


def unavailable() -> str | None:
    # 2.7 is the first version whose windows are two numbers and whose lse has no padding.
    return missing("flash_attn", "flash_attn", "2.7", (8, 9, 12))


def refuses(function: str, call: Call) -> str | None:
    return limited(call, LIMITS)


def _options(call: Call) -> dict:
    left, right = window(call)
    return {
        "dropout_p": 0.0,
        "softmax_scale": call["scale"],
        "causal": (left, right) == (-1, 0),
        "window_size_left": left,
        "window_size_right": right,
        "softcap": call["softcap"],
        "alibi_slopes": call["alibi"],
    }


def _samples(call: Call) -> dict:
    """The functions for dense batches are others, without these."""
    return {} if call["cu_q"] is None else samples(call)


def attention_forward(**call: Any) -> None:
    interface = loaded("flash_attn.flash_attn_interface")
    run = interface._flash_attn_forward if call["cu_q"] is None else interface._flash_attn_varlen_forward
    q, k, v = (call[name] for name in "qkv")
    out, lse, *_ = run(q=q, k=k, v=v, **_samples(call), **_options(call), return_softmax=False)
    store(call, out, lse)


def attention_backward(**call: Any) -> None:
    interface = loaded("flash_attn.flash_attn_interface")
    run = interface._flash_attn_backward if call["cu_q"] is None else interface._flash_attn_varlen_backward
    clear(call)
    tensors = {name: call[name] for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")}
    lse = stored_lse(call, of_blind=torch.inf)
    run(**tensors, softmax_lse=lse, **_samples(call), **_options(call), deterministic=wants_determinism())
