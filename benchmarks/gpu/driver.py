"""Runs stages of processes, any of which may raise, hang or crash, within a limit of seconds, and loses nothing that was reported.

Each process is a session of its own, so that SIGKILL ends it with all that it started. It is sent at the process's deadline, or
when one item takes too long. A process that a crash or a long item ended is started again and goes on with the next item.

All that a process prints is read as it comes: rows go to rows.jsonl, the rest to its stage's log, and both are on the disk at once.
A disk that is full costs the files, not the run: rows are kept for the table as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import rows

ROOT = Path(__file__).parents[2]
LARGEST = 15 << 20  # bytes of one file
RESTARTS = 6
LONGEST_LINE = 1 << 20  # bytes
MOST_ROWS = 4 << 20  # bytes of one task's, so that the others' have room
CHUNKS = 16  # of 64 KiB, read from one process before it is the next one's turn
# What a shell may have set that would make another run of it.
UNWANTED = ("TRITON_INTERPRET", "SORA_KERNELS_BACKEND", "SORA_KERNELS_ISA", "PYTEST_ADDOPTS")
SIGNALS = {number.value: number.name for number in signal.Signals}
NO_TESTS = 5  # pytest's status where the test that crashed was the last
DYING = 3.0  # seconds that a process has to end once it is killed; one that hangs in its driver is left behind
LEAST = 3.0  # seconds, without which nothing is started
SHORTEST = 15.0  # seconds of a stage in a short run


@dataclass(frozen=True)
class Task:
    """What a process runs.

    Args:
        seconds: its deadline, of its stage's time.
        item_seconds: how long one of its items may take before it is taken for hung.
        needs: programs that must be there; without one the task is skipped.
    """

    name: str
    command: Sequence[str | Path]
    seconds: float
    item_seconds: float = 60.0
    environment: dict[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()


@dataclass(frozen=True)
class Stage:
    """Tasks that run at once.

    Args:
        seconds: of all of them; what is not used is left for later stages.
        log: the file of their output, which stages may share.
    """

    name: str
    seconds: float
    log: str
    tasks: Sequence[Task]


class Files:
    """The files of a run: rows.jsonl and logs, appended to at once, none larger than LARGEST."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, IO[bytes]] = {}
        self.sizes: Counter[str] = Counter()
        self.complaints: set[str] = set()

    def append(self, name: str, text: str) -> None:
        data = text.encode(errors="replace")
        if self.sizes[name] + len(data) > LARGEST:
            self.complain(f"{name} is as large as it may be")
            return
        try:
            if name not in self.open:
                self.open[name] = open(self.folder / name, "ab", buffering=0)  # noqa: SIM115
            self.open[name].write(data)
        except OSError as error:
            self.complain(f"{name}: {error.strerror}")
        else:
            self.sizes[name] += len(data)

    def complain(self, reason: str) -> None:
        """Once, and the run goes on."""
        if reason not in self.complaints:
            self.complaints.add(reason)
            say(f"not written: {reason}")


class Process:
    """A task that runs, and what became of it."""

    def __init__(self, task: Task, deadline: float, stage: Stage, run: Run) -> None:
        self.task, self.stage, self.run = task, stage, run
        self.deadline = deadline
        self.item: str | None = None
        self.next_item = 0
        self.restarts = 0
        self.troubles: list[str] = []  # what ended it early
        self.errors: list[str] = []  # of its items
        self.partial, self.last_line, self.reported = b"", "", 0
        self.began = time.monotonic()
        self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
        environment |= {"PYTHONUNBUFFERED": "1", **self.task.environment, rows.FIRST: str(self.next_item)}
        self.item_began, self.killed, self.hung, self.tests_failed = time.monotonic(), 0.0, False, False
        self.popen = subprocess.Popen(
            [str(word) for word in self.task.command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent, cwd=ROOT,
        )  # fmt: skip
        assert self.popen.stdout is not None
        self.pipe = self.popen.stdout.fileno()
        os.set_blocking(self.pipe, False)

    def read(self) -> None:
        """What has come, but not for ever: others wait, and there are deadlines."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(CHUNKS):
                if not (data := os.read(self.pipe, 1 << 16)):
                    break
                *lines, self.partial = (self.partial + data).split(b"\n")
                if len(self.partial) > LONGEST_LINE:
                    lines, self.partial = [*lines, self.partial], b""
                for line in lines:
                    self.line(line.decode(errors="replace"))

    def line(self, line: str) -> None:
        text, row = rows.parsed(line)
        if text.strip():
            self.last_line = text
            self.run.log(self.stage, self.task, text)
        if row is None:
            return
        if isinstance(begun := row.get("begin"), int) and begun >= self.next_item:
            self.item, self.next_item, self.item_began = str(row.get("item")), begun + 1, time.monotonic()
        self.reported += len(line)
        if self.reported > MOST_ROWS:
            if self.reported - len(line) <= MOST_ROWS:
                self.troubles.append(f"more than {MOST_ROWS >> 20} MiB of rows, of which the rest is not kept")
            return
        if "skipped" in row:
            self.troubles.append(f"skipped: {row['skipped']}")
        elif "error" in row or row.get("ok", True) is not True or row.get("outcome") == "failed":
            name = row.get("check") or row.get("test") or row.get("item")
            self.errors.append(f"{name}: {row.get('error') or row.get('reason') or row.get('errors')}"[:300])
            self.tests_failed |= "test" in row
        self.run.add({"stage": self.stage.name, "task": self.task.name, **row})

    def poll(self) -> bool:
        """Reads, kills what is late, starts again what crashed; whether it still runs."""
        self.read()
        status, now = self.popen.poll(), time.monotonic()
        if status is None and not self.killed:
            self.hung = self.item is not None and now - self.item_began > self.task.item_seconds
            if now < self.deadline and not self.hung:
                return True
            self.kill()
            self.killed = now
        if status is None and now - self.killed < DYING:
            return True
        self.kill()  # what it started
        self.read()
        if self.partial:
            self.line(self.partial.decode(errors="replace"))
            self.partial = b""
        if self.killed:
            self.lost("hung" if self.hung else "cut", f"{'hung' if self.hung else 'out of time'} after {now - self.began:.0f} s")
            return self.hung and self.again()
        if status == 0 or (status == 1 and self.tests_failed) or (status == NO_TESTS and self.restarts):
            return False
        crashed = status < 0 or status == rows.FAILED_GPU
        if crashed:
            self.lost("crashed", SIGNALS.get(-status, f"signal {-status}") if status < 0 else "its GPU failed")
        else:
            self.lost("crashed", f"exit {status}: {self.last_line.strip()[:200]}".removesuffix(": "))
        return crashed and self.again()

    def lost(self, how: str, reason: str) -> None:
        """It ended before its last item: cut by its deadline, hung or crashed."""
        reason += f" in {self.item}" if self.item else ""
        self.troubles.append(reason)
        self.run.add({"stage": self.stage.name, "task": self.task.name, how: reason})

    def outcome(self) -> str:
        failed = [f"{len(self.errors)} failed, first {self.errors[0]}"] if self.errors else []
        return "; ".join([*self.troubles, *failed]) or "done"

    def again(self) -> bool:
        """Starts it once more, behind the item that ended it, if there was one and time is left."""
        if self.item is None or self.deadline - time.monotonic() < LEAST:
            return False
        if self.restarts == RESTARTS:
            self.troubles.append("given up")
            return False
        self.restarts += 1
        self.item = None
        self.close()
        self.start()
        return True

    def close(self) -> None:
        if self.popen.stdout is not None:
            self.popen.stdout.close()

    def kill(self) -> None:
        """It and what it started, in whatever process groups; waits for nothing."""
        for _ in range(3):  # what is killed may just be starting another
            found = _session(self.popen.pid)
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not found:
                break


def _session(leader: int) -> list[int]:
    """The processes of a session that live."""
    found = []
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(entry.name)
            state, _, _, session = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()[:4]
            if int(session) == leader and state != b"Z":
                found.append(pid)
    return found


def _die_with_parent() -> None:
    """A killed driver takes the processes that it started along (Linux), but not theirs."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Run:
    """Stages in order, within `seconds` from its making; `scale` is what stages get of the seconds that they ask for."""

    def __init__(self, folder: Path, seconds: float, scale: float = 1.0) -> None:
        self.files, self.start, self.seconds, self.scale = Files(folder), time.monotonic(), seconds, scale
        self.rows: list[dict[str, Any]] = []
        self.outcomes: list[str] = []
        self._last: dict[str, str] = {}

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def scaled(self, seconds: float) -> float:
        """Not less than a process needs to begin."""
        return max(self.scale * seconds, min(seconds, SHORTEST))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.files.append("rows.jsonl", json.dumps(row) + "\n")

    def log(self, stage: Stage, task: Task, text: str) -> None:
        """Lines of several processes share a file; a head says whose they are, as tail -f does."""
        if self._last.get(stage.log) != task.name:
            self.files.append(stage.log, f"==> {stage.name}, {task.name} <==\n")
            self._last[stage.log] = task.name
        self.files.append(stage.log, text + "\n")

    def stage(self, stage: Stage, reserved: float = 0.0) -> None:
        """Runs it, leaving the reserved seconds for what comes after all stages."""
        end = time.monotonic() + min(self.scaled(stage.seconds), self.left() - reserved)
        processes: list[Process] = []
        with ended(processes):
            for task in stage.tasks:
                if reason := self.why_not(task, end):
                    self.report(stage, task, f"skipped: {reason}")
                    continue
                deadline = min(end, time.monotonic() + self.scaled(task.seconds))
                try:
                    processes.append(Process(task, deadline, stage, self))
                except (OSError, subprocess.SubprocessError) as error:  # no memory left, or no such program
                    self.report(stage, task, f"not started: {error}")
            self.wait(stage, processes)

    def why_not(self, task: Task, end: float) -> str | None:
        if end - time.monotonic() < LEAST:
            return "no time left"
        missing = [program for program in task.needs if shutil.which(program) is None]
        return f"no {missing[0]} on the PATH" if missing else None

    def wait(self, stage: Stage, processes: list[Process]) -> None:
        running = list(processes)
        while running:
            with selectors.DefaultSelector() as selector:
                for process in running:
                    selector.register(process.pipe, selectors.EVENT_READ)
                selector.select(0.2)
            time.sleep(0.02)  # a process that has ended leaves its pipe readable until it is waited for
            for process in [process for process in running if not self.still_runs(process)]:
                running.remove(process)
                self.report(stage, process.task, process.outcome(), time.monotonic() - process.began)

    def still_runs(self, process: Process) -> bool:
        try:
            return process.poll()
        except Exception as error:  # a fault here, or no memory for another start, must not cost its neighbours
            process.kill()
            process.troubles.append(rows.one_line(error))
            return False

    def report(self, stage: Stage, task: Task, outcome: str, seconds: float = 0.0) -> None:
        outcome = "".join(c if c.isprintable() else " " for c in outcome)
        line = f"{stage.name}, {task.name}: {outcome}" + (f" ({seconds:.0f} s)" if seconds else "")
        self.outcomes.append(line)
        say(line)
        self.add({"stage": stage.name, "task": task.name, "result": outcome, "seconds": round(seconds, 1)})


def say(text: str) -> None:
    """On the standard output, if there still is one, whatever it can write."""
    with contextlib.suppress(OSError, ValueError):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


@contextlib.contextmanager
def ended(processes: list[Process]) -> Iterator[None]:
    """However this is left, none of the processes goes on."""
    try:
        yield
    finally:
        for process in processes:
            if process.popen.returncode is None:
                process.kill()
            process.close()
