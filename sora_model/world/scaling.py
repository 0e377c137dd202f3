"""A small scaling study: the loss of models of four sizes against the compute they were trained with.

Each model is trained on the same batches at the same learning rate with the same compute, but in at most `MOST_STEPS` steps; its
averaged weights are measured on the way, on clips, captions, noise and levels that are always the same. Sora's report says that
samples improve markedly with training compute; this shows, at sizes that a CPU trains in minutes, how the loss falls with it, and
which size is best at which compute (Peebles and Xie, 2023, figure 8).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..data import Batch, PackedSampler
from ..diffusion.loss import diffusion_loss
from ..diffusion.noise import add_noise
from ..diffusion.task_mix import TaskMix
from ..model.config import DiTConfig
from ..model.dit import DiT
from ..pipeline.pipeline import SoraPipeline
from ..storage.files import whole_file
from ..training.config import TrainConfig
from ..training.dit import DiffusionObjective, smallest_sigma
from ..training.resume import check_run
from ..training.trainer import Trainer
from .config import WorldConfig
from .source import WorldSource
from .world import World

MODELS = {"1 x 32": (1, 32), "2 x 64": (2, 64), "4 x 128": (4, 128), "6 x 256": (6, 256)}  # depth and width
TOKENS = 1024
MOST_STEPS = 15_000  # by which the smallest model has long stopped learning much
POINTS = 14  # measurements of a model, evenly spread over the logarithm of its compute


@dataclass(frozen=True)
class Point:
    """What a model had cost, in floating-point operations, and its loss on held-out clips."""

    model: str
    parameters: int
    step: int
    compute: float
    loss: float


def study(out: Path, compute: float, seed: int = 0, progress: Callable[[Point], None] | None = None) -> list[Point]:
    """Trains every model with `compute` operations in at most `MOST_STEPS` steps; writes scaling.json and scaling.png to `out`."""
    points: list[Point] = []
    folders = {name: out / f"run-{name.replace(' ', '')}" for name in MODELS}
    for folder in folders.values():
        check_run(folder, resume=False, settings={})
    for name, (depth, width) in MODELS.items():
        for point in _train(folders[name], name, depth, width, compute, seed):
            points.append(point)
            if progress is not None:
                progress(point)
    with whole_file(out / "scaling.json") as partial:
        partial.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    with whole_file(out / "scaling.png") as partial:
        plot(points, partial)
    return points


def _train(folder: Path, name: str, depth: int, width: int, compute: float, seed: int) -> list[Point]:
    world = WorldConfig.studio(seed)
    source = WorldSource(World(world, split="training"), [(5, 32, 32), (5, 32, 48), (1, 32, 32)])
    pipeline = SoraPipeline.from_preset("tiny", patch=(1, 8, 8), seed=seed)
    base = pipeline.dit.config.to_dict()
    config = DiTConfig.from_dict({**base, "depth": depth, "hidden_size": width, "num_heads": max(width // 32, 1)})
    pipeline = pipeline.replaced(dit=DiT(config))
    parameters = sum(p.numel() for block in pipeline.dit.blocks for p in block.parameters())
    # Forward and backward of a token: six operations per weight of a block, and attention to the others of its sample.
    per_token = 6 * parameters + 12 * depth * width * 100
    steps = min(max(int(compute / (per_token * TOKENS)), 1), MOST_STEPS)
    training = TrainConfig(steps=steps, learning_rate=2e-3, final_rate=1.0, ema_decay=0.99, save_minutes=10**9, seed=seed)
    objective = DiffusionObjective(pipeline, tasks=TaskMix(1, 0, 0, 0))
    trainer = Trainer(objective, PackedSampler(source, pipeline.unit, TOKENS, seed=seed), training, folder)
    unseen = PackedSampler(WorldSource(World(world, split="held out"), source.sizes), pipeline.unit, 8 * TOKENS, seed=seed).batch(0)
    wanted = {max(round(steps ** ((i + 1) / POINTS)), 1) for i in range(POINTS)}
    points = []
    for done in trainer.train():
        if done.step in wanted and done.step >= min(steps, 20):
            loss = held_out_loss(objective.averaged(trainer.averaged_model()), unseen)
            points.append(Point(name, parameters, done.step, done.step * per_token * TOKENS, loss))
    return points


def held_out_loss(pipeline: SoraPipeline, batch: Batch) -> float:
    """The diffusion loss of a batch at noise and levels that are always the same."""
    latents = pipeline.codec.encode(batch.videos)
    noised = add_noise(pipeline.scheduler, latents, generator=torch.Generator().manual_seed(0))
    predictions = pipeline.dit(noised.latents, noised.timesteps, pipeline.text_encoder(batch.captions))
    return diffusion_loss(predictions, noised, smallest_sigma=smallest_sigma(pipeline.dit)).item()


def plot(points: list[Point], path: Path) -> None:
    """Loss against compute, a line per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(point.model for point in points):
        own = [point for point in points if point.model == name]
        label = f"{name}: {own[0].parameters / 1e6:.2f} million weights in blocks"
        axes.plot([point.compute for point in own], [point.loss for point in own], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="training compute, floating-point operations", ylabel="loss on held-out clips")
    axes.set_title("Loss against compute, depth x width")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
