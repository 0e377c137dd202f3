"""Files and folders that are written whole or not at all, whenever a process is killed or a disk is full.

What is new is written into a folder beside its target, `.NAME.XXXXXXXX.part`, flushed to the disk, and then renamed. A file takes
the place of another in one step. A folder cannot: the old one first moves into the .part folder, then the new one takes its name.
Between these two renames there is no target, and `settle` moves the old one back. A .part folder is locked while its process lives,
so that `settle` can tell what a killed one left behind and removes it.

A checkpoint is a folder in the manner of diffusers: model_index.json says what there is, and each part has a folder of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .weights import check_finite, distinct_state

CONFIGS = ("model_index.json", "config.json")
# What files of a checkpoint are called, those of tokenizers included.
SUFFIXES, NAMES = {".json", ".safetensors", ".model", ".jinja"}, {"merges.txt", "vocab.txt"}
OF_SYSTEMS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # files that file managers leave behind: no loss
NAME_BYTES = 255  # the longest name of a file


class WriteError(OSError):
    """Something could not be written; the message names it and the reason."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever keeps `path` from being written becomes a WriteError."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WriteError(f"cannot write {path}: {reason}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the name `path`; if anything fails, `path` stays as it was.

    Where `path` is a symbolic link, what it leads to is written, and the link stays.
    """
    target = Path(os.path.realpath(path))
    with writing(path), _workspace(target) as space:
        temporary = space / "new" / f".file{target.suffix}"  # hidden from what looks for videos and images meanwhile
        yield temporary
        _finish(space / "new")
        temporary.replace(target)
        flush(target.parent)


@contextlib.contextmanager
def whole_folder(directory: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `directory` at the end; if anything fails, `directory` stays as it was.

    Raises ValueError as `check_replaceable` does.
    """
    target = Path(os.path.realpath(directory))
    with writing(Path(directory)):
        settle(target)
        check_replaceable(directory)
        with _workspace(target) as space:
            new, old = space / "new", space / "old"
            yield new
            _finish(new)
            if target.exists():
                target.rename(old)
            new.rename(target)
            flush(target.parent)
            if old.exists():
                old.rename(space / "gone")  # a half-removed folder must not be taken for a whole one


def settle(path: str | Path) -> None:
    """Brings to an end what killed processes left of a write of `path`: moves an old folder back, removes what was half-written."""
    target = Path(os.path.realpath(path))
    for space in target.parent.glob(f"{glob.escape(_prefix(target))}????????.part"):
        _settle(space, target)


def settle_folder(folder: Path) -> None:
    """Does what `settle` does for whatever was written in a folder."""
    for space in folder.glob(".*.????????.part"):
        name = space.name[1 : -len(".12345678.part")]
        if _prefix(folder / name) == space.name[: -len("12345678.part")]:  # not a hash, of which no name can be made
            _settle(space, folder / name)


def _settle(space: Path, target: Path) -> None:
    """Ends the folder of `_workspace` of a process that is dead."""
    lock = _lock(space, wait=False)
    if lock is None:
        return
    try:
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if {path.name for path in space.iterdir()} <= {"new", "old", "gone"}:  # whatever else is in there is a user's
                _end(space, target)
    finally:
        os.close(lock)


def _end(space: Path, target: Path) -> None:
    """Removes a folder of `_workspace`, after moving back an old folder whose place was not taken."""
    old = space / "old"
    if old.is_dir() and not target.exists():
        old.rename(target)
    shutil.rmtree(space, ignore_errors=True)


@contextlib.contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A locked folder beside `target` with a folder "new" in it."""
    make_folder(target.parent)
    settle(target)
    while True:
        space = Path(tempfile.mkdtemp(".part", _prefix(target), target.parent))
        lock = _lock(space, wait=True)
        if space.exists():
            break
        if lock is not None:  # `settle` of another process came first and removed what was not yet locked
            os.close(lock)
    try:
        (space / "new").mkdir()
        yield space
    finally:
        try:
            _end(space, target)
        finally:
            if lock is not None:
                os.close(lock)


def _prefix(target: Path) -> str:
    """What the names of the folders of `_workspace` begin with: the target's name, or where that leaves no room its hash."""
    name = os.fsencode(target.name)
    return f".{target.name}." if len(name) <= NAME_BYTES - len("..12345678.part") else f".{hashlib.sha256(name).hexdigest()}."


def _lock(folder: Path, wait: bool) -> int | None:
    """Locks a folder until what is returned is closed or the process ends.

    None where another process holds it, or the file system has no locks: there nothing is ever taken for abandoned.
    """
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Locks a folder until the end of the block, or until the process dies. Yields whether it was free.

    On a file system without locks every folder is free.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass
        yield free
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Waits until no other process is in a block with this lock file. The file is there only as long as the block.

    The file that a killed process leaves behind locks nothing, and the next block removes it. On a file system without locks no
    process waits.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                break
        os.close(descriptor)  # another process removed the file before it was locked here
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _finish(folder: Path) -> None:
    """Gives what was written into a folder the permissions of ordinary files, and flushes it: libraries make private ones."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(PermissionError):  # of a file system that has no permissions
                path.chmod(mode)
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those that it lies in, if they are not there, and flushes their names."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        flush(path.parent)


def check_replaceable(directory: str | Path) -> None:
    """Raises ValueError for a file, and for a folder in which there is something else than a checkpoint: it would be lost."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"checkpoint: expected a folder, got the file {directory}")
    files = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(target) for path in files if path.name not in OF_SYSTEMS)
    if any((target / name).is_file() for name in CONFIGS):
        names = (name for name in names if name.suffix not in SUFFIXES and name.name not in NAMES)
    other = next(names, None) if target.is_dir() else None
    if other is not None:
        expected = "an empty folder or one with a checkpoint to replace"
        raise ValueError(f"checkpoint: expected {expected}, got {directory}, which holds {other}")


def save_whole(model: Any, folder: Path) -> None:
    """model.save_pretrained(folder), all or nothing."""
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)


def save_module(module: nn.Module, config: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and model.safetensors; floating-point weights in `dtype`, if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(dtype if value.is_floating_point() else None) for name, value in distinct_state(module).items()}
    for name, value in weights.items():  # float16 ends at 65504
        check_finite(value, f"{type(module).__name__}: {name}")
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
