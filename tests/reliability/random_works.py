"""Every op on batches of random layouts, and whether its bits are those of an earlier call."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from benchmarks.works import Work, works
from sora_kernels.layout import PackedLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def works_of(seed: int, step: int) -> list[Work]:
    """Every op, forward and backward, on a random layout in a random dtype; most layouts never come again."""
    chance = random.Random(f"{seed} {step}")
    grids = [tuple(chance.randint(1, most) for most in (3, 5, 5)) for _ in range(chance.randint(1, 4))]
    head_dim = chance.choice((16, 24, 32))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    layout = PackedLayout.from_grids(grids)
    width = head_dim * chance.randint(1, 3)
    return list(works(chance.choice(DTYPES), head_dim, width, layout=layout, slack=chance.randint(0, 2), make=make))


def results(work: Work) -> list[Tensor]:
    return [x.detach() for x in work.run(torch.ones_like)]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def run_ops(seed: int, step: int) -> list[str]:
    """What is wrong with the ops of a step."""
    wrong = []
    for work in works_of(seed, step):
        if not all(x.isfinite().all() for x in results(work)):
            wrong.append(f"seed {seed}, step {step}: {work.op} is not finite")
    return wrong


class Probe:
    """The same inputs again and again."""

    def __init__(self) -> None:
        self.works = [work for step in range(3) for work in works_of(0, step)]
        self.expected = [results(work) for work in self.works]

    def wrong(self) -> list[str]:
        pairs = zip(self.works, self.expected, strict=True)
        return [f"probe: {work.op} has other bits than at the start" for work, bits in pairs if not same(results(work), bits)]
