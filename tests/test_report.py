"""Every Triton kernel compiles for every architecture, within its resources, and the report says so."""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys

import pytest

from sora_kernels import triton as room
from sora_kernels.report import ARCHS

MATRIX = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[str, list[dict]]:
    """The text, and the rows of the JSON. A process of its own, where Triton compiles instead of interpreting."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sora_kernels.report", "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


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


def test_interpreted_kernels_cannot_be_reported():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "sora_kernels.report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set; an interpreted kernel cannot be compiled" in done.stderr
