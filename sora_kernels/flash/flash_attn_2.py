"""FlashAttention-2 of the package flash_attn. Source: Dao, FlashAttention-2 (2023), https://github.com/Dao-AILab/flash-attention."""

from __future__ import annotations

from typing import Any

import torch

from .common import Call, Limits, limited, loaded, missing, samples, store, store_gradients, stored_lse, wants_determinism, window

TAKES_HINTS = True
LIMITS = Limits(head_dim=256, softcap=True, alibi=True, clips_windows=True)
MODULE = "flash_attn.flash_attn_interface"
FORWARD, BACKWARD = "_flash_attn_forward", "_flash_attn_backward"
PACKED_FORWARD, PACKED_BACKWARD = "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"


def unavailable() -> str | None:
    # 2.7 is the first version whose windows are two numbers and whose lse has no padding.
    functions = FORWARD, BACKWARD, PACKED_FORWARD, PACKED_BACKWARD
    return missing(MODULE, "flash_attn", "2.7", (8, 9, 12), functions)


def refuses(function: str, call: Call) -> str | None:
    return limited(call, LIMITS)


def _options(call: Call) -> dict:
    sides, alibi = window(call), call["alibi"]
    return {
        "dropout_p": 0.0,
        "softmax_scale": call["scale"],
        "causal": sides.is_causal,
        "window_size_left": sides.left,
        "window_size_right": sides.right,
        "softcap": call["softcap"],
        "alibi_slopes": None if alibi is None else alibi.contiguous(),
    }


def _samples(call: Call) -> dict:
    """The functions for dense batches are others, without these.

    With one query at most and grouped heads these kernels take row b for sample b, which holds neither for samples without queries
    nor for rows of no sample. So two is the least that they get.
    """
    return {} if call["cu_q"] is None else samples(call) | {"max_seqlen_q": max(call["max_q"], 2)}


def attention_forward(**call: Any) -> None:
    run = getattr(loaded(MODULE), FORWARD if call["cu_q"] is None else PACKED_FORWARD)
    q, k, v = (call[name] for name in "qkv")
    out, lse, *_ = run(q=q, k=k, v=v, **_samples(call), **_options(call), return_softmax=False)
    store(call, out, lse)


def attention_backward(**call: Any) -> None:
    run = getattr(loaded(MODULE), BACKWARD if call["cu_q"] is None else PACKED_BACKWARD)
    tensors = {name: call[name] for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")}
    lse = stored_lse(call, of_masked=torch.inf)
    run(**tensors, softmax_lse=lse, **_samples(call), **_options(call), deterministic=wants_determinism())
    # With grouped heads, sums of uninitialised memory are in rows of no sample.
    store_gradients(call, call["dq"], call["dk"], call["dv"])
