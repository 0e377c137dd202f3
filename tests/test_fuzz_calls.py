"""The checks of tests/reliability that call everything with bad arguments: a few of each, and that they can fail."""

import os
import re
import signal
import subprocess
import sys
import time
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
