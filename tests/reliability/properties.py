"""What every op promises, on batches drawn at random: python -m tests.reliability.properties 10000

Of each op and backend, forward and backward, to the bit: a packed sample is the sample alone; samples may stand in any order; rows
of no sample and samples and spans without tokens change nothing, whatever they hold; NaNs stay NaNs, in their sample; threads and
strides change nothing. And outputs and gradients obey the rule of tolerance.py against float64. Batches without any token are
drawn too, but are not counted.

    --seed N              of everything random
    --backend NAME        cpu (default: all instruction-set tiers, a process each, and the reference for what the CPU has no kernel
                          for), reference or triton
    --only OP [PROPERTY]  an op, or one property of it, alone
    --blob TEXT           with both: one case again, as a failure printed it

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
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from sweep import ROOT, tiers
from tolerance import (
    AGREE_PACKED,
    TIMES_PLAIN,
    allowed_error,
    assert_bit_equal,
    assert_zero,
    check_accuracy,
    error,
    largest,
    threads,
)
from torch import Tensor

from sora_kernels import backends
from sora_kernels.signatures import SIGNATURES

from . import attentions, subjects
from .children import again
from .layouts import VIEWS, Setting, dtypes_of, nans_of
from .outcome import Outcome
from .subject import Op, Result, Sample, Subject, evaluate

OPS = {**subjects.SUBJECTS, **attentions.SUBJECTS}
BAD = (torch.nan, torch.inf, -torch.inf)


def accuracy(data: st.DataObject, subject: Subject) -> None:
    """Outputs and gradients obey the rule against float64, which plain PyTorch in float64 agrees with.

    Of few numbers plain PyTorch's error, which the rule doubles, may be small by luck. So a batch that fails may obey it as a part
    of a larger one.
    """
    try:
        check_rule(subject)
    except AssertionError:
        check_rule(subject.with_other_signs())


def check_rule(subject: Subject) -> None:
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
    exact = bind(subject.exact)
    results = [bind(subject.call)(*arguments), bind(subject.plain)(*arguments), exact(*map(Tensor.double, arguments))]
    if subject.near is not None:
        at = subject.names.index("v")
        sizes = exact(*(x.double().abs() if i == at else x.double() for i, x in enumerate(arguments)))
        for got, rough, right, size in zip(*results, sizes, strict=True):
            assert_near(got, rough, right, subject.near * size)
        return
    for got, rough, right in zip(*results, strict=True):
        distance, allowed = error(got, right), allowed_error(rough, right, got.dtype)
        assert distance <= allowed < torch.inf, f"error {distance:.3g} exceeds {allowed:.3g}"


def assert_near(got: Tensor, rough: Tensor, right: Tensor, size: Tensor) -> None:
    """Of every row the norm of the error is at most that of size, and twice that of plain PyTorch's error."""
    assert got.shape == right.shape, f"{got.shape} instead of {right.shape}"
    distance = torch.linalg.vector_norm(got.double() - right, dim=-1)
    allowed = TIMES_PLAIN * torch.linalg.vector_norm(rough.double() - right, dim=-1) + torch.linalg.vector_norm(size, dim=-1)
    wrong = ~((distance <= allowed) & (allowed < torch.inf))  # NaN is wrong
    assert not wrong.any(), f"error {distance[wrong][0]:.3g} of a row exceeds {allowed[wrong][0]:.3g}"


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
    assume(order != sorted(order))
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


def ones(output: Tensor, _: int) -> Tensor:
    return torch.ones_like(output)


def strided(data: st.DataObject, subject: Subject) -> None:
    """Views of inputs and of cotangents change no bit."""
    view = data.draw(st.sampled_from(VIEWS), label="view")
    expected, found = evaluate(subject), evaluate(subject, view=view, strided=view)
    assert_bit_equal([*found.of_samples, *found.shared], [*expected.of_samples, *expected.shared])
    if subject.differentiable:  # the cotangent of a sum, of stride 0
        expected = evaluate(subject, cotangent=ones)
        found = evaluate(subject, cotangent=ones, strided=lambda x: x.new_ones(()).expand(x.shape))
        assert_bit_equal([*found.of_samples, *found.shared], [*expected.of_samples, *expected.shared])


Check = Callable[[st.DataObject, Subject], None]
PROPERTIES: dict[str, Check] = {
    f.__name__: f for f in (accuracy, packed, permuted, slack, blank, poisoned, nans, threaded, strided)
}
BETWEEN_SAMPLES = ("packed", "permuted", "poisoned")  # which say nothing of one sample
SETTINGS = settings(
    database=None, deadline=None, print_blob=True, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck)
)


class Pair(NamedTuple):
    """One property of one op."""

    op: str
    property: str

    def setting(self, backend: str) -> Setting:
        fewest = 2 if self.property in BETWEEN_SAMPLES else 1
        packed, ruled = self.property in ("slack", "blank"), self.property == "accuracy"
        return Setting.of(backend)._replace(packed=packed, fewest=fewest, ruled=ruled)


def pairs(backend: str) -> list[Pair]:
    """All that hold for an op that the backend has. Of threads our own kernels promise something, torch's products nothing."""
    able = {name: op for name, op in OPS.items() if dtypes_of(op.function, backend)}
    checks = [name for name in PROPERTIES if name != "threaded" or backend == "cpu"]
    return [Pair(name, check) for name, op in able.items() for check in checks if check not in op.without]


def functions_of(subject: Subject, op: Op) -> set[str]:
    """The backend functions that a batch must run, backward too if there is one."""
    if not any(sample.has_tokens for sample in subject.samples):
        return set()
    function = subject.function or op.function
    backward = {function.replace("_forward", "_backward")} & set(SIGNATURES)
    return {function, *(backward if subject.differentiable else [])}


def check_once(pair: Pair, backend: str, data: st.DataObject) -> set[str]:
    """One case; the backend functions that it ran, all of them the backend's. None of a batch without tokens."""
    op = OPS[pair.op]
    subject = data.draw(op.draw(pair.setting(backend)), label=pair.op).numbered()
    expected = functions_of(subject, op)
    if pair.property in BETWEEN_SAMPLES:
        assume(sum(sample.has_tokens for sample in subject.samples) >= 2)
    with backends.use_backend(backend), backends.record() as calls:
        PROPERTIES[pair.property](data, subject)
    ran = {function for function, _ in calls}
    assert {name for _, name in calls} <= {backend}, f"expected {backend} to run, recorded {calls}"
    assert expected <= ran, f"expected {', '.join(sorted(expected))} of {backend} to run, recorded {calls}"
    return ran if expected else set()


class Examined(NamedTuple):
    """Cases with tokens of a pair, the functions that they ran, and how the smallest one that fails does."""

    cases: int
    functions: set[str]
    failure: str | None


def examine(pair: Pair, backend: str, count: int, seed: int = 0, blob: str | None = None) -> Examined:
    """Draws `count` cases, or that of a blob. Hypothesis begins with the smallest one, which is none of them."""
    cases, functions = -1 if blob is None else 0, set()

    @hypothesis.seed(zlib.crc32(f"{seed} {pair.op} {pair.property}".encode()))
    @settings(SETTINGS, max_examples=count + 1)
    @hypothesis.given(data=st.data())
    def test(data: st.DataObject) -> None:
        nonlocal cases, functions
        ran = check_once(pair, backend, data)
        cases += bool(ran)
        functions |= ran

    if blob is not None:
        test = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())(test)
    try:
        test()
    except hypothesis.errors.DidNotReproduce:
        return Examined(cases, functions, None)
    except Exception as error:  # whatever a case raises is a failure of it
        return Examined(max(min(cases, count), 1), functions, described(error, pair, backend))
    return Examined(cases, functions, None)


def described(error: Exception, pair: Pair, backend: str) -> str:
    """The case, what is wrong with it, and how to repeat it."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    notes = "\n".join(getattr(error, "__notes__", []))
    is_group = hasattr(error, "exceptions")  # as of what fails once and not again
    lines = traceback.format_exception(error) if is_group else [f"{type(error).__name__}: {error}\n{notes}\n"]
    text = "".join([*traceback.format_list(own), *lines])
    found = re.search(r"@reproduce_failure\('[^']*', b'([^']*)'\)", text)
    blob = [f"--blob {found[1]}"] if found else []
    command = again("tests.reliability.properties", "1", f"--backend {backend}", f"--only {pair.op} {pair.property}", *blob)
    return f"{text}{pair.property} of {pair.op} fails; again: {command}"


def chosen(options: argparse.Namespace) -> list[Pair]:
    return [pair for pair in pairs(options.backend) if options.only in (None, [pair.op], [*pair])]


def run(options: argparse.Namespace) -> int:
    """Prints failures, where it ran, and a line for each property."""
    mine = chosen(options)
    where = os.environ.get("SORA_KERNELS_ISA", "cpu") if options.backend == "cpu" else options.backend
    cases, failed = Counter(), Counter()
    for i, pair in enumerate(mine):
        count = options.count // len(mine) + (i < options.count % len(mine))
        examined = examine(pair, options.backend, max(count, 1), options.seed, options.blob)
        cases[pair.property] += examined.cases
        failed[pair.property] += examined.failure is not None
        if examined.failure is not None:
            print(examined.failure, flush=True)
    print(where)
    for name in PROPERTIES:
        if cases[name]:
            print(Outcome(name, cases[name], failed[name]), flush=True)
    return 1 if failed.total() else 0


def per_tier(options: argparse.Namespace) -> int:
    """A process for each tier, with cases of its own, and one for each op that the CPU has no kernel for."""
    names, status = tiers(), 0
    blob = ["--blob", options.blob] if options.blob else []
    able = {pair.op for pair in pairs("cpu")}

    def apart(count: int, *more: str, **environment: str) -> None:
        nonlocal status
        command = [sys.executable, "-m", "tests.reliability.properties", str(count), *more, *blob]
        ended = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, check=False).returncode
        if ended not in (0, 1):  # it did not come to its outcomes
            print(Outcome(f"{' '.join(environment.values()) or 'reference'}, which ended with status {ended}", 1, 1), flush=True)
        status |= ended != 0

    for i, name in enumerate(names):
        if not options.only or options.only[0] in able:
            count = options.count // len(names) + (i < options.count % len(names))
            only = ["--only", *options.only] if options.only else []
            apart(count, "--seed", str(options.seed + i), *only, SORA_KERNELS_ISA=name)
    for op in OPS.keys() - able:
        if not options.only or options.only[0] == op:
            count = options.count if options.only else options.count // len(OPS)
            only = ["--only", *(options.only or [op])]
            apart(count, "--seed", str(options.seed), "--backend", "reference", *only)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="cases in all: of every tier, op and property a share, and one at least")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="cpu", choices=["cpu", "reference", "triton"], help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", metavar=("OP", "PROPERTY"), help=argparse.SUPPRESS)
    parser.add_argument("--blob", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only and (options.only[0] not in OPS or options.only[1:] not in [[], *([name] for name in PROPERTIES)]):
        parser.error(f"--only: expected an op of {', '.join(OPS)} and none or one property of {', '.join(PROPERTIES)}")
    if options.backend == "triton":
        interpreter.prepare()
    if options.backend == "cpu" and "SORA_KERNELS_ISA" not in os.environ:
        return per_tier(options)
    if not chosen(options):
        parser.error(f"--only: expected what {options.backend} has, got {' '.join(options.only)}")
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
