"""What a disk holds after a loss of power: `Disk`, which follows the calls that interposer.c wrote down.

A disk keeps what a program has flushed: a file's bytes by fsync of the file, and names by fsync of their folder. What was not
flushed may be there or not. The states that are made of it are the extremes:

    names lost     every folder as it was when it was flushed last
    bytes torn     all names as they are, but only half of what was written to a file since it was flushed
    bytes zeroed   the same, but those bytes are zeros, as file systems leave them that allocate late

Files are written from front to back, so what was written since a flush lies behind what was flushed. A rename is never seen half
done: file systems with a journal promise that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LOSSES = ("names lost", "bytes torn", "bytes zeroed")


class Call(NamedTuple):
    """A line of the journal. path: absolute. other: where a rename leads, or how many bytes a file had that was flushed, or
    has that was cut."""

    number: int
    name: str
    path: str
    other: str

    def __str__(self) -> str:
        return f"{self.name} {self.path}{f' -> {self.other}' if self.other else ''}"


def read_journal(path: Path) -> list[Call]:
    calls = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        number, name, first, other = (os.fsdecode(part) for part in line.split(b"\0"))
        calls.append(Call(int(number), name, first, other))
    return calls


class File:
    """flushed: how many bytes are safe. kept: the name of its bytes among those that have no other name any more."""

    def __init__(self, flushed: int = 0) -> None:
        self.flushed, self.kept = flushed, ""


class Folder:
    """Names as they are now, and as they were flushed."""

    def __init__(self) -> None:
        self.now: dict[str, File | Folder] = {}
        self.flushed: dict[str, File | Folder] = {}


class Rename(NamedTuple):
    source: Folder
    name: str
    target: Folder
    to: str
    moved: File | Folder


class Disk:
    """Follows calls below `root`, which was wholly flushed when it was a copy of `before`.

    kept: the folder in which interposer.c gives other names to files that lose theirs.
    """

    def __init__(self, before: Path, root: Path, kept: Path) -> None:
        self.root, self.kept = root, kept
        self.top = _of(before)
        self._renames: list[Rename] = []  # that no flush has made sure of

    def _find(self, path: str) -> tuple[Folder, str]:
        """The folder that a path is in, and its last part; the root itself is "" in itself."""
        *parents, name = Path(path).relative_to(self.root).parts or ("",)
        folder = self.top
        for part in parents:
            folder = folder.now[part]  # type: ignore[assignment]
        return folder, name

    def follow(self, call: Call) -> None:
        if call.path.endswith(" (deleted)") or call.name == "write":
            return
        folder, name = self._find(call.path)
        one = folder.now.get(name) if name else self.top
        if call.name in ("open", "create"):
            if one is None:
                folder.now[name] = File()
            elif call.name == "create" and isinstance(one, File):
                one.flushed = 0
        elif call.name == "mkdir":
            folder.now[name] = Folder()
        elif call.name in ("remove", "rmdir"):
            gone = folder.now.pop(name)
            if isinstance(gone, File):
                gone.kept = str(call.number)
        elif call.name == "rename":
            target, to = self._find(call.other)
            moved, replaced = folder.now.pop(name), target.now.get(to)
            if isinstance(replaced, File):
                replaced.kept = str(call.number)
            target.now[to] = moved
            self._renames.append(Rename(folder, name, target, to, moved))
        elif call.name == "truncate" and isinstance(one, File):
            one.flushed = min(one.flushed, int(call.other))
        elif call.name == "flush" and isinstance(one, File):
            one.flushed = int(call.other)
        elif call.name == "flush" and isinstance(one, Folder):
            self._flush(one)
        else:
            raise NotImplementedError(f"a loss of power after {call}")

    def _flush(self, folder: Folder) -> None:
        """Makes sure of a folder's names, and of the other end of what was moved in or out."""
        folder.flushed = dict(folder.now)
        for one in [one for one in self._renames if folder in (one.source, one.target)]:
            self._renames.remove(one)
            if one.source.flushed.get(one.name) is one.moved:
                del one.source.flushed[one.name]
            if one.target.now.get(one.to) is one.moved:
                one.target.flushed[one.to] = one.moved

    def left(self, loss: str) -> Iterator[tuple[str, bytes | None]]:
        """Paths below the root after one of LOSSES, each with a file's bytes, or None for a folder."""
        paths = {id(node): path for path, node in _walk(self.top, "", now=True)}
        for path, node in _walk(self.top, "", now=loss != "names lost"):
            if isinstance(node, Folder):
                yield path, None
                continue
            data = (self.root / paths[id(node)] if id(node) in paths else self.kept / node.kept).read_bytes()
            lost = max(len(data) - node.flushed, 0)
            yield path, data[: node.flushed] + (bytes(lost) if loss == "bytes zeroed" else data[node.flushed :][: lost // 2])


def _of(path: Path) -> Folder:
    folder = Folder()
    for one in path.iterdir():
        folder.now[one.name] = _of(one) if one.is_dir() else File(one.stat().st_size)
    folder.flushed = dict(folder.now)
    return folder


def _walk(folder: Folder, prefix: str, now: bool) -> Iterator[tuple[str, File | Folder]]:
    for name, node in (folder.now if now else folder.flushed).items():
        yield f"{prefix}{name}", node
        if isinstance(node, Folder):
            yield from _walk(node, f"{prefix}{name}/", now)
