"""Commands that train: train, train-vae, train-captioner; what to do with a trained checkpoint: export.

What they do is written in `training/recipes`; here are their options.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .app import Overwrite, Precision, app, check_folder, check_new, command, naming, one_line_errors, parse_size, say, to_path
from .ending import STATUSES
from .files import same_file
from .run import Run, training


class Prediction(str, Enum):
    flow = "flow"
    epsilon = "epsilon"
    v = "v"


OutFolder = Annotated[Path, typer.Argument(help="Folder of the run.")]


@command(Run, epilog=STATUSES, data="world:simple", tokens=4096, ema=0.999)
def train(
    out: OutFolder,
    start: Annotated[Path | None, typer.Option(help="Checkpoint of a pipeline to start from, with all its parts.")] = None,
    model: Annotated[str | None, typer.Option(help="tiny, XS, or S, B, L, XL of the DiT paper. Default: tiny.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Folder of a VAE, one of diffusers' causal ones. Default: pixels.")] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="Folder of a T5, UMT5 or CLIP of transformers. Default: words, learned with the model.")
    ] = None,
    patch: Annotated[str | None, typer.Option(help="Patch size TxHxW. Default: 1x8x8 of pixels, 1x2x2 of latents.")] = None,
    prediction: Annotated[Prediction | None, typer.Option(help="Flow matching, or DDPM's epsilon or v. Default: flow.")] = None,
    detailed: Annotated[float, typer.Option(help="Share of the samples with their long caption.")] = 0.5,
    frames: Annotated[int | None, typer.Option(min=1, help="Latent frames seen of a clip, evenly spread. Default: all.")] = None,
    per_frame: Annotated[float, typer.Option(help="Share of the samples with a noise level for each frame.")] = 0.0,
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the backward instead of keeping them.")] = False,
    *,
    run: Run,
) -> None:
    """Train a video transformer on packed batches of mixed sizes, from a folder of files or the procedural world."""
    from ..training.recipes.dit import DiTRecipe, train_dit

    with training(out) as it:
        recipe = DiTRecipe(
            start=start,
            model=model,
            vae=vae,
            text_encoder=text_encoder,
            patch=None if patch is None else parse_size(patch, "--patch"),
            prediction=prediction and prediction.value,
            detailed=detailed,
            frames=frames,
            per_frame=per_frame,
            checkpointing=checkpointing,
        )
        it.end(train_dit(out, recipe, run.settings(out), it.show), out / "checkpoint")


@command(Run, name="train-vae", epilog=STATUSES, tokens=2304, learning_rate=3e-3, precision=Precision.bf16)
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
    from ..training.recipes.vae import VAERecipe, train_vae

    with training(out) as it:
        recipe = VAERecipe(start=start, decoder_only=decoder_only, channels=channels, temporal=temporal, spatial=spatial)
        trainer, measured = train_vae(out, recipe, run.settings(out), it.show)
        if measured is not None:
            ratios, kind = measured.psnr, "clips it was trained on" if measured.seen else "unseen clips"
            say(f"PSNR of {len(ratios)} {kind}: {sum(ratios) / len(ratios):.1f} dB, the worst {min(ratios):.1f} dB")
        it.end(trainer, out / "checkpoint")


@command(Run, name="train-captioner", epilog=STATUSES, learning_rate=2e-3)
def train_captioner(
    out: OutFolder,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of a pipeline, which gets the captioner.")],
    frames: Annotated[int, typer.Option(min=0, help="Latent frames seen of a clip, evenly spread; 0 sees tubelets of all.")] = 4,
    vocabulary: Annotated[
        int, typer.Option(help="Tokens that captions are written in: 256 bytes, 4 marks, and those learned from captions.")
    ] = 512,
    longest: Annotated[int, typer.Option(min=2, help="Tokens of the longest caption.")] = 128,
    *,
    run: Run,
) -> None:
    """Train a captioner on the latents of a pipeline's VAE, and put it into the pipeline's checkpoint."""
    from ..storage.files import check_replaceable
    from ..training.recipes.captioner import CaptionerRecipe, train_captioner

    check_folder(checkpoint.absolute().parent, "--checkpoint")
    with naming("--checkpoint"):
        check_replaceable(checkpoint)
    with training(out) as it:
        recipe, settings = CaptionerRecipe(checkpoint, frames, vocabulary, longest), run.settings(out)
        # What is written to OUT would be foreign to a checkpoint around it, and the captioner would replace one in it.
        _check_apart(out, checkpoint, "--checkpoint")
        it.end(train_captioner(out, recipe, settings, it.show), checkpoint)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(parser=to_path, help="Folder of a checkpoint.")],
    out: Annotated[Path, typer.Argument(parser=to_path, help="Folder to write, another one.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint with weights in float16, half as large; a text encoder of transformers keeps its own."""
    with one_line_errors():
        from ..storage.files import check_replaceable

        with naming("OUT"):
            check_replaceable(out)
        # The weights that are read would lose their precision for good, or go with the folder that is replaced.
        _check_apart(out, checkpoint, "CHECKPOINT")
        if not out.is_dir() or any(out.iterdir()):
            check_new(out, overwrite, "OUT")
        check_folder(out.absolute().parent, "OUT")
        import torch

        from ..pipeline.pipeline import SoraPipeline

        with naming("CHECKPOINT"):
            pipeline = SoraPipeline.from_pretrained(checkpoint)
        pipeline.save_pretrained(out, dtype=torch.float16)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        say(f"{out}: {size / 1e6:.1f} MB")


def _check_apart(out: Path, checkpoint: Path, option: str) -> None:
    """Raises ValueError for OUT in, at or around a checkpoint, which `option` names."""
    inner, outer = (Path(os.path.realpath(path)) for path in (out, checkpoint))  # resolve() raises for loops of links
    if same_file(out, checkpoint) or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ValueError(f"OUT: expected a folder that is neither {option} nor in or around it, got {out}")
