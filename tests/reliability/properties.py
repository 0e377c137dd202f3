"""What every op promises, on batches drawn at random: python -m tests.reliability.properties 10000

Of each op and backend, forward and backward, to the bit: a packed sample is the sample alone; samples may stand in any order; rows
of no sample and samples and spans without tokens change nothing, whatever they hold; NaNs stay NaNs, in their sample; threads and
strides change nothing. And outputs and gradients obey the rule of tolerance.py against float64.

    --seed N           of everything random
    --backend NAME     cpu (default, all instruction-set tiers, a process each), reference or triton
    --only OP PROPERTY one of each alone
    --blob TEXT        with --only: one case again, as a failure printed it

A case that fails is made as small as possible first, and printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import hypothesis
import interpreter
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from sweep import ROOT, tiers
from tolerance import AGREE_PACKED, allowed_error, assert_bit_equal, assert_zero, check_accuracy, error, largest, threads
from torch import Tensor

from sora_kernels import backends

from . import attentions, subjects
from .layouts import Setting, dtypes_of
from .outcome import Outcome
from .subject import Result, Sample, Subject, evaluate

OPS = {**subjects.SUBJECTS, **attentions.SUBJECTS}
BAD = (torch.nan, torch.inf, -torch.inf)


def accuracy(data: st.DataObject, subject: Subject) -> None:
    """Outputs and gradients obey the rule against float64, which plain PyTorch in float64 agrees with."""
    layouts = subject.layouts
    arguments = subject.arguments([sample.tensors for sample in subject.samples])
    count = len(arguments)

    def bind(function: Callable) -> Callable:
        return lambda *given: function(layouts, list(given[:count]), list(given[count:]))

    if subject.differentiable:
        names = [*subject.names] if subject.joined else [f"{subject.names[0]}[{i}]" for i in range(count)]
        names += [f"shared[{i}]" for i in range(len(subject.shared))]
        functions = map(bind, (subject.call, subject.plain, subject.exact))
        check_accuracy(*functions, dict(zip(names, [*arguments, *subject.shared], strict=True)))
        return
    results = (
        bind(f)(*xs) for f, xs in ((subject.call, arguments), (subject.plain, arguments), (subject.exact, doubles(arguments)))
    )
    for got, rough, right in zip(*results, strict=True):
        distance, allowed = error(got, right), allowed_error(rough, right, got.dtype) + (subject.near or 0.0)
        assert distance <= allowed, f"error {distance:.3g} exceeds {allowed:.3g}"


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


def packed(data: st.DataObject, subject: Subject) -> None:
    """Each sample gets the bits that it gets alone, and shared tensors the sum of the samples' gradients."""
    together = evaluate(subject)
    apart = [evaluate(subject.of([sample])) for sample in subject.samples]
    assert_bit_equal(together.of_samples, [x for result in apart for x in result.of_sample(0)])
    for i, whole in enumerate(together.shared):
        if whole.dtype.itemsize >= 4:  # one that is rounded sample by sample is another number
            assert_sum(whole, [result.shared[i] for result in apart])


def assert_sum(whole: Tensor, parts: list[Tensor]) -> None:
    total = torch.stack(parts).sum(dim=0)
    distance, allowed = error(whole, total.double()), AGREE_PACKED * max(1.0, largest(total), *map(largest, parts))
    assert distance <= allowed, f"a shared gradient differs by {distance:.3g}, more than {allowed:.3g}"


def permuted(data: st.DataObject, subject: Subject) -> None:
    """Samples in another order get the same bits."""
    order = data.draw(st.permutations(range(len(subject.samples))), label="order")
    first, second = evaluate(subject), evaluate(subject.of([subject.samples[i] for i in order]))
    assert_bit_equal(second.of_samples, [x for i in order for x in first.of_sample(i)])
    for got, expected in zip(second.shared, first.shared, strict=True):
        if got.dtype.itemsize >= 4:
            assert_sum(got, [expected])


def slack(data: st.DataObject, subject: Subject) -> None:
    """Rows of no sample get zeros and change nothing, whatever they hold, and whatever their outputs' cotangents are."""
    assert subject.slack, "this batch cannot have rows of no sample"
    held, behind = data.draw(st.sampled_from(BAD), label="hold"), {}
    columns = subject.arguments([sample.tensors for sample in subject.samples])
    for group in subject.slack:
        count = data.draw(st.sampled_from([0, 1, 2, 9, 70]), label=f"rows of {subject.names[group[0]]}")
        behind |= {i: columns[i].new_full((count, *columns[i].shape[1:]), held) for i in group}
    with_slack, without = evaluate(subject, behind), evaluate(subject)
    assert_bit_equal(with_slack.of_samples, without.of_samples)
    assert_same_shared(with_slack, without)
    assert_zero(*with_slack.rest)


def assert_same_shared(got: Result, expected: Result) -> None:
    for ours, theirs in zip(got.shared, expected.shared, strict=True):
        assert_bit_equal([ours], [theirs])


def blank(data: st.DataObject, subject: Subject) -> None:
    """Samples and spans without tokens change nothing."""
    expected = evaluate(subject)
    samples: list[tuple[Sample, bool]] = [(sample, True) for sample in subject.samples]
    for place, sample in reversed(subject.blanks):
        samples.insert(place, (sample, False))
    found = evaluate(subject.of([sample for sample, _ in samples]))
    kept = [i for i, (_, own) in enumerate(samples) if own]
    assert_bit_equal([x for i in kept for x in found.of_sample(i)], expected.of_samples)
    assert_same_shared(found, expected)
    assert_zero(*(x for i, (_, own) in enumerate(samples) if not own for x in found.of_sample(i)))
    if subject.stretched is not None:
        stretched = [sample._replace(layout=layout) for sample, layout in zip(subject.samples, subject.stretched, strict=True)]
        found = evaluate(subject.of(stretched))
        assert_bit_equal(found.of_samples, expected.of_samples)
        assert_same_shared(found, expected)


def poisoned(data: st.DataObject, subject: Subject) -> None:
    """What is not finite in one sample changes no bit of the others."""
    chosen = data.draw(st.integers(0, len(subject.samples) - 1), label="sample")
    held = data.draw(st.sampled_from(BAD), label="hold")
    samples = list(subject.samples)
    samples[chosen] = samples[chosen]._replace(tensors=[torch.full_like(x, held) for x in samples[chosen].tensors])
    found, expected = evaluate(subject.of(samples)), evaluate(subject)
    others = [i for i in range(len(samples)) if i != chosen]
    assert_bit_equal([x for i in others for x in found.of_sample(i)], [x for i in others for x in expected.of_sample(i)])


def nans(data: st.DataObject, subject: Subject) -> None:
    """A NaN is one whatever its bits are, such as those of memory that was filled with ones."""
    chosen = data.draw(st.integers(0, len(subject.samples) - 1), label="sample")
    bits = data.draw(st.sampled_from(["ones", "positive", "signalling"]), label="bits")

    def held(fill: Callable[[Tensor], Tensor]) -> Result:
        samples = list(subject.samples)
        samples[chosen] = samples[chosen]._replace(tensors=[fill(x) for x in samples[chosen].tensors])
        return evaluate(subject.of(samples))

    found, expected = held(partial(nans_of, bits)), held(lambda x: torch.full_like(x, torch.nan))
    for got, right in zip([*found.of_samples, *found.shared], [*expected.of_samples, *expected.shared], strict=True):
        assert torch.equal(got.isnan(), right.isnan()), f"{int(got.isnan().sum())} NaNs instead of {int(right.isnan().sum())}"


def nans_of(bits: str, x: Tensor) -> Tensor:
    size = x.dtype.itemsize
    infinity = torch.tensor(torch.inf, dtype=x.dtype).view(torch_int(size)).item()
    word = {"ones": -1, "positive": 2 ** (8 * size - 1) - 1, "signalling": infinity + 1}[bits]
    return torch.full(x.shape, word, dtype=torch_int(size)).view(x.dtype)


def torch_int(size: int) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]


def threaded(data: st.DataObject, subject: Subject) -> None:
    """1, 2 and 3 threads give the same bits; gradients that plain torch computes may differ by roundings."""
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(evaluate(subject))
    first, *others = results
    for other in others:
        assert_bit_equal([x for own in other.outputs for x in own], [x for own in first.outputs for x in own])
        assert_same_shared(other, first)
        for ours, theirs in zip(other.gradients, first.gradients, strict=True):
            for i, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
                if i in subject.by_torch:
                    assert_sum(got, [expected])
                else:
                    assert_bit_equal([got], [expected])


def rows(x: Tensor) -> Tensor:
    """Columns of a wider buffer of NaNs."""
    return torch.cat([torch.full_like(x, torch.nan), x], dim=-1)[..., x.shape[-1] :]


def columns(x: Tensor) -> Tensor:
    """Every other number of a last axis."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def offset(x: Tensor) -> Tensor:
    """Not at the beginning of a vector."""
    return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)


def turned(x: Tensor) -> Tensor:
    """The first axis is the innermost one."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def every_other(x: Tensor) -> Tensor:
    """Every other row."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=1)[:, 0]


def strided(data: st.DataObject, subject: Subject) -> None:
    """Views of inputs and of cotangents change no bit."""
    view = data.draw(st.sampled_from([rows, columns, offset, turned, every_other]), label="view")
    expected, found = evaluate(subject), evaluate(subject, view=view, strided=view)
    assert_bit_equal([*found.of_samples, *found.shared], [*expected.of_samples, *expected.shared])
    if subject.differentiable:  # the cotangent of a sum, of stride 0
        expected = evaluate(subject, cotangent=torch.ones_like)
        found = evaluate(subject, cotangent=torch.ones_like, strided=lambda x: x.new_ones(()).expand(x.shape))
        assert_bit_equal([*found.of_samples, *found.shared], [*expected.of_samples, *expected.shared])


Check = Callable[[st.DataObject, Subject], None]
PROPERTIES: dict[str, Check] = {
    f.__name__: f for f in (accuracy, packed, permuted, slack, blank, poisoned, nans, threaded, strided)
}
SETTINGS = settings(
    database=None, deadline=None, print_blob=True, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck)
)


class Pair(NamedTuple):
    """One property of one op."""

    op: str
    property: str

    def setting(self, backend: str) -> Setting:
        return Setting.of(backend)._replace(packed=self.property in ("slack", "blank"))


def pairs(backend: str) -> list[Pair]:
    """All that hold for an op that the backend has. Of threads our own kernels promise something, torch's products nothing."""
    able = {name: op for name, op in OPS.items() if dtypes_of(op.function, backend)}
    checks = [name for name in PROPERTIES if name != "threaded" or backend == "cpu"]
    return [Pair(name, check) for name, op in able.items() for check in checks if check not in op.without]


def check_once(pair: Pair, backend: str, data: st.DataObject) -> set[str]:
    """One case; the backend functions that it ran, all of them the backend's."""
    subject = data.draw(OPS[pair.op].draw(pair.setting(backend)), label=pair.op)
    with backends.use_backend(backend), backends.record() as calls:
        PROPERTIES[pair.property](data, subject)
    assert {name for _, name in calls} <= {backend}, f"expected {backend} to run, recorded {calls}"
    return {function for function, _ in calls}


class Examined(NamedTuple):
    """Cases of a pair, the functions that they ran, and how the smallest one that fails does."""

    cases: int
    functions: set[str]
    failure: str | None


def examine(pair: Pair, backend: str, count: int, seed: int = 0, blob: str | None = None) -> Examined:
    """Draws `count` cases, or that of a blob."""
    cases, functions = 0, set()

    @hypothesis.seed(zlib.crc32(f"{seed} {pair.op} {pair.property}".encode()))
    @settings(SETTINGS, max_examples=count)
    @hypothesis.given(data=st.data())
    def test(data: st.DataObject) -> None:
        nonlocal cases, functions
        cases += 1
        functions |= check_once(pair, backend, data)

    if blob is not None:
        test = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())(test)
    try:
        test()
    except hypothesis.errors.DidNotReproduce:
        return Examined(cases, functions, None)
    except Exception as error:  # whatever a case raises is a failure of it
        return Examined(min(cases, count), functions, described(error, pair, backend))
    return Examined(cases, functions, None)


def described(error: Exception, pair: Pair, backend: str) -> str:
    """The case, what is wrong with it, and how to repeat it."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    notes = "\n".join(getattr(error, "__notes__", []))
    is_group = hasattr(error, "exceptions")  # as of what fails once and not again
    lines = traceback.format_exception(error) if is_group else [f"{type(error).__name__}: {error}\n{notes}\n"]
    text = "".join([*traceback.format_list(own), *lines])
    found = re.search(r"@reproduce_failure\('[^']*', b'([^']*)'\)", text)
    tier = os.environ.get("SORA_KERNELS_ISA")
    before = f"SORA_KERNELS_ISA={tier} " if tier else ""
    again = f"{before}python -m tests.reliability.properties 1 --backend {backend} --only {pair.op} {pair.property}"
    return f"{text}{pair.property} of {pair.op} fails; again: {again}" + (f" --blob {found[1]}" if found else "")


def run(options: argparse.Namespace) -> int:
    """Prints failures, and a line for each property."""
    chosen = [Pair(*options.only)] if options.only else pairs(options.backend)
    where = os.environ.get("SORA_KERNELS_ISA", options.backend)
    cases, failed = Counter(), Counter()
    for i, pair in enumerate(chosen):
        count = options.count // len(chosen) + (i < options.count % len(chosen))
        examined = examine(pair, options.backend, max(count, 1), options.seed, options.blob)
        cases[pair.property] += examined.cases
        failed[pair.property] += examined.failure is not None
        if examined.failure is not None:
            print(examined.failure, flush=True)
    for name in PROPERTIES:
        if cases[name]:
            print(Outcome(f"{name} on {where}", cases[name], failed[name]), flush=True)
    return 1 if failed.total() else 0


def per_tier(options: argparse.Namespace) -> int:
    """A process for each tier, with cases of its own."""
    names, status = tiers(), 0
    for i, name in enumerate(names):
        count = options.count // len(names) + (i < options.count % len(names))
        command = [sys.executable, "-m", "tests.reliability.properties", str(count), "--seed", str(options.seed + i)]
        command += ["--only", *options.only] if options.only else []
        command += ["--blob", options.blob] if options.blob else []
        status |= subprocess.run(command, env={**os.environ, "SORA_KERNELS_ISA": name}, cwd=ROOT, check=False).returncode
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="cpu", choices=["cpu", "reference", "triton"])
    parser.add_argument("--only", nargs=2, metavar=("OP", "PROPERTY"))
    parser.add_argument("--blob")
    options = parser.parse_args()
    if options.only and (options.only[0] not in OPS or options.only[1] not in PROPERTIES):
        parser.error(f"--only: expected an op of {', '.join(OPS)} and a property of {', '.join(PROPERTIES)}")
    if options.backend == "triton":
        interpreter.prepare()
    if options.backend == "cpu" and "SORA_KERNELS_ISA" not in os.environ:
        return per_tier(options)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
