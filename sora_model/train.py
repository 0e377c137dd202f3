"""Training on packed batches of mixed sizes: `Trainer`.

A step draws a batch that fills the token budget, empties some captions, draws a task (a mask of given frames) and a noise level for
every sample, and learns all of them in one packed pass. Everything random in step n follows from the seed and n, so a run that was
stopped and resumed goes through the same steps as one that was not.

In the run's folder:

    checkpoint/              a SoraPipeline with the averaged (EMA) weights, for `SoraPipeline.from_pretrained`
    training.safetensors     weights, averages, optimizer moments and the step, to resume from
    loss.csv, tensorboard/   loss, learning rate and tokens per second of every step
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .conditioning import drop_captions
from .data import PackedSampler
from .diffusion import TaskMix, add_noise, diffusion_loss
from .pipeline import SoraPipeline


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps, or None for no such limit.
        minutes: wall-clock minutes, or None for no such limit; a resumed run counts those before.
        learning_rate: highest; reached after `warmup` steps, then falling as a cosine to a tenth at the end.
        optimizer: "muon" (Jordan et al., 2024) for the matrices inside the blocks and AdamW for the rest, or "adamw" for all.
            Muon's steps are scaled to AdamW's size, so one learning rate serves both.
        weight_decay: on matrices only.
        gradient_clip: largest norm of all gradients together.
        caption_dropout: share of captions emptied, for classifier-free guidance.
        ema_decay: of the averaged weights; the first steps average over fewer.
        tasks: how often each task is trained.
        save_every: steps between checkpoints; one is always written at the end.
        seed: of everything random.
    """

    steps: int | None = 1000
    minutes: float | None = None
    learning_rate: float = 1e-3
    warmup: int = 50
    optimizer: str = "muon"
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    tasks: TaskMix = field(default_factory=TaskMix)
    save_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("TrainConfig: steps, minutes: expected a limit, got None for both")
        for name in ("steps", "minutes", "learning_rate", "gradient_clip", "save_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"TrainConfig: {name}: expected a number above 0, got {value}")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"TrainConfig: optimizer: expected 'muon' or 'adamw', got {self.optimizer!r}")


@dataclass(frozen=True)
class Step:
    """What one step did. sizes: (T, H, W) of its samples; seconds: since the run began, earlier parts of it included."""

    step: int
    loss: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    seconds: float
    sizes: list[tuple[int, ...]]


class Trainer:
    """Trains a pipeline's transformer and text encoder.

    >>> trainer = Trainer(pipeline, PackedSampler(source, (1, 8, 8), 2048), TrainConfig(steps=100), "runs/shapes")
    >>> for step in trainer.train():
    ...     print(step.step, step.loss)

    Args:
        pipeline: what to train, on the device to train on.
        sampler: batches of videos and captions.
        config: see `TrainConfig`.
        folder: of the run; see the top of this file.
        resume: go on from the folder's training.safetensors.
    """

    def __init__(
        self, pipeline: SoraPipeline, sampler: PackedSampler, config: TrainConfig, folder: str | Path, *, resume: bool = False
    ) -> None:
        self.pipeline, self.sampler, self.config, self.folder = pipeline, sampler, config, Path(folder)
        encoder = pipeline.text_encoder
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"Trainer: pipeline.text_encoder: expected a module to train, got {type(encoder).__name__}")
        self.model = nn.ModuleDict({"dit": pipeline.dit, "text_encoder": encoder}).train()
        self.average = AveragedModel(self.model, multi_avg_fn=self._move_average)
        self.optimizers = self._optimizers()
        self.step, self.seconds = 0, 0.0
        if resume:
            self._load()
        elif (self.folder / "training.safetensors").exists():
            raise ValueError(f"Trainer: folder: {self.folder} already holds a run; resume it or choose another folder")

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1, by whichever limit is nearer."""
        steps = self.step / self.config.steps if self.config.steps else 0.0
        return max(steps, self.seconds / 60 / self.config.minutes if self.config.minutes else 0.0)

    def train(self) -> Iterator[Step]:
        """Trains to the end, yielding after every step, and saves."""
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.folder.mkdir(parents=True, exist_ok=True)
        log, before = self.folder / "loss.csv", self.seconds
        rows = _rows_before(log, self.step)
        with open(log, "w", newline="") as file, SummaryWriter(str(self.folder / "tensorboard")) as board:
            writer = csv.writer(file)
            writer.writerows(rows or [["step", "loss", "learning_rate", "tokens_per_second", "seconds"]])
            began = time.perf_counter()
            # On a CPU a second thread takes from the step more than it gives.
            for batch in self.sampler.stream(self.step, prefetch=0 if self._device.type == "cpu" else 2):
                if self.progress >= 1:
                    break
                start = time.perf_counter()
                loss, rate = self._train_step(batch.videos, batch.captions)
                self.step += 1
                self.seconds = before + time.perf_counter() - began
                speed = batch.tokens / (time.perf_counter() - start)
                sizes = [tuple(video.shape[1:]) for video in batch.videos]
                done = Step(self.step, loss, rate, batch.tokens, speed, self.seconds, sizes)
                writer.writerow([done.step, f"{loss:.6f}", f"{rate:.6g}", f"{speed:.1f}", f"{self.seconds:.2f}"])
                for name in ("loss", "learning_rate", "tokens_per_second"):
                    board.add_scalar(name, getattr(done, name), done.step)
                if self.step % self.config.save_every == 0:
                    self.save()
                yield done
        self.save()

    def _train_step(self, videos: list[Tensor], captions: list[str]) -> tuple[float, float]:
        """One optimizer step; returns the loss and the learning rate."""
        config, dit = self.config, self.pipeline.dit
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        pt = dit.config.patch_size[0]
        with torch.no_grad():
            latents = self.pipeline.codec.encode([video.to(self._device) for video in videos])
            given = [config.tasks.given(x.shape[1] // pt, generator).repeat_interleave(pt) for x in latents]
            batch = add_noise(self.pipeline.scheduler, latents, given=given, patch_frames=pt, generator=generator)
        text = self.pipeline.text_encoder(drop_captions(captions, config.caption_dropout, generator))
        loss = diffusion_loss(dit(batch.latents, batch.timesteps, text), batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"Trainer: the loss is {loss.item()} at step {self.step}; try a lower learning rate")
        rate = config.learning_rate * _schedule(self.step, config.warmup, self.progress)
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.average.update_parameters(self.model)
        return loss.item(), rate

    def averaged_pipeline(self) -> SoraPipeline:
        """A pipeline with the averaged weights, sharing them."""
        modules: Any = self.average.module
        modules.eval()
        return SoraPipeline(modules["dit"], modules["text_encoder"], self.pipeline.scheduler, self.pipeline.codec)

    def save(self) -> None:
        """Writes checkpoint/ and training.safetensors, each complete or not at all."""
        self.averaged_pipeline().save_pretrained(self.folder / "checkpoint")
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for optimizer, name, parameter in self._optimized():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        state = {"step": self.step, "seconds": self.seconds, "config": asdict(self.config)}
        path = self.folder / "training.safetensors"
        temporary = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, {"state": json.dumps(state)})
        os.replace(temporary, path)

    def _load(self) -> None:
        path = self.folder / "training.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"Trainer: resume: expected {path}, which is not there")
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.average.load_state_dict(part("average."))
        for optimizer, name, parameter in self._optimized():
            moments = {key: value.to(parameter.device) for key, value in part(f"optimizer.{name}.").items()}
            if moments:
                optimizer.state[parameter] = moments
        self.step, self.seconds = state["step"], state["seconds"]

    @property
    def _device(self) -> torch.device:
        return self.pipeline.dit.final.weight.device

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        rate, decay = self.config.learning_rate, self.config.weight_decay
        optimizers: list[torch.optim.Optimizer] = []
        inner: list[nn.Parameter] = []
        if self.config.optimizer == "muon":
            # Not adaLN's matrices, a quarter of Muon's cost, and three iterations of Newton-Schulz instead of five: on the
            # procedural world the loss after 800 steps was the same within 3%.
            named = self.pipeline.dit.blocks.named_parameters()  # type: ignore[attr-defined]
            inner = [p for name, p in named if p.ndim == 2 and "modulation" not in name]
            optimizers.append(torch.optim.Muon(inner, rate, decay, ns_steps=3, adjust_lr_fn="match_rms_adamw"))
        taken = {id(p) for p in inner}
        rest = [p for p in self.model.parameters() if id(p) not in taken]
        matrices, vectors = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, rate, betas=(0.9, 0.99), fused=True))
        return optimizers

    def _optimized(self) -> Iterator[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
        """Every parameter with its name and its optimizer."""
        owners = {id(p): optimizer for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        return ((owners[id(p)], name, p) for name, p in self.model.named_parameters())

    @torch.no_grad()
    def _move_average(self, averages: Any, parameters: Any, updates: Any) -> None:
        decay = min(self.config.ema_decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, parameters, 1 - decay)


def _schedule(step: int, warmup: int, progress: float) -> float:
    """The learning rate as a share of its highest."""
    return min(1.0, (step + 1) / max(warmup, 1)) * (0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0)))


def _rows_before(log: Path, step: int) -> list[list[str]]:
    """The log's header and rows up to `step`: a resumed run rewrites what a crash left after the last save."""
    if step == 0 or not log.exists():
        return []
    with open(log, newline="") as file:
        header, *rows = csv.reader(file)
    return [header, *(row for row in rows if int(row[0]) <= step)]
