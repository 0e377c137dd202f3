"""A stand-in for the package flash_attn, on machines where that cannot be installed.

After `install()`, `import flash_attn` finds it. Names and semantics are those of flash_attn 2.8. What flash_attn can do and these
kernels cannot raises an error that names the argument. Libraries that ask for an installed distribution need `stub.py`'s wheel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pkgutil import extend_path
from types import ModuleType

from ...checks import check_bool, fail
from . import bert_padding, interface, rotary

VERSION = "2.8.4+sora"
"""The version of flash_attn whose signatures and semantics these are; its last part tells the two apart."""


class Part(ModuleType):
    """A module of the stand-in."""


# What each module has, and from where.
CONTENTS: dict[str, tuple[ModuleType | None, tuple[str, ...]]] = {
    "flash_attn": (interface, interface.PUBLIC),
    "flash_attn.flash_attn_interface": (interface, interface.NAMES),
    "flash_attn.bert_padding": (bert_padding, bert_padding.NAMES),
    "flash_attn.layers": (None, ()),
    "flash_attn.layers.rotary": (rotary, rotary.NAMES),
}
PACKAGES = ("flash_attn", "flash_attn.layers")
_earlier: dict[str, ModuleType] | None = None  # what `install` found in sys.modules; None: nothing is installed


def install(*, replace: bool = False) -> None:
    """Has `import flash_attn` find the stand-in from now on; twice is once. Call it before what imports flash_attn.

    Other parts of flash_attn that are installed, such as FlashAttention-4's `flash_attn.cute`, can be imported beside it.

    Args:
        replace: also where a flash_attn is installed, for instance one that was compiled for another torch. What the stand-in does
            not have still comes from there.

    Raises:
        ValueError: a flash_attn is installed and `replace` is False, or one is imported already.
    """
    global _earlier
    replace = check_bool("install", "replace", replace)
    module = sys.modules.get("flash_attn")
    if module is not None and _is_ours(getattr(module, "__version__", "")):
        return
    if module is not None and getattr(module, "__file__", None) is not None:
        fail("install", "flash_attn", "a package that is not imported yet", f"one imported from {module.__file__}")
    origin = None if module is not None else _installed_at()
    if origin is not None and not replace:
        fail("install", "replace", f"True, as flash_attn is installed at {origin}", "False")
    _earlier = {name: module for name, module in sys.modules.items() if _is_part(name)}
    for name in CONTENTS:
        _add(name)
    for name, module in _earlier.items():  # such as flash_attn.cute, which a bare namespace had
        if name.count(".") == 1 and name not in CONTENTS:
            setattr(sys.modules["flash_attn"], name.partition(".")[2], module)


def uninstall() -> None:
    """Undoes `install`: sys.modules has what it had of flash_attn before. Nothing happens where nothing is installed.

    Who has imported a function keeps it. A wheel that `stub.py` made is pip's to uninstall.
    """
    global _earlier
    if _earlier is None:
        return
    for name in [name for name in sys.modules if _is_part(name)]:
        del sys.modules[name]
    sys.modules.update(_earlier)
    _earlier = None


def _is_part(name: str) -> bool:
    return name.partition(".")[0] == "flash_attn"


def _is_ours(version: object) -> bool:
    return str(version).endswith("+sora")


def _installed_at() -> str | None:
    """Where a flash_attn is installed that would be imported; None for none, a bare namespace, or our own wheel."""
    spec = importlib.util.find_spec("flash_attn")
    if spec is None or spec.origin is None:
        return None
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return None if _is_ours(version) else spec.origin


def _add(name: str) -> None:
    source, names = CONTENTS[name]
    module = Part(name, f"{name}, as sora_kernels stands in for it.")
    module.__spec__ = ModuleSpec(name, None, origin="sora_kernels", is_package=name in PACKAGES)
    module.__file__ = (source or sys.modules[__name__]).__file__
    module.__dict__.update({key: getattr(source, key) for key in names})
    parent, _, child = name.rpartition(".")
    sys.modules[name] = module
    if parent:
        module.__package__ = name if name in PACKAGES else parent
        setattr(sys.modules[parent], child, module)
    else:
        module.__package__, module.__dict__["__version__"] = name, VERSION
    if name in PACKAGES:
        module.__path__ = extend_path([], name)  # after its parent is there, as this asks for its path
        module.__spec__.submodule_search_locations = module.__path__  # type: ignore[assignment]
