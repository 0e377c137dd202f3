"""FlashAttention-4 for Hopper and Blackwell, module flash_attn.cute. Source: Dao et al., FlashAttention-4 (2026),
https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute.
"""

from __future__ import annotations

from typing import Any

import torch

from .common import Call, Limits, limited, loaded, missing, samples, store, store_gradients, stored_lse, wants_determinism, window

TAKES_HINTS = True
LIMITS = Limits(head_dim=128, dlse=True)  # it can do a softcap and more channels as well, which is not used here
MODULE, FORWARD, BACKWARD = "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"


def unavailable() -> str | None:
    # b20 is the first version known to have the gradient of lse, and a backward of packed batches on Hopper.
    return missing(MODULE, "flash-attn-4", "4.0.0b20", (9, 10, 11), (FORWARD, BACKWARD))


def refuses(function: str, call: Call) -> str | None:
    return limited(call, LIMITS)


def _options(call: Call) -> dict:
    left, right = sides = window(call)
    return {
        **samples(call),
        "softmax_scale": call["scale"],
        "causal": sides.is_causal,
        "window_size_left": None if left < 0 else left,
        "window_size_right": None if right < 0 or sides.is_causal else right,
    }


def attention_forward(**call: Any) -> None:
    q, k, v, lse = (call[name] for name in ("q", "k", "v", "lse"))
    found, found_lse = torch.empty_like(q), torch.empty_like(lse)
    run = getattr(loaded(MODULE), FORWARD)
    run(q=q, k=k, v=v, **_options(call), num_splits=1, return_lse=True, out=found, lse=found_lse)
    store(call, found, found_lse)


def attention_backward(**call: Any) -> None:
    tensors = {name: call[name] for name in ("q", "k", "v", "out", "dout", "dlse", "dq", "dk", "dv")}
    lse = stored_lse(call, of_masked=-torch.inf)
    run = getattr(loaded(MODULE), BACKWARD)
    run(**tensors, lse=lse, **_options(call), deterministic=wants_determinism())
    store_gradients(call, call["dq"], call["dk"], call["dv"])
