"""Packed self-attention, cross-attention to text and windowed attention, against torch's attentions and flash_attn."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from benchmarks.race import (
    DEVICE,
    FORWARD,
    GRIDS,
    MAIN,
    ON_GPU,
    OURS,
    PASSES,
    REHEARSED,
    Implementation,
    Race,
    Tensors,
    compiled,
    of_pass,
    randn,
)
from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.layout import PackedLayout

TEXT_TOKENS = 77
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn_2_cuda") is not None  # not what stands in for it
HAS_NATTEN = importlib.util.find_spec("natten") is not None
# (grid, window). NATTEN builds the whole score matrix on a CPU, for which the larger grid is too large.
WINDOWS = {"16x32x32": ((16, 32, 32), (5, 9, 9))}
if not ON_GPU:
    WINDOWS["8x24x24"] = ((8, 24, 24), (3, 7, 7))
if REHEARSED:
    WINDOWS = {"6x16x16": ((6, 16, 16), (5, 9, 9))}
# (lengths, heads, head dim) of the packed batches.
LENGTHS = [t * h * w for t, h, w in GRIDS]
BATCHES: dict[str, tuple[list[int], int, int]] = {"mixed": (LENGTHS, 8, 64)}
if ON_GPU:
    BATCHES = {
        "16k": ([16384], 16, 128),
        "16k, d 64": ([16384], 32, 64),
        "mixed, 16 of each": (LENGTHS * 16, 8, 64),
        "mixed, 16 times as long": ([16 * n for n in LENGTHS], 8, 64),
        "mixed, 4 of each, d 128": (LENGTHS * 4, 24, 128),
    }
if REHEARSED:
    BATCHES = {name: ([n // 16 for n in lengths[:4]], heads, d) for name, (lengths, heads, d) in BATCHES.items()}
FIRST = next(iter(BATCHES))


def leaf(x: Tensor) -> Tensor:
    """A contiguous copy to run and to differentiate by."""
    return x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)


def split(x: Tensor, lengths: Sequence[int]) -> Tensors:
    """[N, H, d] -> one dense [1, H, S, d] per sample."""
    return [leaf(rearrange(sample, "s h d -> 1 h s d")) for sample in x.split(list(lengths))]


def padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """[N, H, d] -> [B, H, S, d], S the longest sample."""
    return leaf(torch.nn.utils.rnn.pad_sequence(list(x.split(list(lengths))), batch_first=True).transpose(1, 2))


def unpadded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([sample[:, :n].transpose(0, 1) for sample, n in zip(x, lengths, strict=True)])


def attention(dtype: torch.dtype, which: str, *, batch: str = FIRST, cross: bool = False) -> Race:
    """Packed self-attention, or cross-attention of each sample to its own text."""
    torch.manual_seed(0)
    backward = which != FORWARD
    q_lengths, heads, head_dim = BATCHES[batch]
    k_lengths = [TEXT_TOKENS] * len(q_lengths) if cross else q_lengths
    cu_q, cu_k = (torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int() for lengths in (q_lengths, k_lengths))
    q, k, v = (randn(sum(n), heads, head_dim, dtype=dtype, grad=backward) for n in (q_lengths, k_lengths, k_lengths))
    dout, bounds = randn(*q.shape, dtype=dtype), (cu_q, cu_k, max(q_lengths), max(k_lengths))

    def per_sample(q: Tensors, k: Tensors, v: Tensors) -> Tensors:
        return [F.scaled_dot_product_attention(*qkv) for qkv in zip(q, k, v, strict=True)]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        samples = zip(q.split(list(q_lengths)), k.split(list(k_lengths)), v.split(list(k_lengths)), strict=True)
        dense = [F.scaled_dot_product_attention(*(rearrange(x, "s h d -> 1 h s d") for x in sample)) for sample in samples]
        return torch.cat([rearrange(x, "1 h s d -> s h d") for x in dense])

    def join(results: Tensors) -> Tensors:
        count = len(q_lengths)
        parts = [results[i : i + count] for i in range(0, len(results), count)]
        return [torch.cat([rearrange(x, "1 h s d -> s h d") for x in part]) for part in parts]

    separate = [split(q, q_lengths), split(k, k_lengths), split(v, k_lengths)], [split(dout, q_lengths)], join
    rows = {
        OURS: Implementation(lambda q, k, v: flash_attn_varlen_func(q, k, v, *bounds)),
        "SDPA per sample": Implementation(per_sample, *separate),
    }
    if ON_GPU:
        rows["torch varlen_attn"] = Implementation(lambda q, k, v: varlen_attn(q, k, v, *bounds))
        rows["torch varlen_attn, cuDNN"] = replace(rows["torch varlen_attn"], context=by_cudnn)
        if HAS_FLASH_ATTN:
            from flash_attn import flash_attn_varlen_func as peer

            rows["flash_attn"] = Implementation(lambda q, k, v: peer(q, k, v, *bounds))
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            rows[f"SDPA per sample, {name}"] = Implementation(partial(with_backend, backend, per_sample), *separate)
    else:
        rows["SDPA padded"] = sdpa_padded([q, k, v, dout], q_lengths, k_lengths)
    if not cross:
        sample = torch.arange(len(q_lengths)).repeat_interleave(torch.tensor(q_lengths)).to(DEVICE)
        rows["flex_attention compiled"] = flex(q, k, v, dout, lambda b, h, i, j: sample[i] == sample[j])
    flops = 4e-9 * heads * head_dim * sum(a * b for a, b in zip(q_lengths, k_lengths, strict=True))
    op = ("cross-attention" if cross else "attention") + (f", {batch}" if ON_GPU else "")
    return Race(op, dtype, which, {"gflops": of_pass(which, flops, 2.5 * flops)}, [q, k, v], [dout], reference, rows)


def by_cudnn() -> AbstractContextManager[Any]:
    """torch's varlen_attn has a branch for cuDNN, which nothing public takes."""
    return mock.patch("torch.nn.attention.varlen._should_use_cudnn", return_value=True)


def with_backend(backend: SDPBackend, function: Callable[..., Any], *args: Any) -> Any:
    """The function where torch may use this backend only; NotImplementedError where the backend cannot run it."""
    with sdpa_kernel(backend):
        try:
            return function(*args)
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise NotImplementedError(str(error)) from error
            raise


def sdpa_padded(qkvd: Tensors, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Implementation:
    mask = (torch.arange(max(k_lengths)) < torch.tensor(k_lengths)[:, None])[:, None, None]  # [B, 1, 1, Sk]

    def unpad(results: Tensors) -> Tensors:
        return [unpadded(x, lengths) for x, lengths in zip(results, (q_lengths, q_lengths, k_lengths, k_lengths), strict=False)]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    *inputs, dout = [padded(x, lengths) for x, lengths in zip(qkvd, (q_lengths, k_lengths, k_lengths, q_lengths), strict=True)]
    return Implementation(sdpa, inputs, [dout], unpad)


def flex(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask_mod: Callable[..., Tensor]) -> Implementation:
    @cache
    def mask() -> BlockMask:  # compiled on a GPU, which takes longer than many a row: not before this row's turn
        return create_block_mask(mask_mod, None, None, q.shape[0], k.shape[0], device=DEVICE.type, _compile=ON_GPU)

    function = compiled(flex_attention)
    dense = [leaf(rearrange(x, "s h d -> 1 h s d")) for x in (q, k, v, dout)]

    def restore(results: Tensors) -> Tensors:
        return [rearrange(x, "1 h s d -> s h d") for x in results]

    return Implementation(lambda q, k, v: function(q, k, v, block_mask=mask()), dense[:3], dense[3:], restore)


def window_attention(dtype: torch.dtype, which: str, *, case: str) -> Race:
    """Attention within a (t, h, w) window of one video, NATTEN's rule, against a mask and against all of the video."""
    torch.manual_seed(0)
    (grid, window), (_, heads, head_dim) = WINDOWS[case], BATCHES[FIRST]
    layout = PackedLayout.from_grids([grid], DEVICE)
    q, k, v, dout = (randn(layout.num_tokens, heads, head_dim, dtype=dtype, grad=which != FORWARD) for _ in range(4))

    def seen(i: Tensor, j: Tensor) -> Tensor:
        inside, stride = j >= 0, 1
        for n, w in reversed(list(zip(grid, window, strict=True))):
            first = (i // stride % n - w // 2).clamp(0, n - w)
            key = j // stride % n
            inside, stride = inside & (key >= first) & (key < first + w), stride * n
        return inside

    tokens = torch.arange(q.shape[0], device=DEVICE)
    mask = seen(tokens[:, None], tokens)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # of four dimensions, or torch's fused kernels do not take it
        return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask)[0].transpose(0, 1)

    rows = {
        OURS: Implementation(lambda q, k, v: spatiotemporal_attention(q, k, v, layout, window=window)),
        f"{OURS}, no window": Implementation(lambda q, k, v: spatiotemporal_attention(q, k, v, layout), comparable=False),
        "SDPA with mask": Implementation(masked),
        "flex_attention compiled": flex(q, k, v, dout, lambda b, h, i, j: seen(i, j)),
    }
    if HAS_NATTEN:
        from natten.functional import na3d

        def neighborhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return na3d(*(x.reshape(1, *grid, heads, head_dim) for x in (q, k, v)), kernel_size=window).reshape(q.shape)

        rows["NATTEN na3d"] = Implementation(neighborhood)
    flops = 4e-9 * heads * head_dim * q.shape[0] * math.prod(window)
    work = {"gflops": of_pass(which, flops, 2.5 * flops)}
    return Race(f"window attention, {case}", dtype, which, work, [q, k, v], [dout], masked, rows)


ROWS = [OURS, "SDPA per sample", "flex_attention compiled"]
GPU_ROWS = ["torch varlen_attn", "torch varlen_attn, cuDNN", "SDPA per sample, flash", "SDPA per sample, cuDNN"]
ROWS += GPU_ROWS if ON_GPU else ["SDPA padded"]
ROWS += ["flash_attn"] if HAS_FLASH_ATTN and ON_GPU else []
DTYPES = [MAIN] if ON_GPU else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("implementation", ROWS)
@pytest.mark.parametrize("which", PASSES.values(), ids=PASSES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_attention(measure, implementation, batch, dtype, which):
    measure(implementation, attention, dtype, which, batch=batch)


@pytest.mark.parametrize("implementation", [name for name in ROWS if "flex" not in name])
@pytest.mark.parametrize("which", PASSES.values(), ids=PASSES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_attention(measure, implementation, dtype, which):
    measure(implementation, attention, dtype, which, cross=True, batch=list(BATCHES)[-1])


WINDOW_ROWS = [OURS, f"{OURS}, no window", "SDPA with mask", "flex_attention compiled"]
WINDOW_CASES = [(case, row) for case in WINDOWS for row in WINDOW_ROWS]
if HAS_NATTEN:
    WINDOW_CASES.append((list(WINDOWS)[-1], "NATTEN na3d"))


@pytest.mark.parametrize(("case", "implementation"), WINDOW_CASES)
@pytest.mark.parametrize("which", PASSES.values(), ids=PASSES.keys())
def test_window_attention(measure, implementation, case, which):
    measure(implementation, window_attention, MAIN, which, case=case)
