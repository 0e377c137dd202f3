"""pytest under the driver: a row for each test, and a process that is started again goes on behind the test that ended it.

Load it with `-p benchmarks.gpu.plugin`, which comes before any test file is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.gpu import child, rows, simulated, simulated_gpu

rows.output()
simulated.install()

# What a simulated GPU cannot run: graphs, what asks torch's own build for CUDA, and tensors of many gigabytes.
NOT_SIMULATED = ("in_a_graph", "registration", "compiled", "offsets_past")
_number = 0


def pytest_configure() -> None:
    if reason := child.why_not():
        rows.emit(skipped=reason)
        pytest.exit(reason, returncode=0)
    child.count_compilations()


@pytest.hookimpl(trylast=True)  # when pytest has deselected what -m and -k leave out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    global _number
    if simulated_gpu():
        items[:] = [item for item in items if not any(word in item.name for word in NOT_SIMULATED)]
        for item in items:
            if "test_boundaries" in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason="the CPU's kernels refuse boundaries that a GPU's clamp"))
    _number = rows.first_item()
    items[:] = items[_number : _number + rows.most_items()]


def pytest_runtest_logstart(nodeid: str) -> None:
    global _number
    rows.emit(begin=_number, item=nodeid)
    _number += 1


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:  # pytest itself shows them at its end, which may not come
            print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)
            crash = getattr(report.longrepr, "reprcrash", None)
            row["reason"] = " ".join((crash.message if crash else report.longreprtext).split())[:400]
        rows.emit(**row)
    if report.failed and torch.cuda.is_available() and not child.usable():
        os._exit(rows.FAILED_GPU)
