"""FlashAttention as torch has it: aten's `_flash_attention_forward`."""

from __future__ import annotations

from typing import Any

import torch

from .._torch_private import attention_kernel
from .common import Call, Limits, limited, longest, store, store_gradients, stored_lse, window
from .torch_kernels import no_dropout, unavailable_in_torch

TAKES_HINTS = True
LIMITS = Limits(head_dim=256, clips_windows=True)


def unavailable() -> str | None:
    return unavailable_in_torch("2.10", (8, 9, 12), torch.backends.cuda.is_flash_attention_available, "FlashAttention")


def refuses(function: str, call: Call) -> str | None:
    replaced = torch.nn.attention.current_flash_attention_impl()
    if replaced is not None:
        return f"needs torch's own kernels, which {replaced} replaces"
    return limited(call, LIMITS)


def _options(call: Call) -> dict:
    left, right = window(call)
    return {"scale": call["scale"], "window_size_left": left, "window_size_right": right}


def _samples(call: Call) -> tuple:
    max_q, max_k = longest(call)
    return call["cu_q"], call["cu_k"], max_q if call["cu_q"] is None else max(max_q, 2), max_k  # as flash_attn_2.py has it


def attention_forward(**call: Any) -> None:
    q, k, v = (call[name] for name in "qkv")
    is_causal = window(call).is_causal
    run = attention_kernel("_flash_attention_forward")
    out, lse, *_ = run(q, k, v, *_samples(call), 0.0, is_causal, False, **_options(call))
    store(call, out, lse)


def attention_backward(**call: Any) -> None:
    tensors = (call[name] for name in ("dout", "q", "k", "v", "out"))
    lse = stored_lse(call, of_masked=torch.inf)
    is_causal = window(call).is_causal
    run = attention_kernel("_flash_attention_backward")
    grads = run(*tensors, lse, *_samples(call), 0.0, is_causal, *no_dropout(lse.device), **_options(call))
    store_gradients(call, *grads)
