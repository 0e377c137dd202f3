"""Training, generating and videos as a terminal shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline.pipeline import SoraPipeline
    from ..pipeline.request import Request
    from ..training.trainer import Trainer


def run_training(trainer: Trainer, console: Console) -> list[float]:
    """Trains behind a progress bar; returns the losses."""
    losses: list[float] = []
    if trainer.progress >= 1:
        longer = "--steps" if trainer.config.steps and trainer.step >= trainer.config.steps else "--minutes"
        console.print(f"nothing left to train: step {trainer.step} was the last one; a higher {longer} adds some", highlight=False)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=1.0)
        for step in trainer.train():
            losses.append(step.loss)
            recent = sum(losses[-20:]) / len(losses[-20:])
            text = f"step {step.step}  loss {recent:.4f}  {step.tokens_per_second:,.0f} tokens/s"
            progress.update(bar, completed=trainer.progress, description=text)
    if trainer.stopped and trainer.progress < 1:
        console.print(f"stopped at step {trainer.step}; --resume goes on from there", highlight=False)
    return losses


class Bars:
    """A progress bar of a task, called with how much more is done, and one each for what the VAE encodes and decodes."""

    def __init__(self, progress: Progress, total: int, what: str) -> None:
        self.progress = progress
        self.bar, self.coding = progress.add_task(what, total=total), dict[str, TaskID]()
        self.at: float | None = None  # when the step before was done
        self.estimated = False  # whether it was said how long the rest takes

    def __call__(self, done: int) -> None:
        self.progress.advance(self.bar, done)
        now, before = time.perf_counter(), self.at
        self.at = now
        if before is None or self.estimated:  # the first step warms up; those behind --guidance-from take half the time
            return
        self.estimated, task = True, next(task for task in self.progress.tasks if task.id == self.bar)
        left = (now - before) / done * ((task.total or 0) - task.completed)
        if left >= LONG:
            self.progress.console.print(f"up to {duration(left)} left", highlight=False)

    @property
    def hooks(self) -> dict[str, Any]:
        """What the pipeline's call takes to move the bars."""
        return {"callback": lambda *_: self(1), "progress": self.coded}

    def coded(self, what: str, done: int, total: int) -> None:
        """what: encoding or decoding; each has another bar, from its first tile on."""
        if what not in self.coding:
            self.coding[what] = self.progress.add_task(what)
        self.progress.update(self.coding[what], completed=done, total=total)


LONG = 30  # seconds of work from which on it is said how long it will take


def duration(seconds: float) -> str:
    """As one says it: 40 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def denoising(console: Console, total: int, what: str = "denoising") -> Iterator[Bars]:
    """Progress bars with the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bars = Bars(progress, total, what)
        yield bars
        progress.update(bars.bar, completed=total)  # fewer where a video is begun with, more with schedulers of two stages


def sampled(
    pipeline: SoraPipeline, requests: list[Request], seed: int, console: Console, *, num_inference_steps: int, **sampling: Any
) -> list[Tensor]:
    """The videos of requests, in one packed batch, behind progress bars."""
    with denoising(console, num_inference_steps) as bars:
        return pipeline(requests, generator=seed, num_inference_steps=num_inference_steps, **bars.hooks, **sampling)


def show_video(video: Tensor, console: Console, fps: float) -> None:
    """Plays a video [3, T, H, W] in the terminal, two pixels per character; elsewhere, only says how long it is."""
    if not console.is_terminal:
        console.print(f"{video.shape[1]} frames", highlight=False)
        return
    with Live(console=console, refresh_per_second=30) as live:
        for t in range(video.shape[1]):
            live.update(_drawn(video[:, t], console.width))
            time.sleep(1 / fps)


def _drawn(frame: Tensor, width: int) -> Text:
    """A frame [3, H, W] as half blocks: the upper pixel is the letter's colour, the lower one the background's."""
    step = max(1, -(-frame.shape[2] // width))
    pixels = ((frame[:, ::step, ::step].float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    if len(pixels) % 2:
        pixels = pixels[:-1]
    text = Text()
    for upper, lower in zip(pixels[0::2].tolist(), pixels[1::2].tolist(), strict=True):
        for (r, g, b), (x, y, z) in zip(upper, lower, strict=True):
            text.append("▀", style=f"#{r:02x}{g:02x}{b:02x} on #{x:02x}{y:02x}{z:02x}")
        text.append("\n")
    return text
