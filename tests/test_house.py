"""The house keeps its rules: who imports whom, twins in every folder, nothing of the standard library leaks out of a tier."""

import ast
import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from tolerance import WITHOUT_CPU_KERNEL

import sora_kernels

ROOT = Path(__file__).parent.parent
# An op's family has a reference; attention's two stories share one.
OPS = sorted(path.stem for path in (ROOT / "sora_kernels/reference").glob("*.py") if path.stem not in ("__init__", "common"))
STORIES = sorted(path.stem for path in (ROOT / "sora_kernels").glob("*.py") if (ROOT / f"csrc/cpu/{path.stem}.cpp").is_file())


def imports(path: Path, for_type_checkers: bool = True) -> set[str]:
    """Absolute names of the modules that a file imports anywhere."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    tree = ast.parse(path.read_text())
    if not for_type_checkers:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
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


@pytest.mark.parametrize("path", files("sora_kernels/flash"), ids=lambda path: path.name)
def test_flash_imports_torch_and_little_else(path):
    """The packages that its kernels come from it loads by name."""
    allowed = {"torch", *sys.stdlib_module_names}
    of_kernels = ("flash", "backends", "attention_op", "checks", "_torch_private")
    for name in imports(path):
        assert name.partition(".")[0] in allowed or name.startswith(tuple(f"sora_kernels.{part}" for part in of_kernels)), name


@pytest.mark.parametrize("story", STORIES)
def test_stories_import_no_backend(story):
    names = imports(ROOT / "sora_kernels" / f"{story}.py")
    assert not [
        name for name in names if name.startswith(("sora_kernels._", "sora_kernels.reference", "sora_kernels.triton", "sora_model"))
    ]


def test_kernels_never_import_the_model():
    assert not [path for path in files("sora_kernels") if any(name.startswith("sora_model") for name in imports(path))]


def private_names(tree: ast.AST) -> list[str]:
    """What is imported from sora_kernels, anywhere, that users are not offered: whole modules among it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] == "sora_kernels"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sora_kernels":
            origin = (node.module or "").partition(".")[2]
            public = origin in ("", *sora_kernels._PUBLIC.values())
            known = {*sora_kernels.__all__, "__version__"}
            found += [f"{node.module}.{a.name}" for a in node.names if not public or a.name not in known]
    return found


@pytest.mark.parametrize("path", files("sora_model"), ids=lambda path: str(path.relative_to(ROOT)))
def test_model_imports_public_names_only(path):
    assert not private_names(ast.parse(path.read_text()))


def test_private_names_are_found():
    good = "from sora_kernels import rope_3d, use_backend\nfrom sora_kernels.attention import spatiotemporal_attention"
    bad = "from sora_kernels.library import rows\nfrom sora_kernels import backends\nfrom sora_kernels.rope import Theta"
    assert private_names(ast.parse(good)) == []
    assert private_names(ast.parse(f"{good}\n{bad}\nimport sora_kernels.layout")) == [
        "sora_kernels.library.rows", "sora_kernels.backends", "sora_kernels.rope.Theta", "sora_kernels.layout"
    ]  # fmt: skip


def import_graph(package: str) -> dict[str, set[str]]:
    """module of a package -> the modules of it that it imports anywhere, but for type checkers only."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files(package)}
    graph = {}
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in imports(path, for_type_checkers=False)}
        graph[module] = {name for name in names if name in modules} - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; none if there is no such thing."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for name in sorted(graph[path[-1]] - done):
            found = path[path.index(name) :] if name in path else search([*path, name])
            if found:
                return found
        done.add(path[-1])
        return []

    return next(filter(None, (search([name]) for name in graph)), [])


@pytest.mark.parametrize("package", ["sora_kernels", "sora_model"])
def test_no_module_imports_one_that_imports_it(package):
    graph = import_graph(package)
    assert any(graph.values())
    assert not circle(graph)


def test_a_circle_is_found():
    assert circle({"a": {"b", "d"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


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
        *([] if f"{op}_forward" in WITHOUT_CPU_KERNEL else [f"csrc/cpu/{op}.cpp"]),
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
    own = f"sora::{tier}::", f"4sora{len(tier)}{tier}"  # nm leaves long names as the compiler writes them
    assert not [name for name in weak if not any(place in name for place in own) and not name.startswith("DW.ref.")]


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


def included(path: Path) -> set[Path]:
    """The file and all of ours that it includes, directly or not."""
    found, ahead = set(), [path]
    while ahead:
        file = ahead.pop()
        if file not in found:
            found.add(file)
            names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
            ahead += [(file.parent / name).resolve() for name in names]
    return found


def test_cpu_and_cuda_never_include_each_other():
    csrc = ROOT.resolve() / "csrc"
    for path in sorted(csrc.rglob("*.[ch]*")):
        assert "torch/" not in path.read_text(), f"{path.name} includes torch"
        folders = {file.relative_to(csrc).parts[0] for file in included(path) if file.is_relative_to(csrc)}
        assert not {"cpu", "cuda"} <= folders, f"{path.name} includes headers of both"


def test_docs_have_the_gpu_results():
    from benchmarks.gpu import results

    page = results.PAGE.read_text()
    assert results.updated(page) == page, "run python -m benchmarks.gpu.results"
    assert results.BEGIN in page


def test_nothing_outside_the_world_imports_it():
    """Its commands and its data are found by name; see `sora_model/rooms.py`."""
    outside = [path for path in files("sora_model") if path.relative_to(ROOT).parts[1] != "world"]
    found = {path.relative_to(ROOT): [n for n in imports(path) if f"{n}.".startswith("sora_model.world.")] for path in outside}
    assert not {path: names for path, names in found.items() if names}
