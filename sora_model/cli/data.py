"""Commands about captions and their words: caption, recaption, expand, vocabulary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import MAX_PIXELS, ChatModel, Loaded, check_folder, check_media, command, expanded, naming, read_clip, say
from .files import is_contact_sheet


@command(Loaded)
def caption(
    files: Annotated[list[Path], typer.Argument(help="Videos and images.")],
    detailed: Annotated[bool, typer.Option(help="Long captions.")] = True,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames looked at, from the start of a file.")] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="Larger frames are scaled down to so many pixels.")] = MAX_PIXELS,
    *,
    loaded: Loaded,
) -> None:
    """Say what is seen in videos and images."""
    clips = [read_clip(file, max_frames, max_pixels)[0] for file in files]
    pipeline = loaded.pipeline(captioner=True)
    for file, text in zip(files, pipeline.caption(clips, detailed=detailed), strict=True):
        say(f"{file}: {text}")


def _captions_of(path: Path) -> dict[bool, Path]:
    """The files of a short and of a detailed caption."""
    return {False: path.with_suffix(".txt"), True: path.with_suffix(".detailed.txt")}


@command(Loaded)
def recaption(
    folder: Annotated[Path, typer.Argument(help="Folder of videos and images, and all folders in it.")],
    overwrite: Annotated[bool, typer.Option(help="Write captions anew where there are some.")] = False,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames looked at, a clip drawn from the file.")] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="Larger frames are scaled down to so many pixels.")] = MAX_PIXELS,
    *,
    loaded: Loaded,
) -> None:
    """Caption a training folder: a detailed caption beside each file, and a short one where there is none.

    Contact sheets that commands wrote are left alone. Where files of captions would have the same name, one file has them.
    """
    check_media(folder, "FOLDER")
    check_folder(folder, "FOLDER")
    from ..data import FolderSource, MediaError
    from ..storage.files import NAME_BYTES, whole_file

    pipeline = loaded.pipeline(captioner=True)
    with naming("FOLDER"):
        source: Any = FolderSource(
            folder, multiple_of=pipeline.unit, first=pipeline.timing.first, max_frames=max_frames, max_pixels=max_pixels,
            captions=False,
        )  # fmt: skip
    written, sheets = 0, [path for path in source.paths if is_contact_sheet(path)]
    owners: dict[Path, Path] = {}  # of the files of captions
    for path in sorted(set(source.paths) - set(sheets), key=lambda path: (len(path.name), path)):  # a.png before a.detailed.png
        for file in _captions_of(path).values():
            owners.setdefault(file, path)
    for index, path in enumerate(source.paths):
        if path in sheets:
            say(f"left out: {path}: a contact sheet")
            continue
        wanted = _captions_of(path)
        if other := next((file for file in wanted.values() if owners[file] != path), None):
            say(f"left out: {path}: {other.name} has the caption of {owners[other].name}")
            continue
        if long := next((file for file in wanted.values() if len(os.fsencode(file.name)) > NAME_BYTES), None):
            say(f"left out: {path}: {long.name} would be longer than {NAME_BYTES} bytes")
            continue
        if link := next((file for file in wanted.values() if file.is_symlink()), None):
            say(f"left out: {path}: {link.name} is a link, and what it leads to would be written")
            continue
        wanted = {detailed: file for detailed, file in wanted.items() if overwrite or not os.path.exists(file)}
        if not wanted:
            continue
        try:
            clip = source.load(index).video
        except MediaError as error:
            say(f"left out: {error}")
            continue
        for detailed, file in wanted.items():
            (text,) = pipeline.caption([clip], detailed=detailed)
            if not text:
                say(f"left out: {path}: the captioner found nothing to say")
                continue
            with whole_file(file) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
            written += 1
            say(f"{path}: {text}")
    say(f"{written} captions written for {len(source.paths) - len(sheets)} files")


@command(Loaded)
def expand(
    prompts: Annotated[list[str], typer.Argument(help="Short prompts.")],
    chat_model: ChatModel = None,
    *,
    loaded: Loaded,
) -> None:
    """Make short prompts long and detailed."""
    if chat_model is not None:
        longer = expanded(chat_model, prompts, loaded.device)
    else:
        loaded.check_captioner(" (--chat-model expands prompts, too)")
        longer = loaded.pipeline().expand(prompts)
    for text in longer:
        say(text)


@command(Loaded)
def vocabulary(*, loaded: Loaded) -> None:
    """List the words that prompts may have: those of the captions that the checkpoint was trained on."""
    from ..text.words import VOCABULARY, Vocabulary

    _ = loaded.outline  # is there a checkpoint?
    words = Vocabulary.read(loaded.folder / "text_encoder")
    if not words:
        raise ValueError(f"--checkpoint: expected one with text_encoder/{VOCABULARY}, got {loaded.folder}; its words are not known")
    say(" ".join(word for word in sorted(words) if word[0].isalnum()))
