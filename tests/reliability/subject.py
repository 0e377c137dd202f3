"""One op on one drawn batch, as the properties see it, whatever the op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis.strategies import SearchStrategy
from tolerance import random_like
from torch import Tensor

Function = Callable[[list[Any], list[Tensor], list[Tensor]], list[Tensor]]


class Sample(NamedTuple):
    """What the op gets of it (its length, spans, mask), a tensor for each column of the batch, and whose cotangents it gets."""

    layout: Any
    tensors: list[Tensor]
    number: int = 0

    @property
    def has_tokens(self) -> bool:
        """In each column: without keys, queries have nothing to see."""
        return all(x.numel() for x in self.tensors)


@dataclass(frozen=True)
class Subject:
    """`call(layouts, columns, shared)` -> outputs, of a batch of samples.

    Attributes:
        drawn: what was drawn; it is all that is printed.
        names: of the columns, each the samples' tensors one behind the other.
        shared: tensors that all samples share: weights.
        plain, exact: the same in plain PyTorch at the inputs' dtype, and in float64.
        rows: how many rows of each output a sample has.
        slack: numbers of the columns that may have rows of no sample behind the last one, by how many they must have alike.
        blanks: samples without tokens, which go before the samples of these numbers.
        stretched: the same samples with spans that hold no tokens between their own; None if the op knows no spans.
        joined: whether samples lie end to end; if not, columns are lists of the samples' tensors, and so are outputs if `rows` is
            None.
        differentiable: whether the op has gradients.
        by_torch: numbers of the columns whose gradients plain torch computes, whose last bits may depend on threads.
        near: of an attention that promises to be near another one, the error of a row beside plain PyTorch's, as a share of what
            that attention makes of |v|, which does not cancel.
        function: the backend function that it runs, if not the op's usual one.
    """

    drawn: dict[str, Any]
    names: tuple[str, ...]
    samples: list[Sample]
    shared: list[Tensor]
    call: Function
    plain: Function
    exact: Function
    rows: Callable[[Any], int] | None
    slack: tuple[tuple[int, ...], ...] = ()
    blanks: list[tuple[int, Sample]] = field(default_factory=list)
    stretched: list[Any] | None = None
    joined: bool = True
    differentiable: bool = True
    by_torch: tuple[int, ...] = ()
    near: float | None = None
    function: str | None = None

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.drawn.items())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def layouts(self) -> list[Any]:
        return [sample.layout for sample in self.samples]

    def numbered(self) -> Subject:
        """The same, its samples with cotangents of their own."""
        return self.of([sample._replace(number=i) for i, sample in enumerate(self.samples)])

    def of(self, samples: list[Sample]) -> Subject:
        """The same op on other samples."""
        return replace(self, samples=samples)

    def with_other_signs(self) -> Subject:
        """Its samples, and each 63 times more with other signs of what kernels take; masks stay."""
        generator = torch.Generator().manual_seed(0)

        def changed(i: int, x: Tensor) -> Tensor:
            return x if i in self.by_torch else x * (1 - 2 * torch.randint(2, x.shape, generator=generator)).to(x.dtype)

        others = [s._replace(tensors=[changed(i, x) for i, x in enumerate(s.tensors)]) for _ in range(63) for s in self.samples]
        return self.of([*self.samples, *others])

    def arguments(self, tensors: list[list[Tensor]], behind: dict[int, Tensor] | None = None) -> list[Tensor]:
        """Columns of the samples' tensors, and what comes behind the last one."""
        if not self.joined:
            return [x for own in tensors for x in own]
        behind = behind or {}
        return [torch.cat([*own, *([behind[i]] if i in behind else [])]) for i, own in enumerate(zip(*tensors, strict=True))]

    def cut(self, outputs: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The outputs of each sample, and the rows of no sample."""
        if self.rows is None:
            return [[output] for output in outputs], []
        ends = [0]
        for sample in self.samples:
            ends.append(ends[-1] + self.rows(sample.layout))
        return [[output[a:b] for output in outputs] for a, b in pairwise(ends)], [output[ends[-1] :] for output in outputs]


class Op(NamedTuple):
    """How its batches are drawn, the backend function that says in which dtypes it runs, and properties that it has not.

    inference: it has no gradients.
    """

    draw: Callable[[Any], SearchStrategy[Subject]]
    function: str
    without: tuple[str, ...] = ()
    inference: bool = False


class Result(NamedTuple):
    """What each sample gets, and what the rows of no sample and the shared tensors do."""

    outputs: list[list[Tensor]]
    gradients: list[list[Tensor]]
    shared: list[Tensor]
    rest: list[Tensor]

    def of_sample(self, number: int) -> list[Tensor]:
        return self.outputs[number] + self.gradients[number]

    @property
    def of_samples(self) -> list[Tensor]:
        return [x for number in range(len(self.outputs)) for x in self.of_sample(number)]


def evaluate(
    subject: Subject,
    behind: dict[int, Tensor] | None = None,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    cotangent: Callable[[Tensor, int], Tensor] = random_like,
    strided: Callable[[Tensor], Tensor] = lambda x: x,
) -> Result:
    """Runs the op forward and backward.

    cotangent: of an output of a sample and a number that no other output of the batch has. So samples that change places, or
        outputs of one sample, have other gradients.
    behind: of columns by number, the rows of no sample; their outputs have a cotangent of NaNs.
    view, strided: what becomes of columns and shared tensors, and of cotangents, before the op sees them.
    """
    wanted = subject.differentiable
    tensors = [[x.detach().clone().requires_grad_(wanted) for x in sample.tensors] for sample in subject.samples]
    shared = [x.detach().clone().requires_grad_(wanted) for x in subject.shared]
    behind = {i: x.detach().clone().requires_grad_(wanted) for i, x in (behind or {}).items()}
    columns = [view(x) for x in subject.arguments(tensors, behind)]
    outputs = subject.call(subject.layouts, columns, [view(x) for x in shared])
    pieces, rest = subject.cut([output.detach() for output in outputs])
    if not wanted:
        return Result(pieces, [[] for _ in pieces], [], rest)
    if subject.rows is None:
        cotangents = [cotangent(output, sample.number) for sample, (output,) in zip(subject.samples, pieces, strict=True)]
    else:
        cotangents = []
        for i, last in enumerate(rest):
            of_samples = zip(subject.samples, pieces, strict=True)
            own = [cotangent(outputs[i], sample.number * len(rest) + i) for sample, outputs in of_samples]
            cotangents.append(torch.cat([*own, torch.full_like(last, torch.nan)]))
    leaves = [*(x for own in tensors for x in own), *shared, *behind.values()]
    options = {"allow_unused": True, "materialize_grads": True}
    found = list(torch.autograd.grad(outputs, leaves, [strided(x) for x in cotangents], **options))
    for leaf, gradient in zip(leaves, found, strict=True):
        assert gradient.dtype == leaf.dtype, f"a gradient of {gradient.dtype} of a tensor of {leaf.dtype}"
    gradients = [[found.pop(0) for _ in own] for own in tensors]
    return Result(pieces, gradients, found[: len(shared)], rest + found[len(shared) :])
