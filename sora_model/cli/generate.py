"""A command for every task: generate, animate, restyle, extend, join, loop, long, simulate, batch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..limits import check_text
from .actions import about
from .app import ChatModel, command, console, expanded, naming, parse_size, say
from .call import Call, task
from .requests import described, read_requests
from .terminal import denoising, show_video

if TYPE_CHECKING:
    from ..pipeline.parts import Outline
    from ..sizes import Size

Prompt = Annotated[str, typer.Argument(help="What to show.")]
Video = Annotated[Path, typer.Argument(help="A video file.")]
ClipSize = Annotated[str | None, typer.Option("--size", help="TxHxW in pixels. Default: the checkpoint's.")]
FrameSize = Annotated[
    str | None, typer.Option("--size", help="HxW that frames are scaled and cut to. Default: theirs, see --max-pixels.")
]
Count = Annotated[int, typer.Option(min=1, max=9999, help="Videos of each prompt; their seeds count up.")]
Overlap = Annotated[
    int, typer.Option(min=0, help="Latent frames seen of what is there, besides the first; they fade into what is made.")
]

LONGEST = 1e9  # seconds: 30 years


@task
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to show; one video each.")],
    size: Annotated[
        list[str] | None, typer.Option(help="TxHxW of each video in pixels, or one for all; 1xHxW is an image.")
    ] = None,
    count: Count = 1,
    draft: Annotated[
        int | None,
        typer.Option(
            min=1, help="Make large frames by way of small ones, whose shorter side has so many pixels; 256 is a good number."
        ),
    ] = None,
    expand: Annotated[bool, typer.Option(help="Let the captioner make the prompts long and detailed first.")] = False,
    chat_model: ChatModel = None,
    *,
    call: Call,
) -> None:
    """Generate videos and images of any sizes, all in one packed batch."""
    sizes = [parse_size(text) for text in size or []]
    if len(sizes) not in (0, 1, len(prompts)):
        raise ValueError(f"--size: expected 1 or {len(prompts)} (one per prompt), got {len(sizes)}")
    if chat_model is not None and not os.path.isdir(chat_model):  # Path.is_dir fails for a name that is too long
        raise ValueError(f"--chat-model: expected a folder, got {chat_model}")
    if expand and chat_model is None:
        call.check_captioner(" (--chat-model expands prompts, too)")
    outline = call.outline
    sizes = sizes * len(prompts) if len(sizes) == 1 else sizes or [outline.size] * len(prompts)
    for _, *sides in sizes:
        if draft is not None and draft >= min(sides):
            expected = f"fewer pixels than the shorter side of --size, {min(sides)}"
            raise ValueError(f"--draft: expected {expected}, got {draft}")
    sizes = [one for one in sizes for _ in range(count)]
    from ..pipeline.request import text_to_video

    call.check_keyframes([text_to_video("", one) for one in sizes])
    call.announce(outline, sizes)
    asked = prompts
    if chat_model is not None:  # before the pipeline takes its memory
        prompts = _shown(prompts, expanded(chat_model, prompts, call.device))
    pipeline = call.pipeline(captioner=expand and chat_model is None)
    if expand and chat_model is None:
        prompts = _shown(prompts, pipeline.expand(prompts))
    call.check_words(pipeline, prompts)
    by_video = [
        {"asked": short if long != short else None} for short, long in zip(asked, prompts, strict=True) for _ in range(count)
    ]
    prompts = [prompt for prompt in prompts for _ in range(count)]
    if draft is None:
        requests = [text_to_video(p, s, negative_prompt=call.negative) for p, s in zip(prompts, sizes, strict=True)]
        call.generate(pipeline, requests, by_video=by_video, command="generate", chat_model=chat_model)
        return
    from ..pipeline.tasks import REDONE, refined

    with denoising(console, round((1 + REDONE) * call.num_steps)) as bars:
        videos = refined(pipeline, prompts, sizes, draft, **bars.hooks, **call.several)
    call.write(videos, prompts, by_video=by_video, command="generate", draft=draft, chat_model=chat_model)


@task
def animate(
    image: Annotated[Path, typer.Argument(help="An image file; of a video, its first frame.")],
    prompt: Prompt,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video. Default: the checkpoint's.")] = None,
    last: Annotated[
        Path | None, typer.Option(help="An image that it ends with, for a checkpoint that was trained with both.")
    ] = None,
    size: FrameSize = None,
    count: Count = 1,
    *,
    call: Call,
) -> None:
    """Make a video that begins with an image."""
    outline, shape = call.outline, _frame_size(call, size)
    from ..pipeline.request import image_to_video

    if last is not None and not outline.trained_keyframes.as_condition:
        raise ValueError(
            f"--last: expected none, as the checkpoint takes no single last frame ('sora join' joins videos), got {last}"
        )
    if last is None:
        (picture, _), end = call.read(image, 1, shape), None
    else:
        (picture, _), (end, _) = call.read_joined(image, last, shape, frames=1)
    length = frames or outline.size[0]
    request = image_to_video(prompt, picture, length, outline.timing, last=end, negative_prompt=call.negative)
    call.run([request] * count, "--frames", command="animate", image=image, last=last)


@task
def restyle(
    video: Video,
    prompt: Prompt,
    strength: Annotated[float, typer.Option(help="Share of the denoising done anew; 1 keeps nothing of the video.")] = 0.7,
    size: FrameSize = None,
    count: Count = 1,
    *,
    call: Call,
) -> None:
    """Make a video anew after another prompt: other colours, another scene."""
    clip, rate = call.read(video, None, _frame_size(call, size))
    from ..pipeline.request import video_to_video

    request = video_to_video(prompt, clip, strength, negative_prompt=call.negative)
    call.run([request] * count, "VIDEO", [rate] * count, command="restyle", video=video, strength=strength)


@task
def extend(
    video: Video,
    prompt: Prompt,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to add. Default: as fits the checkpoint's clips.")] = None,
    backward: Annotated[bool, typer.Option(help="Add what leads up to the video instead of what follows.")] = False,
    overlap: Overlap = 1,
    size: FrameSize = None,
    count: Count = 1,
    *,
    call: Call,
) -> None:
    """Make a video longer, forward or backward."""
    outline = call.outline
    clip, rate = call.read(video, None, _frame_size(call, size))
    from ..pipeline.request import extend as request_extension

    timing = outline.timing
    seen = timing.stride * max(overlap, 1) + (0 if backward else timing.first)
    added = frames or max(outline.size[0] - seen, timing.stride)
    request = request_extension(prompt, clip, added, timing, overlap=overlap, backward=backward, negative_prompt=call.negative)
    rates = [rate] * count
    call.run([request] * count, "--frames", rates, command="extend", video=video, overlap=overlap, backward=backward)


@task
def join(
    first: Annotated[Path, typer.Argument(help="The video that comes first.")],
    last: Annotated[Path, typer.Argument(help="The video that comes last; its frames are brought to the size of the first's.")],
    prompt: Annotated[str, typer.Argument(help="What the passage shows.")] = "",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the passage. Default: 2 latent frames.")] = None,
    overlap: Overlap = 1,
    size: FrameSize = None,
    count: Count = 1,
    *,
    call: Call,
) -> None:
    """Join two videos by a passage from the end of one to the start of the other."""
    outline = call.outline
    (start, rate), (end, other) = call.read_joined(first, last, _frame_size(call, size))
    rate = _common_rate(call, [rate, other], "join")
    from ..pipeline.request import join as request_passage

    passage = frames or 2 * outline.timing.stride
    request = request_passage(prompt, start, end, passage, outline.timing, overlap=overlap, negative_prompt=call.negative)
    call.run([request] * count, "--frames", [rate] * count, command="join", first=first, last=last, overlap=overlap)


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
    call.check_any_keyframes()
    outline = call.outline
    shape, stride = parse_size(size) if size else outline.size, outline.timing.stride
    if passage is not None and passage % stride:
        raise ValueError(f"--passage: expected a multiple of {stride}, the frames of a latent frame, got {passage}")
    if shape[0] < max(stride, outline.timing.first):
        option = "--size" if size else "--checkpoint"
        raise ValueError(f"{option}: expected a clip of at least {max(stride, outline.timing.first)} frames, got {shape[0]}")
    way = passage or max(shape[0] // stride, 1) * stride
    call.announce(outline, [shape], made=[(shape[0] + way, *shape[1:])])
    pipeline = call.pipeline()
    call.check_words(pipeline, [prompt, passage_prompt or ""])
    from ..pipeline.tasks import loop as make_loop

    options: dict[str, Any] = {"passage": way, "passage_prompt": passage_prompt, "overlap": overlap}
    with denoising(console, 2 * call.num_steps) as bars:
        video = make_loop(pipeline, prompt, shape, **options, **bars.hooks, **call.several)
    call.write([video], [prompt], command="loop", **options)


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
    if seconds > LONGEST:
        raise ValueError(f"--seconds: expected at most {LONGEST:g}, got {seconds:g}")
    call.check_any_keyframes()
    outline, frames = call.outline, round(seconds * call.rate())
    shape = _chunk(outline, size, overlap)
    if frames < 1:
        raise ValueError(f"--seconds: expected at least one frame, which is {1 / call.rate():g}, got {seconds:g}")
    chunks = 1 + max(math.ceil((frames - shape[0]) / (shape[0] - _seen(outline, overlap))), 0)
    if len(prompts) > chunks:
        raise ValueError(f"PROMPTS: expected at most {chunks}, one for each chunk of --seconds {seconds:g}, got {len(prompts)}")
    call.announce(outline, [shape], "--seconds", made=[(frames, *shape[1:])])
    pipeline = call.pipeline()
    call.check_words(pipeline, prompts)
    from ..pipeline.tasks import long_video

    with denoising(console, frames, "frames") as bars:
        video = long_video(pipeline, prompts, frames, shape, overlap=overlap, progress=bars, **call.several)
    call.write([video], [prompts[0]], command="long", chunks=prompts, overlap=overlap)


@task
def simulate(
    prompt: Annotated[str, typer.Argument(help="The world at first.")],
    action: Annotated[
        list[str] | None,
        typer.Option(
            help="What happens next, such as 'moves up', or 'a blue star moves up' for another object; repeat for several. "
            "Default: asked for."
        ),
    ] = None,
    size: ClipSize = None,
    overlap: Overlap = 1,
    *,
    call: Call,
) -> None:
    """Simulate a world: a chunk of video for every action, shown in the terminal as it comes."""
    call.check_any_keyframes()
    outline = call.outline
    shape = _chunk(outline, size, overlap)
    call.announce(outline, [shape])
    pipeline = call.pipeline()
    call.check_words(pipeline, [prompt])
    from ..pipeline.tasks import Simulation

    world = Simulation(pipeline, prompt, shape, overlap=overlap, **call.several)
    show_video(world.video, console, call.rate())
    present, done = prompt, []
    try:
        for text in action if action is not None else _asked(prompt):
            present = about(present, text)
            check_text(present, "--action")
            say(f"action: {present}")
            call.check_words(pipeline, [present])
            show_video(world.act(present), console, call.rate())
            done.append(present)
    except KeyboardInterrupt:
        say("interrupted: what was made until then is kept")
    call.write([world.video], [prompt], command="simulate", actions=done, overlap=overlap)


def _asked(prompt: str) -> Iterator[str]:
    """Actions typed in, until an empty one or the end of the input."""
    say(f"An action says what happens next: 'moves up' is about the present object, as in '{about(prompt, 'moves up')}'.")
    while True:
        try:
            text = typer.prompt("action (empty ends)", default="", show_default=False)
        except typer.Abort:
            return
        if not text:
            return
        yield text


@command(Call, help=described())
def batch(
    requests: Annotated[Path, typer.Argument(help="A JSON file: a list of requests, see above.")],
    *,
    call: Call,
) -> None:
    from .estimate import check_pixels

    asked = read_requests(requests, call.negative, call.read)
    call.kept.append(requests)
    for one in asked:
        if call.is_unguided and one.fields["negative_prompt"]:
            raise ValueError(
                f"batch: request {one.number}: negative_prompt: expected none with --guidance 1, which has no use for it"
            )
    rates, outline = [_common_rate(call, one.rates, f"batch: request {one.number}") for one in asked], call.outline
    settings, made = [one.settings for one in asked], [one.request(outline) for one in asked]
    for one, request in zip(asked, made, strict=True):
        with naming(f"batch: request {one.number}"):
            check_pixels("batch", [request.stitched_size], call.device)
            call.check_keyframes([request])
    call.run(made, "REQUESTS", rates, settings, command="batch")


def _frame_size(call: Call, text: str | None) -> tuple[int, int] | None:
    """'48x80' -> (48, 80)."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None or min(int(n) for n in match.groups()) < 1:
        raise ValueError(f"--size: expected HxW, such as 48x80, each at least 1, got {text!r}")
    if call.max_pixels is not None:
        raise ValueError(f"--max-pixels: expected none with --size, which says the size, got {call.max_pixels}")
    return int(match[1]), int(match[2])


def _chunk(outline: Outline, text: str | None, overlap: int) -> Size:
    """The size of a chunk, which must be longer than what it sees of the one before."""
    size = parse_size(text) if text else outline.size
    if size[0] <= _seen(outline, overlap):
        option = "--size" if text else "--overlap"
        raise ValueError(f"{option}: expected more than the {_seen(outline, overlap)} frames that a chunk sees, got {size[0]}")
    return size


def _seen(outline: Outline, overlap: int) -> int:
    """Frames that a chunk sees of the one before."""
    return outline.timing.first + outline.timing.stride * overlap


def _common_rate(call: Call, rates: Sequence[float], where: str) -> float:
    """Frames per second of inputs that become one file; images have 0, none. GIFs keep theirs in hundredths of a second.

    where: what an error begins with.
    """
    known = [rate for rate in rates if rate]
    if call.fps is None and known and max(known) > 1.05 * min(known):
        both = " and ".join(f"{rate:g}" for rate in known)
        raise ValueError(f"{where}: last: expected the frames per second of first, got {both}; --fps sets one for both")
    return max(known, default=0.0)


def _shown(prompts: list[str], longer: list[str]) -> list[str]:
    """Detailed prompts for short ones, said on the console."""
    for before, after in zip(prompts, longer, strict=True):
        say(f"{before} -> {after}")
    return longer
