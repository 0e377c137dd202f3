"""The house keeps its rules: who imports whom, twins in every folder, nothing of the standard library leaks out of a tier."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("op", OPS)
def test_tiers_leak_no_shared_symbols(op, tmp_path):
    """The linker merges weak symbols over all tiers: one outside the tier's namespace could carry AVX-512 into the baseline."""
    if shutil.which("c++") is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    output = tmp_path / "op.o"
    flags = ["-std=c++17", "-O0", "-fPIC", "-fopenmp", "-DSORA_TIER=sometier", "-DSORA_VECTOR_BYTES=16"]
    subprocess.run(["c++", *flags, "-c", str(ROOT / "csrc/cpu" / f"{op}.cpp"), "-o", str(output)], check=True)
    symbols = subprocess.run(["nm", "-C", str(output)], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [line.split(maxsplit=2)[2] for line in symbols if line[17:18] in "WVu"]
    assert weak or op != "attention", "expected the tier's own templates: is nm's output read right?"
    assert not [name for name in weak if "sora::sometier::" not in name and not name.startswith("DW.ref.")]


def test_cpu_and_cuda_never_include_each_other():
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        text = path.read_text()
        assert "torch/" not in text, f"{path.name} includes torch"
        if path.parent.name == "cpu":
            assert "cuda/" not in text
        if path.parent.name == "cuda":
            assert "cpu/" not in text


def test_docs_have_the_gpu_results():
    from benchmarks.gpu import results

    page = results.PAGE.read_text()
    assert results.updated(page) == page, "run python -m benchmarks.gpu.results"
    assert results.BEGIN in page
