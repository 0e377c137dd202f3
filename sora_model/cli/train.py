"""Commands that train: train, train-vae, train-captioner."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import Size
from ..terminal import run_training
from .app import Precision, app, console, known_device, one_line_errors, parse_size, say

if TYPE_CHECKING:
    from ..data import Source
    from ..train import TrainConfig


class Prediction(str, Enum):
    flow = "flow"
    epsilon = "epsilon"
    v = "v"


class WorldName(str, Enum):
    simple = "simple"
    studio = "studio"
    rich = "rich"


OutFolder = Annotated[Path, typer.Argument(help="Folder of the run.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder of videos and images, captions in .txt beside them. Default: a procedural world.")
]
WorldOption = Annotated[WorldName, typer.Option(help="Which procedural world: how much it holds.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.")]
Minutes = Annotated[float | None, typer.Option(help="Wall-clock limit.")]
Sizes = Annotated[list[str] | None, typer.Option("--size", help="Sizes TxHxW of the world's clips; repeat for several.")]
Tokens = Annotated[int, typer.Option(help="Tokens in a packed batch, as a batch of short samples; long ones count for more.")]
MaxFrames = Annotated[int | None, typer.Option(help="Longest clip drawn from a file.")]
MaxPixels = Annotated[int | None, typer.Option(help="Larger frames of files are scaled down.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
Accumulation = Annotated[int, typer.Option(help="Batches whose gradients make one step.")]
PrecisionOption = Annotated[Precision, typer.Option(help="bf16 multiplies matrices in bfloat16.")]
Ema = Annotated[float, typer.Option(help="Decay of the averaged weights.")]
Resume = Annotated[bool, typer.Option(help="Go on with the run in OUT.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]

# Of the world's clips; what is named twice comes twice as often.
CLIPS = ["13x48x48", "13x48x80", "13x80x48"]
LONGER, STILLS = ["17x48x48", "17x48x80", "17x80x48", "21x48x48"], ["1x48x48", "1x64x64", "1x128x128", "1x256x256"]
LARGER = ["9x96x96", "5x96x160", "5x160x96", "5x256x256", "1x512x512"]
WORLD_SIZES = {
    "simple": ["6x24x24", "6x16x32", "6x32x16", "1x24x24"],
    "studio": [*4 * CLIPS, *LONGER, *STILLS, *LARGER],
    "rich": CLIPS,
}
# A VAE is convolutional: what it learns of small frames holds for large ones, but for their large plain parts.
VAE_SIZES = [*2 * CLIPS, "5x96x96", "1x128x128"]
# Of the clips, those that teach going on, obeying and joining.
LESSONS = {"drift": 0.2, "turn": 0.2, "link": 0.15}


@app.command()
def train(
    out: OutFolder,
    data: Data = None,
    world: WorldOption = WorldName.simple,
    steps: Steps = None,
    minutes: Minutes = None,
    model: Annotated[str, typer.Option(help="tiny, XS, or S, B, L, XL of the DiT paper.")] = "tiny",
    vae: Annotated[Path | None, typer.Option(help="Folder of a VAE, one of diffusers' causal ones. Default: pixels.")] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="Folder of a T5, UMT5 or CLIP of transformers. Default: words, learned with the model.")
    ] = None,
    patch: Annotated[str | None, typer.Option(help="Patch size TxHxW. Default: 1x8x8 of pixels, 1x2x2 of latents.")] = None,
    size: Sizes = None,
    tokens: Tokens = 2048,
    clips: Annotated[int | None, typer.Option(help="Clips of the world, seen again and again. Default: endless.")] = None,
    max_frames: MaxFrames = 32,
    max_pixels: MaxPixels = None,
    learning_rate: Rate = 1e-3,
    prediction: Annotated[Prediction, typer.Option(help="Flow matching, or DDPM's epsilon or v.")] = Prediction.flow,
    detailed: Annotated[float, typer.Option(help="Share of the samples with their long caption.")] = 0.5,
    lessons: Annotated[bool, typer.Option(help="Clips of the world that teach to go on, to obey and to join.")] = False,
    frames: Annotated[int | None, typer.Option(help="Latent frames seen of a clip, evenly spread. Default: all.")] = None,
    per_frame: Annotated[float, typer.Option(help="Share of the samples with a noise level for each frame.")] = 0.0,
    accumulation: Accumulation = 1,
    precision: PrecisionOption = Precision.no,
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the backward instead of keeping them.")] = False,
    ema: Ema = 0.999,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Train a video transformer on packed batches of mixed sizes, from the procedural world or a folder of files."""
    with one_line_errors():
        from ..diffusion import TaskMix
        from ..pipeline import SoraPipeline
        from ..pretrained_text import PretrainedEncoder
        from ..train import Trainer
        from ..train_dit import DiffusionObjective
        from ..vae import VideoVAE, latent_size

        device = _own_device(device)
        sizes = [parse_size(text) for text in size or WORLD_SIZES[world.value]]
        if resume:
            pipeline = SoraPipeline.from_pretrained(out / "checkpoint", device=device)
        else:
            codec = None if vae is None else VideoVAE.from_pretrained(vae).to(device)
            cut = parse_size(patch) if patch else (1, 8, 8) if vae is None else (1, 2, 2)
            encoder = None if text_encoder is None else PretrainedEncoder.from_pretrained(text_encoder).to(device)
            pipeline = SoraPipeline.from_preset(
                model, patch=cut, codec=codec, text_encoder=encoder, prediction=prediction.value, size=sizes[0], seed=seed,
                device=device,
            )  # fmt: skip
        pipeline.dit.gradient_checkpointing = checkpointing
        options = {"lessons": LESSONS if lessons else {}, "timing": pipeline.timing}
        lead = pipeline.timing.lead
        source = _source(data, world, sizes, pipeline.unit, lead, max_frames, max_pixels, clips, seed, options)
        sampler = _sampler(
            source, pipeline.dit.config.patch_size, tokens, seed,
            latent_size=lambda one: _seen(latent_size(pipeline.codec, one), frames),
            attention_width=pipeline.dit.config.hidden_size,
        )  # fmt: skip
        objective = DiffusionObjective(
            pipeline, tasks=TaskMix(per_frame=per_frame), detailed=detailed, num_frames=frames,
            keep_latents=clips is not None and data is None,
        )  # fmt: skip
        config = _config(steps, minutes, learning_rate, accumulation, precision, ema, seed)
        run_training(Trainer(objective, sampler, config, out, resume=resume), console)
        say(f"checkpoint: {out / 'checkpoint'}")


@app.command()
def train_vae(
    out: OutFolder,
    data: Data = None,
    world: WorldOption = WorldName.studio,
    steps: Steps = None,
    minutes: Minutes = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a VAE to start from.")] = None,
    decoder_only: Annotated[bool, typer.Option("--decoder-only", help="Leave the latents as they are.")] = False,
    channels: Annotated[int, typer.Option(help="Of a latent.")] = 16,
    temporal: Annotated[int, typer.Option(help="Frames per latent frame, after the first: 4 or 8.")] = 4,
    spatial: Annotated[int, typer.Option(help="Pixels per latent position along height and width: 8 or 16.")] = 8,
    size: Sizes = None,
    tokens: Annotated[int, typer.Option(help="Latent positions in a batch.")] = 2304,
    max_frames: MaxFrames = 13,
    max_pixels: MaxPixels = None,
    learning_rate: Rate = 3e-3,
    accumulation: Accumulation = 1,
    precision: PrecisionOption = Precision.bf16,
    ema: Ema = 0.995,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Train a small causal video VAE; at the end, say how well it gives back clips it has not seen (PSNR)."""
    with one_line_errors():
        import torch

        from ..train import Trainer
        from ..train_vae import VAEObjective, clips_of, finish, gives_back
        from ..vae import VideoVAE, latent_size

        device = _own_device(device)
        torch.manual_seed(seed)
        if resume or start is not None:
            make = VideoVAE.from_pretrained(out / "checkpoint" if resume or start is None else start)
        else:
            make = VideoVAE.small(latent_channels=channels, temporal=temporal, spatial=spatial)
        vae = make.to(device)
        sizes = [parse_size(text) for text in size or VAE_SIZES]
        options = {"lessons": LESSONS, "timing": (1, vae.compression[0])}
        source = _source(data, world, sizes, vae.compression, 1, max_frames, max_pixels, None, seed, options)
        sampler = _sampler(source, (1, 1, 1), tokens, seed, latent_size=lambda one: latent_size(vae, one))
        config = _config(steps, minutes, learning_rate, accumulation, precision, ema, seed)
        trainer = Trainer(VAEObjective(vae, decoder_only=decoder_only), sampler, config, out, resume=resume)
        run_training(trainer, console)
        if not trainer.accelerator.is_main_process:
            return
        trained = VideoVAE.from_pretrained(out / "checkpoint").to(device)
        # Of a world, clips it has not seen; of a folder, files it was trained on.
        shown = [10**6 + i for i in range(64)] if data is None else range(min(len(source), 64))  # type: ignore[arg-type]
        if not decoder_only:
            finish(trained, clips_of(source, range(len(shown))), out / "checkpoint")
        ratios = gives_back(trained, clips_of(source, shown))
        kind = "unseen clips" if data is None else "clips it was trained on"
        say(f"PSNR of {len(ratios)} {kind}: {sum(ratios) / len(ratios):.1f} dB, the worst {min(ratios):.1f} dB")
        say(f"checkpoint: {out / 'checkpoint'}")


@app.command()
def train_captioner(
    out: OutFolder,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of a pipeline, which gets the captioner.")],
    data: Data = None,
    world: WorldOption = WorldName.studio,
    steps: Steps = None,
    minutes: Minutes = None,
    frames: Annotated[int, typer.Option(help="Latent frames seen of a clip, evenly spread; 0 sees tubelets of all.")] = 4,
    size: Sizes = None,
    tokens: Tokens = 2048,
    max_frames: MaxFrames = 32,
    max_pixels: MaxPixels = None,
    learning_rate: Rate = 2e-3,
    accumulation: Accumulation = 1,
    precision: PrecisionOption = Precision.no,
    ema: Ema = 0.995,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Train a captioner on the latents of a pipeline's VAE, and put it into the pipeline's checkpoint."""
    with one_line_errors():
        import torch

        from ..captioner import Captioner, CaptionerConfig, train_tokenizer
        from ..pipeline import SoraPipeline
        from ..train import Trainer
        from ..train_captioner import CaptionObjective
        from ..vae import latent_size

        device = _own_device(device)
        pipeline = SoraPipeline.from_pretrained(checkpoint, device=device)
        patch = pipeline.dit.config.patch_size
        lead = pipeline.timing.lead
        sizes = [parse_size(text) for text in size or WORLD_SIZES[world.value]]
        source = _source(data, world, sizes, pipeline.unit, lead, max_frames, max_pixels, None, seed, {})
        if resume:
            captioner = Captioner.from_pretrained(out / "checkpoint")
        else:
            torch.manual_seed(seed)
            count = len(source) if data is not None else 4096  # type: ignore[arg-type]
            tokenizer = train_tokenizer(_captions(source, range(count)))
            sizes_of_it = CaptionerConfig(
                in_channels=pipeline.codec.channels, patch_size=patch, num_frames=frames or None, vocabulary=len(tokenizer)
            )
            captioner = Captioner(sizes_of_it, tokenizer)
        captioner.to(device)
        sampler = _sampler(source, patch, tokens, seed, latent_size=lambda one: _seen(latent_size(pipeline.codec, one), frames))
        config = _config(steps, minutes, learning_rate, accumulation, precision, ema, seed)
        trainer = Trainer(CaptionObjective(captioner, pipeline.codec), sampler, config, out, resume=resume)
        run_training(trainer, console)
        if not trainer.accelerator.is_main_process:
            return
        pipeline.captioner = Captioner.from_pretrained(out / "checkpoint").to(device)
        pipeline.save_pretrained(checkpoint)
        say(f"checkpoint: {checkpoint}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Write a checkpoint with weights in float16, half as large."""
    with one_line_errors():
        import torch

        from ..pipeline import SoraPipeline

        SoraPipeline.from_pretrained(checkpoint).save_pretrained(out, dtype=torch.float16)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        say(f"{out}: {size / 1e6:.1f} MB")


@app.command()
def scaling(
    out: OutFolder,
    compute: Annotated[float, typer.Option(help="Floating-point operations that each model is trained with.")] = 2e14,
    seed: Seed = 0,
) -> None:
    """Train models of three sizes with the same compute, and plot their losses against it."""
    with one_line_errors():
        from ..scaling import study

        out.mkdir(parents=True, exist_ok=True)
        study(
            out, compute, seed, lambda p: console.print(f"{p.model}  step {p.step}  {p.compute:.2e} operations  loss {p.loss:.4f}")
        )
        say(str(out / "scaling.png"))


def _source(
    data: Path | None,
    world: WorldName,
    sizes: list[Size],
    unit: Size,
    lead: int,
    max_frames: int | None,
    max_pixels: int | None,
    clips: int | None,
    seed: int,
    options: dict[str, Any],
) -> Source:
    """A folder of files, or the training part of a world; `clips` of it again and again, or without end."""
    from ..data import FolderSource, Repeated, World, WorldConfig, WorldSource

    if data is not None:
        return FolderSource(data, multiple_of=unit, lead=lead, max_frames=max_frames, max_pixels=max_pixels, seed=seed)
    config = getattr(WorldConfig, world.value)(seed)
    source = WorldSource(World(config, split="training" if world is WorldName.studio else None), sizes, **options)
    return source if clips is None else Repeated(source, clips)


def _own_device(device: str) -> str:
    """The device of this process: with several of them on GPUs, each has its own."""
    from accelerate import PartialState

    state = PartialState(cpu=known_device(device) == "cpu")
    return device if state.num_processes == 1 else str(state.device)


def _sampler(source: Source, patch: Size, tokens: int, seed: int, **options: Any) -> Any:
    """Packed batches of this process; from an endless source, of several sizes each."""
    from accelerate import PartialState

    from ..data import PackedSampler, WorldSource

    if isinstance(source, WorldSource):
        options["min_sizes"] = min(len(set(source.sizes)), 4)
    state = PartialState()
    return PackedSampler(source, patch, tokens, seed=seed, rank=state.process_index, num_ranks=state.num_processes, **options)


def _config(
    steps: int | None, minutes: float | None, rate: float, accumulation: int, precision: Precision, ema: float, seed: int
) -> TrainConfig:
    from ..train import TrainConfig

    return TrainConfig(
        steps=1000 if steps is None and minutes is None else steps,
        minutes=minutes,
        learning_rate=rate,
        accumulation=accumulation,
        mixed_precision=precision.value,
        ema_decay=ema,
        seed=seed,
    )


def _seen(size: Size, frames: int | None) -> Size:
    """What is left of a latent's size where only so many of its frames are looked at."""
    return (min(size[0], frames) if frames else size[0], *size[1:])


def _captions(source: Source, indices: Sequence[int]) -> list[str]:
    """Captions to learn a vocabulary from, without decoding files where they are known already."""
    from ..data import FolderSource

    if isinstance(source, FolderSource):
        return [*source.captions, *(caption for caption in source.detailed if caption)]
    samples = [source.load(i) for i in indices]
    return [caption for sample in samples for caption in (sample.caption, sample.detailed) if caption]
