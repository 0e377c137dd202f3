"""NVIDIA's cuDNN as torch has it: aten's `_cudnn_attention_forward` for packed batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch_private import attention_kernel
from .common import Call, Limits, limited, longest, store, store_gradients, stored_lse, window
from .torch_kernels import no_dropout, unavailable_in_torch

TAKES_HINTS = True
# It aligns causal masks to the first key, and leaves open what a query without keys gets. It counts packed rows without gaps.
LIMITS = Limits(head_dim=128, window=False, grouped=False, equal_lengths=True, contiguous=True)


def unavailable() -> str | None:
    return unavailable_in_torch("2.11", (8, 9, 10), torch.backends.cudnn.is_available, "cuDNN")


def refuses(function: str, call: Call) -> str | None:
    return limited(call, LIMITS)


def attention_forward(**call: Any) -> None:
    q, k, v = (call[name] for name in "qkv")
    is_causal = window(call) == (-1, 0)
    if call["cu_q"] is None:
        run = attention_kernel("_scaled_dot_product_cudnn_attention")
        out, lse, *_ = run(*_heads_first(q, k, v), None, True, 0.0, is_causal, False, scale=call["scale"])
        store(call, out.transpose(1, 2), lse.reshape(call["lse"].shape))
    else:
        run = attention_kernel("_cudnn_attention_forward")
        samples = call["cu_q"], call["cu_k"], *longest(call)
        out, lse, *_ = run(q, k, v, None, *samples, True, 0.0, is_causal, False, scale=call["scale"])
        store(call, out, lse.reshape(q.shape[:2]).mT)  # it is [N, H, 1]


def attention_backward(**call: Any) -> None:
    tensors = [call[name] for name in ("dout", "q", "k", "v", "out")]
    lse = stored_lse(call, of_blind=-torch.inf)
    is_causal, scale = window(call) == (-1, 0), call["scale"]
    samples = call["cu_q"], call["cu_k"], *longest(call)
    if call["cu_q"] is None:
        run = attention_kernel("_scaled_dot_product_cudnn_attention_backward")
        grads = run(*_heads_first(*tensors), lse, *no_dropout(lse.device), None, *samples, 0.0, is_causal, scale=scale)
        store_gradients(call, *_heads_first(*grads))
    else:
        run = attention_kernel("_cudnn_attention_backward")
        lse = lse.mT.contiguous()[..., None]
        grads = run(*tensors, lse, *no_dropout(lse.device), None, *samples, 0.0, is_causal, scale=scale)
        store_gradients(call, *grads)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, d] -> [B, H, S, d], and back."""
    return tuple(x.transpose(1, 2) for x in tensors)
