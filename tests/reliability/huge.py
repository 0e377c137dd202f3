"""Every op forward and backward on tensors of more than 2^31 elements: python -m tests.reliability.huge 2147483648

An element's number then does not fit an int32. An unsigned one it would outgrow at 2^32, for which this has not the memory. Each
case runs in a process of its own, in bfloat16, with more than that many elements in its first input, and in an output or in that
input's gradient. All elements of outputs and gradients are compared with those of a small batch that the huge one repeats: outputs
bit for bit, gradients to a rounding, as their sums may be split in another way. Gradients of what all samples share are compared
with the reference's in float64, twice: with cotangents that repeat too, and with some that are 0 but for the last repetition. That
one lies wholly beyond, so a sum that ends too early is 0. A case takes up to 20 GiB, and waits until the machine has them. --case
NAME runs one of them.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from sora_kernels import backends

from .huge_cases import CASES, Case
from .outcome import LINE, Outcome, outcomes

ROOT = Path(__file__).parents[2]
NAME = "numel beyond 2**31"
MOST = 20 << 30  # bytes
BYTES_AN_ELEMENT = 10  # that a case takes at most, to know whether it fits
ROUNDING = 2.0**-7  # of bfloat16
OF_LARGEST = 2.0**-9  # of the largest gradient: that of many rows is summed in float32
PATIENCE = 1800  # seconds until there is enough memory


def listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def cotangent(output: Tensor, axis: int) -> Tensor:
    """The same for every index along the axis, which takes no memory."""
    one = output.detach().narrow(axis, 0, 1)
    drawn = torch.randn(one.shape, generator=torch.Generator().manual_seed(one.numel())).to(output.dtype)
    return drawn.expand(output.shape)


def of_the_last(cotangent: Tensor, count: int, axis: int) -> Tensor:
    """The same in the last repetition, 0 before it, which takes no memory: nothing is written to numpy's zeros."""
    length = cotangent.shape[axis] // count
    last = cotangent.shape[axis] - length, length
    zeros = torch.from_numpy(np.zeros(cotangent.numel() * cotangent.itemsize, np.uint8)).view(cotangent.dtype).view(cotangent.shape)
    zeros.narrow(axis, *last).copy_(cotangent.narrow(axis, *last))
    return zeros


def repeated(base: Tensor, count: int, axis: int) -> Tensor:
    shape = list(base.shape)
    shape[axis] *= count
    x = torch.empty(shape, dtype=base.dtype)
    x.unflatten(axis, (count, base.shape[axis])).copy_(base.unsqueeze(axis).expand(*base.shape[:axis], count, *base.shape[axis:]))
    return x


def far_off(huge: Tensor, base: Tensor, count: int, axis: int, exact: bool) -> str | None:
    """The first repetition that differs from the small batch, or None."""
    bound = base.abs().mul(ROUNDING).add_(base.abs().max() * OF_LARGEST)
    for i, part in enumerate(huge.unflatten(axis, (count, base.shape[axis])).unbind(axis)):
        if torch.equal(part, base):
            continue
        if exact or not bool(((part - base).abs() <= bound).all()):
            return f"repetition {i} of {count} is off by {float((part - base).abs().max()):.3g}"
    return None


def off_a_sum(total: Tensor, right: Tensor) -> str | None:
    bound = right.abs() * 2 * ROUNDING + right.abs().max() * 4 * OF_LARGEST
    distance = (total.double() - right).abs()
    return None if bool((distance <= bound).all()) else f"is off by {float(distance.max() / right.abs().max()):.3g} of the largest"


def leaves(case: Case, count: int = 1) -> list[Tensor]:
    """Inputs that are the same tensor share their memory."""
    kept = {id(x): repeated(x, count, case.axis) if count > 1 else x for x in case.repeated}
    return [x.detach().requires_grad_() for x in [*(kept[id(x)] for x in case.repeated), *case.shared]]


def gradients_of_shared(case: Case) -> list[Tensor]:
    """Of the small batch, in float64 by the reference."""
    inputs = [x.detach().double().requires_grad_() for x in leaves(case)]
    with backends.use_backend("reference"):
        outputs = listed(case.call(1)(*inputs))
        cotangents = [cotangent(x.bfloat16(), case.out_axis).double() for x in outputs]
        return list(torch.autograd.grad(outputs, inputs[len(case.repeated) :], cotangents)) if case.shared else []


def wrong(case: Case, count: int) -> list[str]:
    """What differs in a batch that holds the small one so many times."""
    inputs = leaves(case)
    small = listed(case.call(1)(*inputs))
    small_grads = torch.autograd.grad(small, inputs, [cotangent(x, case.out_axis) for x in small])
    exact = gradients_of_shared(case)

    found: dict[str, str | None] = {}
    inputs = leaves(case, count)
    huge = listed(case.call(count)(*inputs))
    for i, (out, base) in enumerate(zip(huge, small, strict=True)):
        found[f"output {i}"] = far_off(out.detach(), base.detach(), count, case.out_axis, exact=True)
    cotangents = [cotangent(x, case.out_axis) for x in huge]
    edges = [get_gradient_edge(x) for x in huge]
    out = None
    huge.clear()  # what the backward does not need makes room for what it computes
    grads = list(torch.autograd.grad(edges, inputs, cotangents, retain_graph=bool(exact)))
    for i, base in enumerate(small_grads[: len(case.repeated)]):
        found[f"gradient {i}"] = far_off(grads[i], base, count, case.axis, exact=False)
    totals = grads[len(case.repeated) :]
    for i, (total, right) in enumerate(zip(totals, exact, strict=True)):
        found[f"gradient of shared {i}"] = off_a_sum(total, right * count)
    grads.clear()
    if exact:
        cotangents = [of_the_last(x, count, case.out_axis) for x in cotangents]
        totals = torch.autograd.grad(edges, inputs[len(case.repeated) :], cotangents)
        for i, (total, right) in enumerate(zip(totals, exact, strict=True)):
            found[f"gradient of shared {i} by the last repetition"] = off_a_sum(total, right)
    return [f"{name} {text}" for name, text in found.items() if text]


def run_one(name: str, elements: int) -> Outcome:
    """In this process; prints what is wrong."""
    case, begin = CASES[name](), time.monotonic()
    failures = wrong(case, case.count(elements))
    seconds, peak = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    failures += [f"takes {peak >> 20} MiB"] if peak > MOST else []
    for failure in failures:
        print(f"{name} of more than {elements} elements: {failure}")
    return Outcome(name.replace(":", ""), 1, min(len(failures), 1), seconds, peak)


def available() -> int:
    """Bytes of memory that are free or can be freed."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def run_apart(name: str, elements: int) -> Outcome:
    """In a process of its own, once there is memory for it."""
    end = time.monotonic() + PATIENCE
    while available() < BYTES_AN_ELEMENT * elements:
        if time.monotonic() > end:
            print(f"{name}: no {BYTES_AN_ELEMENT * elements >> 30} GiB of memory in {PATIENCE} s")
            return Outcome(name, 1, 1)
        time.sleep(5)
    command = [sys.executable, "-m", "tests.reliability.huge", str(elements), "--case", name]
    env = {**os.environ, "SORA_KERNELS_CACHE_MB": "0"}  # what is freed is free
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    found = outcomes(done.stdout)
    outcome = found[0] if found else Outcome(name, 1, 1)
    print(f"{name}: {outcome.seconds or 0:.0f} s, {(outcome.memory or 0) >> 20} MiB, status {done.returncode}")
    # Not the child's outcome, which is one of those that the last line counts.
    print(LINE.sub("", done.stdout).lstrip("\n") + done.stderr, end="", flush=True)
    return outcome._replace(failed=1) if done.returncode else outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elements", type=int, help="the largest tensor of each case has more")
    parser.add_argument("--case", choices=CASES, help="this one alone")
    options = parser.parse_args()
    if options.case:
        outcome = run_one(options.case, options.elements)
        print(outcome)
        return outcome.failed
    every = [run_apart(name, options.elements) for name in CASES]
    seconds, memory = max(x.seconds or 0 for x in every), max(x.memory or 0 for x in every)
    failed = sum(x.failed for x in every)
    print(Outcome(NAME, len(every), failed, seconds, memory))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
