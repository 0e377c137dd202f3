"""The sweep of sweep.py, a thousand cases over all tiers, and some on the other backends."""

import subprocess
import sys

import pytest
import sweep
from reliability.outcome import Outcome

from sora_kernels import backends


def test_block_sizes_are_found_in_the_code() -> None:
    assert {16, 32, 64, 128, 256, 1024} <= set(sweep.BLOCKS)


def test_lengths_lie_on_both_sides_of_every_block_size() -> None:
    draw = sweep.Draw(0, 0, 300)
    drawn = {draw.length() for _ in range(4000)}
    assert {n for b in sweep.BLOCKS if b <= 300 for n in (b - 1, b, b + 1)} <= drawn


def test_every_tier() -> None:
    command = [sys.executable, "-m", "tests.sweep", "1000"]
    done = subprocess.run(command, cwd=sweep.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tiers = sweep.tiers()
    outcome = str(Outcome("attention of any lengths", 1000 // len(tiers), 0))
    assert done.stdout.splitlines() == [line for name in tiers for line in (name, outcome)]


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_reference(first: int) -> None:
    assert sweep.run(range(first, first + 100), 1, "reference", 140) == []


@pytest.mark.emulated
@pytest.mark.skipif(not backends.INTERPRETED, reason="Triton compiles")
@pytest.mark.parametrize("first", range(0, 80, 10))
def test_triton(first: int) -> None:
    assert sweep.run(range(first, first + 10), 2, "triton", 80) == []


def test_a_wrong_result_is_found() -> None:
    cases = [sweep.drawn(sweep.Draw(0, number, 100)) for number in range(40)]
    seen = [case for case in cases if any(visible.any() for visible in case.visible)]
    assert len(seen) > 20
    for case in seen:
        right = case.call
        case.call = lambda q, k, v, right=right: right(q, k, 1.5 * v)
        assert sweep.failure(case) is not None
