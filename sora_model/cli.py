"""The command line: `sora train`, `sora generate` and `sora demo`."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from .pipeline import SoraPipeline
    from .train import Trainer

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


Size = tuple[int, int, int]


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
        from .train import TrainConfig, Trainer

        if steps is None and minutes is None:
            steps = 1000
        pipeline = _resumed(out, device) if resume else _new_pipeline(model, parse_size(patch), prediction, seed, device)
        cell = pipeline.unit
        source: Any
        if data is not None:
            source = FolderSource(data, multiple_of=cell, max_frames=max_frames, max_pixels=max_pixels, seed=seed)
        else:
            sizes = [parse_size(text) for text in size or ["8x32x32", "8x24x40", "8x40x24", "1x32x32"]]
            world = World(WorldConfig.rich(seed) if rich_world else WorldConfig.simple(seed))
            source = WorldSource(world, sizes, detailed=0.5 if rich_world else 0.0)
        sampler = PackedSampler(source, pipeline.unit, tokens, min_sizes=1 if data else min(len(source.sizes), 4), seed=seed)
        config = TrainConfig(steps=steps, minutes=minutes, learning_rate=learning_rate, seed=seed)
        run_training(Trainer(pipeline, sampler, config, out, resume=resume))
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
        sizes = [parse_size(text) for text in size or ["8x32x32"]]
        if len(sizes) == 1:
            sizes *= len(prompts)
        if len(sizes) != len(prompts):
            raise ValueError(f"--size: expected 1 or {len(prompts)} (one per prompt), got {len(sizes)}")
        from .pipeline import SoraPipeline

        pipeline = SoraPipeline.from_pretrained(checkpoint, device=device)
        for path in generate_files(pipeline, prompts, sizes, out, steps, guidance, seed, fps, scale, format.value):
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


def run_training(trainer: Trainer) -> list[float]:
    """Trains behind a progress bar; returns the losses."""
    losses: list[float] = []
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=1.0)
        for step in trainer.train():
            losses.append(step.loss)
            recent = sum(losses[-20:]) / len(losses[-20:])
            text = f"step {step.step}  loss {recent:.4f}  {step.tokens_per_second:,.0f} tokens/s"
            progress.update(bar, completed=trainer.progress, description=text)
    return losses


def generate_files(
    pipeline: SoraPipeline,
    prompts: list[str],
    sizes: list[Size],
    out: Path,
    steps: int,
    guidance: float,
    seed: int,
    fps: float,
    scale: int,
    format: str,
) -> list[Path]:
    """Generates in one packed batch and writes one file each and a contact sheet; returns their paths."""
    from .data import contact_sheet, write_video

    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps)
        videos = pipeline(
            prompts, sizes, num_inference_steps=steps, guidance_scale=guidance, seeds=seed,
            callback=lambda *_: progress.advance(bar),
        )  # fmt: skip
    paths = []
    for i, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48]
        suffix = "png" if video.shape[1] == 1 else format
        paths.append(write_video(out / f"{i:02d}-{name}.{suffix}", video, fps=fps, scale=scale))
    labels = [f"{prompt} ({'x'.join(map(str, size))})" for prompt, size in zip(prompts, sizes, strict=True)]
    return [*paths, contact_sheet(out / "contact_sheet.png", videos, labels)]


def _new_pipeline(model: str, patch: Size, prediction: Prediction, seed: int, device: str) -> SoraPipeline:
    import diffusers
    import torch

    from .config import PRESETS, DiTConfig
    from .dit import DiT
    from .pipeline import SoraPipeline
    from .text import WordEncoder

    if model not in PRESETS:
        raise ValueError(f"--model: expected one of {', '.join(PRESETS)}, got {model!r}")
    torch.manual_seed(seed)
    encoder = WordEncoder(dim=128)
    # Pixels in large patches: what the network can tell easily is the clean video, not the noise in it.
    output = "clean" if prediction is Prediction.flow else "direct"
    config = DiTConfig.preset(model, patch=patch, in_channels=3, text_dim=encoder.dim, prediction=output)
    scheduler: Any
    if prediction is Prediction.flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    else:
        kind = "epsilon" if prediction is Prediction.epsilon else "v_prediction"
        # Pixels are clipped to [-1, 1] while sampling; the zero-SNR end makes sampling start from what training saw.
        scheduler = diffusers.DDIMScheduler(
            prediction_type=kind, clip_sample=True, timestep_spacing="trailing",
            rescale_betas_zero_snr=kind == "v_prediction", beta_schedule="squaredcos_cap_v2",
        )  # fmt: skip
    return SoraPipeline(DiT(config).to(device), encoder.to(device), scheduler)


def _resumed(out: Path, device: str) -> SoraPipeline:
    from .pipeline import SoraPipeline

    return SoraPipeline.from_pretrained(out / "checkpoint", device=device)
