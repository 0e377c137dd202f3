"""The driver's stages on a simulated GPU: what a run on a GPU does, but for what its kernels compute."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_gpu_driver import ROOT, command, outcome, run

from benchmarks.gpu import stages
from benchmarks.gpu.driver import Task
from benchmarks.gpu.prepare import LOGS
from benchmarks.gpu.prepared import KERNELS, unpack
from benchmarks.gpu.tuning import LINES
from sora_kernels.triton.configs import CANDIDATES

LAUNCHES = "launches"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="prepare builds the CUDA kernels, too")


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    """A folder with a compute-sanitizer and an ncu that only run what they are given."""
    folder = tmp_path_factory.mktemp("tools")
    for name in ("compute-sanitizer", "ncu"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\nexec "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What `prepare` makes for the first stage, and in file LAUNCHES what it launched while it compiled."""
    folder = tmp_path_factory.mktemp("prepared")
    done = command("prepare", folder, "--stages", "smoke", RECORDED_LAUNCHES=str(folder / LAUNCHES))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@needs_nvcc
def test_prepared_kernels_are_launched_as_cold_ones(tmp_path: Path, prepared: Path) -> None:
    """The same kernels, grids, threads and shared memory in the same order, and nothing is compiled."""
    unpack(prepared / KERNELS, tmp_path / "cache")
    known = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    known |= {"CUDA_VISIBLE_DEVICES": "", "SIMULATED_GPU": "sm90"}
    environment = {**known, "RECORDED_LAUNCHES": str(tmp_path / LAUNCHES), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(stages.child("smoke"), env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "compiled" not in done.stdout
    assert '"compiled": ' in (prepared / LOGS / "rows.jsonl").read_text()
    warm, cold = ((folder / LAUNCHES).read_text().splitlines() for folder in (tmp_path, prepared))
    assert len(warm) > 50
    assert warm == cold


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, tools: Path, prepared: Path) -> tuple[Path, subprocess.CompletedProcess, float]:
    out, start = tmp_path_factory.mktemp("out"), time.monotonic()
    done = command(out, "--simulate", "sm90", "--prepared", prepared, "--items", "8", tools=tools)
    return out, done, time.monotonic() - start


@needs_nvcc
def test_every_stage_reports(rehearsal) -> None:
    out, done, seconds = rehearsal
    assert seconds < 420
    found = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    results = {row["stage"]: row["result"] for row in found if "result" in row}
    assert list(results) == [stage.name for stage in stages.stages()]

    def of(stage: str, key: str) -> list[dict]:
        return [row for row in found if row["stage"] == stage and key in row]

    assert of("setup", "machine")[0]["machine"]["device"] == "simulated GPU"
    assert [row["how"] for row in of("setup", "prepared")] == ["taken from the prepared folder"] * 2
    assert len(of("smoke", "check")) == 8
    assert not of("smoke", "compiled"), "a kernel that was prepared was compiled again"
    assert {row["ceiling"] for row in of("attention", "ceiling")} == {"copy", "matmul 256"}
    ran = {stage: {row["implementation"] for row in of(stage, "implementation")} for stage in ("attention", "memory", "peers")}
    assert {"sora_kernels", "sora_kernels (128, 128, 8, 3)", "torch varlen_attn"} <= ran["attention"]
    assert {"sora_kernels", "copy"} <= ran["memory"]
    assert ran["peers"] == {"torch eager"}
    assert all(of(stage, "test") for stage in ("capture", "tests", "sanitizer"))
    assert [row["present"] for row in of("tuning", "blocks")].count(True) == 1
    assert len(of("profile", "profiled")) == 4
    assert not [row for row in found if row.get("outcome") == "failed" or row.get("ok") is False or "error" in row]
    assert not [row for row in found if "hung" in row or "crashed" in row]
    assert done.returncode == 0, done.stdout + done.stderr


@needs_nvcc
def test_files_and_table(rehearsal) -> None:
    out, done, _ = rehearsal
    files = list(out.rglob("*"))
    assert len(files) <= 8
    assert all(path.is_file() and path.parent == out and path.stat().st_size <= 16 << 20 for path in files)
    text = (out / "summary.txt").read_text()
    assert len(text) < 12_000
    assert done.stdout.endswith(text)
    for line in (
        "checks against float64 wrong: 0 of",
        "forward, d 128: present",
        "attention, 16k, bfloat16, forward: sora_kernels",
    ):
        assert line in text


INJECTED = """
import ctypes, sys, time
from benchmarks.gpu import child, simulated
simulated.install()
from benchmarks.gpu import smoke
failures = {"raises": lambda: 1 / 0, "hangs": lambda: time.sleep(1000), "crashes": lambda: ctypes.string_at(0)}
made = smoke.items()[:4]
made[1] = child.Item("injected", lambda: failures[sys.argv[2]]())
smoke.items = lambda: made
child.main()
"""


UNKNOWN = """
from benchmarks.gpu import child, simulated
simulated.install()
from sora_kernels import backends
backends.BACKENDS["triton"].stand_in.unavailable = lambda: "was compiled for others"
child.main()
"""


def test_a_gpu_that_nothing_knows(tmp_path: Path, monkeypatch) -> None:
    """Each family says it in a line, and what needs no Triton runs."""
    monkeypatch.setenv("SIMULATED_GPU", "sm90")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or threads of four processes wait for one another
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    families = ("smoke", "attention", "tuning", "profiled")
    made = run(tmp_path, *(Task(name, [sys.executable, "-c", UNKNOWN, name], 100) for name in families), seconds=100)
    assert outcome(made, "smoke") == "1 failed, first triton: RuntimeError: triton was compiled for others"
    for name in families[1:]:
        assert outcome(made, name) == "skipped: the Triton backend was compiled for others"


def test_injected_failures(tmp_path: Path, monkeypatch) -> None:
    """In a family on the simulated GPU: its other items, and other families, are all there."""
    monkeypatch.setenv("SIMULATED_GPU", "sm90")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or threads of four processes wait for one another
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kinds = ("raises", "hangs", "crashes")
    tasks = [Task(how, [sys.executable, "-c", INJECTED, "smoke", how], 300, item_seconds=20) for how in kinds]
    made = run(tmp_path, *tasks, Task("whole", stages.child("profiled"), 300), seconds=300)
    for how in kinds:
        assert sum(row["task"] == how for row in made.rows if "check" in row) == 3, how
    assert sum("profiled" in row for row in made.rows) == 4
    assert outcome(made, "raises") == "1 failed, first injected: ZeroDivisionError: division by zero"
    assert outcome(made, "hangs").startswith("hung after")
    assert outcome(made, "crashes") == "SIGSEGV in injected"


def test_what_configs_names_is_measured() -> None:
    named = [(kernel, head_dim) for (kernel, arch), lines in CANDIDATES.items() if arch == "sm90" for head_dim, _ in lines]
    assert set(named) <= set(LINES)
