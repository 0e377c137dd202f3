"""The house keeps its rules: who imports whom, twins in every folder, nothing of the standard library leaks out of a tier."""

import ast
import re
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


@pytest.mark.parametrize("package", ["sora_kernels", "sora_model"])
def test_type_checkers_of_users_read_the_types(package):
    assert (ROOT / package / "py.typed").is_file()
    assert re.search(rf'^package-data = .*{package} = \[[^]]*"py.typed"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


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


def private_torch(path: Path) -> list[str]:
    """Names of torch that begin with an underscore, as a file imports or reads them."""
    of_torch, found = {}, []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            of_torch |= {alias.asname or "torch": alias.name for alias in node.names if is_torch(alias.name)}
            found += [alias.name for alias in node.names if is_torch(alias.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level and is_torch(node.module or ""):
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            of_torch |= names
            found += names.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            root, _, rest = dotted.partition(".")
            if root in of_torch:
                found.append(f"{of_torch[root]}.{rest}")
    return sorted({name for name in found if re.search(r"\._(?!_)", name)})


def is_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


@pytest.mark.parametrize("path", files("sora_kernels") + files("sora_model"), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_parts_of_torch_are_in_one_file(path):
    found = private_torch(path)
    assert bool(found) == (path.name == "_torch_private.py"), found


def test_private_parts_of_torch_are_found(tmp_path):
    file = tmp_path / "file.py"
    lines = [
        "import torch",
        "import torch._dynamo as dynamo",
        "from torch._library import infer",
        "from torch.autograd import forward_ad",
    ]
    file.write_text("\n".join([*lines, "torch._C.f()", "forward_ad._current_level", "torch.nn.Module.__init__", "self._C", ""]))
    assert private_torch(file) == [
        "torch._C", "torch._C.f", "torch._dynamo", "torch._library.infer", "torch.autograd.forward_ad._current_level"
    ]  # fmt: skip


def test_cpu_and_cuda_never_include_each_other():
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        text = path.read_text()
        assert "torch/" not in text, f"{path.name} includes torch"
        if path.parent.name == "cpu":
            assert "cuda/" not in text
        if path.parent.name == "cuda":
            assert "cpu/" not in text


def test_readme_has_the_gpu_results():
    from benchmarks.gpu import results

    readme = (ROOT / "README.md").read_text()
    assert results.updated(readme) == readme, "run python -m benchmarks.gpu.results"
    assert results.BEGIN in readme
