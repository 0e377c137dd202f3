"""What a benchmark races: one op on one packed batch by several implementations from the same numbers, and how its work is counted.

A `Race` is one op at one dtype and pass, ours first. A peer gets its inputs in the layout that suits it best (padded, or a tensor
per sample), arranged before the clock starts. Everything runs on the GPU if there is one, on sizes that fill it.

Useful work is what the op asks for, not what an implementation happens to do:

    attention        4 H d sum_b Sq_b Sk_b FLOPs forward (Sk: the keys in the window), 2.5 times that backward
    patch embedding  2 N K D FLOPs forward, as many for the weight's gradient; and bytes, as the memory-bound ops
    memory-bound     bytes of each input read once and each output written once, in the forward and again in the backward

A row of adaLN's modulation serves so many tokens that its bytes are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import simulated_gpu
from sora_kernels.layout import PackedLayout

OURS = "sora_kernels"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
REHEARSED = simulated_gpu() is not None  # on the GPU's code paths, with few tokens, and without times that mean anything
MAIN = torch.bfloat16 if ON_GPU else torch.float32
# Images and videos of 256, 1024, 1600, 4096, 576 and 2304 tokens; on a GPU four times that, for more than its caches hold.
GRIDS = [(1, 16, 16), (4, 16, 16), (4, 20, 20), (16, 16, 16), (1, 24, 24), (4, 24, 24)]
if REHEARSED:
    GRIDS = GRIDS[:1] + GRIDS[2:3]
LAYOUT = PackedLayout.from_grids(GRIDS * (4 if ON_GPU and not REHEARSED else 1), DEVICE)
BEYOND_CACHES = PackedLayout.from_grids(GRIDS * 4, DEVICE)
HEADS, HEAD_DIM, WIDTH = (24, 128, 3072) if ON_GPU else (8, 64, 1152)
# Largest error allowed, relative to the largest element of the float32 result.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

# Passes. BACKWARD differentiates one graph, made before the clock starts, again and again; only on GPUs, for the CPU's sake.
FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"
IDS = {FORWARD: "False", BOTH: "True", BACKWARD: "alone"}  # a case's name says whether the backward is in it ...
PASSES = {"forward": FORWARD, "backward": BOTH} | ({"backward alone": BACKWARD} if ON_GPU else {})  # ... or says it so

Tensors = list[Tensor]


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to compute the op: `run(*inputs)` returns a tensor or a sequence of them.

    Args:
        inputs, cotangents: in this implementation's layout, a list of tensors where it works sample by sample; default the race's.
        restore: brings outputs, followed by the gradients of the inputs that need one, into the race's layout.
        comparable: False for a row that computes something else on purpose.
        differentiable: False for a row that is only called, whatever the pass.
        context: what holds while it runs, forward and backward, such as `partial(use_backend, "triton")`.
    """

    run: Callable[..., Any]
    inputs: Sequence[Any] | None = None
    cotangents: Sequence[Any] | None = None
    restore: Callable[[Tensors], Tensors] = list
    comparable: bool = True
    differentiable: bool = True
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, eq=False)
class Race:
    """One op at one dtype and pass, and everything that computes it.

    Args:
        which: the pass; a backward gives the gradients of all inputs that require one.
        work: useful FLOPs and bytes of one call, in units of 1e9, by unit: "gflops", "gbps".
        reference: plain torch, run once in float32; every row is checked against it.
        roundings: by which the tolerance of one op is multiplied, for models.
        host_seconds: what it takes the host to launch a row, as the clock finds out.
    """

    op: str
    dtype: torch.dtype
    which: str
    work: dict[str, float]
    inputs: Sequence[Any]
    cotangents: Sequence[Any]
    reference: Callable[..., Any]
    implementations: dict[str, Implementation]
    roundings: int = 1
    host_seconds: dict[str, float] = field(default_factory=dict)
    _graphs: dict[str, Tensors] = field(default_factory=dict)

    def call(self, name: str) -> Tensors:
        """Runs one implementation: outputs, then gradients, in its own layout."""
        row = self.implementations[name]
        with row.context():
            return self._call(name, row)

    def _call(self, name: str, row: Implementation) -> Tensors:
        inputs = self.inputs if row.inputs is None else row.inputs
        if self.which == FORWARD or not row.differentiable:
            with torch.no_grad():
                return leaves([row.run(*inputs)])
        cotangents = self.cotangents if row.cotangents is None else row.cotangents
        if self.which == BOTH:
            return differentiated(leaves([row.run(*inputs)]), inputs, cotangents)
        if name not in self._graphs:
            self._graphs[name] = leaves([row.run(*inputs)])
        return differentiated(self._graphs[name], inputs, cotangents, retain_graph=True)

    def check(self, name: str) -> None:
        """Raises ArithmeticError if an output or a gradient of an implementation is wrong, ValueError if it has another shape."""
        row = self.implementations[name]
        if not row.comparable:
            return
        for i, (got, expected) in enumerate(zip(row.restore(self.call(name)), self.expected, strict=True)):
            result = f"{self.op} {self.dtype} by {name}: result {i}"
            if got.shape != expected.shape:
                raise ValueError(f"{result} has shape {list(got.shape)}, expected {list(expected.shape)}")
            error = float((got - expected).detach().abs().max() / expected.detach().abs().max())
            if not error <= self.roundings * TOLERANCE[self.dtype]:
                raise ArithmeticError(f"{result} is off by {error:.2g} of its largest element")

    @cached_property
    def expected(self) -> Tensors:
        def single(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return [single(y) for y in x]
            return x if x.dtype == torch.float32 else x.detach().float().requires_grad_(x.requires_grad)

        inputs = single(self.inputs)
        if self.which == FORWARD:
            with torch.no_grad():
                return leaves([self.reference(*inputs)])
        return differentiated(leaves([self.reference(*inputs)]), inputs, single(self.cotangents))


def differentiated(outputs: Tensors, inputs: Sequence[Any], cotangents: Sequence[Any], retain_graph: bool = False) -> Tensors:
    """The outputs and the gradients of the inputs that need one."""
    wanted = [x for x in leaves(inputs) if x.requires_grad]
    return outputs + list(torch.autograd.grad(outputs, wanted, leaves(cotangents), retain_graph=retain_graph))


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


def of_pass(which: str, forward: float, backward: float) -> float:
    """What a pass takes, of what its two halves take."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]


def passes(*rows: str) -> list[tuple[str, str]]:
    """(pass, row) of a benchmark's cases, with a copy beside the forward, on GPUs beside every pass."""
    cases = [(which, row) for which in PASSES.values() for row in (*rows, "copy")]
    return [(which, row) for which, row in cases if row != "copy" or which == FORWARD or ON_GPU]


def copied(gigabytes: float) -> Implementation:
    """A row that reads and writes as many bytes as the op must: the limit of memory-bound work."""

    @cache
    def memory() -> tuple[Tensor, Tensor]:
        source = torch.ones(int(gigabytes * 1e9 / 2), dtype=torch.uint8, device=DEVICE)
        return source, torch.empty_like(source)

    def run(*_: Any) -> Tensor:
        source, target = memory()
        return target.copy_(source)

    return Implementation(run, comparable=False, differentiable=False)
