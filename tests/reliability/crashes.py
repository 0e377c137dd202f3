"""Saves that are interrupted at every system call: python -m tests.reliability.crashes [COUNT] [--seed S]

For every call that changes something below the folder that is written to, and every way in which it can go wrong, a process of its
own is killed there, or its disk fails from there on. After a kill, a loss of power is worked out too (see disk.py). Then the last
good state must still be there, the run must go on as if nothing had happened, and nothing may be left over.

COUNT: how many calls are drawn at random; default: all of them. --only NAME: one save. --at N --fault FAULT: one case of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .children import again
from .disk import LOSSES, Disk, read_journal
from .fork import FAILED
from .interposed import Ended, Fault, Interposed, emptied, in_child
from .outcome import Outcome

KILLED, POWER, DISK = "crash points of a save", "power losses", "full disk, read-only, I/O errors"
FAULTS = [fault for fault in Fault if fault is not Fault.nothing]
Files = dict[str, bytes | None]  # of a folder, by path; None: a folder


class Case(NamedTuple):
    save: str
    at: int
    fault: Fault


class Checked(NamedTuple):
    """kind: the outcome that it counts for. problem: what was found, or None."""

    kind: str
    seconds: float
    problem: str | None


class Crashes:
    """All saves, each prepared once, in a folder `work`."""

    def __init__(self, work: Path) -> None:
        from . import saves

        saves.deterministic()
        self.work, self.saves, self.interposed = work, saves.SAVES, Interposed()
        self.shared = saves.prepare(work)
        self.root, self.spare, self.log = work / "case" / "root", work / "case" / "spare", work / "log"
        self._seen: dict[tuple[str, bool, str], str | None] = {}  # what was found in states that were looked at before
        saves.done(saves.train(work / "first", self.shared.small, 1))  # here, so that children find everything imported

    def _must(self, ended: Ended) -> None:
        if ended.status:
            raise RuntimeError(f"preparation failed ({ended.status}):\n{ended.output}")

    def prepare(self, name: str) -> int:
        """Prepares a save; returns how many calls it has."""
        emptied(self.root)
        self._must(in_child(lambda: self.saves[name].prepare(self.shared, self.root), self.log))
        shutil.copytree(self.root, self.base(name), symlinks=True)
        self._must(self._act(Case(name, 0, Fault.nothing)))
        return int((self.spare / "count").read_text())

    def base(self, name: str) -> Path:
        return self.work / "bases" / name

    def _act(self, case: Case) -> Ended:
        """Writes with the fault, in a folder that is as it was."""
        shutil.rmtree(self.root.parent, ignore_errors=True)
        shutil.copytree(self.base(case.save), self.root, symlinks=True)

        def act() -> int:
            self.interposed.arm(self.root, self.spare, case.at, case.fault)
            result = self.saves[case.save].act(self.shared, self.root)
            count = self.interposed.disarm()
            (self.spare / "count").write_text(str(count))
            if result is not None:
                print(result.output)
            return 0 if result is None else result.exit_code

        return in_child(act, self.log)

    def check(self, case: Case, last: int) -> Iterable[Checked]:
        """last: how many calls the save has; the point behind it is its end."""
        began = time.perf_counter()
        ended = self._act(case)
        if case.fault is not Fault.killed:
            complete = ended.status == 0  # what says that it has saved has
            problem = self._failed_well(case, ended) or self._recovered(case.save, contents(self.root), complete)
            yield Checked(DISK, time.perf_counter() - began, problem)
            return
        complete = case.at > last
        if ended.status != (0 if complete else -9):
            yield Checked(KILLED, time.perf_counter() - began, f"status {ended.status}: {ended.output}")
            return
        calls = read_journal(self.spare / "journal")
        found = contents(self.root)
        disk = Disk(self.base(case.save), self.root, self.spare / "kept")
        for call in calls:
            disk.follow(call)
        lost = {loss: dict(disk.left(loss)) for loss in LOSSES}
        problem = self._recovered(case.save, found, complete)
        yield Checked(KILLED, time.perf_counter() - began, problem)
        for loss, files in lost.items():
            began = time.perf_counter()
            problem = self._recovered(case.save, files, complete)
            yield Checked(POWER, time.perf_counter() - began, problem and f"{loss}: {problem}")

    def _failed_well(self, case: Case, ended: Ended) -> str | None:
        """What is wrong with how a command ended whose disk failed."""
        harmless = case.fault in (Fault.interrupted, Fault.short_writes)
        if ended.status == 0:
            return None  # it was clearing up by then, or it went on
        if harmless:
            return f"status {ended.status}, expected 0: {ended.output}"
        if not self.saves[case.save].command:
            raised = ended.status == FAILED and "WriteError: cannot write" in ended.output
            return None if raised else f"status {ended.status}, expected a WriteError: {ended.output}"
        lines = [line for line in ended.output.splitlines() if "error: " in line]
        if ended.status != 2 or len(lines) != 1 or "Traceback" in ended.output:
            return f"status {ended.status}, expected 2 and one line: {ended.output}"
        return None

    def _recovered(self, name: str, files: Files, complete: bool) -> str | None:
        """What is wrong with what is left, after trying to go on from it. The same state is tried once."""
        key = name, complete, digest(files)
        if key not in self._seen:
            write(files, emptied(self.root))
            ended = in_child(lambda: self.saves[name].recover(self.shared, self.root, complete), self.log)
            self._seen[key] = None if ended.status == 0 else f"going on from it ends with status {ended.status}: {ended.output}"
        return self._seen[key]


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in sorted(folder.rglob("*"))}


def write(files: Files, folder: Path) -> None:
    for path, data in sorted(files.items()):
        (folder / path).mkdir(parents=True) if data is None else (folder / path).write_bytes(data)


def digest(files: Files) -> str:
    """Equal for states that differ in random names only."""
    total = hashlib.sha256()
    named = ((re.sub(r"\.\w{8}\.part|\.tmp\w{6}|tfevents\.\d+\.\w+\.\d+", ".x", path), data) for path, data in files.items())
    for path, data in sorted(named, key=lambda one: one[0]):
        total.update(repr((path, data if data is None else hashlib.sha256(data).digest())).encode())
    return total.hexdigest()


def points_of(fault: Fault, count: int) -> Iterable[int]:
    """Where a save of so many calls is interrupted; the point behind the last one is its end."""
    if fault in (Fault.interrupted, Fault.short_writes):  # which go on to the end, at every call or every other one
        return range(1, 4)
    return range(1, count + 1 + (fault is Fault.killed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", help="cases, spread over saves, calls and faults; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="SAVE", help="this save alone; the first line of a run names all")
    parser.add_argument("--at", type=int, help="the call of this number of it alone, from 1")
    parser.add_argument("--fault", choices=[one.name for one in FAULTS], help="this one alone")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    options = parser.parse_args()
    totals: dict[str, list[Checked]] = {KILLED: [], POWER: [], DISK: []}
    memory = Path("/dev/shm")  # a loss of power is worked out, so no disk needs to be waited for
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as work:
        crashes = Crashes(Path(work).resolve())
        if options.only not in (None, *crashes.saves):
            parser.error(f"--only: expected one of {', '.join(crashes.saves)}, got {options.only!r}")
        names = [options.only] if options.only else list(crashes.saves)
        points = {name: crashes.prepare(name) for name in names}
        print(", ".join(f"{name}: {count} calls" for name, count in points.items()), flush=True)
        cases = [
            Case(name, at, fault)
            for name, count in points.items()
            for fault in ([Fault[options.fault]] if options.fault else FAULTS)
            for at in ([options.at] if options.at is not None else points_of(fault, count))
        ]
        if options.count is not None:
            cases = sorted(random.Random(options.seed).sample(cases, min(options.count, len(cases))))
        alone = again("tests.reliability.crashes")
        for case in cases:
            for checked in crashes.check(case, points[case.save]):
                totals[checked.kind].append(checked)
                if checked.problem is not None:
                    one = f"--only '{case.save}' --at {case.at} --fault {case.fault.name}"
                    print(f"FAILED: {alone} {one}: {checked.problem}", flush=True)
                elif options.verbose:
                    print(case, f"{checked.seconds:.2f} s", flush=True)
    for kind, found in totals.items():
        failed = sum(one.problem is not None for one in found)
        print(Outcome(kind, len(found), failed, max((one.seconds for one in found), default=0.0)), flush=True)
    return int(any(one.problem is not None for found in totals.values() for one in found))


if __name__ == "__main__":
    sys.exit(main())
