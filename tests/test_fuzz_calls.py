"""The checks of tests/reliability that call everything with bad arguments: a few of each, and that they can fail."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reliability import children, dlpack
from reliability.children import Case
from reliability.outcome import Outcome, outcomes

ROOT = Path(__file__).parent.parent


def ran(*command: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.reliability.{command[0]}", *command[1:]],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (outcome,) = outcomes(done.stdout)
    return outcome


def test_public_functions_refuse_or_serve() -> None:
    assert ran("calls", "4", "--seed", "1").cases > 200


@pytest.mark.emulated
def test_cuda_entries_refuse_or_serve() -> None:
    assert ran("entries", "6", "--module", "_cuda").cases > 100


@pytest.mark.skipif(dlpack.compiler() is None, reason="needs clang with libFuzzer")
def test_descriptions_of_tensors() -> None:
    assert ran("dlpack", "20", "--runs", "2000").cases >= 2000


def raises() -> None:
    raise OSError("out of the case")


# What a case does, and what is said of it.
CASES = {
    "nothing": (lambda: None, None),
    "crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
    "wrong": (lambda: "not right", "not right"),
    "hang": (lambda: time.sleep(60), "no end after"),
    "slow": (lambda: time.sleep(0.7), r"took [\d.]+ s"),
    "exit": (raises, "ended with status 70"),
    "large": (lambda: torch.ones(1 << 24).sum() and None, r"took \d+ MiB"),
    "good": (lambda: None, None),
}


def test_each_failure_is_one_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(children, "SECONDS", 0.5)
    monkeypatch.setattr(children, "MEMORY", 32 << 20)
    named = list(CASES.items())
    outcome = children.run("cases", range(len(named)), lambda n: Case(named[n][0], named[n][1][0]), "again")  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert (outcome.cases, outcome.failed) == (8, 6)
    for number, (name, (_, said)) in enumerate(named):
        if said is None:
            assert f"case {number}:" not in printed
        else:
            (line,) = (line for line in printed.splitlines() if line.startswith(f"case {number}: {name}: "))
            assert re.search(said, line)


def test_memory_that_malloc_had_free_counts() -> None:
    """In a process of its own, as it changes how malloc works: it keeps 256 MiB, of which the call takes 64."""
    code = (
        "import ctypes, torch; from tests.reliability.children import measured; libc = ctypes.CDLL(None);"
        "[libc.mallopt(option, 1 << 30) for option in (-1, -3)]; torch.ones(1 << 26);"
        "print(measured(lambda: torch.ones(1 << 24).sum() and None)[2] >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 60 <= int(done.stdout) <= 80


def test_a_failure_is_repeated_by_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same directory, tier and sanitizer."""
    monkeypatch.setenv("SORA_KERNELS_ISA", "avx2")
    monkeypatch.setenv("ASAN_OPTIONS", "a=1:b=2 3")
    command = children.again("tests.reliability.entries", "1", "--seed 4")
    assert command.startswith(f"cd {os.getcwd()} && ASAN_OPTIONS='a=1:b=2 3' ")
    assert command.endswith(f" SORA_KERNELS_ISA=avx2 {sys.executable} -m tests.reliability.entries 1 --seed 4")
    code = "import os; print(os.environ['SORA_KERNELS_ISA'], os.environ['ASAN_OPTIONS'])"
    shown = command.partition(" -m ")[0] + f' -c "{code}"'
    done = subprocess.run(shown, shell=True, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    assert done.stdout == "avx2 a=1:b=2 3\n"


@pytest.fixture
def makes(tmp_path: Path) -> Callable[..., list[str]]:
    """Of a target, the programs that it runs, each of which fails."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f"#!/bin/sh\necho $SORA_KERNELS_ISA $* >> {log}\nexit 1\n")
    python.chmod(0o755)
    variables = (f"BIN={tmp_path}", f"SANITIZED={tmp_path}", "SANITIZER_OPTIONS=A=1", "TIERS=avx2 baseline")

    def run(target: str) -> list[str]:
        command = ["make", "-o", ".venv/.ready", "-o", "sanitized", target, *variables]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode != 0
        return log.read_text().splitlines()

    return run


def test_each_tier_has_calls_of_its_own(makes: Callable[..., list[str]]) -> None:
    ran = makes("fuzz-calls")
    assert ran[:2] == [f"{tier} -m tests.reliability.entries 1001 --seed {i}" for i, tier in enumerate(("avx2", "baseline"))]
    assert len(ran) == 5  # whatever fails


def test_the_sweep_runs_whatever_fails(makes: Callable[..., list[str]]) -> None:
    assert [line.split()[1] for line in makes("property")] == ["tests.reliability.properties", "tests.sweep"]
