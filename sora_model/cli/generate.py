"""A command for every task: generate, animate, restyle, extend, join, loop, long, simulate, batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Call, console, parse_size, say, task
from .requests import read_requests
from .terminal import denoising, show_video

if TYPE_CHECKING:
    from ..pipeline.pipeline import SoraPipeline

Prompt = Annotated[str, typer.Argument(help="What to show.")]
Video = Annotated[Path, typer.Argument(help="A video file.")]
ClipSize = Annotated[str | None, typer.Option("--size", help="TxHxW in pixels. Default: the checkpoint's.")]
Overlap = Annotated[
    int, typer.Option(min=0, help="Latent frames seen of what is there, besides the first; they fade into what is made.")
]


@task
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to show; one video each.")],
    size: Annotated[
        list[str] | None, typer.Option(help="TxHxW of each video in pixels, or one for all; 1xHxW is an image.")
    ] = None,
    draft: Annotated[
        int | None,
        typer.Option(
            min=1, help="Make large frames by way of small ones, whose shorter side has so many pixels; 256 is a good number."
        ),
    ] = None,
    expand: Annotated[bool, typer.Option(help="Let the captioner make the prompts long and detailed first.")] = False,
    *,
    call: Call,
) -> None:
    """Generate videos and images of any sizes, all in one packed batch."""
    sizes = [parse_size(text) for text in size or []]
    if len(sizes) not in (0, 1, len(prompts)):
        raise ValueError(f"--size: expected 1 or {len(prompts)} (one per prompt), got {len(sizes)}")
    for _, *sides in sizes:
        if draft is not None and draft >= min(sides):
            expected = f"fewer pixels than the shorter side of --size, {min(sides)}"
            raise ValueError(f"--draft: expected {expected}, got {draft}")
    pipeline = call.pipeline(captioner=expand)
    from ..pipeline.request import text_to_video

    sizes = sizes * len(prompts) if len(sizes) == 1 else sizes or [pipeline.size] * len(prompts)
    if expand:
        prompts = _expanded(pipeline, prompts)
    if draft is None:
        requests = [text_to_video(p, s, negative_prompt=call.negative) for p, s in zip(prompts, sizes, strict=True)]
        call.generate(pipeline, requests)
        return
    from ..pipeline.tasks import REDONE, refined

    with denoising(console, round((1 + REDONE) * call.steps)) as advance:
        videos = refined(pipeline, prompts, sizes, draft, callback=lambda *_: advance(1), **call.several)
    call.write(videos, prompts)


@task
def animate(
    image: Annotated[Path, typer.Argument(help="An image file; of a video, its first frame.")],
    prompt: Prompt,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video. Default: the checkpoint's.")] = None,
    *,
    call: Call,
) -> None:
    """Make a video that begins with an image."""
    picture, _ = call.read(image, max_frames=1)
    pipeline = call.pipeline()
    from ..pipeline.request import image_to_video

    request = image_to_video(prompt, picture, frames or pipeline.size[0], pipeline.timing, negative_prompt=call.negative)
    call.generate(pipeline, [request])


@task
def restyle(
    video: Video,
    prompt: Prompt,
    strength: Annotated[float, typer.Option(help="Share of the denoising done anew; 1 keeps nothing of the video.")] = 0.7,
    *,
    call: Call,
) -> None:
    """Make a video anew after another prompt: other colours, another scene."""
    clip, rate = call.read(video)
    from ..pipeline.request import video_to_video

    request = video_to_video(prompt, clip, strength, negative_prompt=call.negative)
    call.generate(call.pipeline(), [request], [rate])


@task
def extend(
    video: Video,
    prompt: Prompt,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to add. Default: as fits the checkpoint's clips.")] = None,
    backward: Annotated[bool, typer.Option(help="Add what leads up to the video instead of what follows.")] = False,
    overlap: Overlap = 1,
    *,
    call: Call,
) -> None:
    """Make a video longer, forward or backward."""
    clip, rate = call.read(video)
    pipeline = call.pipeline()
    from ..pipeline.request import extend as request_extension

    timing = pipeline.timing
    seen = timing.stride * max(overlap, 1) + (0 if backward else timing.first)
    added = frames or max(pipeline.size[0] - seen, timing.stride)
    request = request_extension(prompt, clip, added, timing, overlap=overlap, backward=backward, negative_prompt=call.negative)
    call.generate(pipeline, [request], [rate])


@task
def join(
    first: Annotated[Path, typer.Argument(help="The video that comes first.")],
    last: Annotated[Path, typer.Argument(help="The video that comes last.")],
    prompt: Annotated[str, typer.Argument(help="What the passage shows.")] = "",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the passage. Default: 2 latent frames.")] = None,
    overlap: Overlap = 1,
    *,
    call: Call,
) -> None:
    """Join two videos by a passage from the end of one to the start of the other."""
    (start, rate), (end, other) = call.read(first), call.read(last)
    rate = _common_rate(call, rate, other)
    from ..pipeline.request import check_joined

    check_joined(start, end)
    pipeline = call.pipeline()
    from ..pipeline.request import join as request_passage

    passage = frames or 2 * pipeline.timing.stride
    request = request_passage(prompt, start, end, passage, pipeline.timing, overlap=overlap, negative_prompt=call.negative)
    call.generate(pipeline, [request], [rate])


@task
def loop(
    prompt: Prompt,
    size: ClipSize = None,
    passage: Annotated[int | None, typer.Option(min=1, help="Frames of the way back. Default: about the clip's.")] = None,
    passage_prompt: Annotated[str | None, typer.Option(help="What the way back shows. Default: the prompt.")] = None,
    overlap: Overlap = 1,
    *,
    call: Call,
) -> None:
    """Make a video that can be played round and round without a seam."""
    shape = parse_size(size) if size else None
    pipeline = call.pipeline()
    from ..pipeline.tasks import loop as make_loop

    options = {"passage": passage, "passage_prompt": passage_prompt, "overlap": overlap, **call.several}
    with denoising(console, 2 * call.steps) as advance:
        video = make_loop(pipeline, prompt, shape, callback=lambda *_: advance(1), **options)
    call.write([video], [prompt])


@task
def long(
    prompts: Annotated[list[str], typer.Argument(help="One for the whole video, or one per chunk; the last one stays.")],
    seconds: Annotated[float, typer.Option(help="Length of the video.")] = 10.0,
    size: ClipSize = None,
    overlap: Overlap = 1,
    *,
    call: Call,
) -> None:
    """Make a long video by extending a clip again and again."""
    shape, frames = parse_size(size) if size else None, round(seconds * call.rate())
    if frames < 1:
        raise ValueError(f"--seconds: expected at least one frame, which is {1 / call.rate():g}, got {seconds:g}")
    pipeline = call.pipeline()
    from ..pipeline.tasks import long_video

    with denoising(console, frames, "frames") as advance:
        video = long_video(pipeline, prompts, frames, shape, overlap=overlap, progress=advance, **call.several)
    call.write([video], [prompts[0]])


@task
def simulate(
    prompt: Annotated[str, typer.Argument(help="The world at first.")],
    action: Annotated[list[str] | None, typer.Option(help="What happens next; repeat for several. Default: asked for.")] = None,
    size: ClipSize = None,
    overlap: Overlap = 1,
    *,
    call: Call,
) -> None:
    """Simulate a world: a chunk of video for every action, shown in the terminal as it comes."""
    shape = parse_size(size) if size else None
    pipeline = call.pipeline()
    from ..pipeline.tasks import Simulation

    world = Simulation(pipeline, prompt, shape, overlap=overlap, **call.several)
    show_video(world.video, console, call.rate())
    try:
        for told in action if action is not None else _asked():
            show_video(world.act(told), console, call.rate())
    except KeyboardInterrupt:
        say("interrupted: what was made until then is kept")
    call.write([world.video], [prompt])


def _asked() -> Iterator[str]:
    """Actions typed in, until an empty one or the end of the input."""
    while True:
        try:
            told = typer.prompt("action (empty ends)", default="", show_default=False)
        except typer.Abort:
            return
        if not told:
            return
        yield told


@task
def batch(
    requests: Annotated[Path, typer.Argument(help="A JSON file: a list of requests; see the README.")],
    *,
    call: Call,
) -> None:
    """Run requests of different tasks and sizes in one packed batch."""
    asked = read_requests(requests, call.negative, call.read)
    for one in asked:
        if call.guidance == 1 and one.fields["negative_prompt"]:
            raise ValueError(
                f"batch: request {one.number}: negative_prompt: expected none with --guidance 1, which has no use for it"
            )
    rates = [_common_rate(call, *one.rates) for one in asked]
    pipeline = call.pipeline()
    call.generate(pipeline, [one.request(pipeline) for one in asked], rates)


def _common_rate(call: Call, *rates: float) -> float:
    """Frames per second of inputs that become one file; images have 0, none. GIFs keep theirs in hundredths of a second."""
    known = [rate for rate in rates if rate]
    if call.fps is None and known and max(known) > 1.05 * min(known):
        both = " and ".join(f"{rate:g}" for rate in known)
        raise ValueError(f"join: last: expected the frames per second of first, got {both}; --fps sets one for both")
    return max(known, default=0.0)


def _expanded(pipeline: SoraPipeline, prompts: list[str]) -> list[str]:
    """Detailed prompts for short ones, said on the console."""
    longer = pipeline.expand(prompts)
    for before, after in zip(prompts, longer, strict=True):
        say(f"{before} -> {after}")
    return longer
