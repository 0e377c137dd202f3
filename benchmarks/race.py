"""What a benchmark races: one op on one packed batch by several implementations from the same numbers, and how its work is counted.

A `Race` is one op at one dtype and pass, ours first. A peer gets its inputs in the layout that suits it best (padded, or a tensor
per sample), arranged before the clock starts. Everything runs on the GPU if there is one, on sizes that fill it.

Useful work is what the op asks for, not what an implementation happens to do:

    attention        4 H d sum_b Sq_b Sk_b FLOPs forward (Sk: the keys in the window), 3.5 times that with the backward
    patch embedding  2 N K D FLOPs forward, twice that with the weight's gradient
    RoPE, adaLN      bytes of each input read once and each output written once, in the forward and again in the backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sora_kernels.layout import PackedLayout

OURS = "sora_kernels"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
MAIN = torch.bfloat16 if ON_GPU else torch.float32
# Images and videos of 256, 1024, 1600, 4096, 576 and 2304 tokens; on a GPU four times that, for more than its caches hold.
GRIDS = [(1, 16, 16), (4, 16, 16), (4, 20, 20), (16, 16, 16), (1, 24, 24), (4, 24, 24)]
LAYOUT = PackedLayout.from_grids(GRIDS * (4 if ON_GPU else 1), DEVICE)
HEADS, HEAD_DIM, WIDTH = (24, 128, 3072) if ON_GPU else (8, 64, 1152)
# Largest error allowed, relative to the largest element of the float32 result.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Tensors = list[Tensor]


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to compute the op: `run(*inputs)` returns a tensor or a sequence of them.

    Args:
        inputs, cotangents: in this implementation's layout, a list of tensors where it works sample by sample; default the race's.
        restore: brings outputs, followed by the gradients of the inputs that need one, into the race's layout.
        comparable: False for a row that computes something else on purpose.
    """

    run: Callable[..., Any]
    inputs: Sequence[Any] | None = None
    cotangents: Sequence[Any] | None = None
    restore: Callable[[Tensors], Tensors] = list
    comparable: bool = True


@dataclass(frozen=True, eq=False)
class Race:
    """One op at one dtype and pass, and everything that computes it.

    Args:
        backward: forward and backward, with the gradients of all inputs that require one.
        work: useful FLOPs or bytes of one call, in units of 1e9; `unit` is "gflops" or "gbps".
        reference: plain torch, run once in float32; every row is checked against it.
    """

    op: str
    dtype: torch.dtype
    backward: bool
    work: float
    unit: str
    inputs: Sequence[Any]
    cotangents: Sequence[Any]
    reference: Callable[..., Any]
    implementations: dict[str, Implementation]

    def call(self, name: str) -> Tensors:
        """Runs one implementation: outputs, then gradients, in its own layout."""
        row = self.implementations[name]
        inputs = self.inputs if row.inputs is None else row.inputs
        return self._run(row.run, inputs, self.cotangents if row.cotangents is None else row.cotangents)

    def check(self, name: str) -> None:
        """Raises ArithmeticError if an output or a gradient of an implementation is wrong."""
        row = self.implementations[name]
        if not row.comparable:
            return
        for i, (got, expected) in enumerate(zip(row.restore(self.call(name)), self.expected, strict=True)):
            error = float((got - expected).detach().abs().max() / expected.detach().abs().max())
            if got.shape != expected.shape or not error <= TOLERANCE[self.dtype]:
                raise ArithmeticError(f"{self.op} {self.dtype} by {name}: result {i} is off by {error:.2g} of its largest element")

    @cached_property
    def expected(self) -> Tensors:
        def single(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return [single(y) for y in x]
            return x if x.dtype == torch.float32 else x.detach().float().requires_grad_(x.requires_grad)

        return self._run(self.reference, single(self.inputs), single(self.cotangents))

    def _run(self, run: Callable[..., Any], inputs: Sequence[Any], cotangents: Sequence[Any]) -> Tensors:
        with torch.set_grad_enabled(self.backward):
            outputs = run(*inputs)
        outputs = leaves([outputs])
        if not self.backward:
            return outputs
        return outputs + list(torch.autograd.grad(outputs, [x for x in leaves(inputs) if x.requires_grad], leaves(cotangents)))


def leaves(values: Iterable[Any]) -> Tensors:
    """The tensors of nested sequences of tensors, in order."""
    return [x for value in values for x in ([value] if isinstance(value, Tensor) else leaves(value))]


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes at hand, its best case."""
    return torch.compile(function, dynamic=False)


def gigabytes(*tensors: Tensor) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / 1e9


def passes(*rows: str, forward_only: Sequence[str] = ()) -> list[tuple[bool, str]]:
    """(with the backward, row) of a benchmark's cases."""
    return [(False, row) for row in (*rows, *forward_only)] + [(True, row) for row in rows]


def copied(work: float) -> Implementation:
    """A row that reads and writes as many bytes, in 1e9, as the op must: the limit of memory-bound work."""
    source = torch.ones(int(work * 1e9 / 2), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return Implementation(lambda *_: target.copy_(source), comparable=False)
