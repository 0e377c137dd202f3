"""What this package promises of attention, asked of each backend: who is to run by default needs all of it.

Rows have the promise, whether it was kept, and the backend; or why the backend could not be asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.child import Item
from benchmarks.race import DEVICE, MAIN, REHEARSED
from sora_kernels import backends, flash, flash_attn_varlen_func

LENGTHS = (40, 1, 0, 23) if REHEARSED else (1000, 1, 0, 4097, 300)
SLACK, HEADS, KEY_HEADS, HEAD_DIM = 5, 4, 2, 64
MOST_ERROR = 2e-2  # of a result relative to all of it, as smoke.py has it for bfloat16
NAMES = ("triton", *flash.FOREIGN) if REHEARSED else ("triton", "hopper", *flash.FOREIGN)


def attention(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """out, dq, dk and dv of a packed batch."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    cu = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
    out = flash_attn_varlen_func(*leaves, cu, cu, max(lengths), max(lengths))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def promises(backend: str, device: str = DEVICE, dtype: torch.dtype = MAIN) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    heads = HEADS, KEY_HEADS, KEY_HEADS, HEADS
    tensors = [torch.randn(total + SLACK, n, HEAD_DIM, generator=generator).to(device, dtype) for n in heads]
    with backends.use_backend("reference"):
        expected = attention(*(x.double().cpu() for x in tensors), LENGTHS)
    with backends.use_backend(backend):
        try:
            found = attention(*tensors, LENGTHS)
        except ValueError as refused:
            yield from absent(backend, str(refused))
            return
        errors = [float((x.cpu().double() - y)[:total].norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
        is_right = all(error <= MOST_ERROR for error in errors)  # not their maximum, which may pass over a NaN
        kept = {"right": is_right, "zeros in rows of no sample": not any(x[total:].any() for x in found)}
        kept["the same from run to run"] = all(same(attention(*tensors, LENGTHS), found) for _ in range(5))
        first, alone = 0, []
        for length in LENGTHS:
            rows = slice(first, first + length)
            if length:
                alone.append(same(attention(*(x[rows] for x in tensors), (length,)), [x[rows] for x in found]))
            first += length
        kept["a packed sample as alone"] = all(alone)
        broken = [x.clone() for x in tensors]
        others = slice(LENGTHS[0], total)
        for x in broken:
            x[: LENGTHS[0]], x[total:] = torch.nan, torch.nan
        with_nans = attention(*broken, LENGTHS)
        kept["NaNs stay in their sample"] = same([x[others] for x in with_nans], [x[others] for x in found])
        kept["NaNs show in their sample"] = all(bool(x[: LENGTHS[0]].isnan().all()) for x in with_nans)
    for promise, is_kept in kept.items():
        yield {"promise": promise, "kept": is_kept, "backend": backend}


def absent(backend: str, reason: str) -> Iterator[dict[str, Any]]:
    yield {"promise": "all", "kept": None, "backend": backend, "reason": reason}


def items() -> list[Item]:
    found = []
    for name in NAMES:
        reasons = {backends.BACKENDS[name].unavailable(f"attention_{p}", "cuda", MAIN, HEAD_DIM) for p in ("forward", "backward")}
        reason = next((reason for reason in reasons if reason is not None), None)
        found.append(Item(name, partial(promises, name) if reason is None else partial(absent, name, reason)))
    return found
