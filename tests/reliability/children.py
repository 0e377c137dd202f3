"""Runs cases in child processes, so that a crash, a hang or too much memory is one failure of one case and the rest goes on.

The parent has imported and recorded all that cases need, and forks a child for a batch of them. A child says which case it is
about to run, and what came of it. So the parent knows which case a child died in, and starts another one behind it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import resource
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .fork import fork
from .outcome import Outcome

SECONDS, MEMORY = 10.0, 1 << 30  # what one case may take
BATCH = 250  # cases of a child
ADDRESSES = 4 << 30  # what a child may map beyond the memory that it starts with: more is a MemoryError before the machine swaps
# What a case depends on besides our own variables.
VARIABLES = ("ASAN_OPTIONS", "LD_PRELOAD", "OMP_NUM_THREADS", "TSAN_OPTIONS", "UBSAN_OPTIONS")
SANITIZED = 1 << 40  # AddressSanitizer maps more than this, and cannot do with less


class Case(NamedTuple):
    """What is called, in words; and the call, which returns what is wrong or None."""

    text: str
    call: Callable[[], str | None]


class Result(NamedTuple):
    """seconds and memory (bytes) are None of a case that ended its child."""

    number: int
    wrong: str | None
    seconds: float | None
    memory: int | None


def memory_line(name: str) -> int:
    """Bytes, of a line of the process's status such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise ValueError(f"memory_line: name: expected a line of /proc/self/status, got {name!r}")


def measured(call: Callable[[], str | None]) -> tuple[str | None, float, int]:
    """What is wrong with a call, its seconds, and its peak of resident memory beyond what there was before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was free already would not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory_line("VmRSS"), time.perf_counter()
    wrong = call()
    seconds = time.perf_counter() - start
    memory = memory_line("VmHWM") - before
    if wrong is None and seconds > SECONDS:
        wrong = f"took {seconds:.1f} s"
    if wrong is None and memory > MEMORY:
        wrong = f"took {memory >> 20} MiB"
    return wrong, seconds, memory


def work(numbers: Sequence[int], prepare: Callable[[int], Case], pipe: int) -> None:
    """The child: lines of [number, text] before and [number, wrong, seconds, memory] behind each case."""
    faulthandler.enable(sys.__stderr__)
    torch.set_printoptions(threshold=1, edgeitems=1)  # complaints about types print all arguments
    mapped = memory_line("VmSize")
    if mapped < SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, mapped + ADDRESSES))
    for number in numbers:
        torch.set_num_threads(1 + number // BATCH % 2)
        case = prepare(number)
        os.write(pipe, json.dumps([number, case.text[:8000]]).encode() + b"\n")
        wrong, seconds, memory = measured(case.call)
        os.write(pipe, json.dumps([number, wrong and wrong[:4000], seconds, memory]).encode() + b"\n")


class Child:
    """A child and the lines that it has written."""

    def __init__(self, numbers: Sequence[int], prepare: Callable[[int], Case]) -> None:
        self.pipe, writing = os.pipe()
        self.rest = b""
        self.process = fork(lambda: work(numbers, prepare, writing))
        os.close(writing)

    def line(self) -> list | None:
        """The next one; None at the end. TimeoutError if there is none in time."""
        until = time.monotonic() + SECONDS + 2  # a call that took too long and ended is measured by the child
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.pipe], [], [], max(until - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            data = os.read(self.pipe, 1 << 16)
            if not data:
                return None
            self.rest += data
        first, self.rest = self.rest.split(b"\n", 1)
        return json.loads(first)

    def end(self) -> str:
        """How it ended."""
        os.close(self.pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def run_batch(numbers: Sequence[int], prepare: Callable[[int], Case], failed: Callable[[int, str, str], None]) -> list[Result]:
    """The results of as many cases as one child could run: all but those behind the one that ended it."""
    child, results = Child(numbers, prepare), list[Result]()
    text = "preparing it"
    try:
        while (line := child.line()) is not None:
            if len(line) == 2:
                text = line[1]
                continue
            results.append(Result(*line))
            if results[-1].wrong:
                failed(results[-1].number, text, results[-1].wrong)
            text = "preparing it"
        end = child.end()
    except TimeoutError:
        os.kill(child.process, signal.SIGKILL)
        child.end()
        end = f"no end after {SECONDS:.0f} s"
    if len(results) < len(numbers):
        number = numbers[len(results)]
        results.append(Result(number, end, None, None))
        failed(number, text, end)
    return results


def again(module: str, *arguments: str) -> str:
    """A shell command that runs a module where and as this process runs, but for what does not change a case."""
    names = [name for name in sorted(os.environ) if name.startswith("SORA_KERNELS_") or name in VARIABLES]
    assigned = [f"{name}={shlex.quote(os.environ[name])}" for name in names]
    return " ".join(["cd", shlex.quote(os.getcwd()), "&&", *assigned, shlex.quote(sys.executable), "-m", module, *arguments])


def run(name: str, numbers: Sequence[int], prepare: Callable[[int], Case], hint: str = "") -> Outcome:
    """Runs cases by their numbers, prints every failure and how to repeat it, and returns what came of all."""
    gc.collect()
    gc.freeze()  # a child that collects the parent's objects would copy their pages
    results: list[Result] = []

    def failed(number: int, text: str, wrong: str) -> None:
        print(f"case {number}: {text}: {wrong}\n  alone: {hint} --only {number}", flush=True)

    while len(results) < len(numbers):
        results += run_batch(numbers[len(results) : len(results) + BATCH], prepare, failed)
    return Outcome(
        name,
        len(results),
        sum(result.wrong is not None for result in results),
        max((result.seconds or 0.0 for result in results), default=0.0),
        max((result.memory or 0 for result in results), default=0),
    )
