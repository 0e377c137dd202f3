"""What every op is held to, whatever the op, the backend and the dtype: the one tolerance rule and the shared checks.

The rule: the error against the float64 reference is at most twice that of plain PyTorch at the same dtype, plus what
storing the result in that dtype costs near 0.3. It holds for every output and for every gradient. In float64, where the
reference is no more exact than the op, both must agree to AGREE_FLOAT64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TIMES_PLAIN = 2.0
ROUNDINGS = 2.0
# Cotangents that the errors of gradients are taken over: of one, plain PyTorch's error can be small by luck.
DRAWS = 16
DRAWS_EMULATED = 2  # of the kernels' own gradients; plain PyTorch's are drawn as often as ever
# What the CPU has no kernel for, as none would be faster: docs/performance.md. There the reference computes it.
WITHOUT_CPU_KERNEL = ("int8_attention_forward",)
# GPU kernels that run on the CPU, one operation or one thread at a time, a thousand times slower.
EMULATED = ("simt", "triton") if backends.INTERPRETED else ("simt",)
# Two ways to write a formula agree to this in float64, relative to the largest element.
AGREE_FLOAT64 = 1e-12
# Gradients of packed samples against each sample alone, relative to the largest element: sums may be split differently.
AGREE_PACKED = 1e-5

Run = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Target:
    """Device, backend and dtype of one test."""

    device: str
    backend: str
    dtype: torch.dtype

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape)).to(self.device, self.dtype)

    def boundaries(self, *lengths: int) -> Tensor:
        """Lengths 3, 0, 5 -> int32 [0, 3, 3, 8]."""
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).int()

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}-{str(self.dtype).removeprefix('torch.')}"


def random_like(output: Tensor, draw: int = 0) -> Tensor:
    """A cotangent that depends on the shape and the draw only: bfloat16 numbers, which every dtype holds."""
    generator = torch.Generator().manual_seed(output.numel() + 1_000_003 * draw)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output)


def forward(function: Callable, inputs: Iterable[Tensor]) -> Run:
    """Leaves that share the inputs' memory and strides, and the outputs of `function` on them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    return leaves, list(result) if isinstance(result, tuple | list) else [result]


def random_cotangents(outputs: Sequence[Tensor], draw: int = 0) -> list[Tensor]:
    """Each output has its own, so that gradients of outputs that change places are found."""
    return [random_like(output.detach(), draw * len(outputs) + i) for i, output in enumerate(outputs)]


def backward(leaves: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
    options = {"retain_graph": retain_graph, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(outputs, leaves, cotangents, **options))


def run(function: Callable, inputs: Iterable[Tensor], cotangent: Callable[[Tensor], Tensor] | None = None) -> Run:
    """Outputs and gradients of `function(*inputs)`. cotangent: of an output; default random ones."""
    leaves, outputs = forward(function, inputs)
    results = [output.detach() for output in outputs]
    return results, backward(leaves, outputs, random_cotangents(outputs) if cotangent is None else list(map(cotangent, results)))


def run_draws(function: Callable, inputs: Iterable[Tensor], count: int = DRAWS) -> Run:
    """Outputs, and the gradients for each of `count` cotangents, stacked."""
    leaves, outputs = forward(function, inputs)
    draws = [backward(leaves, outputs, random_cotangents(outputs, draw), retain_graph=True) for draw in range(count)]
    return [output.detach() for output in outputs], [torch.stack(gradients) for gradients in zip(*draws, strict=True)]


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_bit_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=0, equal_nan=True)


def assert_zero(*tensors: Tensor) -> None:
    for x in tensors:
        assert not x.any(), f"expected zeros, got {x}"


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest distance; infinities (the lse of a query without keys) must be the same, and NaN is as far as can be."""
    infinite = exact.isinf()
    if actual.shape != exact.shape or not torch.equal(actual[infinite].double(), exact[infinite]):
        return torch.inf
    return largest((actual.double() - exact).masked_fill(infinite, 0).nan_to_num(nan=torch.inf))


def allowed_error(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The rule, for a result stored in `dtype` where plain PyTorch computes `plain`."""
    finite = exact.masked_fill(exact.isinf(), 0)
    if dtype == torch.float64:
        return AGREE_FLOAT64 * max(1, largest(finite))
    stored = finite.to(dtype)
    return TIMES_PLAIN * error(plain, exact) + ROUNDINGS * largest((stored + 0.3 - 0.3) - stored)


def check_accuracy(op: Callable, plain: Callable, exact: Callable, inputs: dict[str, Tensor]) -> Run:
    """Holds the outputs and all gradients of `op` to the rule; `plain` runs at the inputs' dtype, `exact` in float64.

    `plain` in float64 must give what `exact` gives, so that the reference itself has a witness.
    """
    doubles = [x.double() for x in inputs.values()]
    count = DRAWS_EMULATED if backends.forced_backend() in EMULATED else DRAWS
    actual, rough, truth = run_draws(op, inputs.values(), count), run_draws(plain, inputs.values()), run_draws(exact, doubles)
    for kind, *results in zip(("output", "gradient"), actual, rough, truth, strict=True):
        for i, (got, at_dtype, right) in enumerate(zip(*results, strict=True)):
            name = f"{kind} {i if kind == 'output' else list(inputs)[i]}"
            drawn = right[:count] if kind == "gradient" else right
            distance, allowed = error(got, drawn), allowed_error(at_dtype, right, got.dtype)
            assert distance <= allowed < torch.inf, f"{name} {list(right.shape)}: error {distance:.3g} exceeds {allowed:.3g}"

    witness = run(plain, doubles)
    truth = truth[0], [gradient[0] for gradient in truth[1]]
    for right, second in zip(truth[0] + truth[1], witness[0] + witness[1], strict=True):
        distance = error(second, right)
        assert distance <= allowed_error(second, right, torch.float64), f"the reference is off by {distance:.3g}"
    for gradient, x in zip(actual[1], inputs.values(), strict=True):
        assert gradient.dtype == x.dtype
    return actual[0], [gradient[0] for gradient in actual[1]]


@dataclass(frozen=True)
class Case:
    """One op on one packed batch: `op(layout, *inputs, *shared)`, and what it is made of, sample by sample."""

    op: Callable
    layout: Any
    inputs: list[Tensor]
    operators: set[str]  # what runs, of torch.ops.sora_kernels
    shared: list[Tensor] = field(default_factory=list)  # weights
    parts: list[tuple[Any, list[Tensor]]] = field(default_factory=list)  # (layout, inputs) of each sample

    @classmethod
    def of_samples(cls, op: Callable, layout: Any, parts: list[tuple[Any, list[Tensor]]], operators: set[str], *shared: Tensor):
        inputs = [torch.cat(column) for column in zip(*(sample for _, sample in parts), strict=True)]
        return cls(op, layout, inputs, operators, list(shared), parts)

    @property
    def arguments(self) -> list[Tensor]:
        return self.inputs + self.shared

    def __call__(self, *arguments: Tensor) -> Any:
        return self.op(self.layout, *arguments)


def check_packed(case: Case) -> None:
    """The packed batch has the bits of its samples run one by one; gradients agree.

    The cotangents are the outputs themselves, which makes them the same on both sides.
    """
    together = run(case, case.arguments, torch.clone)
    apart = [run(partial(case.op, layout), sample + case.shared, torch.clone) for layout, sample in case.parts]
    for i, output in enumerate(together[0]):
        assert_bit_equal([output], [torch.cat([outputs[i] for outputs, _ in apart])])
    for i, gradient in enumerate(together[1]):
        parts = [gradients[i] for _, gradients in apart]
        if i < len(case.inputs):
            expected = torch.cat(parts)
        elif gradient.dtype.itemsize >= 4:
            expected = torch.stack(parts).sum(dim=0)
        else:
            continue  # a weight's gradient rounded sample by sample is another number
        torch.testing.assert_close(gradient, expected, rtol=0, atol=AGREE_PACKED * max(1, largest(expected)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_threads(function: Callable, inputs: Iterable[Tensor], counts: Sequence[int] = (1, 2, 16)) -> Run:
    """The CPU kernels give the same bits, backward included, for any number of threads."""
    results = []
    for count in counts:
        with threads(count), backends.use_backend("cpu"):
            results.append(run(function, inputs))
    for other in results[1:]:
        assert_bit_equal(other[0] + other[1], results[0][0] + results[0][1])
    return results[0]


# Widths of rows that are whole vectors, begin where vectors do, or neither.
LARGE_WIDTHS = (1024, 1000, 333)


def large_lengths(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens of two samples of 6 MiB: together their outputs pass the caches by, alone they do not."""
    return ((6 << 20) // (width * dtype.itemsize),) * 2


def check_large(case: Case) -> None:
    check_packed(case)
    check_threads(case, case.arguments)


def check_rejected(function: Callable, arguments: dict[str, Any], message: str) -> None:
    """Bad input raises ValueError or TypeError with "op: argument: expected ..., got ..."; `~` stands for any text."""
    assert re.fullmatch(r"\w+: .+: expected .+, got .+", message), message
    pattern = ".*".join(map(re.escape, message.split("~")))
    with pytest.raises((ValueError, TypeError), match=f"^{pattern}$"):
        function(**arguments)
