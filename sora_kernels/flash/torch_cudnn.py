"""NVIDIA's cuDNN as torch has it, for dense batches: aten's `_scaled_dot_product_cudnn_attention`.

For packed batches torch has it switched off: through 2.13, graphs are built anew in each call, the backward reads past its end, and
samples without tokens need cuDNN 9.25. Sources: pull requests 186142 and 191576 of pytorch/pytorch, issue 943 of
NVIDIA/cudnn-frontend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch_private import attention_kernel
from .common import Call, Limits, limited, longest, store, store_gradients, stored_lse, window
from .torch_kernels import no_dropout, unavailable_in_torch

TAKES_HINTS = True
# It aligns causal masks to the first key, and leaves open what a query without keys gets.
LIMITS = Limits(head_dim=128, window=False, grouped=False, square_causal=True, contiguous=True, packed=False)


def unavailable() -> str | None:
    return unavailable_in_torch("2.10", (9, 10), torch.backends.cudnn.is_available, "cuDNN")


def refuses(function: str, call: Call) -> str | None:
    reason = limited(call, LIMITS)
    if reason is None and min(longest(call)) == 1:
        return "needs more than one query and one key"
    if reason is None and function == "attention_backward" and torch.are_deterministic_algorithms_enabled():
        return "has no deterministic backward"
    if reason is None and not _torch_would(call):
        return "is what torch does not use here, by torch.backends.cuda.can_use_cudnn_attention"
    return reason


def _torch_would(call: Call) -> bool:
    """Whether torch itself would: it knows which versions of cuDNN fail where, and what its user switched off."""
    q, k, v = _heads_first(call["q"], call["k"], call["v"])
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, window(call).is_causal, False)
    return torch.backends.cuda.can_use_cudnn_attention(parameters)


def attention_forward(**call: Any) -> None:
    q, k, v = (call[name] for name in "qkv")
    run = attention_kernel("_scaled_dot_product_cudnn_attention")
    out, lse, *_ = run(*_heads_first(q, k, v), None, True, 0.0, window(call).is_causal, False, scale=call["scale"])
    store(call, out.transpose(1, 2), lse.reshape(call["lse"].shape))  # [B, H, S, 1] in later versions


def attention_backward(**call: Any) -> None:
    tensors = _heads_first(*(call[name] for name in ("dout", "q", "k", "v", "out")))
    lse = stored_lse(call, of_masked=-torch.inf)[..., None]
    run = attention_kernel("_scaled_dot_product_cudnn_attention_backward")
    is_causal, scale = window(call).is_causal, call["scale"]
    grads = run(*tensors, lse, *no_dropout(lse.device), None, None, None, *longest(call), 0.0, is_causal, scale=scale)
    store_gradients(call, *_heads_first(*grads))


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, d] -> [B, H, S, d], and back."""
    return tuple(x.transpose(1, 2) for x in tensors)
