"""What a model is trained on, by name: a folder of files, or what a room of the package offers.

"clips" is the folder clips/, with captions in .txt beside its files. A name with a colon belongs to a room: "world:simple" is made
by the module `training_data` of the room world.

>>> training_data("world:studio,lessons").name
'world:studio,lessons'

Settings are called as the command's options are: a run's file keeps them by these names, and messages show them.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..data import FolderSource, Source
from ..data.budget import Fit, TokenBudget
from ..rooms import module_of, rooms_with
from ..sizes import Size, Timing

logger = logging.getLogger(__name__)
MODULE = "training_data"  # of a room: its function `named` takes what follows the room's name


class FileLimits(NamedTuple):
    """The most frames that are taken of a file, and the most pixels of each. None: what a batch holds."""

    max_frames: int | None = None
    max_pixels: int | None = None


class Wanted(NamedTuple):
    """What a model takes.

    purpose: "dit", "vae" or "captioner". unit: pixels of a token along T, H and W. timing: pixel frames of a token frame.
    budget: what a batch holds. frames: the most that are taken of a file unless a limit is set. captions: False where none are
    needed.
    """

    purpose: str
    unit: Size
    timing: Timing
    budget: TokenBudget
    frames: int = 32
    captions: bool = True


@dataclass(frozen=True)
class Clips:
    """Clips to learn from.

    source: of the clips. size: (T, H, W) that a pipeline makes by default. captions: to learn words from.
    unseen: numbers of clips that are never trained on; none of a folder. repeated: the same clips come in every epoch, so that
    their latents can be kept. min_sizes: see `PackedSampler`.
    """

    source: Source
    size: Size
    captions: Callable[[], Iterable[str]]
    unseen: Sequence[int] = ()
    repeated: bool = False
    min_sizes: int = 1


class TrainingData(Protocol):
    """Something to learn from.

    name: what it is called in a run's settings. check: raises ValueError for settings that it cannot follow, by their names,
    before anything is opened. clips: opens it.
    """

    @property
    def name(self) -> str: ...

    def check(self, purpose: str, sizes: Sequence[Size], files: FileLimits) -> None: ...

    def clips(self, wanted: Wanted, sizes: Sequence[Size], files: FileLimits, seed: int) -> Clips: ...


def training_data(name: str) -> TrainingData:
    """The data of a name, after looking whether it is there. Raises ValueError if it is not."""
    scheme, colon, rest = name.partition(":")
    if not colon or not re.fullmatch(r"\w+", scheme) or os.path.exists(name):
        return FolderData(Path(name))
    if scheme not in rooms_with(MODULE):
        known = ", ".join(f"{room}:..." for room in rooms_with(MODULE)) or "none"
        raise ValueError(f"--data: expected a folder of videos and images, or one of the sources {known}; got {name}")
    return module_of(scheme, MODULE).named(rest)


def refuse(because: str, settings: dict[str, Any]) -> None:
    """Settings that another one leaves nothing to do are an error."""
    for name, value in settings.items():
        if value:
            raise ValueError(f"--{name.replace('_', '-')}: expected none with {because}, got {value}")


class FolderData:
    """A folder of videos and images, which are cut and scaled to what a batch holds unless limits are set."""

    def __init__(self, folder: Path) -> None:
        if not os.path.isdir(folder):  # Path.is_dir fails for a name that is too long
            there = "which is a file" if os.path.exists(folder) else "there is no such folder"
            raise ValueError(f"--data: expected a folder of videos and images, got {folder} ({there})")
        self.folder = folder

    @property
    def name(self) -> str:
        return str(self.folder.resolve())

    def check(self, purpose: str, sizes: Sequence[Size], files: FileLimits) -> None:
        refuse("--data, whose files have their own", {"size": ["x".join(map(str, size)) for size in sizes]})

    def clips(self, wanted: Wanted, sizes: Sequence[Size], files: FileLimits, seed: int) -> Clips:
        source = FolderSource(
            self.folder,
            multiple_of=wanted.unit,
            first=wanted.timing.first,
            max_frames=files.max_frames or wanted.frames,
            max_pixels=files.max_pixels,
            fit=Fit(wanted.budget, cut=files.max_frames is None, scale=files.max_pixels is None),
            captions=wanted.captions,
            seed=seed,
        )
        if source.fitted:
            logger.warning(_fitted(source, wanted.budget))

        def captions() -> list[str]:
            return [*source.captions, *(caption for caption in source.detailed if caption)]

        return Clips(source, common_size([source.size(i) for i in range(len(source))]), captions)


def _fitted(source: FolderSource, budget: TokenBudget) -> str:
    """What was done to clips so that they fit, in one line."""
    sizes = [source.size(i) for i in source.fitted]
    videos, images = [size for size in sizes if size[0] > 1], [size for size in sizes if size[0] == 1]
    parts = []
    if videos:
        longest, (_, height, width) = max(size[0] for size in videos), max(videos, key=math.prod)
        parts.append(f"{_are(videos, 'video')} cut to {longest} frames and scaled to about {height}x{width}")
    if images:
        _, height, width = max(images, key=math.prod)
        parts.append(f"{_are(images, 'image')} scaled to about {height}x{width}")
    return f"{' and '.join(parts)}, to fit --tokens {budget.tokens_per_batch}; --max-frames, --max-pixels and --tokens change that"


def _are(sizes: list[Size], kind: str) -> str:
    return f"1 {kind} is" if len(sizes) == 1 else f"{len(sizes)} {kind}s are"


def common_size(sizes: Sequence[Size]) -> Size:
    """The size in the middle of those of a folder's videos, or of its images if these are more.

    Videos of a folder rarely have the very same size, so sizes are not counted but ordered, by their area.
    """
    videos = [size for size in sizes if size[0] > 1]
    kind = videos if 2 * len(videos) >= len(sizes) else [size for size in sizes if size[0] == 1]
    return sorted(kind, key=lambda size: (size[1] * size[2], size))[(len(kind) - 1) // 2]
