"""The command line: `sora train`, `sora generate` and `sora demo`."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from .config import Size
from .terminal import generate_files, run_training

# torch and diffusers take seconds to import, so commands import them: --help and a wrong option answer at once.

app = typer.Typer(
    help="Train a packed video diffusion transformer and generate videos of any size with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)


class Prediction(str, Enum):
    flow = "flow"
    epsilon = "epsilon"
    v = "v"


class Format(str, Enum):
    mp4 = "mp4"
    gif = "gif"


def parse_size(text: str) -> Size:
    """'8x32x48' -> (8, 32, 48)."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"expected TxHxW, such as 8x32x48, got {text!r}")
    t, h, w = (int(n) for n in match.groups())
    return t, h, w


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one clear line and exit code 2 for what a user can mend."""
    try:
        yield
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        errors.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@app.callback()
def main() -> None:
    logging.getLogger("sora_model").handlers = [RichHandler(console=errors, show_path=False, show_time=False)]


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="Folder of the run.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of videos and images, captions in .txt beside them. Default: a procedural world.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Wall-clock limit.")] = None,
    model: Annotated[str, typer.Option(help="tiny, or S, B, L, XL of the DiT paper.")] = "tiny",
    patch: Annotated[str, typer.Option(help="Patch size TxHxW in pixels.")] = "1x8x8",
    size: Annotated[list[str] | None, typer.Option(help="Sizes TxHxW of the world's clips; repeat for several.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a packed batch.")] = 2048,
    max_frames: Annotated[int | None, typer.Option(help="Longest clip drawn from a file.")] = 32,
    max_pixels: Annotated[int | None, typer.Option(help="Larger frames of files are scaled down.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    prediction: Annotated[Prediction, typer.Option(help="Flow matching, or DDPM's epsilon or v.")] = Prediction.flow,
    rich_world: Annotated[bool, typer.Option(help="More colours, shapes, digits, cameras and several objects.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the run in OUT.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train on packed batches of mixed sizes, from the procedural world or a folder of files."""
    with one_line_errors():
        from .data import FolderSource, PackedSampler, World, WorldConfig, WorldSource
        from .pipeline import SoraPipeline
        from .train import TrainConfig, Trainer

        if steps is None and minutes is None:
            steps = 1000
        if resume:
            pipeline = SoraPipeline.from_pretrained(out / "checkpoint", device=device)
        else:
            pipeline = SoraPipeline.from_preset(
                model, patch=parse_size(patch), prediction=prediction.value, seed=seed, device=device
            )
        source: Any
        if data is not None:
            source = FolderSource(data, multiple_of=pipeline.unit, max_frames=max_frames, max_pixels=max_pixels, seed=seed)
        else:
            sizes = [parse_size(text) for text in size or ["6x24x24", "6x16x32", "6x32x16", "1x24x24"]]
            world = World(WorldConfig.rich(seed) if rich_world else WorldConfig.simple(seed))
            source = WorldSource(world, sizes, detailed=0.5 if rich_world else 0.0)
        sampler = PackedSampler(source, pipeline.unit, tokens, min_sizes=1 if data else min(len(source.sizes), 4), seed=seed)
        config = TrainConfig(steps=steps, minutes=minutes, learning_rate=learning_rate, seed=seed)
        run_training(Trainer(pipeline, sampler, config, out, resume=resume), console)
        console.print(f"checkpoint: {out / 'checkpoint'}")


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to show; one video each.")],
    checkpoint: Annotated[Path, typer.Option(help="A run's checkpoint folder.")],
    size: Annotated[
        list[str] | None, typer.Option(help="TxHxW of each video in pixels, or one for all; 1xHxW is an image.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the videos.")] = Path("outputs"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of the first video; the next ones count up.")] = 0,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 8.0,
    scale: Annotated[int, typer.Option(help="Whole factor by which pixels are enlarged in the files.")] = 1,
    format: Annotated[Format, typer.Option(help="Of videos; images are PNG.")] = Format.mp4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Generate videos and images of any sizes, all in one packed batch."""
    with one_line_errors():
        sizes = [parse_size(text) for text in size or ["6x24x24"]]
        if len(sizes) == 1:
            sizes *= len(prompts)
        if len(sizes) != len(prompts):
            raise ValueError(f"--size: expected 1 or {len(prompts)} (one per prompt), got {len(sizes)}")
        from .pipeline import SoraPipeline

        pipeline = SoraPipeline.from_pretrained(checkpoint, device=device)
        for path in generate_files(pipeline, prompts, sizes, out, steps, guidance, seed, fps, scale, format.value, console):
            console.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("outputs/demo"),
    minutes: Annotated[float, typer.Option(help="Of training.")] = 3.75,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train a small model on the procedural world for a few minutes, then generate videos of several sizes with it."""
    with one_line_errors():
        from .demo import run

        run(out, minutes, seed, console)
