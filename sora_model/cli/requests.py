"""The file of `sora batch`: a JSON list of requests, each checked field by field before any work begins."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..limits import check_limit, check_text
from ..storage.documents import read_json_for
from .app import parse_size
from .text import is_utf8

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline.parts import Outline
    from ..pipeline.request import Request

    Read = Callable[[Path, int | None, tuple[int, int] | None, str], tuple[Tensor, float]]


class Kind(NamedTuple):
    """What a field may hold, in words and as a test. JSON's true and false are no numbers, though Python's are."""

    expected: str
    fits: Callable[[Any], bool]
    is_optional: bool = False

    @property
    def optional(self) -> Kind:
        return self._replace(is_optional=True)


def _whole(first: int) -> Kind:
    return Kind(f"a whole number of at least {first}", lambda value: type(value) is int and value >= first)


def _is_size(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and len(value) == 3 and all(COUNT.fits(n) for n in value))


TEXT = Kind("text", lambda value: isinstance(value, str) and is_utf8(value))
FILE = Kind("the name of a file", lambda value: isinstance(value, str) and value != "")
COUNT = _whole(1)
SEED = Kind(f"a whole number from 0 to {2**63}", lambda value: type(value) is int and 0 <= value <= 2**63)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SHARE = Kind("a number above 0 and up to 1", lambda value: type(value) in (int, float) and 0 < value <= 1)
SIZE = Kind("TxHxW, such as 8x32x48, or [T, H, W], each at least 1", _is_size)

# What a request may say: the arguments of its function in request.py. Videos and images are paths, from the file's folder.
COMMON = {"prompt": TEXT, "negative_prompt": TEXT.optional, "seed": SEED.optional}
TASKS: dict[str, dict[str, Kind]] = {
    "text_to_video": {"size": SIZE.optional},
    "text_to_image": {"height": COUNT, "width": COUNT},
    "image_to_video": {"image": FILE, "frames": COUNT, "last": FILE.optional},
    "video_to_video": {"video": FILE, "strength": SHARE.optional},
    "extend": {"video": FILE, "frames": COUNT, "overlap": _whole(0).optional, "backward": FLAG.optional},
    "join": {"first": FILE, "last": FILE, "frames": COUNT, "overlap": _whole(0).optional},
}
# The names of the commands for the tasks that have another name in the library.
ALIASES = {"generate": "text_to_video", "animate": "image_to_video", "restyle": "video_to_video"}


def described() -> str:
    """The help of `sora batch`: the format, every task and every field."""

    def listed(fields: dict[str, Kind]) -> str:
        return "\n".join(
            f"  {name}: {kind.expected}{', may be left out' if kind.is_optional else ''}" for name, kind in fields.items()
        )

    commands = {task: command for command, task in ALIASES.items()}
    tasks = "\n".join(f"{task}{f' or {commands[task]}' if task in commands else ''}\n{listed(TASKS[task])}" for task in TASKS)
    example = '[{"prompt": "a blue star"}, {"task": "extend", "prompt": "a blue star moves up", "video": "star.mp4", "frames": 8}]'
    parts = [
        "Run requests of different tasks and sizes in one packed batch.",
        f"REQUESTS is a JSON file, a list of objects:\n{example}",
        "A request is of task text_to_video unless it says another. Names of files count from the folder of REQUESTS.",
        f"Fields of all tasks:\n{listed(COMMON)}",
        f"Tasks, and their fields:\n{tasks}",
    ]
    return "\n\n".join(f"\b\n{part}" for part in parts)


@dataclass(frozen=True)
class Asked:
    """A request of the file, its videos and images read, before it is known what the checkpoint's timing and size are.

    rates: frames per second of its videos. files: the paths of its videos and images, by their fields.
    """

    number: int
    task: str
    fields: dict[str, Any]
    rates: list[float]
    files: dict[str, Path]

    @property
    def settings(self) -> dict[str, Any]:
        """What the video's file says of its request, defaults of the task included; its prompt, seed and size it has anyway."""
        from ..pipeline import request

        parameters = inspect.signature(getattr(request, self.task)).parameters
        names = [name for name in TASKS[self.task] if name not in ("size", "height", "width")]
        values = {**{name: parameters[name].default for name in names}, **self.fields, **self.files}
        return {"task": self.task, "negative": self.fields["negative_prompt"], **{name: values[name] for name in names}}

    def request(self, outline: Outline) -> Request:
        from ..pipeline import request

        fields = dict(self.fields)
        if self.task in ("image_to_video", "extend", "join"):
            fields["timing"] = outline.timing
        if self.task == "text_to_video":
            fields.setdefault("size", outline.size)
        try:
            return getattr(request, self.task)(**fields)
        except ValueError as error:
            raise ValueError(f"batch: request {self.number}: {error}") from None


def read_requests(path: Path, negative: str, read: Read) -> list[Asked]:
    """The requests of a file in UTF-8; negative: the negative prompt of those that have none; read: `Call.read`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is not JSON; tasks, fields and values that cannot be, named with the number of their request.
    """
    if not os.path.isfile(path):  # Path.is_file fails for a name that is too long
        raise FileNotFoundError(f"batch: expected a JSON file, got {path}")
    wanted = read_json_for("batch", path)
    if not isinstance(wanted, list) or not wanted or not all(isinstance(one, dict) for one in wanted):
        raise ValueError(f"batch: {path}: expected a list of objects with a task each")
    check_limit("requests", len(wanted), f"batch: {path}", "requests")
    checked = [_checked(one, i) for i, one in enumerate(wanted)]
    texts = [fields[name] for _, fields in checked for name in ("prompt", "negative_prompt") if fields.get(name)]
    check_limit("batch_text", sum(map(len, texts)), f"batch: {path}: prompts", "characters")
    read = _once(read)
    return [_read(task, fields, i, path.parent, negative, read) for i, (task, fields) in enumerate(checked)]


def _once(read: Read) -> Read:
    """Reads a file that many requests name once, under whatever names; all files together hold no more pixels than one may."""
    known: dict[tuple[Any, ...], tuple[Tensor, float]] = {}

    def reading(path: Path, *how: Any) -> tuple[Tensor, float]:
        key = os.path.realpath(path) if os.path.exists(path) else path, *how
        if key not in known:
            known[key] = read(path, *how)
            check_limit("clip_pixels", sum(clip[0].numel() for clip, _ in known.values()), "with the files before it", "pixels")
        return known[key]

    return reading


def _checked(one: dict[str, Any], number: int) -> tuple[str, dict[str, Any]]:
    """The task of a request and its fields, each of the kind that it must be."""
    where, fields = f"batch: request {number}", dict(one)
    task = fields.pop("task", "text_to_video")
    task = ALIASES.get(task, task) if isinstance(task, str) else task
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"{where}: task: expected one of {', '.join([*TASKS, *ALIASES])}, got {task!r}")
    kinds = {**COMMON, **TASKS[task]}
    for name, value in fields.items():
        if name not in kinds:
            raise ValueError(f"{where}: expected {', '.join(sorted(kinds))} for {task}, got {name}")
        if not kinds[name].fits(value) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{where}: {name}: expected {kinds[name].expected}, got {json.dumps(value)}")
        if kinds[name].expected == TEXT.expected:
            check_text(value, f"{where}: {name}")
        if name == "size" and isinstance(value, str):
            fields[name] = parse_size(value, f"{where}: size")
    for name, kind in kinds.items():
        if name not in fields and not kind.is_optional:
            raise ValueError(f"{where}: {name}: expected {kinds[name].expected} for {task}, got none")
    return task, fields


def _read(task: str, fields: dict[str, Any], number: int, folder: Path, negative: str, read: Read) -> Asked:
    """A request with its videos and images in place of their names."""
    fields, rates = {"negative_prompt": negative, **fields}, []
    files: dict[str, Path] = {name: folder / fields[name] for name in ("image", "video", "first", "last") if name in fields}
    images = task == "image_to_video"
    for name, path in files.items():
        before = "image" if images else "first"
        size = tuple(fields[before].shape[2:]) if name == "last" else None  # read before
        try:
            fields[name], rate = read(path, 1 if images else None, size, f", as {before} has them" if size else "")
        except (ValueError, OSError) as error:
            raise ValueError(f"batch: request {number}: {name}: {error}") from None
        rates += [] if images else [rate]
    return Asked(number, task, fields, rates, files)
