"""The first thing to run on a GPU: every op forward and backward against float64 on the CPU, by each of the GPU's backends.

The batch is ragged, with a sample of one token and rows behind the last sample. Errors are relative, in the Euclidean norm: one
wrong row of many hundreds breaks it, and so does a NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.child import Item
from benchmarks.works import Work, works
from sora_kernels import backends
from sora_kernels.layout import PackedLayout

GRIDS, SLACK = [(2, 9, 7), (1, 1, 1), (3, 5, 6), (1, 17, 16)], 5
HEAD_DIM, WIDTH = 64, 256
# Of a result relative to all of it. bfloat16 keeps 8 bits, and sums of a sample's gradients lose a few.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def batch(dtype: torch.dtype, device: str) -> list[Work]:
    """Each op with its backward, on the same numbers wherever and in whatever dtype: those that bfloat16 has."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    layout = PackedLayout.from_grids(GRIDS).to(device)
    found = list(works(dtype, HEAD_DIM, WIDTH, layout=layout, slack=SLACK, make=make))
    with_backward = {op_of(work) for work in found if work.backward}
    return [work for work in found if work.backward or work.op not in with_backward]


def results(work: Work) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def cotangent(out: Tensor) -> Tensor:
        return torch.randn(out.shape, generator=generator).bfloat16().to(out)

    return work.run(cotangent)


@cache
def exact() -> dict[str, list[Tensor]]:
    """By the reference, in float64 on the CPU."""
    with backends.use_backend("reference"):
        return {work.op: [x.detach() for x in results(work)] for work in batch(torch.float64, "cpu")}


def check(index: int, dtype: torch.dtype, backend: str) -> Iterator[dict[str, Any]]:
    work = batch(dtype, "cuda")[index]
    with backends.use_backend(backend), backends.record() as calls:
        got = results(work)
    errors = [float((x.detach().cpu().double() - y).norm() / y.norm()) for x, y in zip(got, exact()[work.op], strict=True)]
    ran = sorted({name for _, name in calls})
    ok = ran == [backend] and all(error <= TOLERANCE[dtype] for error in errors)
    yield {"check": title(work, dtype, backend), "ok": ok, "errors": [float(f"{error:.2g}") for error in errors], "ran": ran}


def title(work: Work, dtype: torch.dtype, backend: str) -> str:
    return f"{op_of(work)}, {str(dtype).removeprefix('torch.')}, {backend}"


def op_of(work: Work) -> str:
    return work.op.removesuffix(", backward")


def fail(reason: str) -> Iterator[dict[str, Any]]:
    raise RuntimeError(reason)


def items() -> list[Item]:
    """Of a backend that cannot run at all, one that says why."""
    found: dict[str, Item] = {}
    for dtype, backend in itertools.product(TOLERANCE, ("cuda", "triton")):
        for i, work in enumerate(batch(dtype, "cuda")):
            function = next(f for f in backends.FUNCTIONS if f.startswith(op_of(work)))
            reason = backends.BACKENDS[backend].unavailable(function, "cuda", dtype)
            if reason is None:
                found[title(work, dtype, backend)] = Item(title(work, dtype, backend), partial(check, i, dtype, backend))
            elif reason != f"has no {function}":
                found[backend] = Item(backend, partial(fail, f"{backend} {reason}"))
    return list(found.values())
