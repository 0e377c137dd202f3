"""The test suite as a check: what pytest is told, and what it reports."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

# Those of the GPU driver build on all cores and have deadlines; see the Makefile.
DRIVER_TESTS = ("tests/test_gpu_driver.py", "tests/test_gpu_rehearsal.py")


class Result(NamedTuple):
    test: str
    passed: bool


def pytest_options(report: Path) -> list[str]:
    """What `make test` runs first, in two processes, with a JUnit report."""
    ignored = [f"--ignore={path}" for path in DRIVER_TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "-m", "not emulated"]
    return [*options, f"--junitxml={report}", *ignored]


def results(report: str) -> list[Result]:
    """Those of a JUnit report, without the skipped ones.

    >>> results('<s><testcase classname="t" name="a"/><testcase classname="t" name="b"><failure/></testcase></s>')
    [Result(test='t::a', passed=True), Result(test='t::b', passed=False)]
    """
    cases = [case for case in ElementTree.fromstring(report).iter("testcase") if case.find("skipped") is None]
    return [
        Result(f"{case.get('classname')}::{case.get('name')}", case.find("failure") is None and case.find("error") is None)
        for case in cases
    ]


def read_results(report: Path, status: int) -> list[Result]:
    """Those of a file; a run that ended early, by its exit status or without a test, is one that failed."""
    ran = results(report.read_text()) if report.exists() else []
    return ran if ran and status in (0, 1) else [*ran, Result(f"pytest, which ended with exit status {status}", False)]
