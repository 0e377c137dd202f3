"""Training and generating as a terminal shows them: behind progress bars, with files at the end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .config import Size

if TYPE_CHECKING:
    from .pipeline import SoraPipeline
    from .train import Trainer


def run_training(trainer: Trainer, console: Console) -> list[float]:
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
    console: Console,
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
