"""Every Triton kernel compiles for every architecture, within its resources, and the report says so."""

import concurrent.futures
import importlib
import importlib.util
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from benchmarks.launches import ARCHS
from sora_kernels import triton as room
from sora_kernels.triton.devices import SHARED_MEMORY

MATRIX = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma", "gfx1100": "v_wmma"}
TRITON = ".".join(triton.__version__.split(".")[:2])
# Bytes that a kernel spills in bfloat16, by (architecture, head dim, kernel); what is not listed spills nothing. Each Triton brings
# its own assembler, so that another machine finds the same.
SPILLED: dict[str, dict[tuple[str, int, str], int]] = {
    "3.6": {
        ("sm80", 64, "attention.dkdv_kernel"): 8,
        ("sm80", 64, "block_sparse_attention.dkdv_kernel"): 8,
        ("sm90", 96, "block_sparse_attention.dq_kernel"): 16,
        ("sm90", 96, "block_sparse_attention.dkdv_kernel"): 16,
        ("sm90", 96, "spatiotemporal_attention.dkdv_kernel"): 40,
        ("sm90", 128, "block_sparse_attention.dq_kernel"): 16,
        ("sm90", 128, "block_sparse_attention.dkdv_kernel"): 16,
        ("sm90", 128, "spatiotemporal_attention.dkdv_kernel"): 48,
        ("sm90", 256, "attention.forward_kernel"): 96,
        ("sm90", 256, "attention.dq_kernel"): 328,
        ("sm90", 256, "attention.dkdv_kernel"): 512,
        ("sm90", 256, "block_sparse_attention.dq_kernel"): 120,
        ("sm90", 256, "block_sparse_attention.dkdv_kernel"): 480,
        ("sm90", 256, "spatiotemporal_attention.dkdv_kernel"): 248,
        ("sm100", 128, "patch_embed.scatter_kernel"): 48,
        ("gfx1100", 128, "attention.dq_kernel"): 44,
        ("gfx1100", 128, "attention.dkdv_kernel"): 468,
        ("gfx1100", 128, "block_sparse_attention.dkdv_kernel"): 480,
        ("gfx1100", 128, "spatiotemporal_attention.dq_kernel"): 52,
        ("gfx1100", 128, "spatiotemporal_attention.dkdv_kernel"): 552,
        ("gfx1100", 128, "patch_embed.embed_kernel"): 392,
        ("gfx1100", 256, "attention.dq_kernel"): 972,
        ("gfx1100", 256, "attention.dkdv_kernel"): 1512,
        ("gfx1100", 256, "block_sparse_attention.dq_kernel"): 356,
        ("gfx1100", 256, "block_sparse_attention.dkdv_kernel"): 1508,
        ("gfx1100", 256, "spatiotemporal_attention.forward_kernel"): 4,
        ("gfx1100", 256, "spatiotemporal_attention.dq_kernel"): 800,
        ("gfx1100", 256, "spatiotemporal_attention.dkdv_kernel"): 1688,
    },
    "3.9": {
        ("sm80", 64, "attention.dkdv_kernel"): 8,
        ("sm80", 64, "block_sparse_attention.dkdv_kernel"): 8,
        ("sm80", 128, "block_sparse_attention.forward_kernel"): 16,
        ("sm90", 256, "attention.forward_kernel"): 48,
        ("sm90", 256, "attention.dq_kernel"): 216,
        ("sm90", 256, "attention.dkdv_kernel"): 368,
        ("sm90", 256, "block_sparse_attention.forward_kernel"): 32,
        ("sm90", 256, "block_sparse_attention.dq_kernel"): 120,
        ("sm90", 256, "block_sparse_attention.dkdv_kernel"): 432,
        ("sm90", 256, "spatiotemporal_attention.forward_kernel"): 8,
        ("sm90", 256, "spatiotemporal_attention.dkdv_kernel"): 512,
        ("sm100", 64, "block_sparse_attention.forward_kernel"): 8,
        ("gfx1100", 128, "attention.dq_kernel"): 408,
        ("gfx1100", 128, "attention.dkdv_kernel"): 260,
        ("gfx1100", 128, "block_sparse_attention.dkdv_kernel"): 180,
        ("gfx1100", 128, "spatiotemporal_attention.dq_kernel"): 96,
        ("gfx1100", 128, "spatiotemporal_attention.dkdv_kernel"): 392,
        ("gfx1100", 128, "patch_embed.embed_kernel"): 508,
        ("gfx1100", 256, "attention.forward_kernel"): 604,
        ("gfx1100", 256, "attention.dq_kernel"): 3168,
        ("gfx1100", 256, "attention.dkdv_kernel"): 1088,
        ("gfx1100", 256, "block_sparse_attention.dq_kernel"): 352,
        ("gfx1100", 256, "block_sparse_attention.dkdv_kernel"): 908,
        ("gfx1100", 256, "spatiotemporal_attention.dq_kernel"): 680,
        ("gfx1100", 256, "spatiotemporal_attention.dkdv_kernel"): 1136,
    },
}
# The same of the launches in compiled.py, by their name there.
SPILLED_VARIANTS = {"3.6": {"causal": 24, "causal window": 48, "one token, window": 48}}


def allowed(arch: str, head_dim: int, kernel: str) -> int:
    """Bytes that this kernel may spill."""
    if TRITON not in SPILLED:
        pytest.skip(f"what spills is known for Triton {' and '.join(SPILLED)}, not for {TRITON}")
    return SPILLED[TRITON].get((arch, head_dim, kernel), 0)


def assert_spills(found: list[tuple[int, tuple[str, int, str]]]) -> None:
    """All at once, so that one run shows what to write down."""
    assert {kernel: spilled for spilled, kernel in found if spilled > allowed(*kernel)} == {}


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
    return run_without_interpreter("-m", "benchmarks.gpu_report", "--json", str(path)), json.loads(path.read_text())


@pytest.fixture(scope="module")
def compiled() -> dict:
    """What compiled.py prints."""
    return json.loads(run_without_interpreter(str(Path(__file__).with_name("compiled.py"))))


@pytest.fixture(scope="module")
def tables() -> dict[str, list[dict]]:
    """By architecture, what compiled_tables.py prints."""
    program = str(Path(__file__).with_name("compiled_tables.py"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda arch: json.loads(run_without_interpreter(program, arch)), ARCHS)
        return dict(zip(ARCHS, found, strict=True))


def triton_rows(report, arch):
    return [row for row in report[1] if row["arch"] == arch and not row["name"].startswith("_cuda")]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_compiled(report, arch):
    """But test_hopper.py's."""
    names = [module.name for module in pkgutil.iter_modules(room.__path__) if not module.name.startswith("hopper")]
    modules = [importlib.import_module(f"{room.__name__}.{name}") for name in names]
    expected = {
        f"{module.__name__.rpartition('.')[2]}.{name}" for module in modules for name in vars(module) if name.endswith("_kernel")
    }
    assert {row["name"] for row in triton_rows(report, arch)} == expected


@pytest.mark.parametrize("arch", ARCHS)
def test_only_what_is_listed_spills(report, arch):
    assert_spills([(row["spilled"], (arch, 128, row["name"])) for row in triton_rows(report, arch)])


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_of_all_head_dims_spills_only_what_is_listed(tables, arch):
    """In 2 bytes. In 4 bytes there are no ceilings: docs/performance.md."""
    rows = [row for row in tables[arch] if row["dtype"] == "torch.bfloat16" and row["head_dim"]]
    assert_spills([(row["spilled"], (arch, row["head_dim"], row["name"])) for row in rows])


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_is_what_gpus_are_asked_for(report, tables, arch):
    most = max(row["shared"] for row in triton_rows(report, arch) + tables[arch])
    assert most == SHARED_MEMORY.get(arch, most) <= ARCHS[arch][1] << 10


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_runs_on_tensor_cores(report, arch):
    kernels = [row for row in triton_rows(report, arch) if "attention" in row["name"] and "list" not in row["name"]]
    assert len(kernels) == 10
    for row in kernels:
        assert any(name.startswith(MATRIX[arch]) for name in row["tensor_core"]), row


def test_matrix_unit_is_waited_for_once_a_block_of_keys(report, compiled):
    """Otherwise the compiler had to serialise wgmma: each instruction is then followed by a wait."""
    rows = triton_rows(report, "sm90") + [row for rows in compiled["variants"].values() for row in rows]
    for row in rows:
        if "attention" in row["name"] and "list" not in row["name"]:
            assert 0 < 3 * row["waits"] <= row["tensor_core"]["wgmma.mma_async"], row


@pytest.mark.skipif(TRITON not in SPILLED, reason=f"what spills on Triton {TRITON} is not known")
def test_variants_spill_next_to_nothing(compiled):
    """And compile at all, where Triton sees integers that are 1."""
    assert {"causal", "window", "72 channels", "one row, adaLN", "float32 beside x, adaLN", "int8 with a mask"} < compiled[
        "variants"
    ].keys()
    worst = {name: max(row["spilled"] for row in rows) for name, rows in compiled["variants"].items()}
    allowed = SPILLED_VARIANTS.get(TRITON, {})
    assert {name: spilled for name, spilled in worst.items() if spilled > allowed.get(name, 0)} == {}


def test_one_version_of_a_kernel_serves_all_batches(compiled):
    counts = compiled["versions"]
    assert {"attention.forward_kernel", "spatiotemporal_attention.dkdv_kernel", "patch_embed.embed_kernel"} < counts.keys()
    # The list of tiles is made for each size of tile: of queries and of keys.
    assert counts == {name: 2 if "tile_list" in name else 1 for name in counts}


@pytest.mark.skipif(
    shutil.which("nvcc") is None or importlib.util.find_spec("sora_kernels._cuda") is None,
    reason="the CUDA kernels are built where there is an nvcc, for one Python",
)
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
    command = [sys.executable, "-m", "benchmarks.gpu_report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set; an interpreted kernel cannot be compiled" in done.stderr
