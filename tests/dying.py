"""Kills what writes files, or fills its disk, at the n-th thing that it does to them: `Dying`.

Counted are files opened for writing, renames, removals, folders made, permissions, flushes, and safetensors files. A process that
was killed does nothing more: whatever it tries afterwards, in its `finally` clauses too, is refused. Files that were not flushed
are torn in half then, as a loss of power leaves them, and a safetensors file is torn while it is written.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
from safetensors import SafetensorError

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What the interpreter tells of, and where among its arguments the descriptor of the folder is that a name is relative to.
CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
_active: list[Dying] = []


class Killed(BaseException):
    """The process died here."""


class Dying:
    """While it lasts, operation number `at` on files below `root` is the last one, or fails for want of space.

    full: instead of death, the disk is full from then on: only renames, removals and permissions work.
    done: the operations so far. reached: whether there were so many.
    """

    def __init__(self, root: Path, at: int, *, full: bool = False) -> None:
        self.root, self.at, self.full = os.path.realpath(root), at, full
        self.done: list[str] = []
        self.reached = False
        self._unflushed: list[str] = []

    def __enter__(self) -> Dying:
        _active.append(self)
        self._patch = pytest.MonkeyPatch()
        fsync, save = os.fsync, safetensors.torch.save_file

        def flush(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.on("fsync", path)
            fsync(descriptor)
            self._unflushed = [one for one in self._unflushed if one != path]

        def write(tensors: dict, filename: str | Path, metadata: dict | None = None) -> None:
            path = self._inside(filename)
            try:
                self.on("safetensors", filename, torn=True)
            except (Killed, OSError) as error:
                if self._dead_before:
                    raise
                save(tensors, filename, metadata)
                os.truncate(filename, os.path.getsize(filename) // 2)
                if isinstance(error, OSError):
                    raise SafetensorError(f"Error while serializing: I/O error: {FULL.strerror} (os error 28)") from None
                raise
            save(tensors, filename, metadata)
            if path:
                self._unflushed.append(path)

        self._patch.setattr(os, "fsync", flush)
        self._patch.setattr(safetensors.torch, "save_file", write)
        for name in (
            "sora_model.storage.files.save_file",
            "sora_model.training.trainer.save_file",
            "transformers.modeling_utils.safe_save_file",
        ):
            self._patch.setattr(name, write)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        _active.remove(self)

    def _inside(self, path: object) -> str | None:
        """The path if it is one that counts."""
        if not isinstance(path, str | os.PathLike):
            return None
        path = os.path.abspath(path)
        return path if path.startswith(self.root) else None

    def on(self, event: str, *args: object, torn: bool = False) -> None:
        """Something is about to be done to a file."""
        path = self._inside(args[0])
        if path is None:
            return
        self._dead_before = self.reached and not self.full
        if self._dead_before:
            raise Killed(f"{event} after death")
        self.done.append(f"{event} {os.path.basename(path)}")
        frees = event in ("os.rename", "os.remove", "os.rmdir", "os.chmod")
        if len(self.done) >= self.at and not (self.full and frees):
            self.reached = True
            if self.full:
                raise OSError(errno.ENOSPC, FULL.strerror, path)
            for one in self._unflushed:
                if os.path.isfile(one):
                    os.truncate(one, os.path.getsize(one) // 2)
            raise Killed(f"{event} {path}")
        if event == "open":
            self._unflushed.append(path)
        elif event == "os.rename":
            target = os.path.abspath(str(args[1]))
            self._unflushed = [target + one[len(path) :] if one.startswith(path) else one for one in self._unflushed]


def _heard(event: str, args: tuple) -> None:
    if not _active:
        return
    if event == "open" and args[2] & WRITES and not args[2] & (os.O_APPEND | os.O_DIRECTORY):
        _active[-1].on("open", args[0])
    elif event in CHANGES:
        folder, path = args[CHANGES[event]], args[0]
        if isinstance(folder, int) and folder >= 0 and isinstance(path, str):  # as shutil.rmtree goes about it
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        _active[-1].on(event, path, *args[1:])


sys.addaudithook(_heard)  # for good, but it hears nothing unless something is dying
