"""Attention by kernels that others wrote: which of them there are, and which should be the fastest on a GPU.

Each is a backend with a module of its own here, which says what it cannot do and adds what this package promises around it. They
are asked after `sora_kernels.backends.prefer("fastest")`, or when forced by name, on NVIDIA GPUs alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__: list[str] = []  # what users call

FUNCTIONS = ("attention_forward", "attention_backward")  # that these backends have
FOREIGN = ("torch_cudnn", "flash_attn_3", "flash_attn_4", "torch_flash", "flash_attn_2")


class Figure(NamedTuple):
    """TFLOP/s of attention in 16 bits at head dim 128 over thousands of tokens, without a mask; None where none is known."""

    backend: str
    forward: float | None
    backward: float | None
    source: str


# By the major number of the GPU's compute capability, the fastest first. Measured with benchmarks/gpu: nothing yet.
MEASURED: dict[int, tuple[Figure, ...]] = {}
# What others published of theirs. "hopper" is this package's own, which nobody has measured.
PUBLISHED: dict[int, tuple[Figure, ...]] = {
    8: (
        Figure("flash_attn_2", 230, None, "A100, at most; Dao, FlashAttention-2 (2023)"),
        Figure("torch_flash", None, None, "the same kernels, of the version that torch has"),
    ),
    9: (
        Figure("torch_cudnn", 702, 612, "H200, 16,384 tokens, cuDNN 9.19; NVIDIA's cudnn-frontend"),
        Figure("flash_attn_3", 648, None, "H100, 16,384 tokens; Shah et al., FlashAttention-3 (2024)"),
        Figure("flash_attn_4", None, None, "no figure for Hopper is known here"),
        Figure("flash_attn_2", 370, None, "H100, 16,384 tokens; Shah et al., FlashAttention-3 (2024)"),
        Figure("torch_flash", None, None, "the same kernels, of the version that torch has"),
        Figure("hopper", None, None, "not measured"),
    ),
    10: (
        Figure("torch_cudnn", 1783, 1417, "GB200, the shapes of Wan, cuDNN 9.22; NVIDIA's cudnn-frontend"),
        Figure("flash_attn_4", 1613, None, "B200; Dao et al., FlashAttention-4 (2026)"),
    ),
}


def fastest() -> tuple[str, ...]:
    """The backends to ask first on the present GPU; without one, as `info` may be asked, those for Hopper."""
    return order(torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9)


def order(major: int) -> tuple[str, ...]:
    """Of GPUs of this compute capability; empty for those that no one has published figures of.

    >>> order(9)[:2], order(12)
    (('torch_cudnn', 'flash_attn_3'), ())
    """
    return tuple(figure.backend for figure in MEASURED.get(major, PUBLISHED.get(major, ())))
