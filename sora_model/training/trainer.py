"""Training on packed batches of mixed sizes: `Trainer`, for whatever an `Objective` says is to be learned.

A step draws one batch per process and accumulation, takes the mean of the gradients of their losses, moves the weights, and
averages them. Everything random in step n follows from the seed and n, so a run that was stopped and resumed goes through the same
steps as one that was not (where it is limited by minutes, the learning rate follows the clock). Processes and devices are
accelerate's: `torchrun --nproc_per_node 8 -m sora_model.cli train ...`, or `accelerate launch`.

In the run's folder:

    checkpoint/              the averaged (EMA) weights, as the objective saves them
    training.safetensors     weights, averages, optimizer moments and the step: all that a run is resumed from, in one file
    loss.csv, tensorboard/   loss, learning rate and tokens per second of every step; see log.py

Whatever ends a process or fills a disk while these are written, the run can be resumed from the last save that is whole.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data import Batch, PackedSampler
from ..storage.weights import check_finite, distinct_state, load_distinct
from .config import TrainConfig
from .log import Step, TrainLog
from .optimizers import KernelMuon, check_moments, muon_parameters, schedule
from .resume import CHECKPOINT, STATE, all_settings, check_run, only_run, read_state, read_state_tensors, write_state


class Objective(Protocol):
    """What is to be learned.

    model: the modules to train. loss: of one batch, with everything random drawn from the generator.
    save: writes a checkpoint with `model` (the averaged weights) to a folder, complete or not at all.
    """

    @property
    def model(self) -> nn.Module: ...

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor: ...

    def save(self, model: nn.Module, folder: Path) -> None: ...


class Trainer:
    """Trains an objective's model.

    >>> from sora_model import SoraPipeline
    >>> from sora_model.data import PackedSampler
    >>> from sora_model.training.dit import DiffusionObjective
    >>> pipeline = SoraPipeline.from_preset("tiny", patch=(1, 8, 8))
    >>> sampler = PackedSampler(source, (1, 8, 8), tokens_per_batch=256)
    >>> trainer = Trainer(DiffusionObjective(pipeline), sampler, TrainConfig(steps=2), "runs/shapes")
    >>> [step.step for step in trainer.train()]
    [1, 2]

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
        self._resumed = resume
        self._log: TrainLog | None = None
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
        """Ends the training, of all processes, after the step in hand, and saves it. A signal handler or a thread may call it."""
        self._stopping = True

    def train(self) -> Iterator[Step]:
        """Trains to the end, or until `stop` is called, yielding after every step, and saves.

        What else ends it, an exception or a loop that is left, saves nothing: the last save stays as it is. Signals are the
        caller's: only the command line has handlers, which call `stop`.

        Raises:
            SettingError: another process is training in the folder.
            FloatingPointError: a loss that is NaN or infinite.
            WriteError: the disk is full, or otherwise refuses. ValueError: weights that are not finite, which are never saved.
            RuntimeError: of torch, as where it has no memory or has lost its device.
        """
        main, fresh = self.accelerator.is_main_process, not (self._resumed or self.step)
        with contextlib.ExitStack() as stack:
            if main:
                stack.enter_context(only_run(self.folder, fresh=fresh))
                self._log = stack.enter_context(TrainLog(self.folder, self.step))
                stack.callback(setattr, self, "_log", None)  # a later `save` has no rows to flush
            yield from self._steps()
            self.save()

    def _steps(self) -> Iterator[Step]:
        """All steps to the end, each written to the log, if there is one, and saves on the way."""
        before, saved = self.seconds, self.seconds
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
            if self._log is not None:
                self._log.add(done)
            if self.seconds - saved > 60 * self.config.save_minutes:
                self.save()
                saved = self.seconds
            yield done

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
                    hint = "nothing of it is saved; try a lower learning rate"
                    raise FloatingPointError(f"Trainer: the loss is {losses[-1]} at step {self.step}; {hint}")
                self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        rate = config.learning_rate * schedule(self.step, config.warmup, self.progress, config.final_rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.model.zero_grad()
        self.average.update_parameters(self.model)
        return sum(losses) / len(losses), rate

    def _agree(self, seconds: float) -> None:
        """Sets the clock and whether to stop, the same for all processes: the latest clock, and a stop that any was asked for."""
        if self.accelerator.num_processes == 1:
            self.seconds, self.stopped = seconds, self._stopping
            return
        agreed = torch.tensor([seconds, float(self._stopping)], device=self.accelerator.device)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        self.seconds, self.stopped = agreed[0].item(), bool(agreed[1])

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
        tensors = self._tensors()
        for name, value in tensors.items():  # a good state is not replaced by one that is lost
            check_finite(value, f"Trainer: save: {name.removeprefix('model.')}")
        if self._log is not None:  # after a loss of power, the log has the row of every step that the state has
            self._log.flush()
        state = {"step": self.step, "seconds": self.seconds, "config": asdict(self.config), "settings": self.settings}
        first = not (self.folder / STATE).exists()
        if not first:
            write_state(self.folder / STATE, tensors, state)
        self.objective.save(self.averaged_model(), self.folder / CHECKPOINT)
        if first:
            write_state(self.folder / STATE, tensors, state)

    def _tensors(self) -> dict[str, Tensor]:
        """Weights, averages and moments, by the names that they are saved under."""
        tensors = {f"model.{name}": value for name, value in distinct_state(self.model).items()}
        tensors |= {f"average.{name}": value for name, value in distinct_state(self.average).items()}
        for name, optimizer, parameter in self._moments:
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def _load(self) -> None:
        path = self.folder / STATE
        state, tensors = read_state(path), read_state_tensors(path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        for name, value in tensors.items():
            check_finite(value, f"Trainer: resume: {path}: {name}")
        load_distinct(self.model, part("model."), f"Trainer: resume: {path}")
        load_distinct(self.average, part("average."), f"Trainer: resume: {path}")
        if (count := int(self.average.n_averaged)) != state["step"]:
            raise ValueError(f"Trainer: resume: {path}: average.n_averaged: expected the step {state['step']}, got {count}")
        for name, optimizer, parameter in self._moments:
            moments = {key: value.to(parameter.device) for key, value in part(f"optimizer.{name}.").items()}
            if moments:  # there are none of what had no gradient yet
                check_moments(moments, optimizer, parameter, f"Trainer: resume: {path}: optimizer.{name}")
                optimizer.state[parameter] = moments
        self.step, self.seconds = state["step"], state["seconds"]

    def _make_optimizers(self) -> None:
        rate, decay = self.config.learning_rate, self.config.weight_decay
        named = list(self.model.named_parameters())
        chosen = muon_parameters(self.model) if self.config.optimizer == "muon" else set()
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
