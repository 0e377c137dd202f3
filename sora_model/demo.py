"""The demo: train on the procedural world for some minutes, generate videos of several sizes, compare the kernels with torch."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sora_kernels.adaln import gate_residual_layer_norm_modulate
from sora_kernels.attention import flash_attn_varlen_func
from sora_kernels.layout import PackedLayout
from sora_kernels.patch_embed import patch_embed_3d
from sora_kernels.rope import rope_3d

from .config import Size
from .data import PackedSampler, World, WorldConfig, WorldSource, judge, read_video
from .diffusion import TaskMix
from .pipeline import SoraPipeline
from .terminal import generate_files, run_training
from .train import TrainConfig, Trainer

SIZES: list[Size] = [(6, 24, 24), (6, 16, 32), (6, 32, 16), (1, 24, 24)]
# Colour, shape, motion and size of what is generated; an image has no motion.
WANTED: list[tuple[str, str, str, Size]] = [
    ("red", "circle", "right", (6, 24, 24)),
    ("green", "square", "up", (6, 24, 24)),
    ("blue", "triangle", "left", (6, 24, 24)),
    ("blue", "circle", "left", (6, 16, 32)),
    ("red", "square", "right", (6, 16, 32)),
    ("green", "triangle", "up", (6, 32, 16)),
    ("blue", "square", "down", (6, 32, 16)),
    ("red", "triangle", "stay", (1, 24, 24)),
]


def run(out: Path, minutes: float, seed: int, console: Console) -> None:
    """Everything the demo does; files go to `out`."""
    began = time.perf_counter()
    console.rule("1. training a packed DiT on a procedural world")
    config = WorldConfig.simple(seed)
    pipeline = SoraPipeline.from_preset("tiny", patch=(1, 8, 8), seed=seed)
    sampler = PackedSampler(WorldSource(World(config), SIZES, weights=[3, 2, 2, 1]), pipeline.unit, 1024, min_sizes=4, seed=seed)
    first = sampler.batch(0)
    mixed = sorted({tuple(video.shape[1:]) for video in first.videos})
    console.print(f"first batch: {len(first.videos)} samples, {first.tokens} tokens, no padding, (T, H, W) of {mixed}")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_folder = out / f"run-{stamp}"
    # Many small steps at a high rate, and text to video alone: minutes are few.
    training = TrainConfig(
        steps=None, minutes=minutes, learning_rate=3e-3, ema_decay=0.995, tasks=TaskMix(1, 0, 0, 0), seed=seed, save_every=10**6
    )
    trainer = Trainer(pipeline, sampler, training, run_folder)
    losses = run_training(trainer, console)
    console.print(f"{len(losses)} steps in {trainer.seconds:.0f} s")
    loss_curve(run_folder / "loss.csv", out / "loss.png")

    console.rule("2. generating videos of several sizes in one packed batch")
    world = World(WorldConfig.simple(seed + 1))
    scenes = [world.sample(i, color=c, shape=s, motion=m) for i, (c, s, m, _) in enumerate(WANTED)]
    sizes = [size for *_, size in WANTED]
    prompts = [scene.caption(frames=size[0]) for scene, size in zip(scenes, sizes, strict=True)]
    files = generate_files(trainer.averaged_pipeline(), prompts, sizes, out / "videos", 30, 3.0, seed, 6.0, 8, "mp4", console)
    table = Table("prompt", "size", "colour", "motion", "shape", title="what a program sees in the videos")
    for prompt, scene, size, file in zip(prompts, scenes, sizes, files, strict=False):
        video = read_video(file, normalize=True)[0][:, :, 4::8, 4::8]  # the files are enlarged 8 times
        seen = judge(video, scene.truth(*size))
        motion = "-" if size[0] == 1 else _mark(seen["motion"])
        table.add_row(prompt, "x".join(map(str, size)), _mark(seen["color"]), motion, _mark(seen["shape"]))
    console.print(table)
    console.print(f"the same for every colour, shape and motion: {all_prompts(trainer.averaged_pipeline(), world)}")

    console.rule("3. the kernels against torch")
    console.print(kernel_table())

    console.rule("what the demo made")
    for path in [*files, out / "loss.png", run_folder / "checkpoint"]:
        console.print(str(path), highlight=False, soft_wrap=True)
    console.print(f"in all {time.perf_counter() - began:.0f} s")


def all_prompts(pipeline: SoraPipeline, world: World) -> str:
    """Generates a clip for every colour, shape and motion of the world; says how many show what was asked for."""
    config = world.config
    wanted = list(itertools.product(config.colors, config.shapes, config.motions))
    scenes = [world.sample(i, color=c, shape=s, motion=m) for i, (c, s, m) in enumerate(wanted)]
    sizes = [SIZES[i % 3] for i in range(len(wanted))]
    videos = pipeline([scene.caption() for scene in scenes], sizes, guidance_scale=3.0, seeds=1000)
    seen = [judge(video, scene.truth(*size)) for video, scene, size in zip(videos, scenes, sizes, strict=True)]
    rights = {name: sum(one[key] for one in seen) for name, key in (("colour", "color"), ("motion", "motion"), ("shape", "shape"))}
    return ", ".join(f"{name} {right} of {len(wanted)}" for name, right in rights.items())


def loss_curve(log: Path, path: Path) -> None:
    """Plots the loss of every step and its running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    window = max(len(losses) // 50, 1)
    means = [sum(losses[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, label="each step")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log", title="Training loss")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def kernel_table() -> Table:
    """Each op beside the plain torch it replaces, on a packed batch of mixed sizes, float32, forward."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    grids = [(4, 16, 16), (1, 32, 32), (8, 12, 20), (4, 20, 12)]
    layout = PackedLayout.from_grids(grids)
    tokens, cu = layout.num_tokens, layout.cu_seqlens
    q, k, v = random(tokens, 8, 64), random(tokens, 8, 64), random(tokens, 8, 64)
    x, y, rows = random(tokens, 512), random(tokens, 512), random(layout.num_samples, 3 * 512)
    gate, shift, scale = rows.chunk(3, dim=1)
    videos = [random(16, t, 2 * h, 2 * w) for t, h, w in grids]
    weight, bias = random(512, 16, 1, 2, 2), random(512)
    angles = torch.cat(
        [torch.outer(p, 1e4 ** -(torch.arange(n) / n)) for p, n in zip(layout.positions().T, (12, 10, 10), strict=True)], 1
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def attention() -> Tensor:
        parts = zip(*(layout.unpack(part) for part in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in qkv)) for qkv in parts]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    def rope() -> Tensor:
        even, odd = q[..., 0::2], q[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    def adaln() -> Tensor:
        g, b, a = (row.repeat_interleave(cu.diff(), dim=0) for row in (gate, shift, scale))
        return F.layer_norm(x + g * y, (512,), eps=1e-6) * (1 + a) + b

    def patches() -> Tensor:
        outs = [F.conv3d(video[None], weight, bias, stride=(1, 2, 2))[0].flatten(1).T for video in videos]
        return torch.cat(outs)

    table = Table("op", "ours, ms", "torch, ms", "faster", title=f"{tokens:,} packed tokens, {torch.get_num_threads()} threads")
    for name, ours, theirs in (
        ("packed attention / SDPA per sample", lambda: flash_attn_varlen_func(q, k, v, cu, cu), attention),
        ("3D RoPE / torch", lambda: rope_3d(q, layout), rope),
        (
            "gate + residual + norm + modulate / torch",
            lambda: gate_residual_layer_norm_modulate(x, y, gate, shift, scale, cu)[1],
            adaln,
        ),
        ("patch embedding / Conv3d per video", lambda: patch_embed_3d(videos, weight, bias, patch_size=(1, 2, 2))[0], patches),
    ):
        torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
        mine, other = _interleaved(ours, theirs)
        table.add_row(name, f"{1e3 * mine:.1f}", f"{1e3 * other:.1f}", f"{other / mine:.1f}x")
    return table


def _interleaved(a: Callable[[], Tensor], b: Callable[[], Tensor], rounds: int = 9) -> tuple[float, float]:
    """Median seconds of each, measured in turn so that a slow moment of the machine hits both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, seconds in zip((a, b), times, strict=True):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
    return sorted(times[0])[rounds // 2], sorted(times[1])[rounds // 2]


def _mark(right: bool) -> str:
    return "[green]yes[/]" if right else "[red]no[/]"
