"""Commands about captions: caption, recaption, expand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, load_pipeline, one_line_errors, read_clip, say

CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="Folder of a checkpoint. Default: the one that comes with the package.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]


@app.command()
def caption(
    files: Annotated[list[Path], typer.Argument(help="Videos and images.")],
    detailed: Annotated[bool, typer.Option(help="Long captions.")] = True,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames looked at, from the start of a file.")] = 32,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Say what is seen in videos and images."""
    with one_line_errors():
        clips = [read_clip(file, max_frames) for file in files]
        pipeline = load_pipeline(checkpoint, device)
        for file, text in zip(files, pipeline.caption(clips, detailed=detailed), strict=True):
            say(f"{file}: {text}")


@app.command()
def recaption(
    folder: Annotated[Path, typer.Argument(help="Folder of videos and images, and all folders in it.")],
    overwrite: Annotated[bool, typer.Option(help="Write captions anew where there are some.")] = False,
    max_frames: Annotated[int | None, typer.Option(help="Frames looked at, a clip drawn from the file.")] = 32,
    max_pixels: Annotated[int | None, typer.Option(help="Larger frames are scaled down.")] = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Caption a training folder: a detailed caption beside each file, and a short one where there is none."""
    with one_line_errors():
        from ..checkpoint import whole_file
        from ..data import FolderSource, MediaError

        pipeline = load_pipeline(checkpoint, device)
        source: Any = FolderSource(
            folder, multiple_of=pipeline.unit, lead=pipeline.timing.lead, max_frames=max_frames, max_pixels=max_pixels,
            captions=False,
        )  # fmt: skip
        written = 0
        for index, path in enumerate(source.paths):
            wanted = {False: path.with_suffix(".txt"), True: path.with_suffix(".detailed.txt")}
            wanted = {long: file for long, file in wanted.items() if overwrite or not file.exists()}
            if not wanted:
                continue
            try:
                clip = source.load(index).video
            except MediaError as error:
                say(f"left out: {error}")
                continue
            for long, file in wanted.items():
                (text,) = pipeline.caption([clip], detailed=long)
                with whole_file(file) as partial:
                    partial.write_text(text + "\n", encoding="utf-8")
                written += 1
            say(f"{path}: {text}")
        say(f"{written} captions written for {len(source.paths)} files")


@app.command()
def expand(
    prompts: Annotated[list[str], typer.Argument(help="Short prompts.")],
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Make short prompts long and detailed."""
    with one_line_errors():
        for text in load_pipeline(checkpoint, device).expand(prompts):
            say(text)
