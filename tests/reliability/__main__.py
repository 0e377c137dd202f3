"""Attacks the packages, and writes what was found: python -m tests.reliability [TARGET ...]

Each target of the Makefile that attacks something is run, all of them or those named. When it has ended, the outcomes that it
printed take the place of its earlier ones in docs/reliability.json; docs/reliability.md is that file as a table.
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
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.reliability.outcome import Outcome, outcomes

ROOT = Path(__file__).resolve().parents[2]
JSON, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"


class Target(NamedTuple):
    """What attacks what, and the outcomes that it must print: a part that dies in silence is a failure."""

    what: str
    outcomes: tuple[str, ...]


TARGETS = {  # in the order of the page
    "property": Target(
        "Random layouts, masks, windows and dtypes, forward and backward. Results are within twice plain PyTorch's error "
        "(accuracy). Samples are what each is alone (packed), in any order (permuted). Rows of no sample (slack) and samples "
        "without tokens (blank) change nothing, whatever they hold. NaN and infinity in one sample change no bit of the others "
        "(poisoned). NaNs of any bits act alike (nans). Threads (threaded) and strides (strided) change nothing",
        ("accuracy", "packed", "permuted", "slack", "blank", "poisoned", "nans", "threaded", "strided", "attention of any lengths"),
    ),
    "fuzz-calls": Target(
        "Wrong calls, under AddressSanitizer and UndefinedBehaviorSanitizer",
        ("compiled entries of _cpu", "public functions", "compiled entries of _cuda", "DLPack decoding"),
    ),
    "fuzz-files": Target(
        "Damaged and malicious files, prompts and paths", ("media files", "checkpoints", "batch files, prompts and paths")
    ),
    "crashes": Target(
        "Saves that are killed, lose power or find the disk full, at every system call",
        ("crash points of a save", "power losses", "full disk, read-only, I/O errors"),
    ),
    "races": Target("The CPU kernels under ThreadSanitizer", ("data races (ThreadSanitizer)",)),
    "soak": Target("Hours of changing batches, in threads and forks", ("soak, steps", "soak, threads", "soak, forks")),
    "huge": Target("Tensors of more than 2^31 elements", ("numel beyond 2**31",)),
    "floors": Target("The lowest versions that are declared", ("lowest versions",)),
    "sdist-test": Target("The source distribution, unpacked elsewhere", ("files and commands of the sdist", "tests of the sdist")),
}
VERSIONS = ("torch", "triton")


class Run(NamedTuple):
    """Of a target, and what it printed. took: seconds."""

    target: str
    outcomes: list[Outcome]
    took: float
    versions: str
    where: str

    @property
    def failed(self) -> int:
        return sum(outcome.failed for outcome in self.outcomes)


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


def attacked(target: str, command: list[str], versions: str, where: str) -> Run:
    """Runs a command, shows what it prints, and keeps its outcomes; to end badly or not to report a part is a failure, too."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    found: list[Outcome] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        found += outcomes(line)
    status = process.wait()
    found = [one if one.cases else one._replace(failed=1) for one in summed(found)]
    reported = {one.name for one in found}
    found += [Outcome(f"{name}, which reported nothing", 1, 1) for name in TARGETS[target].outcomes if name not in reported]
    if status and not any(one.failed for one in found):
        found.append(Outcome(f"{target}, which ended with status {status}", 1, 1))
    return Run(target, found, time.perf_counter() - began, versions, where)


def summed(found: Iterable[Outcome]) -> list[Outcome]:
    """What several processes print under one name, as one."""
    by_name: dict[str, Outcome] = {}
    for one in found:
        by_name[one.name] = one.plus(by_name[one.name]) if one.name in by_name else one
    return list(by_name.values())


def read(path: Path) -> list[Run]:
    runs = json.loads(path.read_text()) if path.exists() else []
    return [Run(**{**run, "outcomes": [Outcome(**one) for one in run["outcomes"]]}) for run in runs]


def written(runs: Iterable[Run]) -> str:
    return json.dumps([{**run._asdict(), "outcomes": [one._asdict() for one in run.outcomes]} for run in runs], indent=1) + "\n"


def page(runs: list[Run]) -> str:
    """docs/reliability.md."""
    lines = [
        "# Reliability",
        "",
        "`make reliability` attacks the packages and writes this page. `make` and a name of the first column repeats a part of it.",
        "Where cases are drawn, each that fails is printed with what repeats it alone. [security.md](security.md) says what is",
        "promised, and to whom. Memory is what a case takes beyond what its process began with; of soak and huge, all of it. The",
        "longest case of fuzz-files is in seconds of a processor.",
        "",
        "| target | cases of | cases | failures | longest case | most memory | seconds in all | Python / torch / Triton |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for run in runs:
        for i, one in enumerate(run.outcomes):
            longest = "" if one.seconds is None else f"{one.seconds:.1f} s"
            memory = "" if one.memory is None else f"{one.memory >> 20} MiB"
            measured = f"{one.cases:,} | {one.failed:,} | {longest} | {memory} | {'' if i else f'{run.took:,.0f}'}"
            lines.append(f"| {run.target} | {one.name} | {measured} | {run.versions} |")
    lines += ["", "What the targets do:", "", "| target | |", "|---|---|"]
    lines += [f"| {name} | {target.what} |" for name, target in TARGETS.items()]
    missing = [name for name in TARGETS if name not in {run.target for run in runs}]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    lines += ["", "Run on:", ""]
    places = dict.fromkeys(run.where for run in runs)
    lines += [f"- {place}: {', '.join(run.target for run in runs if run.where == place)}" for place in places]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default all")
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"TARGET: expected some of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    failed, versions_and_place = 0, (versions(), where())  # before the page that is written makes the tree dirty
    for target in options.targets or TARGETS:
        run = attacked(target, ["make", "--no-print-directory", target], *versions_and_place)
        failed += run.failed
        runs = [*(one for one in read(JSON) if one.target != target), run]
        runs.sort(key=lambda one: list(TARGETS).index(one.target))
        JSON.write_text(written(runs))
        PAGE.write_text(page(runs))
    print(f"{PAGE.relative_to(ROOT)}: {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
