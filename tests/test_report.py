"""Every Triton kernel compiles for every architecture, within its resources, and the report says so."""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sora_kernels import triton as room
from sora_kernels.report import ARCHS

MATRIX = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}


def run_without_interpreter(*arguments: str) -> str:
    """What a Python process prints in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[str, list[dict]]:
    """The text, and the rows of the JSON."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    return run_without_interpreter("-m", "sora_kernels.report", "--json", str(path)), json.loads(path.read_text())


@pytest.fixture(scope="module")
def compiled() -> dict:
    """What compiled.py prints."""
    return json.loads(run_without_interpreter(str(Path(__file__).with_name("compiled.py"))))


def triton_rows(report, arch):
    return [row for row in report[1] if row["arch"] == arch and not row["name"].startswith("_cuda")]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_compiled(report, arch):
    modules = [importlib.import_module(f"{room.__name__}.{module.name}") for module in pkgutil.iter_modules(room.__path__)]
    expected = {
        f"{module.__name__.rpartition('.')[2]}.{name}" for module in modules for name in vars(module) if name.endswith("_kernel")
    }
    assert {row["name"] for row in triton_rows(report, arch)} == expected


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_everything_fits(report, arch):
    for row in triton_rows(report, arch):
        assert row["spilled"] == 0, row
        assert row["shared"] <= ARCHS[arch][1] << 10, row


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_runs_on_tensor_cores(report, arch):
    kernels = [row for row in triton_rows(report, arch) if "attention" in row["name"] and "list" not in row["name"]]
    assert len(kernels) == 6
    for row in kernels:
        assert any(name.startswith(MATRIX[arch]) for name in row["tensor_core"]), row


def test_matrix_unit_is_waited_for_once_a_block_of_keys(report, compiled):
    """Otherwise the compiler had to serialise wgmma: each instruction is then followed by a wait."""
    rows = triton_rows(report, "sm90") + [row for rows in compiled["variants"].values() for row in rows]
    for row in rows:
        if "attention" in row["name"] and "list" not in row["name"]:
            assert 0 < 3 * row["waits"] <= row["tensor_core"]["wgmma.mma_async"], row


def test_variants_spill_next_to_nothing(compiled):
    """And compile at all, where Triton sees integers that are 1."""
    assert {"causal", "window", "72 channels", "one row, adaLN"} < compiled["variants"].keys()
    for name, rows in compiled["variants"].items():
        for row in rows:
            assert row["spilled"] <= (16 if name == "grouped" else 0), (name, row)


def test_attention_compiles_once_for_all_batches(compiled):
    counts = compiled["signatures"]
    assert {"attention.forward_kernel", "spatiotemporal_attention.dkdv_kernel"} < counts.keys()
    # The list of tiles is made for each size of tile: of queries and of keys.
    assert counts == {name: 2 if "tile_list" in name else 1 for name in counts}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="the CUDA kernels are built where there is an nvcc")
def test_cuda_kernels_spill_nothing(report):
    rows = [row for row in report[1] if row["name"].startswith("_cuda")]
    assert {"_cuda.adaln_forward", "_cuda.norm_backward", "_cuda.rope_forward", "_cuda.rearrange"} <= {row["name"] for row in rows}
    for row in rows:
        assert row["spilled"] == 0, row


def test_the_report_says_that_it_is_a_plan(report):
    assert "it is a plan, not a measurement" in report[0]
    assert "| H200, µs |" in report[0]
    assert all(f"| {row['name']} " in report[0] for row in report[1])


def test_the_report_in_the_documentation_is_this_one(report):
    """The table of work, and which Triton kernels there are; the rest is the compiler's."""

    def stable(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| _cuda.")]
        work = [line for line in lines if line.count("|") == 9]
        return work + [line.split("|")[1] for line in lines if line not in work]

    documented = (Path(__file__).parents[1] / "docs" / "gpu-report.md").read_text()
    assert stable(documented) == stable(report[0])


def test_interpreted_kernels_cannot_be_reported():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "sora_kernels.report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set; an interpreted kernel cannot be compiled" in done.stderr
