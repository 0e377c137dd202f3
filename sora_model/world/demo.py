"""The demo: videos of several sizes and tasks from the checkpoint that comes with the package, and the kernels beside torch."""

from __future__ import annotations

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

from ..cli.files import write_files
from ..cli.terminal import sampled
from ..cli.text import one_line
from ..data import contact_sheet
from ..pipeline.pipeline import SoraPipeline
from ..pipeline.request import Request, extend, image_to_video, join, text_to_video, video_to_video
from ..sizes import Size
from .config import WorldConfig
from .judge import judge
from .scene import Scene
from .world import World

# Colour, shape, motion and size of what is generated; an image has no motion.
WANTED: list[tuple[str, str, str, Size]] = [
    ("red", "circle", "right", (13, 48, 48)),
    ("green", "square", "up", (13, 48, 48)),
    ("blue", "star", "left", (13, 48, 80)),
    ("yellow", "ring", "down and right", (13, 48, 80)),
    ("purple", "triangle", "up and left", (13, 80, 48)),
    ("cyan", "cross", "down", (13, 80, 48)),
    ("orange", "diamond", "stay", (1, 64, 64)),
]
STEPS, GUIDANCE = 30, 3.0


def run(pipeline: SoraPipeline, out: Path, seed: int, console: Console, *, overwrite: bool = False) -> None:
    """Everything the demo does; files go to `out`, beside those there or, with `overwrite`, in their place."""
    began = time.perf_counter()
    console.rule("1. a first video")
    prompt = "a red circle moves right"
    first = generate(pipeline, [text_to_video(prompt, (13, 48, 48))], seed, console)
    files = write_files(first, [prompt], out / "first", [8.0], 8, "mp4", seeds=[seed], overwrite=overwrite)
    console.print(f"{files[0]} after {time.perf_counter() - began:.0f} s", highlight=False, soft_wrap=True)

    console.rule("2. videos and images of several sizes in one packed batch")
    world = World(WorldConfig.studio(seed))
    scenes = [world.sample(i, color=c, shape=s, motion=m) for i, (c, s, m, _) in enumerate(WANTED)]
    sizes = [size for *_, size in WANTED]
    prompts = [scene.caption(frames=size[0]) for scene, size in zip(scenes, sizes, strict=True)]
    requests = [text_to_video(text, size) for text, size in zip(prompts, sizes, strict=True)]
    videos = generate(pipeline, requests, seed, console)
    seeds = [seed + i for i in range(len(videos))]
    files += write_files(videos, prompts, out / "videos", [8.0] * len(videos), 4, "mp4", seeds=seeds, overwrite=overwrite)
    console.print(verdicts(prompts, scenes, sizes, videos))

    console.rule("3. every task in one packed batch")
    tasks = every_task(pipeline, videos)
    made = generate(pipeline, list(tasks.values()), seed, console)
    files.append(contact_sheet(out / "tasks.png", made, [f"{name}: {tasks[name].prompt}" for name in tasks], columns=12, cell=80))
    if pipeline.captioner is not None:
        for text, caption in zip(prompts, pipeline.caption(videos), strict=True):
            console.print(f"asked for: {text}\n  captioned: {one_line(caption)}", highlight=False, soft_wrap=True, markup=False)

    console.rule("4. the kernels against torch")
    console.print(kernel_table())

    console.rule("what the demo made")
    for path in files:
        console.print(str(path), highlight=False, soft_wrap=True)
    console.print(f"in all {time.perf_counter() - began:.0f} s")


def generate(pipeline: SoraPipeline, requests: list[Request], seed: int, console: Console) -> list[Tensor]:
    return sampled(pipeline, requests, seed, console, num_inference_steps=STEPS, guidance_scale=GUIDANCE)


def every_task(pipeline: SoraPipeline, videos: list[Tensor]) -> dict[str, Request]:
    """A request of each task, made of videos of `WANTED`: clips and, last, an image."""
    timing = pipeline.timing
    return {
        "text to video": text_to_video("a white ring moves up and right", pipeline.size),
        "text to image": text_to_video("a purple cross", (1, 64, 64)),
        "image to video": image_to_video("an orange diamond moves right", videos[-1], 13, timing),
        "video to video": video_to_video("a yellow circle moves right", videos[0], 0.85),
        "extension": extend("a red circle moves down", videos[0], 8, timing),
        "extension backward": extend("a green square moves up", videos[1], 9, timing, backward=True),
        "joining": join("a blue star", videos[2], videos[2].flip(3), 2 * timing.stride, timing),
    }


def verdicts(prompts: list[str], scenes: list[Scene], sizes: list[Size], videos: list[Tensor]) -> Table:
    """What a program sees in each video."""
    table = Table("prompt", "size", "colour", "motion", "shape", title="what a program sees in the videos")
    for prompt, scene, size, video in zip(prompts, scenes, sizes, videos, strict=True):
        seen = judge(video, scene.truth(*size))
        motion = "-" if size[0] == 1 else _mark(seen["motion"])
        table.add_row(prompt, "x".join(map(str, size)), _mark(seen["color"]), motion, _mark(seen["shape"]))
    return table


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
