"""How much memory a call takes, from what its checkpoint's configs say: `memory`, `written`, and what is refused.

Measured on a CPU; estimates are up to 50% above, those of files within 10%:
    transformer   52 float32 of width D for each token, both halves of guidance among them; in bfloat16 90 bytes
    VAE           200 bytes for each pixel that it decodes at once, as measured with the checkpoint that comes with the package;
                  Wan's, which goes on from frame to frame, 27 kB for each pixel of a tile, however long
    files         30 bytes for each pixel of a frame, and of H.264 4.5 more for each frame that it looks ahead
Other VAEs may take several times as much.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..pipeline.parts import Outline, Weights
from ..sizes import Size

PROCESS = 5e8  # bytes of the libraries
TOKEN, TOKEN_BF16 = 52 * 4, 90  # bytes for D = 1
DECODED, DECODED_FRAME = 200, {"AutoencoderKLWan": 27e3}  # bytes of a pixel in the decoder; of one of a frame
HELD = 24  # bytes of a pixel that is decoded, then copied
FILE, FILE_FRAME, AHEAD = 30, 4.5, 40  # bytes of a pixel in the encoder, of one of each frame that waits, and such frames
PIXEL = 12  # bytes of a pixel of a video, which is held whatever else is


class How(NamedTuple):
    """Options of a call that change what it takes.

    bf16: weights are bfloat16, where a checkpoint's may be. offload: of its parts, one is on the device at a time.
    """

    bf16: bool = False
    offload: bool = False

    def weights(self, outline: Outline) -> Weights:
        return outline.weights if not self.bf16 or outline.weights_bf16 is None else outline.weights_bf16

    def __str__(self) -> str:
        return " ".join(["--precision bf16"] * self.bf16 + ["--offload"] * self.offload)


def tokens(outline: Outline, sizes: Sequence[Size]) -> int:
    """Of all videos, each made larger to whole tokens."""
    total = 0
    for size in sizes:
        frames, height, width = outline.padded(size)
        grid = 1 + (frames - outline.timing.first) // outline.timing.stride, height // outline.unit[1], width // outline.unit[2]
        total += math.prod(grid)
    return total


class Working(NamedTuple):
    """Bytes that the stages of a pass work in, one after the other, besides weights and videos."""

    transformer: float
    vae: float


def working(outline: Outline, sizes: Sequence[Size], how: How = How()) -> Working:  # noqa: B008
    from ..codec.tiles import AT_ONCE, TILE

    token = TOKEN_BF16 if how.bf16 and outline.weights_bf16 is not None else TOKEN
    transformer = token * outline.width * tokens(outline, sizes)
    tiles = [(size[0], min(size[1], TILE) * min(size[2], TILE)) for size in map(outline.padded, sizes)]
    if of_frame := DECODED_FRAME.get(outline.vae or ""):
        return Working(transformer, of_frame * max(tile for _, tile in tiles))
    pixels = sum(math.prod(outline.padded(size)) for size in sizes)
    return Working(transformer, DECODED * min(max(max(frames * tile for frames, tile in tiles), AT_ONCE), pixels))


def memory(
    outline: Outline,
    sizes: Sequence[Size],
    made: Sequence[Size] = (),
    how: How = How(),  # noqa: B008
    share: float = 1.0,
) -> float:
    """Bytes, about, that one packed pass over videos of these sizes takes.

    made: videos that are held besides. share: of the work, which is estimated too high by no more than half.
    """
    weights, work = how.weights(outline), working(outline, sizes, how)
    encoding, denoising, decoding = [_all(weights)] * 3
    if how.offload:
        encoding, denoising, decoding = weights.encoders, max(weights.transformers), weights.others
    held = HELD * sum(math.prod(outline.padded(size)) for size in sizes) + PIXEL * sum(map(math.prod, made))
    return PROCESS + max(encoding, denoising + share * work.transformer, decoding + share * work.vae) + held


def written(outline: Outline, made: Sequence[Size], how: How, scale: int, suffix: str, device: str) -> float:
    """Bytes of the host, about, while videos of these sizes are written one after the other, each pixel `scale` x `scale`."""
    ahead = AHEAD if suffix == "mp4" else 0
    pixels = ((FILE + FILE_FRAME * min(size[0] - 1, ahead)) * scale**2 * size[1] * size[2] for size in made)
    weights = _all(how.weights(outline)) if device == "cpu" or how.offload else 0.0
    return PROCESS + weights + PIXEL * sum(map(math.prod, made)) + max(pixels)


def _all(weights: Weights) -> float:
    return weights.encoders + sum(weights.transformers) + weights.others


def check_pixels(option: str, sizes: Sequence[Size], device: str) -> None:
    """Raises ValueError for videos that alone need more memory than the device has."""
    needed, there = min(PIXEL * sum(map(math.prod, sizes)), 10**30), installed(device)  # what a float can hold
    if needed > there:
        raise ValueError(
            f"{option}: expected videos that {'the memory' if device == 'cpu' else device} of {there / 1e9:.3g} GB can hold, "
            f"got {needed / 1e9:.3g} GB of pixels"
        )


def check_memory(option: str, outline: Outline, sizes: Sequence[Size], made: Sequence[Size], how: How, device: str) -> None:
    """Raises ValueError where even half of the work is beyond the device; names what would be enough."""
    there, needed = installed(device), memory(outline, sizes, made, how)
    if how.offload and (host := PROCESS + _all(how.weights(outline))) > installed("cpu"):
        got = f"{installed('cpu') / 1e9:.3g} GB, got {host / 1e9:.3g} GB of weights"
        raise ValueError(f"--offload: expected weights that the memory of the CPU can hold, {got}")
    if memory(outline, sizes, made, how, share=0.5) <= there:
        return
    name = f"{'the memory' if device == 'cpu' else device} of {there / 1e9:.3g} GB"
    held = _all(how.weights(outline))
    line = f"{option}: expected videos for which {name} is enough, got ones that take about {needed / 1e9:.3g} GB"
    if held > there and not how.offload:
        line = (
            f"--checkpoint: expected weights that {name} can hold, got {held / 1e9:.3g} GB, and {needed / 1e9:.3g} GB with the work"
        )
    enough = [(text, amount) for text, amount in others(outline, sizes, made, how, device) if amount <= there]
    raise ValueError("; ".join([line, *(f"{text} takes about {amount / 1e9:.3g} GB" for text, amount in enough[:2])]))


def check_written(option: str, needed: float) -> None:
    """Raises ValueError for files that the host cannot write; needed: see `written`."""
    there = installed("cpu")
    if needed > there:
        expected = f"files that the memory of {there / 1e9:.3g} GB can hold while they are written"
        raise ValueError(f"{option}: expected {expected}, got ones that take about {needed / 1e9:.3g} GB")


def others(outline: Outline, sizes: Sequence[Size], made: Sequence[Size], how: How, device: str) -> Iterator[tuple[str, float]]:
    """Other ways to the same videos, then the most sparing way to smaller ones, and what they take."""
    bf16 = {how.bf16, outline.weights_bf16 is not None}
    ways = sorted({How(cast, cut) for cast in bf16 for cut in {how.offload, device != "cpu"}}, key=sum)
    for way in ways:
        if way != how:
            yield str(way), memory(outline, sizes, made, way)
    if len(set(sizes)) == 1 and not made:
        (frames, height, width), stride = sizes[0], outline.timing.stride
        for part in (2, 4, 8):
            fewer = max((frames - 1) // part // stride * stride + 1, 1)
            smaller = (fewer, height, width) if fewer < frames else (frames, max(height // part, 1), max(width // part, 1))
            options = f"{ways[-1]} --size {'x'.join(map(str, smaller))}".strip()
            yield options, memory(outline, [smaller] * len(sizes), (), ways[-1])


def installed(device: str) -> int:
    """Bytes of memory that a device has."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    return torch.cuda.get_device_properties(device).total_memory
