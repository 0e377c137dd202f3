"""The files that tasks write: names that are not taken, and what each says about itself: `write_files`.

    outputs/00-a-cat-seed0.mp4  outputs/01-a-cat-seed1.mp4  outputs/contact_sheet.png       of one call
    outputs/02-a-dog-seed0.png                              outputs/contact_sheet-02.png    of the next

The number in front counts all videos of a folder. A contact sheet has the number of its first video, if that is not 00.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# What the names look like: a number, then words, or those of a contact sheet.
NAMES = re.compile(r"(?:(\d{2,9})-.*|contact_sheet(?:-\d{2,9})?)\.(?:mp4|gif|png)")


def write_files(
    videos: Sequence[Tensor],
    prompts: Sequence[str],
    out: Path,
    fps: Sequence[float],
    scale: int,
    format: str,
    *,
    seeds: Sequence[int] | None = None,
    settings: Sequence[Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
) -> list[Path]:
    """Writes one file each, at its own frames per second, and a contact sheet; returns their paths. Nothing there is replaced.

    Args:
        format: suffix of videos; a single frame is a PNG.
        seeds: of the videos, part of their names.
        settings: what each file carries in its comment, a JSON object, besides prompt, seed, size and version.
        overwrite: count from 0 again and replace what has these names, unless one of them is an input.
        inputs: files that are never replaced, by whatever link they are reached.
    """
    from sora_kernels import __version__

    from ..data import contact_sheet, write_video
    from ..storage.files import lock_file, make_folder, settle_folder, writing

    numbers: Sequence[int | None] = seeds if seeds is not None else [None] * len(videos)
    names, labels, comments = [], [], []
    for prompt, video, seed, more in zip(prompts, videos, numbers, settings or [{}] * len(videos), strict=True):
        size = "x".join(map(str, video.shape[1:]))
        words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48].strip("-") or "video"
        names.append(f"{words}{'' if seed is None else f'-seed{seed}'}.{'png' if video.shape[1] == 1 else format}")
        labels.append(f"{prompt} ({size}{'' if seed is None else f', seed {seed}'})")
        comments.append({"prompt": prompt, "seed": seed, "size": size, **more, "sora": __version__})
    with writing(out):
        make_folder(out)
    # Of two processes, the second one sees the names of the first. A run that is training here locks the folder itself.
    with writing(out), lock_file(out / ".files.lock"):
        settle_folder(out)  # of a call that was killed, whose names this one may not have
        *paths, sheet = free_paths(out, names, overwrite=overwrite, inputs=inputs)
        for path, video, rate, comment in zip(paths, videos, fps, comments, strict=True):
            write_video(path, video, fps=rate, scale=scale, comment=json.dumps(comment))
        return [*paths, contact_sheet(sheet, videos, labels, comment=json.dumps({"contact_sheet": comments}))]


def free_paths(out: Path, names: Sequence[str], *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> list[Path]:
    """Paths of new files of these names in a folder that is there, each with its number in front, and of their contact sheet.

    >>> [str(path) for path in free_paths(Path("."), ["a-cat.mp4", "a-dog.mp4"])]        # with 00 and 01 there, from 02 on
    ['00-a-cat.mp4', '01-a-dog.mp4', 'contact_sheet.png']
    """

    def numbered(start: int) -> list[Path]:
        paths = [out / f"{start + i:02d}-{name}" for i, name in enumerate(names)]
        return [*paths, out / (f"contact_sheet-{start:02d}.png" if start else "contact_sheet.png")]

    kept = list(inputs)
    if overwrite and not any(same_file(path, one) for path in numbered(0) for one in kept):
        return numbered(0)
    numbers = [int(match[1] or 0) for path in out.iterdir() if (match := NAMES.fullmatch(path.name))]
    start = max(numbers) + 1 if numbers else 0
    while any(map(os.path.lexists, numbered(start))):
        start += 1
    return numbered(start)


def same_file(path: Path, other: Path) -> bool:
    """Whether both names lead to one file, through whatever links."""
    return path.exists() and other.exists() and path.samefile(other)


def is_contact_sheet(path: Path) -> bool:
    """Whether a file is a contact sheet that a command wrote; it says so in its comment."""
    from ..data import MediaError, read_comment

    try:
        return path.suffix == ".png" and (read_comment(path) or "").startswith('{"contact_sheet":')
    except MediaError:
        return False
