"""Attacks the packages, and writes what was found: python -m tests.reliability [TARGET ...]

Each target of the Makefile that attacks something is run, all of them or those named, and each outcome that it prints becomes a
row of docs/reliability.json at once. docs/reliability.md is that file as a table. Rows of targets that are not run stay.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.reliability.outcome import Outcome, outcomes

ROOT = Path(__file__).resolve().parents[2]
JSON, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
# In the order of the page: what attacks what, and what a case is.
TARGETS = {
    "property": "Random layouts, masks, windows and dtypes: what holds for every op, forward and backward",
    "fuzz-calls": "Wrong calls, under AddressSanitizer and UndefinedBehaviorSanitizer",
    "fuzz-files": "Damaged and malicious files, prompts and paths",
    "crashes": "Saves that are killed, lose power or find the disk full, at every system call",
    "races": "The CPU kernels under ThreadSanitizer",
    "soak": "Hours of changing batches, in threads and forks",
    "huge": "Tensors of more than 2^31 elements",
    "floors": "The lowest versions that are declared",
    "sdist-test": "The source distribution, unpacked elsewhere",
}
VERSIONS = ("torch", "triton")


class Row(NamedTuple):
    """One kind of case of one target; what several processes print under one name is summed."""

    target: str
    outcome: Outcome
    took: float  # seconds of all cases
    versions: str
    where: str

    def plus(self, other: Row) -> Row:
        a, b = self.outcome, other.outcome
        seconds = [one for one in (a.seconds, b.seconds) if one is not None]
        memory = [one for one in (a.memory, b.memory) if one is not None]
        both = Outcome(a.name, a.cases + b.cases, a.failed + b.failed, max(seconds, default=None), max(memory, default=None))
        return self._replace(outcome=both, took=self.took + other.took)


def versions() -> str:
    """Of Python, then of VERSIONS."""
    return " / ".join([platform.python_version(), *map(importlib.metadata.version, VERSIONS)])


def where() -> str:
    """The processor, the commit and the day."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()}, {commit.stdout.strip() or 'no commit'}, {datetime.date.today()}"


def attacked(target: str, command: list[str]) -> Iterator[Row]:
    """Runs a command, shows what it prints, and yields its outcomes; one that fails without one is an outcome too."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    began, failed = time.perf_counter(), False
    for line in process.stdout:
        print(line, end="", flush=True)
        for outcome in outcomes(line):
            now = time.perf_counter()
            yield Row(target, outcome, now - began, versions(), where())
            began, failed = now, failed or outcome.failed > 0
    if process.wait() != 0 and not failed:
        name = f"{target}: ended with status {process.returncode}"
        yield Row(target, Outcome(name.replace(":", ","), 1, 1), time.perf_counter() - began, versions(), where())


def summed(rows: list[Row]) -> list[Row]:
    by_name: dict[str, Row] = {}
    for row in rows:
        before = by_name.get(row.outcome.name)
        by_name[row.outcome.name] = before.plus(row) if before else row
    return list(by_name.values())


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [Row(**{**row, "outcome": Outcome(**row["outcome"])}) for row in json.loads(path.read_text())]


def written(rows: list[Row]) -> str:
    return json.dumps([{**row._asdict(), "outcome": row.outcome._asdict()} for row in rows], indent=1) + "\n"


def page(rows: list[Row]) -> str:
    """docs/reliability.md."""
    lines = [
        "# Reliability",
        "",
        "`make reliability` attacks the packages and writes this page. `make` and a name of the first column repeats a part of it.",
        "Each failing case is printed with what repeats it alone. [security.md](security.md) says what is promised, and to whom.",
        "",
        "| target | cases of | cases | failures | seconds | longest case | most memory of a case | Python / torch / Triton |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        o = row.outcome
        longest = "" if o.seconds is None else f"{o.seconds:.1f} s"
        memory = "" if o.memory is None else f"{o.memory >> 20} MiB"
        lines.append(
            f"| {row.target} | {o.name} | {o.cases:,} | {o.failed:,} | {row.took:,.0f} | {longest} | {memory} | {row.versions} |"
        )
    lines += ["", "What the targets do:", "", "| target | |", "|---|---|"]
    lines += [f"| {name} | {what} |" for name, what in TARGETS.items()]
    missing = [name for name in TARGETS if name not in {row.target for row in rows}]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    lines += ["", "Run on:", ""]
    lines += [f"- {place}: {', '.join(dict.fromkeys(r.target for r in rows if r.where == place))}" for place in places(rows)]
    return "\n".join(lines) + "\n"


def places(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.where for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default all")
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"TARGET: expected some of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    failed = 0
    for target in options.targets or TARGETS:
        rows: list[Row] = []
        for row in attacked(target, ["make", "--no-print-directory", target]):
            rows = summed([*rows, row])
            kept = [one for one in read(JSON) if one.target != target]
            order = list(TARGETS)
            everything = sorted([*kept, *rows], key=lambda one: order.index(one.target))
            JSON.write_text(written(everything))
            PAGE.write_text(page(everything))
        failed += sum(row.outcome.failed for row in rows)
    print(f"{PAGE.relative_to(ROOT)}: {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
