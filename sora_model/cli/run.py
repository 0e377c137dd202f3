"""What all training shares: options, which clips to learn from, and the run itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..sizes import Size
from .app import Precision, check_folder, check_media, console, known_device, parse_size
from .terminal import run_training

if TYPE_CHECKING:
    from ..data import Source
    from ..training.config import TrainConfig
    from ..training.trainer import Objective, Trainer


class WorldName(str, Enum):
    simple = "simple"
    studio = "studio"
    rich = "rich"


@dataclass(frozen=True)
class Run:
    """The options that all training shares."""

    data: Annotated[
        Path | None,
        typer.Option(help="Folder of videos and images, captions in .txt beside them. Default: a procedural world."),
    ] = None
    world: Annotated[WorldName, typer.Option(help="Which procedural world: how much it holds.")] = WorldName.studio
    size: Annotated[list[str] | None, typer.Option(help="Sizes TxHxW of the world's clips; repeat for several.")] = None
    max_frames: Annotated[int | None, typer.Option(min=1, help="Longest clip drawn from a file.")] = 32
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Larger frames of files are scaled down.")] = None
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in a packed batch, as a batch of short samples; long ones count for more.")
    ] = 2048
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None
    minutes: Annotated[float | None, typer.Option(help="Wall-clock limit.")] = None
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3
    accumulation: Annotated[int, typer.Option(help="Batches whose gradients make one step.")] = 1
    precision: Annotated[Precision, typer.Option(help="bf16 multiplies matrices in bfloat16.")] = Precision.no
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.995
    save_minutes: Annotated[float, typer.Option(help="Between saves, to which a killed run goes back; the end is one, too.")] = 10.0
    resume: Annotated[bool, typer.Option(help="Go on with the run in OUT.")] = False
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of everything random.")] = 0
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"

    @property
    def own_device(self) -> str:
        """The device of this process: with several of them on GPUs, each has its own."""
        from accelerate import PartialState

        state = PartialState(cpu=known_device(self.device) == "cpu")
        if state.num_processes > 1:
            return str(state.device)
        if self.device.startswith("cuda:"):
            import torch

            torch.cuda.set_device(self.device)  # accelerate takes the current one
        return self.device

    def sizes(self, unit: Size, lead: int, default: list[str]) -> list[Size]:
        """Sizes of the world's clips: those asked for, or the default ones made larger to whole tokens."""
        from ..sizes import Timing

        if self.size:
            return [parse_size(text) for text in self.size]
        timing, (_, uh, uw) = Timing(lead, unit[0]), unit
        return [(timing.whole(t), -(-h // uh) * uh, -(-w // uw) * uw) for t, h, w in map(parse_size, default)]

    def source(
        self, sizes: list[Size], unit: Size, lead: int, clips: int | None = None, captions: bool = True, **options: Any
    ) -> Source:
        """A folder of files, or the training part of a world; `clips` of it again and again, or without end.

        captions: False takes files without captions. options: of the world's clips.
        """
        from ..data import FolderSource, Repeated
        from ..world.config import WorldConfig
        from ..world.source import WorldSource
        from ..world.world import World

        if self.data is not None:
            limits = {"max_frames": self.max_frames, "max_pixels": self.max_pixels, "seed": self.seed}
            return FolderSource(self.data, multiple_of=unit, first=lead, captions=captions, **limits)  # type: ignore[arg-type]
        config = getattr(WorldConfig, self.world.value)(self.seed)
        split = "training" if self.world is WorldName.studio else None
        source = WorldSource(World(config, split=split), sizes, **options)
        return source if clips is None else Repeated(source, clips)

    def settings(self, out: Path, **own: Any) -> dict[str, str | int | None]:
        """What must be the same where the run is resumed: these options and the command's own; if it is, they are compared.

        Everything that can be refused before the work begins is refused here.
        """
        from accelerate import PartialState

        from ..training.resume import all_settings, check_run

        if self.data is None:
            refuse("a world, whose clips have their own sizes", {"max-pixels": self.max_pixels})
        else:
            refuse("--data, whose files have their own", {"size": self.size})
            check_media(self.data, "--data")
        config = self.config()
        for text in self.size or []:
            parse_size(text)
        _ = self.own_device  # makes the state of the processes
        if PartialState().is_main_process:
            check_folder(out, "OUT")
        # What a run does not have is None, so that it cannot go on with it either.
        ignored = {"world"} if self.data else {"max_frames", "max_pixels"}
        names = ("data", "world", "size", "tokens", "max_frames", "max_pixels")
        chosen = {**{name: None if name in ignored else getattr(self, name) for name in names}, **own}
        told: dict[str, str | int | None] = {}
        for name, value in chosen.items():
            value = value.resolve() if isinstance(value, Path) else getattr(value, "value", value)
            told[f"--{name.replace('_', '-')}"] = str(value) if value else None
        with PartialState().main_process_first():
            check_run(out, resume=self.resume, settings=all_settings(told, config, PartialState().num_processes))
        return told

    def parts(self, out: Path, start: Path | None = None) -> Path | None:
        """The checkpoint that the model's parts come from: the run's own where it goes on, else the one that it starts from.

        A run's state may be there without a checkpoint. Its parts are then made as they were at first, and filled from the state.
        """
        own = out / "checkpoint"
        return own if self.resume and own.is_dir() else start

    def train(
        self, out: Path, objective: Objective, source: Source, patch: Size, settings: dict[str, str | int | None], **packing: Any
    ) -> Trainer:
        """Trains on packed batches of this process; from an endless source, of several sizes each. packing: see `PackedSampler`."""
        from accelerate import PartialState

        from ..data import PackedSampler
        from ..training.trainer import Trainer
        from ..world.source import WorldSource

        if isinstance(source, WorldSource):
            packing["min_sizes"] = min(len(set(source.sizes)), 4)
        state = PartialState()
        packing |= {"seed": self.seed, "rank": state.process_index, "num_ranks": state.num_processes}
        sampler = PackedSampler(source, patch, self.tokens, **packing)
        trainer = Trainer(objective, sampler, self.config(), out, resume=self.resume, settings=settings)
        run_training(trainer, console)
        return trainer

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


def refuse(because: str, options: dict[str, Any]) -> None:
    """Options that another one leaves nothing to do are an error."""
    for name, value in options.items():
        if value:
            raise ValueError(f"--{name}: expected none with {because}, got {value}")
