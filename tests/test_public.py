"""What `sora_kernels` exports: every public name, documented, and loaded only when it is asked for."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sora_kernels

# Modules of the package that users do not call: how ops are run, and `python -m sora_kernels.info`.
INTERNAL = {
    "adaln_op", "attention_arguments", "attention_op", "checks", "derivatives", "info", "last_result", "library", "reference",
    "signatures",
    "triton", "used_keys",
}  # fmt: skip
MODULES = sorted(module.name for module in pkgutil.iter_modules(sora_kernels.__path__) if not module.name.startswith("_"))


def defined(module: ModuleType) -> set[str]:
    """The functions and classes of a module without an underscore, or those that it lists."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_exported() -> None:
    assert set(MODULES) > INTERNAL
    modules = {name: importlib.import_module(f"sora_kernels.{name}") for name in MODULES if name not in INTERNAL}
    assert {name: origin for origin, module in modules.items() for name in defined(module)} == sora_kernels._PUBLIC
    assert sora_kernels.__all__ == sorted(sora_kernels._PUBLIC)
    assert set(sora_kernels.__all__) < set(dir(sora_kernels))


@pytest.mark.parametrize("name", sora_kernels.__all__)
def test_exported(name: str) -> None:
    value = getattr(sora_kernels, name)
    assert value is getattr(importlib.import_module(f"sora_kernels.{sora_kernels._PUBLIC[name]}"), name)
    assert value.__doc__
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if not attribute.startswith("_") and (callable(member) or isinstance(member, property | classmethod | staticmethod)):
            assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute}"


def test_type_checkers_see_the_same() -> None:
    tree = ast.parse(Path(str(sora_kernels.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == sora_kernels._PUBLIC


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'sora_kernels' has no attribute 'rope_4d'"):
        _ = sora_kernels.rope_4d


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    assert run("import sys, sora_kernels; print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize("first", ["", "import sora_kernels.bias_gelu; ", "from sora_kernels.bias_gelu import bias_gelu as b; "])
def test_functions_with_the_name_of_their_module(first: str) -> None:
    code = "from sora_kernels import bias_gelu, spatiotemporal_attention; print(bias_gelu, spatiotemporal_attention)"
    assert re.fullmatch("<function bias_gelu at .+> <function spatiotemporal_attention at .+>\n", run(first + code))
