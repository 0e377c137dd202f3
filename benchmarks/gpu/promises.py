"""What this package promises of attention, asked of each backend: who is to run by default needs all of it.

Rows have the promise, whether it was kept, and the backend; or why the backend could not be asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.child import Item
from benchmarks.race import DEVICE, MAIN, REHEARSED
from sora_kernels import backends, flash, flash_attn_func, flash_attn_varlen_func

LENGTHS = (40, 1, 0, 23) if REHEARSED else (1000, 1, 0, 4097, 300)
DENSE_LENGTHS = (40, 40) if REHEARSED else (1000, 1000, 1000)
SLACK, HEAD_DIM = 5, 64
MOST_ERROR = 2e-2  # of a result relative to all of it, as smoke.py has it for bfloat16
NAMES = ("triton", *flash.FOREIGN) if REHEARSED else ("triton", "hopper", *flash.FOREIGN)


class Batch(NamedTuple):
    """Samples one behind the other: q, k, v and dout of [tokens, heads, HEAD_DIM], and what comes behind them."""

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    is_packed: bool

    @property
    def slack(self) -> int:
        return SLACK if self.is_packed else 0

    def alone(self, sample: int) -> Batch:
        return self._replace(lengths=(self.lengths[sample],))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        """out, dq, dk and dv."""
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if self.is_packed:
            cu = torch.tensor([0, *self.lengths], device=q.device).cumsum(0).int()
            out = flash_attn_varlen_func(*leaves, cu, cu, max(self.lengths), max(self.lengths))
        else:
            out = flash_attn_func(*(x.unflatten(0, (len(self.lengths), -1)) for x in leaves)).flatten(0, 1)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


# The dense one is as cuDNN takes it.
BATCHES = {"": Batch(LENGTHS, 4, 2, True), " in a dense batch": Batch(DENSE_LENGTHS, 2, 2, False)}


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def promises(backend: str, device: str = DEVICE, dtype: torch.dtype = MAIN) -> Iterator[dict[str, Any]]:
    for suffix, batch in BATCHES.items():
        kept = kept_by(backend, batch, device, dtype)
        if isinstance(kept, str):
            yield {"promise": f"all{suffix}", "kept": None, "backend": backend, "reason": kept}
        else:
            yield from ({"promise": f"{promise}{suffix}", "kept": is_kept, "backend": backend} for promise, is_kept in kept.items())


def kept_by(backend: str, batch: Batch, device: str, dtype: torch.dtype) -> dict[str, bool] | str:
    """Whether each promise was kept; or why the backend refuses such a batch."""
    generator = torch.Generator().manual_seed(0)
    total, heads = sum(batch.lengths), (batch.heads, batch.key_heads, batch.key_heads, batch.heads)
    tensors = [torch.randn(total + batch.slack, n, HEAD_DIM, generator=generator).to(device, dtype) for n in heads]
    with backends.use_backend("reference"):
        expected = batch.attention(*(x.double().cpu() for x in tensors))
    with backends.use_backend(backend):
        try:
            found = batch.attention(*tensors)
        except ValueError as error:
            if backends.NO_BACKEND not in str(error):
                raise
            return str(error)
        errors = [float((x.cpu().double() - y)[:total].norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
        kept = {"right": all(error <= MOST_ERROR for error in errors)}  # not their maximum, which may pass over a NaN
        if batch.slack:
            kept["zeros in rows of no sample"] = not any(x[total:].any() for x in found)
        kept["the same from run to run"] = all(same(batch.attention(*tensors), found) for _ in range(5))
        first, alone = 0, []
        for i, length in enumerate(batch.lengths):
            rows = slice(first, first + length)
            if length:
                alone.append(same(batch.alone(i).attention(*(x[rows] for x in tensors)), [x[rows] for x in found]))
            first += length
        kept["a sample as alone"] = all(alone)
        broken, end = [x.clone() for x in tensors], batch.lengths[0]
        for x in broken:
            x[:end], x[total:] = torch.nan, torch.nan
        with_nans = batch.attention(*broken)
        kept["NaNs stay in their sample"] = same([x[end:total] for x in with_nans], [x[end:total] for x in found])
        kept["NaNs show in their sample"] = all(bool(x[:end].isnan().all()) for x in with_nans)
    return kept


def absent(backend: str, reason: str) -> Iterator[dict[str, Any]]:
    yield {"promise": "all", "kept": None, "backend": backend, "reason": reason}


def items() -> list[Item]:
    found = []
    for name in NAMES:
        reasons = {backends.BACKENDS[name].unavailable(f"attention_{p}", "cuda", MAIN, HEAD_DIM) for p in ("forward", "backward")}
        reason = next((reason for reason in reasons if reason is not None), None)
        found.append(Item(name, partial(promises, name) if reason is None else partial(absent, name, reason)))
    return found
