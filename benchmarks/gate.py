"""Fails if the package has become slower next to its peers than the committed table says.

python -m benchmarks.gate docs/benchmarks/ratios.json

Runs the benchmarks and compares each row's ratio ("ours is faster by") with the committed one. A row that is more than TOLERANCE
below is measured again, up to ATTEMPTS times in all, as a busy machine can spoil any single row; it fails if it stays below.
The exit status is 1 if a row fails, 2 if the ratios are another machine's, which would say nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOLERANCE = 0.15
ATTEMPTS = 3


def machine_of(results: dict[str, Any]) -> str:
    machine = results["machine_info"]
    cpu = machine["cpu"].get("brand_raw", machine["processor"])
    return f"{cpu}, {machine['device']}, torch {machine['torch']}"


def ratios_of(results: dict[str, Any]) -> dict[str, Any]:
    """What of pytest-benchmark's results is compared: the machine, and each row's ratio by its test."""
    rows = {row["fullname"]: row["extra_info"].get("speedup") for row in results["benchmarks"]}
    return {
        "machine": machine_of(results),
        "ratios": {test: round(ratio, 3) for test, ratio in sorted(rows.items()) if ratio is not None},
    }


def lowest(*runs: dict[str, Any]) -> dict[str, Any]:
    """The first run's ratios, each as the run on its machine has it that has the lowest: a lucky moment is nothing to hold to."""
    first, *others = map(ratios_of, runs)
    for other in others:
        if other["machine"] == first["machine"]:
            first["ratios"] = {test: min(ratio, other["ratios"].get(test, ratio)) for test, ratio in first["ratios"].items()}
    return first


def measured(tests: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", f"--benchmark-json={path}", *tests]
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            sys.exit(status)
        return ratios_of(json.loads(path.read_text()))


def fallen(committed: dict[str, float], now: dict[str, float]) -> list[str]:
    """The tests whose ratio is more than TOLERANCE below the committed one; those that are gone count as fallen."""
    return [test for test, ratio in committed.items() if now.get(test, 0) < (1 - TOLERANCE) * ratio]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("committed", type=Path, help="ratios.json, as benchmarks.report writes it")
    path = parser.parse_args().committed
    if not path.is_file():
        parser.error(f"{path} does not exist; `make bench-report` writes it")
    committed = json.loads(path.read_text())
    now = measured(["benchmarks"])
    if now["machine"] != committed["machine"]:
        print(f"the ratios are of {committed['machine']}, this is {now['machine']}", file=sys.stderr)
        return 2
    best = now["ratios"]
    for _ in range(ATTEMPTS - 1):
        again = [test for test in fallen(committed["ratios"], best) if test in best]
        if not again:
            break
        for test, ratio in measured(again)["ratios"].items():
            best[test] = max(best[test], ratio)
    failed = fallen(committed["ratios"], best)
    for test in failed:
        print(f"{test}: {best.get(test, 'gone')}, committed {committed['ratios'][test]}")
    print(f"{len(committed['ratios']) - len(failed)} of {len(committed['ratios'])} ratios hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
