"""Fails if the package has become slower next to its peers than the committed table of this processor says.

python -m benchmarks.gate docs/benchmarks

Runs the benchmarks and compares each row's ratio ("ours is faster by") with the committed one. A row that is more than TOLERANCE
below is measured again, up to ATTEMPTS times in all, as a busy machine can spoil any single row; it fails if it stays below.
The exit status is 1 if a row fails. It is 2 if there are no ratios of this processor, as another one's would say nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cpuinfo

TOLERANCE = 0.15
ATTEMPTS = 3


def processor_of(results: dict[str, Any]) -> str:
    """The processor's name with its family and model: the names of virtual ones are not enough to tell them apart.

    >>> processor_of({"machine_info": {"cpu": {"brand_raw": "AMD EPYC", "family": 26, "model": 2}}})
    'AMD EPYC family 26 model 2'
    """
    cpu = results["machine_info"]["cpu"]
    name = cpu.get("brand_raw") or results["machine_info"]["processor"]
    return " ".join([name, *(f"{key} {cpu[key]}" for key in ("family", "model") if key in cpu)])


def folder_of(processor: str) -> str:
    """The name of the folder with a processor's results.

    >>> folder_of("AMD EPYC family 26 model 2")
    'amd-epyc-family-26-model-2'
    """
    return re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")


def machine_of(results: dict[str, Any]) -> str:
    machine = results["machine_info"]
    return f"{processor_of(results)}, {machine['device']}, torch {machine['torch']}"


def ratios_of(results: dict[str, Any]) -> dict[str, Any]:
    """What of pytest-benchmark's results is compared: the machine, and each row's ratio by its test."""
    rows = {row["fullname"]: row["extra_info"].get("speedup") for row in results["benchmarks"]}
    return {
        "processor": processor_of(results),
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
    parser.add_argument("results", type=Path, help="folder with one of each processor, as benchmarks.report writes them")
    results = parser.parse_args().results
    cpu = processor_of({"machine_info": {"cpu": cpuinfo.get_cpu_info(), "processor": platform.processor()}})
    path = results / folder_of(cpu) / "ratios.json"
    if not path.is_file():
        known = ", ".join(sorted(ratios.parent.name for ratios in results.glob("*/ratios.json"))) or "none"
        parser.error(f"no ratios of {cpu} in {results} (of: {known}); `make bench-report` writes them")
    committed = json.loads(path.read_text())
    now = measured(["benchmarks"])
    if now["machine"] != committed["machine"]:  # threads, instruction set or torch
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
