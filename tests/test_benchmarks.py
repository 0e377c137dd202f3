"""What benchmarks count, run and print. They themselves are no tests."""

import json

import pytest
import torch
from torch import Tensor

from benchmarks import chart, gate
from benchmarks.gpu import NAME, results
from benchmarks.race import BACKWARD, BOTH, FORWARD, OURS, Implementation, Race, copied, of_pass


def race(which: str) -> tuple[Race, list[str]]:
    """A race of squares, and the forwards that were run."""
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=which != FORWARD)
    runs: list[str] = []

    def square(x: Tensor) -> Tensor:
        runs.append("square")
        return x * x

    rows = {
        OURS: Implementation(square),
        "wrong": Implementation(lambda x: x * x * 1.1),
        "misshapen": Implementation(lambda x: x * x, restore=lambda results: [x[None] for x in results]),
        "copy": copied(1e-6),
    }
    return Race("square", torch.float32, which, {"gbps": 1.0}, [x], [torch.ones(3)], lambda x: x**2, rows), runs


@pytest.mark.parametrize("which", [FORWARD, BOTH, BACKWARD])
def test_race(which: str) -> None:
    """Outputs, then gradients where the pass has them; a backward alone runs its forward once; wrong rows are found."""
    squares, runs = race(which)
    for _ in range(3):
        results = squares.call(OURS)
    expected = [[1.0, 4.0, 9.0]] + [[2.0, 4.0, 6.0]] * (which != FORWARD)
    assert [x.tolist() for x in results] == expected
    assert len(runs) == (1 if which == BACKWARD else 3)
    squares.check(OURS)
    squares.check("copy")
    with pytest.raises(ArithmeticError, match="by wrong: result 0 is off by 0"):
        squares.check("wrong")
    with pytest.raises(ValueError, match=r"shape \[1, 3\], expected \[3\]"):
        squares.check("misshapen")


def test_of_pass() -> None:
    assert [of_pass(which, 2, 5) for which in (FORWARD, BACKWARD, BOTH)] == [2, 5, 7]


def test_gpu_results(tmp_path) -> None:
    """A copy is no peer, what is to be known of a row stands beside its name, and a simulated GPU's rows are not kept."""

    def row(implementation: str, op: str = "rope_3d", **info: object) -> dict:
        return {"op": op, "dtype": "bfloat16", "pass": "backward", "implementation": implementation, "ms": [1, 1, 1], **info}

    rows = [
        {"machine": {"device": "NVIDIA X100", "torch": "2"}},
        row(OURS, useful_gbps=3900.0),
        row("alone", op="attention", useful_gflops=1.0, speedup=2.0),
        row("copy", useful_gbps=4300.0, speedup=0.907),
        row("torch eager", useful_gbps=400.0, speedup=9.5),
        row("torch.compile", useful_gbps=2000.0, speedup=1.951, inexact="by much", host_ms=0.25, host_bound=True),
        {"op": "rope_3d", "dtype": "bfloat16", "pass": "backward", "implementation": "peer", "reason": "a | b"},
        {"test": "tests/test_rope.py::test", "outcome": "passed"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = results.kept(tmp_path, tmp_path / "results")
    assert path.name.startswith("nvidia-x100-20")
    head, *lines = results.of_gpu(json.loads(path.read_text()), path.name).splitlines()
    assert head.startswith("NVIDIA X100, torch 2, 20")
    best = "torch.compile (inexact, host 0.25 ms)"
    assert lines[3:] == [f"| rope_3d | bfloat16 | backward | 3,900.0 GB/s | 91% | {best} | 1.95x |"]
    rows[0]["machine"]["device"] = NAME
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="expected rows of a GPU, got those of simulated GPU"):
        results.kept(tmp_path, tmp_path)


def test_chart(tmp_path) -> None:
    """Every bar is a row of the committed table."""
    page = chart.TABLE.read_text()
    assert chart.ratios(page)["attention", "float32", "forward", "SDPA padded"] > 1
    chart.draw(page, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_gate() -> None:
    """A ratio may fall by 15%, a row may be new; one that is gone, or has fallen further, is found."""
    machine = {"cpu": {}, "processor": "a cpu", "device": "2 threads", "torch": "2.13"}

    def measured(**ratios: float | None) -> dict:
        rows = [{"fullname": name, "extra_info": {} if ratio is None else {"speedup": ratio}} for name, ratio in ratios.items()]
        return {"machine_info": machine, "benchmarks": rows}

    def results(**ratios: float | None) -> dict:
        return gate.ratios_of(measured(**ratios))

    committed = results(ours=None, same=1.5, lower=2.0, fallen=2.0, gone=3.0)
    assert committed["machine"] == "a cpu, 2 threads, torch 2.13"
    assert set(committed["ratios"]) == {"same", "lower", "fallen", "gone"}
    now = results(ours=None, same=1.5, lower=1.71, fallen=1.69, new=0.1)
    assert gate.fallen(committed["ratios"], now["ratios"]) == ["fallen", "gone"]
    another = {**measured(a=0.1), "machine_info": {**machine, "torch": "2.12"}}
    assert gate.lowest(measured(a=2.0, b=1.0), measured(a=1.5, b=3.0, c=1.0), another)["ratios"] == {"a": 1.5, "b": 1.0}
