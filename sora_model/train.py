"""Training on packed batches of mixed sizes: `Trainer`, for whatever an `Objective` says is to be learned.

A step draws one batch per process and accumulation, takes the mean of the gradients of their losses, moves the weights, and
averages them. Everything random in step n follows from the seed and n, so a run that was stopped and resumed goes through the same
steps as one that was not (where it is limited by minutes, the learning rate follows the clock). Processes and devices are
accelerate's: `torchrun --nproc_per_node 8 -m sora_model.cli train ...`, or `accelerate launch`.

In the run's folder:

    checkpoint/              the averaged (EMA) weights, as the objective saves them
    training.safetensors     weights, averages, optimizer moments and the step: all that a run is resumed from, in one file
    loss.csv, tensorboard/   loss, learning rate and tokens per second of every step; see train_log.py

Whatever ends a process or fills a disk while these are written, the run can be resumed from the last save that is whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .checkpoint import check_replaceable, settle, whole_file
from .data import Batch, PackedSampler
from .train_log import TrainLog
from .weights import check_finite, distinct_state, load_distinct

STATE = "training.safetensors"


class Objective(Protocol):
    """What is to be learned.

    model: the modules to train. loss: of one batch, with everything random drawn from the generator.
    save: writes a checkpoint with `model` (the averaged weights) to a folder, complete or not at all.
    """

    @property
    def model(self) -> nn.Module: ...

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor: ...

    def save(self, model: nn.Module, folder: Path) -> None: ...


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps, or None for no such limit.
        minutes: wall-clock minutes, or None for no such limit; a resumed run counts those before.
        learning_rate: highest; reached after `warmup` steps, then falling as a cosine.
        final_rate: what it falls to at the end, as a share of it; 1 keeps it.
        optimizer: "muon" (Jordan et al., 2024) for the matrices and kernels inside the model and AdamW for the rest, or "adamw" for
            all. Muon's steps are scaled to AdamW's size, so one learning rate serves both.
        weight_decay: on matrices only.
        gradient_clip: largest norm of all gradients together.
        accumulation: batches whose gradients make one step.
        mixed_precision: "no", or "bf16": matrices multiplied in bfloat16, weights and their averages kept in float32.
        ema_decay: of the averaged weights; the first steps average over fewer.
        save_minutes: between checkpoints; one is always written at the end.
        seed: of everything random.
    """

    steps: int | None = 1000
    minutes: float | None = None
    learning_rate: float = 1e-3
    warmup: int = 50
    final_rate: float = 0.1
    optimizer: str = "muon"
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    accumulation: int = 1
    mixed_precision: str = "no"
    ema_decay: float = 0.999
    save_minutes: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("TrainConfig: steps, minutes: expected a limit, got None for both")
        for name in ("steps", "minutes", "learning_rate", "gradient_clip", "accumulation", "save_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"TrainConfig: {name}: expected a number above 0, got {value}")
        for name in ("ema_decay", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"TrainConfig: {name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if self.warmup < 0 or self.weight_decay < 0:
            got = f"{self.warmup} and {self.weight_decay}"
            raise ValueError(f"TrainConfig: warmup, weight_decay: expected numbers of at least 0, got {got}")
        for name, known in (("optimizer", ("muon", "adamw")), ("mixed_precision", ("no", "bf16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"TrainConfig: {name}: expected {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}")


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
    """Trains an objective's model.

    >>> sampler = PackedSampler(source, (1, 8, 8), 2048)
    >>> trainer = Trainer(DiffusionObjective(pipeline), sampler, TrainConfig(steps=100), "runs/shapes")
    >>> for step in trainer.train():
    ...     print(step.step, step.loss)

    Args:
        objective: what to learn, its model on the device to train on.
        sampler: batches of videos and captions; of this process, where there are several.
        config: see `TrainConfig`.
        folder: of the run; see the top of this file.
        resume: go on from the folder's training.safetensors.
        settings: whatever else must be the same where the run is resumed, by name: what its model and batches are made of. Kept
            with the weights; another value is an error then, as another seed or accumulation is.
    """

    def __init__(
        self,
        objective: Objective,
        sampler: PackedSampler,
        config: TrainConfig,
        folder: str | Path,
        *,
        resume: bool = False,
        settings: Mapping[str, str | int | None] | None = None,
    ) -> None:
        self.objective, self.sampler, self.config, self.folder = objective, sampler, config, Path(folder)
        self.model = objective.model.train()
        device = next(self.model.parameters()).device
        self.accelerator = Accelerator(gradient_accumulation_steps=config.accumulation, cpu=device.type == "cpu")
        # First, as it may move the weights: optimizers and averages look at where they are.
        self._forward = self.accelerator.prepare(_Loss(objective, config.mixed_precision == "bf16"))
        self.average = AveragedModel(self.model, multi_avg_fn=self._move_average)
        self.optimizers: list[torch.optim.Optimizer] = []
        self._moments: list[tuple[str, torch.optim.Optimizer, nn.Parameter]] = []  # whose state each weight's moments are
        self._make_optimizers()
        self.step, self.seconds, self.stopped, self._stopping = 0, 0.0, False, False
        self.settings = all_settings(settings or {}, config, self.accelerator.num_processes)
        with self.accelerator.main_process_first():
            check_run(self.folder, resume=resume, settings=self.settings)
        if resume:
            self._load()

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1, by whichever limit is nearer."""
        steps = self.step / self.config.steps if self.config.steps else 0.0
        return max(steps, self.seconds / 60 / self.config.minutes if self.config.minutes else 0.0)

    def stop(self) -> None:
        """Ends the training, of all processes, after the step in hand."""
        self._stopping = True

    def train(self) -> Iterator[Step]:
        """Trains to the end, or until `stop` is called, yielding after every step, and saves."""
        before, saved = self.seconds, self.seconds
        with TrainLog(self.folder, self.step) if self.accelerator.is_main_process else contextlib.nullcontext() as log:
            began = time.perf_counter()
            # On a CPU a second thread takes from the step more than it gives.
            prefetch = 0 if self.accelerator.device.type == "cpu" else 2
            batches = self.sampler.stream(self.step * self.config.accumulation, prefetch=prefetch)
            while self.progress < 1 and not self.stopped:
                start = time.perf_counter()
                drawn = [next(batches) for _ in range(self.config.accumulation)]
                loss, rate = self._train_step(drawn)
                self.step += 1
                self._agree(before + time.perf_counter() - began)
                tokens = sum(batch.tokens for batch in drawn)
                speed = tokens / (time.perf_counter() - start)
                sizes = [tuple(video.shape[1:]) for batch in drawn for video in batch.videos]
                done = Step(self.step, loss, rate, tokens, speed, self.seconds, sizes)
                if log is not None:
                    log.add(done)
                if self.seconds - saved > 60 * self.config.save_minutes:
                    self.save()
                    saved = self.seconds
                yield done
        self.save()

    def _train_step(self, batches: list[Batch]) -> tuple[float, float]:
        """One optimizer step; returns the loss and the learning rate."""
        config, losses = self.config, []
        for i, batch in enumerate(batches):
            number = (self.step * config.accumulation + i) * self.accelerator.num_processes + self.accelerator.process_index
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
            with self.accelerator.accumulate(self._forward):
                loss = self._forward(batch, generator)
                losses.append(self.accelerator.reduce(loss.detach(), "mean").item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"Trainer: the loss is {losses[-1]} at step {self.step}; try a lower learning rate")
                self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        rate = config.learning_rate * _schedule(self.step, config.warmup, self.progress, config.final_rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.model.zero_grad()
        self.average.update_parameters(self.model)
        return sum(losses) / len(losses), rate

    def _agree(self, seconds: float) -> None:
        """Sets the clock and whether to stop, the same for all processes: the latest clock, and a stop that any was told of."""
        if self.accelerator.num_processes == 1:
            self.seconds, self.stopped = seconds, self._stopping
            return
        told = torch.tensor([seconds, float(self._stopping)], device=self.accelerator.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        self.seconds, self.stopped = told[0].item(), bool(told[1])

    def averaged_model(self) -> nn.Module:
        """The model with the averaged weights, sharing them."""
        return self.average.module.eval()

    def save(self) -> None:
        """Writes training.safetensors and checkpoint/, each complete or not at all.

        First the state, which is what matters if the second fails. Only a run's first save is the other way round: a state that
        is there has a checkpoint beside it, whose parts the run is resumed with.
        """
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        for name, value in distinct_state(self.model).items():  # a good state is not replaced by one that is lost
            check_finite(value, f"Trainer: save: {name}")
        first = not (self.folder / STATE).exists()
        for write in (self._save_checkpoint, self._save_state) if first else (self._save_state, self._save_checkpoint):
            write()

    def _save_checkpoint(self) -> None:
        self.objective.save(self.averaged_model(), self.folder / "checkpoint")

    def _save_state(self) -> None:
        tensors = {f"model.{name}": value for name, value in distinct_state(self.model).items()}
        tensors |= {f"average.{name}": value for name, value in distinct_state(self.average).items()}
        for name, optimizer, parameter in self._moments:
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        state = {"step": self.step, "seconds": self.seconds, "config": asdict(self.config), "settings": self.settings}
        with whole_file(self.folder / STATE) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, {"state": json.dumps(state)})

    def _load(self) -> None:
        path = self.folder / STATE
        state = _state(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        load_distinct(self.model, part("model."), f"Trainer: resume: {path}")
        load_distinct(self.average, part("average."), f"Trainer: resume: {path}")
        for name, optimizer, parameter in self._moments:
            moments = {key: value.to(parameter.device) for key, value in part(f"optimizer.{name}.").items()}
            if moments:
                optimizer.state[parameter] = moments
        self.step, self.seconds = state["step"], state["seconds"]

    def _make_optimizers(self) -> None:
        rate, decay = self.config.learning_rate, self.config.weight_decay
        named = list(self.model.named_parameters())
        chosen = _inner(self.model) if self.config.optimizer == "muon" else set()
        inner = [(name, p) for name, p in named if name in chosen]
        if inner:
            muon = KernelMuon([p for _, p in inner], rate, decay, ns_steps=5, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
            self._moments += [(name, muon, view) for (name, _), view in zip(inner, muon.views, strict=True)]
        taken = {id(p) for _, p in inner}
        rest = [(name, p) for name, p in named if id(p) not in taken]
        groups = [
            {"params": [p for _, p in rest if p.ndim > 1], "weight_decay": decay},
            {"params": [p for _, p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, rate, betas=(0.9, 0.99), fused=True)
        self.optimizers.append(adamw)
        self._moments += [(name, adamw, p) for name, p in rest]

    @torch.no_grad()
    def _move_average(self, averages: Any, parameters: Any, updates: Any) -> None:
        decay = min(self.config.ema_decay, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(decay)(averages, parameters, updates)


def all_settings(settings: Mapping[str, str | int | None], config: TrainConfig, processes: int) -> dict[str, str | int | None]:
    """What must be the same where a run is resumed: what its caller names, and what of its config the batches depend on."""
    return {**settings, "seed": config.seed, "accumulation x processes": config.accumulation * processes}


def check_run(folder: Path, *, resume: bool, settings: Mapping[str, str | int | None]) -> None:
    """Brings to an end what a killed process left half-written in a run's folder, and says whether a run can begin or go on there.

    Raises:
        FileNotFoundError: nothing to resume.
        ValueError: a fresh run where there is one already; settings that are not those that the run began with (see `Trainer`);
            files of others in checkpoint/.
    """
    path = folder / STATE
    for name in ("checkpoint", STATE, "loss.csv"):
        settle(folder / name)
    check_replaceable(folder / "checkpoint")
    if not resume and path.exists():
        raise ValueError(
            f"Trainer: folder: {folder} already holds a run, at step {_state(path)['step']}; resume it or choose another folder"
        )
    if not resume:
        return
    if not path.is_file():
        raise FileNotFoundError(f"Trainer: resume: expected {path}, which is not there: nothing was saved; begin without resume")
    began = _state(path)["settings"]
    other = [
        f"{name}: expected {began[name]}, as the run began with, got {value}"
        for name, value in settings.items()
        if name in began and began[name] != value
    ]
    if other:
        raise ValueError(f"Trainer: resume: {'; '.join(other)}")


def _state(path: Path) -> dict[str, Any]:
    """What a run's file says beside its tensors: step, seconds, config and settings."""
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            return {name: state[name] for name in ("step", "seconds", "config", "settings")}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Trainer: {path}: expected the state of a run of this package, got {error}") from None


class _Loss(nn.Module):
    """The objective's loss as a module, which is what several processes share."""

    def __init__(self, objective: Objective, bfloat16: bool) -> None:
        super().__init__()
        self.model = objective.model
        self._loss, self._bfloat16 = objective.loss, bfloat16

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._bfloat16):  # accelerate's cannot change within a process
            return self._loss(batch, generator)


class KernelMuon(torch.optim.Muon):
    """torch's Muon, which takes matrices alone, on convolution kernels too: each is seen as the matrix [out, in * kernel]."""

    def __init__(self, parameters: list[nn.Parameter], *args: Any, **options: Any) -> None:
        self.kernels = parameters
        self.views = [p if p.ndim == 2 else nn.Parameter(p.data.view(p.shape[0], -1)) for p in parameters]
        super().__init__(self.views, *args, **options)

    def step(self, closure: Any = None) -> Any:
        for view, kernel in zip(self.views, self.kernels, strict=True):
            if view is not kernel:
                view.grad = None if kernel.grad is None else kernel.grad.view_as(view)
        return super().step(closure)


def _inner(model: nn.Module) -> set[str]:
    """Names of the matrices and kernels that Muon takes: those inside a model.

    Not tables of embeddings, nor what meets inputs and outputs of a transformer, nor adaLN's, a quarter of the cost for nothing.
    Of a convolutional VAE all of them.
    """
    outer = {"final", "modulation", "shared_modulation", "final_modulation", "lm_head"}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def inside(name: str) -> bool:
        parts = set(name.split("."))
        return name not in tables and not parts & outer and not any(part.endswith("_embed") for part in parts)

    return {name for name, p in model.named_parameters() if p.ndim >= 2 and inside(name)}


def _schedule(step: int, warmup: int, progress: float, final: float) -> float:
    """The learning rate as a share of its highest."""
    fallen = (1 - math.cos(math.pi * min(progress, 1.0))) / 2  # 0 at the start, 1 at the end
    return min(1.0, (step + 1) / max(warmup, 1)) * (1 - (1 - final) * fallen)
