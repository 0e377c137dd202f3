"""What all commands that train share: options, errors that name them, and a trainer's steps in the terminal."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .app import Precision, check_folder, console, is_out_of_memory, known_device, parse_size, say
from .ending import Signals, endings
from .terminal import run_training

if TYPE_CHECKING:
    from ..training.config import TrainConfig
    from ..training.recipes.common import RunSettings
    from ..training.trainer import Trainer

# Settings that are not called as their options are.
OPTIONS = {"folder": "OUT", "ema_decay": "--ema", "mixed_precision": "--precision"}


@dataclass(frozen=True)
class Run:
    """The options that all training shares."""

    data: Annotated[
        str, typer.Option(help="Folder of videos and images, captions in .txt beside them; or a source, as world:studio,lessons.")
    ] = "world:studio"
    size: Annotated[list[str] | None, typer.Option(help="Sizes TxHxW of the source's clips; repeat for several.")] = None
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Longest clip of a file. Default: what --tokens holds, at most 32, or 13 for a VAE.")
    ] = None
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Larger frames of files are scaled down. Default: what --tokens holds.")
    ] = None
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in a packed batch, as a batch of short samples; long ones count for more.")
    ] = 2048
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None
    minutes: Annotated[float | None, typer.Option(help="Wall-clock limit, of all sessions of a run together.")] = None
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3
    accumulation: Annotated[int, typer.Option(help="Batches whose gradients make one step.")] = 1
    precision: Annotated[Precision, typer.Option(help="bf16 multiplies matrices in bfloat16.")] = Precision.no
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.995
    save_minutes: Annotated[float, typer.Option(help="Between saves, to which a killed run goes back; the end is one, too.")] = 10.0
    resume: Annotated[bool, typer.Option(help="Go on with the run in OUT.")] = False
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of everything random.")] = 0
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"

    def settings(self, out: Path) -> RunSettings:
        """The options as a recipe takes them, after looking whether files can go to `out`."""
        from ..training.recipes.common import RunSettings
        from ..training.sources import FileLimits

        check_folder(out, "OUT")
        if not self.data:  # which would be the present folder
            raise ValueError("--data: expected a folder or a source, got ''")
        return RunSettings(
            data=self.data,
            sizes=tuple(parse_size(text) for text in self.size or []),
            files=FileLimits(self.max_frames, self.max_pixels),
            tokens=self.tokens,
            config=self.config(),
            resume=self.resume,
            device=known_device(self.device),
        )

    def config(self) -> TrainConfig:
        from ..training.config import TrainConfig

        return TrainConfig(
            steps=1000 if self.steps is None and self.minutes is None else self.steps,
            minutes=self.minutes,
            learning_rate=self.learning_rate,
            accumulation=self.accumulation,
            mixed_precision=self.precision.value,
            ema_decay=self.ema,
            save_minutes=self.save_minutes,
            seed=self.seed,
        )


@contextlib.contextmanager
def errors_by_option() -> Iterator[None]:
    """Errors about a setting name its option, and memory that cannot be had is an error of one line."""
    from ..training.config import SettingError

    try:
        yield
    except SettingError as error:
        name = OPTIONS.get(error.setting, f"--{error.setting.replace('_', '-')}")
        raise ValueError(f"{name}: {error.problem}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+|$", str(error))[0]  # type: ignore[index]
        expected = "expected a smaller model or batch (--model, --channels, --patch, --vocabulary, --longest; --tokens, --size)"
        raise ValueError(f"out of memory: {expected}, got one that does not fit; {asked}".rstrip("; ")) from error


class Training:
    """The training of a command in its folder: its steps behind a bar, and how it ended."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def show(self, trainer: Trainer) -> None:
        """Takes a trainer through its steps behind a bar, which only the main process draws. A signal stops it."""
        self._signals.trainer = trainer
        try:
            run_training(trainer, console if trainer.accelerator.is_main_process else Console(quiet=True))
        finally:
            self._signals.trainer = None

    def end(self, trainer: Trainer, checkpoint: Path) -> None:
        """Says where the checkpoint is; the exit status is 128 + N where signal N stopped the training, in any process."""
        if trainer.accelerator.is_main_process:
            say(f"checkpoint: {checkpoint}")
        if trainer.stopped and trainer.progress < 1:
            raise typer.Exit(128 + (self._signals.number or signal.SIGTERM))


@contextlib.contextmanager
def training(out: Path) -> Iterator[Training]:
    """What a command that trains in `out` does, within: errors name options, signals end it as ending.py says."""
    with endings(out) as signals, errors_by_option():
        yield Training(signals)
