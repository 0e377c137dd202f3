"""FlashAttention-4 for Hopper and Blackwell, module flash_attn.cute. Source: Dao et al., FlashAttention-4 (2026),
https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute.
"""

from __future__ import annotations

from typing import Any

import torch

from .common import Call, Limits, clear, limited, loaded, missing, samples, store, stored_lse, wants_determinism, window

TAKES_HINTS = True
LIMITS = Limits(head_dim=128, dlse=True)


def unavailable() -> str | None:
    # b20 is the first version known to have the gradient of lse, and a backward of packed batches on Hopper.
    return missing("flash_attn.cute.interface", "flash-attn-4", "4.0.0b20", (9, 10, 11))


def refuses(function: str, call: Call) -> str | None:
    return limited(call, LIMITS)


def _options(call: Call) -> dict:
    left, right = window(call)
    is_causal = (left, right) == (-1, 0)
    return {
        **samples(call),
        "softmax_scale": call["scale"],
        "causal": is_causal,
        "window_size_left": None if left < 0 else left,
        "window_size_right": None if right < 0 or is_causal else right,
    }


def attention_forward(**call: Any) -> None:
    q, k, v, lse = (call[name] for name in ("q", "k", "v", "lse"))
    found, found_lse = torch.empty_like(q), torch.empty_like(lse)
    run = loaded("flash_attn.cute.interface")._flash_attn_fwd
    run(q=q, k=k, v=v, **_options(call), num_splits=1, return_lse=True, out=found, lse=found_lse)
    store(call, found, found_lse)


def attention_backward(**call: Any) -> None:
    clear(call)
    tensors = {name: call[name] for name in ("q", "k", "v", "out", "dout", "dlse", "dq", "dk", "dv")}
    lse = stored_lse(call, of_blind=-torch.inf)
    run = loaded("flash_attn.cute.interface")._flash_attn_bwd
    run(**tensors, lse=lse, **_options(call), deterministic=wants_determinism())
