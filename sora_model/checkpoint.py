"""Folders that are written whole or not at all, and the components in them.

A checkpoint is a folder in the manner of diffusers: model_index.json says what there is, and each part has a folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIGS = ("model_index.json", "config.json")
# What files of a checkpoint are called, those of tokenizers included.
SUFFIXES, NAMES = {".json", ".safetensors", ".model", ".jinja"}, {"merges.txt", "vocab.txt"}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which then takes its name; if anything fails, `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(directory: str | Path) -> None:
    """Raises ValueError for a file, and for a folder in which there is something else than a checkpoint: it would be lost."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"checkpoint: expected a folder, got the file {directory}")
    if not target.is_dir() or not any(target.iterdir()):
        return
    other = None
    if any((target / name).is_file() for name in CONFIGS):
        files = (path for path in target.rglob("*") if path.is_file())
        other = next((path for path in files if path.suffix not in SUFFIXES and path.name not in NAMES), None)
        if other is None:
            return
    held = f", which holds {other.name}" if other else ""
    raise ValueError(f"checkpoint: expected an empty folder or one with a checkpoint to replace, got {directory}{held}")


@contextmanager
def whole_folder(directory: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `directory` at the end; if anything fails, `directory` stays as it was.

    Raises ValueError as `check_replaceable` does.
    """
    target = Path(directory).absolute()
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's folders are private
        if target.exists():
            _replace(target, folder)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(target: Path, folder: Path) -> None:
    """folder takes the place of target, which is lost only when that is done."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = aside / target.name
    try:
        target.rename(old)
        folder.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def save_whole(model: Any, folder: Path) -> None:
    """model.save_pretrained(folder), all or nothing."""
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)


def save_module(module: nn.Module, config: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and model.safetensors; floating-point weights in `dtype`, if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(dtype if value.is_floating_point() else None) for name, value in distinct_state(module).items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_json(path: Path, owner: str) -> dict[str, Any]:
    """A JSON file of a checkpoint; `owner` is named in the error if it is not there or broken."""
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: expected a folder with {path.name}, got {path.parent}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{owner}: {path}: expected JSON, got {error}") from None


def built(kind: Callable[..., Any], config: dict[str, Any], owner: str, **more: Any) -> Any:
    """kind(**config); keys that it does not take are an error that says so."""
    try:
        return kind(**config, **more)
    except TypeError as error:
        raise ValueError(f"{owner}: config.json: {error}") from None


def load_weights(module: nn.Module, folder: Path, owner: str) -> None:
    """Reads model.safetensors into a module, whose weights keep their dtype.

    Raises:
        ValueError: a broken file; weights that are missing, left over or of another shape.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: expected a folder with model.safetensors, got {folder}")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{owner}: {path}: expected safetensors, got {error}") from None
    load_distinct(module, weights, f"{owner}: {path}")


def load_distinct(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Takes what `distinct_state` gave into a module; raises ValueError for weights missing, left over or of another shape."""
    expected = {name: tuple(value.shape) for name, value in distinct_state(module).items()}
    got = {name: tuple(value.shape) for name, value in weights.items()}
    for name in {**expected, **got}:
        if expected.get(name) != got.get(name):
            raise ValueError(f"{where}: {name}: expected shape {expected.get(name)}, got {got.get(name)}")
    module.load_state_dict(weights, strict=False)


def distinct_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without second names of one tensor (tied embeddings)."""
    names = {value.data_ptr(): name for name, value in reversed(module.state_dict().items())}
    return {name: value for name, value in module.state_dict().items() if names[value.data_ptr()] == name}
