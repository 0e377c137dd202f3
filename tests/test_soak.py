"""A share of `python -m tests.reliability.soak`, and that it finds what it looks for."""

import ctypes
import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from reliability import random_works, soak, together
from reliability.resources import MOST_DRIFT, Usage, drift, drifted, usage
from tolerance import threads

from sora_kernels import backends

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def known() -> together.Known:
    return together.Known(0)


def test_steps_repeat_and_leave_nothing(tmp_path: Path) -> None:
    """A save, a resume, and the probe on both sides of it."""
    probe, before = random_works.Probe(), None
    with mock.patch.object(soak, "ROUND", 12):
        for step in soak.training(tmp_path / "run", seed=0):
            assert soak.run_ops(0, step) == []
            if step in (6, 18):
                now = usage()
                assert before is None or (now.files, now.threads) == (before.files, before.threads)
                before = now
            if step == 18:
                break
    assert probe.wrong() == []


def test_threads_at_once_get_the_bits_of_one(known: together.Known) -> None:
    with threads(together.OPENMP), together.Callers(known, "test") as callers:
        together.time.sleep(2)
    assert callers.calls > 0
    assert callers.failures == []


def hang() -> None:
    """With Python's lock, as `ctypes.PyDLL` keeps it."""
    with mock.patch.object(together, "HANGS", 1), together.Callers(together.Known(0), "hangs"):
        ctypes.PyDLL(None).sleep(60)


def test_a_hang_with_pythons_lock_ends_the_process() -> None:
    command = [sys.executable, "-c", "from tests.test_soak import hang; hang()"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50, env=environment)
    assert done.returncode == 1
    assert "in hang" in done.stderr


def test_threads_share_no_leaf(known: together.Known) -> None:
    leaves = [x for work, _ in known.cases for x in work.inputs if x.requires_grad]
    assert leaves
    used: list[torch.Tensor] = []
    with mock.patch.multiple(together, results=lambda work: used.extend(work.inputs), same=lambda *_: True):
        for seed in range(50):
            known.wrong(random.Random(seed))
    assert not {id(x) for x in used} & {id(x) for x in leaves}
    assert {x.data_ptr() for x in used} & {x.data_ptr() for x in leaves}


def test_children_of_such_a_process_get_them_too(known: together.Known) -> None:
    with threads(together.OPENMP), together.Callers(known, "test") as callers:
        assert together.forked(known, "child") is None
    assert callers.failures == []


def test_other_bits_are_found(known: together.Known) -> None:
    """One bit of one result in a kernel that is called a second time."""
    call = backends.call

    def off(function: str, like: torch.Tensor, /, **arguments: object) -> None:
        call(function, like, **arguments)
        if function == "rope_3d":
            out = arguments["out"]
            out.view(-1)[0] = out.view(-1)[0] * 1.01 + 0.1

    probe = random_works.Probe()
    with mock.patch.object(backends, "call", off):
        wrong = probe.wrong()
    assert wrong
    assert all(line.startswith("probe: rope_3d") for line in wrong)


def test_a_call_that_raises_is_found(known: together.Known) -> None:
    """Also one by what surrounds the op: its thread goes on and keeps what it found before."""
    with mock.patch.object(backends, "record", side_effect=RuntimeError("no record")), together.Callers(known, "seed") as callers:
        time.sleep(1)
    assert any("RuntimeError: no record" in failure for failure in callers.failures)
    assert callers.calls > len(callers.failures)


class Hanging:
    """Works that hang in a child of a child."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def wrong(self, _: random.Random) -> str | None:
        if self.process not in (os.getpid(), os.getppid()):
            time.sleep(1000)
        return None


def test_a_child_of_a_child_that_hangs_is_killed(capfd) -> None:
    """It would keep whoever reads its output waiting for ever."""
    name = next(name for name in map(str, itertools.count()) if random.Random(name).random() < 0.2)
    assert together.forked(Hanging(), name, 2) == f"{name} ended with status 1"
    assert f"{name}: {name} and its child hangs" in capfd.readouterr().out


def leak() -> None:
    """In a process of its own: one that has freed much takes nothing new."""
    kept, used = [], []
    for _ in range(10):
        kept.append(torch.ones(1 << 22))
        used.append(usage())
    assert drift([x.resident for x in used]).slope > MOST_DRIFT
    assert any("leak: resident drifts" in line for line in drifted("leak", used, "resident"))
    assert any("leak: held drifts" in line for line in drifted("leak", used, "held"))


def test_a_leak_is_found() -> None:
    code = "import sys; sys.path.insert(0, 'tests'); import test_soak; test_soak.leak()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    flat = [Usage(500 << 20, 400 << 20, 200 << 20, 8, 3)] * 30
    assert drifted("flat", flat, "resident") == []
    slow = [one._replace(allocated=one.allocated + (i << 16)) for i, one in enumerate(flat)]
    assert drifted("a little", slow, "resident")[0].startswith("a little: allocated drifts")
    assert drifted("a file", [*flat, *(x._replace(files=9) for x in flat)], "resident")[0].startswith("a file: files drifts")
