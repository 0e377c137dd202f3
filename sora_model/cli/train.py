"""Commands that train: train, train-vae, train-captioner; what to do with a trained checkpoint: export, and a scaling study."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..model.config import PRESETS
from ..sizes import Size, Timing
from .app import Precision, app, check_finite, check_folder, command, console, one_line_errors, parse_size, say
from .run import Run, WorldName, refuse

if TYPE_CHECKING:
    from ..data import Source
    from ..pipeline.pipeline import SoraPipeline
    from ..training.trainer import Trainer


class Prediction(str, Enum):
    flow = "flow"
    epsilon = "epsilon"
    v = "v"


OutFolder = Annotated[Path, typer.Argument(help="Folder of the run.")]

# Of the world's clips; what is named twice comes twice as often.
CLIPS = ["13x48x48", "13x48x80", "13x80x48"]
LONGER, STILLS = ["17x48x48", "17x48x80", "17x80x48", "21x48x48"], ["1x48x48", "1x64x64", "1x128x128"]
LARGER, LARGEST = ["9x96x96", "5x96x160", "5x160x96"], ["1x256x256", "5x256x256", "1x512x512"]
WORLD_SIZES = {
    "simple": ["6x24x24", "6x16x32", "6x32x16", "1x24x24"],
    "studio": [*4 * CLIPS, *2 * LONGER, *STILLS, *LARGER],
    "rich": CLIPS,
}
# A VAE is convolutional: what it learns of small frames holds for large ones, but for norms and attention over all of a frame.
VAE_SIZES = [*3 * CLIPS, "5x96x96", "5x160x160", "1x128x128", "1x256x256"]
CAPTION_SIZES = [*4 * CLIPS, *LONGER, *STILLS, LARGEST[0]]  # a larger frame says no more than a small one
# Of the clips, those that teach going on, obeying and joining.
LESSONS = {"drift": 0.2, "turn": 0.2, "link": 0.15, "morph": 0.12}
# Nearly all the rest are closeups for a VAE, which does not ask what is given. A still one is the first frame of a clip.
VAE_LESSONS = {**LESSONS, "closeup": 0.3}


@command(Run, world=WorldName.simple, tokens=4096, ema=0.999)
def train(
    out: OutFolder,
    start: Annotated[Path | None, typer.Option(help="Checkpoint of a pipeline to start from, with all its parts.")] = None,
    model: Annotated[str | None, typer.Option(help="tiny, XS, or S, B, L, XL of the DiT paper. Default: tiny.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Folder of a VAE, one of diffusers' causal ones. Default: pixels.")] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="Folder of a T5, UMT5 or CLIP of transformers. Default: words, learned with the model.")
    ] = None,
    patch: Annotated[str | None, typer.Option(help="Patch size TxHxW. Default: 1x8x8 of pixels, 1x2x2 of latents.")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Clips of the world, seen again and again. Default: endless.")] = None,
    prediction: Annotated[Prediction | None, typer.Option(help="Flow matching, or DDPM's epsilon or v. Default: flow.")] = None,
    detailed: Annotated[float, typer.Option(help="Share of the samples with their long caption.")] = 0.5,
    lessons: Annotated[bool, typer.Option(help="Clips of the world that teach to go on, to obey and to join.")] = False,
    frames: Annotated[int | None, typer.Option(min=1, help="Latent frames seen of a clip, evenly spread. Default: all.")] = None,
    per_frame: Annotated[float, typer.Option(help="Share of the samples with a noise level for each frame.")] = 0.0,
    large: Annotated[bool, typer.Option(help="Frames of up to 512x512 among the world's, too.")] = False,
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the backward instead of keeping them.")] = False,
    *,
    run: Run,
) -> None:
    """Train a video transformer on packed batches of mixed sizes, from the procedural world or a folder of files."""
    from ..codec.codec import latent_size
    from ..diffusion.task_mix import TaskMix
    from ..pipeline.pipeline import SoraPipeline
    from ..training.dit import DiffusionObjective

    parts = {"model": model, "vae": vae, "text-encoder": text_encoder, "patch": patch, "prediction": prediction}
    worldly = {"clips": clips, "lessons": lessons, "large": large}
    refuse("--start, whose checkpoint has its own", parts if start else {})
    refuse("--data, which has its own clips", worldly if run.data else {})
    refuse("--size, which says all sizes", {"large": large} if run.size else {})
    kind, name = prediction or Prediction.flow, model or "tiny"
    if name not in PRESETS:
        raise ValueError(f"--model: expected one of {', '.join(PRESETS)}, got {name!r}")
    if not 0 <= detailed <= 1:
        raise ValueError(f"--detailed: expected a share from 0 to 1, got {detailed}")
    cut, mix = parse_size(patch, "--patch") if patch else None, TaskMix(per_frame=per_frame)
    if start is None:
        parts |= {"model": name, "prediction": kind}
    settings = run.settings(out, start=start, frames=frames, **parts, **worldly)
    device, before = run.own_device, run.parts(out, start)
    if before is not None:
        pipeline = SoraPipeline.from_pretrained(before, device=device)
    else:
        pipeline = _untrained(name, cut, vae, text_encoder, kind.value, run.seed, device)
    pipeline.dit.gradient_checkpointing = checkpointing
    timing, default = pipeline.timing, [*WORLD_SIZES[run.world.value], *(LARGEST if large else [])]
    sizes = run.sizes(pipeline.unit, timing.first, default)
    source = run.source(sizes, pipeline.unit, timing.first, clips, lessons=LESSONS if lessons else {}, timing=timing)
    if before is None:
        pipeline.size = sizes[0] if run.data is None else _common_size(source)
    objective = DiffusionObjective(
        pipeline, tasks=mix, detailed=detailed, num_frames=frames,
        keep_latents=clips is not None and run.data is None,
    )  # fmt: skip
    trainer = run.train(
        out, objective, source, pipeline.dit.config.patch_size, settings,
        latent_size=lambda one: _seen(latent_size(pipeline.codec, one), frames),
        attention_width=pipeline.dit.config.hidden_size,
    )  # fmt: skip
    _end(trainer, out / "checkpoint")


def _untrained(
    model: str, patch: Size | None, vae: Path | None, text_encoder: Path | None, prediction: str, seed: int, device: str
) -> SoraPipeline:
    """A pipeline whose transformer is to be trained, its VAE and text encoder from folders, if any are given."""
    from ..codec.vae import VideoVAE
    from ..pipeline.pipeline import SoraPipeline
    from ..text.pretrained import PretrainedEncoder

    codec = None if vae is None else VideoVAE.from_pretrained(vae).to(device)
    encoder = None if text_encoder is None else PretrainedEncoder.from_pretrained(text_encoder).to(device)
    cut = patch or ((1, 8, 8) if vae is None else (1, 2, 2))
    return SoraPipeline.from_preset(
        model, patch=cut, codec=codec, text_encoder=encoder, prediction=prediction, seed=seed, device=device
    )


@command(Run, name="train-vae", max_frames=13, tokens=2304, learning_rate=3e-3, precision=Precision.bf16)
def train_vae(
    out: OutFolder,
    start: Annotated[Path | None, typer.Option(help="Folder of a VAE to start from.")] = None,
    decoder_only: Annotated[bool, typer.Option("--decoder-only", help="Leave the latents as they are.")] = False,
    channels: Annotated[int | None, typer.Option(min=1, help="Of a latent. Default: 16.")] = None,
    temporal: Annotated[int | None, typer.Option(help="Frames per latent frame, after the first: 4, the default, or 8.")] = None,
    spatial: Annotated[
        int | None, typer.Option(help="Pixels per latent position along height and width: 8, the default, or 16.")
    ] = None,
    *,
    run: Run,
) -> None:
    """Train a small causal video VAE; at the end, say how well it gives back clips it has not seen (PSNR). A token is a latent."""
    import torch

    from ..codec.codec import latent_size
    from ..codec.vae import VideoVAE
    from ..training.vae import VAEObjective, clips_of, finish, reconstruction_psnr

    parts = {"channels": channels, "temporal": temporal, "spatial": spatial}
    refuse("--start, whose checkpoint has its own", parts if start else {})
    if start is None:
        parts = {"channels": channels or 16, "temporal": temporal or 4, "spatial": spatial or 8}
    settings = run.settings(out, start=start, decoder_only=decoder_only, **parts)
    device, before = run.own_device, run.parts(out, start)
    torch.manual_seed(run.seed)
    if before is not None:
        made = VideoVAE.from_pretrained(before)
    else:
        made = VideoVAE.small(latent_channels=channels or 16, temporal=temporal or 4, spatial=spatial or 8)
    vae = made.to(device)
    sizes = run.sizes(vae.compression, 1, VAE_SIZES)
    source = run.source(sizes, vae.compression, 1, captions=False, lessons=VAE_LESSONS, timing=Timing(1, vae.compression[0]))
    objective = VAEObjective(vae, decoder_only=decoder_only)
    trainer = run.train(out, objective, source, (1, 1, 1), settings, latent_size=lambda one: latent_size(vae, one))
    if not trainer.accelerator.is_main_process:
        return
    trained = VideoVAE.from_pretrained(out / "checkpoint").to(device)
    # Of a world, clips it has not seen; of a folder, files it was trained on.
    shown = [10**6 + i for i in range(64)] if run.data is None else trainer.sampler.usable[:64]
    if not decoder_only:
        finish(trained, clips_of(source, range(64) if run.data is None else shown), out / "checkpoint")
    ratios = reconstruction_psnr(trained, clips_of(source, shown))
    kind = "unseen clips" if run.data is None else "clips it was trained on"
    say(f"PSNR of {len(ratios)} {kind}: {sum(ratios) / len(ratios):.1f} dB, the worst {min(ratios):.1f} dB")
    _end(trainer, out / "checkpoint")


@command(Run, name="train-captioner", learning_rate=2e-3)
def train_captioner(
    out: OutFolder,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of a pipeline, which gets the captioner.")],
    frames: Annotated[int, typer.Option(min=0, help="Latent frames seen of a clip, evenly spread; 0 sees tubelets of all.")] = 4,
    vocabulary: Annotated[int, typer.Option(min=1, help="Tokens that captions are written in, learned from them.")] = 512,
    longest: Annotated[int, typer.Option(min=2, help="Tokens of the longest caption.")] = 128,
    *,
    run: Run,
) -> None:
    """Train a captioner on the latents of a pipeline's VAE, and put it into the pipeline's checkpoint."""
    import torch

    from ..caption.captioner import Captioner, CaptionerConfig, train_tokenizer
    from ..codec.codec import latent_size
    from ..pipeline.pipeline import SoraPipeline
    from ..storage.files import check_replaceable
    from ..training.captioner import CaptionObjective

    check_replaceable(checkpoint)
    check_folder(checkpoint.absolute().parent, "--checkpoint")
    settings = run.settings(out, checkpoint=checkpoint, frames=frames, vocabulary=vocabulary, longest=longest)
    device = run.own_device
    pipeline = SoraPipeline.from_pretrained(checkpoint, device=device)
    patch = pipeline.dit.config.patch_size
    sizes = run.sizes(pipeline.unit, pipeline.timing.first, CAPTION_SIZES)
    source = run.source(sizes, pipeline.unit, pipeline.timing.first)
    before = run.parts(out)
    if before is not None:
        captioner = Captioner.from_pretrained(before)
    else:
        torch.manual_seed(run.seed)
        count = len(source) if run.data is not None else 4096  # type: ignore[arg-type]
        tokenizer = train_tokenizer(_captions(source, range(count)), vocabulary)
        config = CaptionerConfig(
            in_channels=pipeline.codec.channels,
            patch_size=patch,
            num_frames=frames or None,
            vocabulary=len(tokenizer),
            longest=longest,
        )
        captioner = Captioner(config, tokenizer)
    captioner.to(device)
    # Words learned anew from captions that have changed since would give the weights another meaning.
    words = json.dumps(captioner.tokenizer.get_vocab(), sort_keys=True)
    settings["words learned from the captions"] = f"{zlib.crc32(words.encode()):08x}"
    objective = CaptionObjective(captioner, pipeline.codec)
    trainer = run.train(
        out, objective, source, patch, settings, latent_size=lambda one: _seen(latent_size(pipeline.codec, one), frames)
    )
    if not trainer.accelerator.is_main_process:
        return
    latest = SoraPipeline.from_pretrained(checkpoint)  # it may have been trained further meanwhile
    latest.replaced(captioner=Captioner.from_pretrained(out / "checkpoint")).save_pretrained(checkpoint)
    _end(trainer, checkpoint)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Write a checkpoint with weights in float16, half as large; a text encoder of transformers keeps its own."""
    with one_line_errors():
        from ..storage.files import check_replaceable

        check_replaceable(out)
        check_folder(out.absolute().parent, "OUT")
        import torch

        from ..pipeline.pipeline import SoraPipeline

        SoraPipeline.from_pretrained(checkpoint).save_pretrained(out, dtype=torch.float16)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        say(f"{out}: {size / 1e6:.1f} MB")


@app.command()
def scaling(
    out: OutFolder,
    compute: Annotated[float, typer.Option(min=1, help="Floating-point operations that each model is trained with.")] = 2e13,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train models of four sizes with the same compute, in at most 15,000 steps, and plot their losses against it."""
    with one_line_errors():
        check_finite({"compute": compute})
        check_folder(out, "OUT")
        from ..world.scaling import study

        out.mkdir(parents=True, exist_ok=True)
        study(
            out, compute, seed, lambda p: console.print(f"{p.model}  step {p.step}  {p.compute:.2e} operations  loss {p.loss:.4f}")
        )
        say(str(out / "scaling.png"))


def _end(trainer: Trainer, checkpoint: Path) -> None:
    """Says where the checkpoint is; the exit code is 130 where the training was stopped."""
    say(f"checkpoint: {checkpoint}")
    if trainer.stopped and trainer.progress < 1:
        raise typer.Exit(130)


def _common_size(source: Source) -> Size:
    """The size that most of a folder's files have; among as many, that of a video, and a small one."""
    counts = Counter(source.size(i) for i in range(len(source)))  # type: ignore[arg-type]
    return max(counts, key=lambda size: (counts[size], size[0] > 1, -math.prod(size)))


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
