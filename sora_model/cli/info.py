"""What a checkpoint is, by its configs and the headers of its files alone: `sora info`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Loaded, command, parse_size, say

if TYPE_CHECKING:
    from ..pipeline.parts import Outline
    from ..sizes import Size

# By the keyframes that a transformer was trained with.
TASKS: dict[str, tuple[str, ...]] = {
    "none": ("generate", "restyle"),
    "first": ("animate",),
    "first and last": ("animate",),
    "any": ("generate", "restyle", "animate", "extend", "join", "loop", "long", "simulate"),
}
OWNER = "--checkpoint"


@command(Loaded)
def info(
    size: Annotated[
        str | None, typer.Option("--size", help="TxHxW in pixels, to say the memory of. Default: the checkpoint's.")
    ] = None,
    *,
    loaded: Loaded,
) -> None:
    """Say what a checkpoint is, what it can do and what memory that takes. No weights are read."""
    outline, folder = loaded.outline, loaded.folder
    asked = outline.size if size is None else parse_size(size)
    for name, text in (*_parts(folder), *_sizes(outline), *_memory(outline, asked), *_tasks(outline, folder)):
        say(f"{name:15}{text}")


def _parts(folder: Path) -> Iterator[tuple[str, str]]:
    from ..pipeline.parts import bytes_in
    from ..storage.weights import read_json
    from ..text.words import Vocabulary

    yield "checkpoint", f"{folder}, a {read_json(folder / 'model_index.json', OWNER)['_class_name']}"
    for name in ("dit", "transformer", "transformer_2"):
        if (folder / name).is_dir():
            yield "transformer", f"{_count(folder / name)} weights in {_amount(bytes_in(folder / name))}"
    if (folder / "image_encoder").is_dir():
        yield "images", f"CLIP, {_amount(bytes_in(folder / 'image_encoder'))}"
    config = read_json(folder / "text_encoder" / "config.json", OWNER)
    words = None if "model_type" in config else Vocabulary.read(folder / "text_encoder")
    known = config.get("model_type") or f"{len(words or ())} words learned with it, 'sora vocabulary' lists them"
    yield "text", f"{known}; {_amount(bytes_in(folder / 'text_encoder'))}"
    if (folder / "vae").is_dir():
        kind = read_json(folder / "vae" / "config.json", OWNER)["_class_name"]
        yield "VAE", f"{kind}, {_amount(bytes_in(folder / 'vae'))}"
    else:
        yield "VAE", "none: its latents are pixels"


def _sizes(outline: Outline) -> Iterator[tuple[str, str]]:
    first, stride = outline.timing
    _, height, width = outline.unit
    yield "sizes", f"{first} + {stride} n frames, height {height} n, width {width} n; others are made larger and cut"
    own = outline.defaults
    second = "" if own.guidance_scale_2 is None else f", of the expert for low noise {own.guidance_scale_2:g}"
    guided = f"guidance {own.guidance_scale:g}{second}"
    span = "at all steps" if own.guidance_from == 0 else f"from noise level 1 to {own.guidance_from:g}"
    yield "defaults", f"{_shape(outline.size)} at {own.fps:g} frames per second, {own.num_inference_steps} steps, {guided} {span}"


def _memory(outline: Outline, size: Size) -> Iterator[tuple[str, str]]:
    from .estimate import How, memory, tokens, working

    yield "memory", f"about, for {_shape(size)}, which is {tokens(outline, [size]):,} tokens:"
    for how in [How()] if outline.weights_bf16 is None else [How(), How(bf16=True)]:
        weights, stages = how.weights(outline), working(outline, [size], how)
        transformers = " + ".join(map(_amount, weights.transformers))
        amounts = f"text {_amount(weights.encoders)}, transformer {transformers} and {_amount(stages.transformer)} to work in"
        vae = f"VAE {_amount(weights.others)} and {_amount(stages.vae)}"
        total, on_gpu = (_amount(memory(outline, [size], how=one)) for one in (how, how._replace(offload=True)))
        yield (
            f"  {str(how) or 'as it is'}".replace("--precision ", ""),
            f"{total}: {amounts}, {vae}; on a GPU with --offload {on_gpu}",
        )


def _tasks(outline: Outline, folder: Path) -> Iterator[tuple[str, str]]:
    from ..pipeline.checkpoint import has_captioner

    can, cannot = [*TASKS[outline.trained_keyframes.value], "batch"], {}
    if others := [task for task in TASKS["any"] if task not in can]:
        cannot[", ".join(others)] = f"of keyframes it takes {outline.trained_keyframes.expected}"
    if has_captioner(folder, OWNER):
        can += ["caption", "recaption", "expand"]
    else:
        cannot["caption, recaption"] = "it has no captioner"
        cannot["expand"] = "it has no captioner; --chat-model does it"
    yield "tasks", ", ".join(can)
    for tasks, why in cannot.items():
        yield "not", f"{tasks}: {why}"


def _shape(size: Size) -> str:
    return "x".join(map(str, size))


def _amount(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _count(folder: Path) -> str:
    """How many weights there are."""
    from ..storage.weights import read_shapes

    count = sum(map(math.prod, read_shapes(sorted(folder.glob("*.safetensors")), OWNER).values()))
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"
