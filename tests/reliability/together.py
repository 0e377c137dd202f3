"""Ops called by several Python threads at once, and in children of a process with such threads."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import signal
import threading
import time
from dataclasses import replace

import torch
from tolerance import threads
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.works import Work
from sora_kernels import backends, memory
from sora_kernels.bias_gelu import bias_gelu

from .fork import fork
from .outcome import Outcome
from .random_works import results, same, works_of
from .resources import Usage, drifted, reported, usage

THREADS = 4  # of Python
OPENMP = 3  # of each of them, where it runs a kernel
LAYOUTS = 6
CHILD_LIMIT, HANGS = 60, 600  # seconds


class Known:
    """Works and the bits that one thread alone gets."""

    def __init__(self, seed: int) -> None:
        # Not those of no CPU kernel: a thread may force the backend "cpu", for all of them.
        works = [work for step in range(LAYOUTS) for work in works_of(seed, step) if work.op != "int8_attention"]
        large = torch.ones(1, 1).expand(memory.LARGE // 4, 1)
        works.append(Work("bias_gelu of a large output", "token", len(large), 0, 0, lambda x: bias_gelu(x, None), [large]))
        self.cases: list[tuple[Work, list[Tensor]]] = [(work, results(work)) for work in works]

    def wrong(self, chance: random.Random) -> str | None:
        """Runs one of them, on leaves of its own: threads that share one may hang in PyTorch itself (docs/kernels.md)."""
        work, expected = chance.choice(self.cases)
        work = replace(work, inputs=[x.detach().requires_grad_(x.requires_grad) for x in work.inputs])
        return None if same(results(work), expected) else f"{work.op} of {[list(x.shape) for x in work.inputs]} has other bits"


class Callers:
    """Threads that run known works until they are stopped, some of them where a backend is forced or calls are recorded."""

    def __init__(self, known: Known, name: str) -> None:
        self.known, self.calls, self.failures = known, 0, list[str]()
        self._stopping, self._lock = threading.Event(), threading.Lock()
        names = [f"{name} {i}" for i in range(THREADS)]
        self._threads = [threading.Thread(target=self._call, args=(one,), name=one, daemon=True) for one in names]

    def _call(self, name: str) -> None:
        chance, calls = random.Random(name), 0
        failures: list[str] = []
        while not self._stopping.is_set():
            try:
                problem = self._wrong(chance)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            calls += 1
            failures += [f"thread {name}, call {calls}: {problem}"] if problem else []
        with self._lock:
            self.calls += calls
            self.failures += failures

    def _wrong(self, chance: random.Random) -> str | None:
        forced = backends.use_backend("cpu") if chance.random() < 0.3 else contextlib.nullcontext()
        with forced, backends.record() if chance.random() < 0.3 else contextlib.nullcontext([("", "")]) as recorded:
            problem = self.known.wrong(chance)
        if not recorded or {backend for _, backend in recorded} - {"", "cpu"}:
            problem = problem or f"recorded {recorded}"
        return problem

    def __enter__(self) -> Callers:
        # A thread that hangs with Python's lock lets no other one say so: this ends the process, with all stacks and status 1.
        faulthandler.dump_traceback_later(HANGS, exit=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopping.set()
        until = time.monotonic() + CHILD_LIMIT
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            self.failures += [f"thread {thread.name} hangs"] if thread.is_alive() else []
        faulthandler.cancel_dump_traceback_later()
        if backends.forced_backend() not in (None, os.environ.get("SORA_KERNELS_BACKEND")):
            self.failures.append(f"backend {backends.forced_backend()} is still forced")


def soak_threads(seconds: float, seed: int) -> Outcome:
    """Rounds of new threads: what one leaves behind adds up."""
    known, calls = Known(seed), 0
    failures: list[str] = []
    used: list[Usage] = []
    end = time.monotonic() + seconds
    with threads(OPENMP):
        while time.monotonic() < end or len(used) < 2:
            with Callers(known, f"{seed} {len(used)}") as callers:
                time.sleep(min(1.0, seconds / 10))
            calls += callers.calls
            failures += callers.failures
            used.append(usage())
            if any("hangs" in failure for failure in failures):
                break
    failures += drifted("threads", used, "held")
    return reported(Outcome("soak, threads", calls, len(failures), memory=max(x.resident for x in used)), failures)


class Children(Dataset):
    """Whether a call in a worker has the bits of the parent's."""

    def __init__(self, known: Known, seed: str) -> None:
        self.known, self.seed = known, seed

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> str:
        return self.known.wrong(random.Random(f"{self.seed} {index}")) or ""


def forked(known: Known, name: str, limit: float = CHILD_LIMIT) -> str | None:
    """What is wrong in a child that runs some works and in its own child. limit: seconds, after which it is killed."""

    def run() -> bool:
        chance = random.Random(name)
        problems = [known.wrong(chance) for _ in range(4)]
        if chance.random() < 0.2:
            # Its clock must end first: a child that is killed while it waits would leave one that hangs behind.
            problems.append(forked(known, f"{name} and its child", limit / 2))
        for problem in filter(None, problems):
            print(f"{name}: {problem}")
        # Of other threads' contexts nothing is left.
        return any(problems) or backends.forced_backend() is not None

    child = fork(run)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return None if status == 0 else f"{name} ended with status {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"{name} hangs"


def soak_forks(seconds: float, seed: int) -> Outcome:
    known, children = Known(seed), 0
    failures: list[str] = []
    used: list[Usage] = []
    end = time.monotonic() + seconds
    with threads(OPENMP):
        while time.monotonic() < end or len(used) < 2:
            name = f"seed {seed}, child {children}"
            with Callers(known, name) as callers:
                # Of a process whose other threads are in the middle of anything; a few at once, as starting them takes time, too.
                problems = [forked(known, f"{name}.{i}") for i in range(4)]
            alone = forked(known, f"{name}.4")  # of one whose threads have ended
            workers = DataLoader(Children(known, name), batch_size=None, num_workers=2, timeout=CHILD_LIMIT)
            try:
                found = [f"{name}: worker: {problem}" for problem in workers if problem]
            except RuntimeError as error:  # one that hangs or died
                found = [f"{name}: worker hangs or died: {error}"]
            failures += [*callers.failures, *filter(None, [*problems, alone]), *found]
            children += 7
            for thread in set(threading.enumerate()) - {threading.main_thread()}:
                thread.join(CHILD_LIMIT)  # those that fed the queues of workers end in their own time
            used.append(usage())
            if any("hangs" in failure for failure in failures):
                break
    failures += drifted("forks", used, "held")
    return reported(Outcome("soak, forks", children, len(failures), memory=max(x.resident for x in used)), failures)
