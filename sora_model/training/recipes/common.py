"""What all recipes share: `RunSettings`, and the run itself from its checks to its last step."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ...codec.codec import Codec, latent_size
from ...data import PackedSampler
from ...data.budget import TokenBudget, Wording
from ...sizes import Size
from ..config import SettingError, TrainConfig, check_above
from ..resume import all_settings, check_idle, check_run
from ..sources import Clips, FileLimits, TrainingData, Wanted, training_data
from ..trainer import Objective, Trainer

Run = Callable[[Trainer], Any]  # takes a trainer through its steps, showing them or not
ANY_FILE = FileLimits()
PIXELS = 2**28  # of a clip, which is held in memory: 3 GB
WORDING = Wording("--tokens", "a larger --tokens takes it, or a smaller --max-pixels, --max-frames or --size")


def quiet(trainer: Trainer) -> None:
    """Takes a trainer through its steps without showing them."""
    for _ in trainer.train():
        pass


@dataclass(frozen=True)
class RunSettings:
    """The settings of every recipe.

    data: a folder, or a source by name; see `sources.py`. sizes: of the source's clips, where it has none of its own; none are its
    default ones. files: the most that is taken of a file. tokens: of a packed batch. config: see `TrainConfig`. resume: go on
    with the run in the folder. device: cpu, cuda or cuda:N.
    """

    data: str = "world:simple"
    sizes: tuple[Size, ...] = ()
    files: FileLimits = ANY_FILE
    tokens: int = 2048
    config: TrainConfig = field(default_factory=TrainConfig)
    resume: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        owner = "RunSettings"
        check_above(owner, {"tokens": self.tokens, **self.files._asdict()})
        for size in self.sizes:
            if min(size) < 1 or math.prod(size) > PIXELS:
                raise SettingError(owner, "size", f"expected (T, H, W), each at least 1, of at most {PIXELS} pixels, got {size}")

    @property
    def own_device(self) -> str:
        """The device of this process: with several of them on GPUs, each has its own."""
        state = PartialState(cpu=self.device == "cpu")
        if state.num_processes > 1:
            return str(state.device)
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)  # accelerate takes the current one
        return self.device


class Preparation:
    """A run that has been checked: nothing of it has been loaded yet.

    Args:
        out: folder of the run.
        run: see `RunSettings`.
        purpose: see `Wanted`.
        own: the recipe's settings that must be the same where the run is resumed.

    Raises:
        ValueError: whatever can be refused before the work begins; a `SettingError` where it is one setting.
    """

    def __init__(self, out: str | Path, run: RunSettings, purpose: str, own: Mapping[str, Any]) -> None:
        self.out, self.run, self.purpose = Path(out), run, purpose
        self.data: TrainingData = training_data(run.data)
        self.data.check(purpose, run.sizes, run.files)
        self.device = run.own_device
        if PartialState().is_main_process:
            check_idle(self.out)
        else:
            logging.getLogger("sora_model").setLevel(logging.ERROR)  # one process says what there is to say
        settings = {"data": self.data.name, "size": list(run.sizes), "tokens": run.tokens, **run.files._asdict(), **own}
        self.settings = {f"--{name.replace('_', '-')}": _text(value) for name, value in settings.items()}
        with PartialState().main_process_first():
            check_run(self.out, resume=run.resume, settings=all_settings(self.settings, run.config, PartialState().num_processes))

    def parts(self, start: Path | None = None) -> Path | None:
        """The checkpoint that the model's parts come from: the run's own where it goes on, else the one that it starts from.

        A run's state may be there without a checkpoint. Its parts are then made as they were at first, and filled from the state.
        """
        own = self.out / "checkpoint"
        return own if self.run.resume and own.is_dir() else start

    def budget(self, codec: Codec, patch: Size, *, frames: int | None = None, attention_width: int | None = None) -> TokenBudget:
        """What a batch holds of latents, of which only `frames` are looked at."""

        def seen(size: Size) -> Size:
            latent = latent_size(codec, size)
            return (min(latent[0], frames) if frames else latent[0], *latent[1:])

        return TokenBudget(patch, self.run.tokens, seen, attention_width, WORDING)

    def clips(self, wanted: Wanted) -> Clips:
        """Opens the data. Sizes that were asked for and fit no batch, or no token, are an error."""
        for size in self.run.sizes:
            try:
                wanted.budget.check(size)
            except ValueError as error:
                raise SettingError("RunSettings", "size", str(error)) from None
        return self.data.clips(wanted, self.run.sizes, self.run.files, self.run.config.seed)

    def train(self, objective: Objective, clips: Clips, budget: TokenBudget, show: Run) -> Trainer:
        """Trains on packed batches of this process; from an endless source, of several sizes each."""
        state = PartialState()
        options = {"rank": state.process_index, "num_ranks": state.num_processes, "seed": self.run.config.seed}
        try:
            sampler = PackedSampler(clips.source, **vars(budget), min_sizes=clips.min_sizes, **options)
        except ValueError as error:  # nothing fits
            raise SettingError("RunSettings", "data", str(error).removeprefix("PackedSampler: ")) from None
        trainer = Trainer(objective, sampler, self.run.config, self.out, resume=self.run.resume, settings=self.settings)
        show(trainer)
        return trainer


def _text(value: Any) -> str | None:
    """A setting as a run's file keeps it. What a run does not have is None, so that it cannot go on with it either."""
    if isinstance(value, list):
        value = ["x".join(map(str, size)) for size in value]
    value = os.path.realpath(value) if isinstance(value, Path) else value  # resolve() raises for loops of links
    return str(value) if value else None
