"""The house keeps its rules: who imports whom, twins in every folder, nothing of the standard library leaks out of a tier."""

import ast
import functools
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent
OPS = ("attention", "rope", "adaln", "bias_gelu", "patch_embed")
STORIES = (*OPS, "spatiotemporal_attention")


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports anywhere."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            names |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"nothing in {folder}"
    return found


@pytest.mark.parametrize("path", files("sora_kernels/reference"), ids=lambda path: path.name)
def test_reference_imports_torch_and_einops_only(path):
    allowed = {"torch", "einops", *sys.stdlib_module_names}
    outside = [name for name in imports(path) if name.partition(".")[0] not in allowed]
    assert all(name.startswith("sora_kernels.reference") for name in outside), outside


@pytest.mark.parametrize("path", files("sora_kernels/triton"), ids=lambda path: path.name)
def test_triton_imports_torch_and_triton_only(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name in imports(path):
        assert name.partition(".")[0] in allowed or name.startswith("sora_kernels.triton."), name


@pytest.mark.parametrize("story", STORIES)
def test_stories_import_no_backend(story):
    names = imports(ROOT / "sora_kernels" / f"{story}.py")
    assert not [
        name for name in names if name.startswith(("sora_kernels._", "sora_kernels.reference", "sora_kernels.triton", "sora_model"))
    ]


def test_kernels_never_import_the_model():
    assert not [path for path in files("sora_kernels") if any(name.startswith("sora_model") for name in imports(path))]


def test_model_imports_public_names_only():
    for path in files("sora_model"):
        for name in imports(path):
            if name.startswith("sora_kernels"):
                assert name.removeprefix("sora_kernels.") in (*STORIES, "layout", "info", "backends"), f"{path.name} imports {name}"


@pytest.mark.parametrize("op", OPS)
def test_one_basename_everywhere(op):
    for twin in (
        f"sora_kernels/{op}.py",
        f"sora_kernels/reference/{op}.py",
        f"sora_kernels/triton/{op}.py",
        f"csrc/cpu/{op}.cpp",
        f"tests/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ):
        assert (ROOT / twin).is_file(), f"missing {twin}"


def build_script() -> dict:
    """What setup.py defines; it builds nothing."""
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, SORA_KERNELS_CUDA="0"):
        return runpy.run_path(str(ROOT / "setup.py"))


SETUP = build_script()
COMPILATIONS = [pytest.param(*tier, source, id=f"{source}-{tier[0]}") for *tier, sources in SETUP["TIERS"] for source in sources]


@functools.cache
def compiler_knows(compiler: str, flags: str) -> bool:
    command = [compiler, *flags.split(), "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True, check=False).returncode == 0


@pytest.mark.parametrize(("tier", "width", "flags", "source"), COMPILATIONS)
def test_tiers_leak_no_shared_symbols(tier, width, flags, source, tmp_path):
    """The linker merges weak symbols over all tiers: one outside the tier's namespace could carry AVX-512 into the baseline.

    Without optimisation, so that no inlining hides one.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    if not compiler_knows(compiler, flags):
        pytest.skip(f"{compiler} does not know {flags}")
    output = tmp_path / "source.o"
    defines = [f"-DSORA_TIER={tier}", f"-DSORA_VECTOR_BYTES={width}", *flags.split()]
    command = [compiler, *SETUP["CPU_FLAGS"].split(), "-O0", *defines]
    subprocess.run([*command, "-c", str(SETUP["CPU"] / f"{source}.cpp"), "-o", str(output)], check=True)
    symbols = subprocess.run(["nm", "-C", str(output)], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [line.split(maxsplit=2)[2] for line in symbols if line[17:18] in "WVu"]
    assert weak or source != "attention", "expected the tier's own templates: is nm's output read right?"
    assert not [name for name in weak if f"sora::{tier}::" not in name and not name.startswith("DW.ref.")]


def test_cpu_and_cuda_never_include_each_other():
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        text = path.read_text()
        assert "torch/" not in text, f"{path.name} includes torch"
        folder = path.relative_to(ROOT / "csrc").parts[0]
        if folder == "cpu":
            assert "cuda/" not in text
        if folder == "cuda":
            assert "cpu/" not in text


def test_readme_has_the_gpu_results():
    from benchmarks.gpu import results

    readme = (ROOT / "README.md").read_text()
    assert results.updated(readme) == readme, "run python -m benchmarks.gpu.results"
    assert results.BEGIN in readme
