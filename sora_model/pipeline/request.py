"""What a pipeline is asked for: `Request`, and one function per task that makes one. Every task is a mask of clean frames.

    request                 keyframes                              result
    text_to_video           none                                   the clip
    text_to_image           none                                   a clip of one frame
    image_to_video          the first frame, maybe the last        the clip
    video_to_video          none; starts from a noised video       the clip
    extend                  the video's last frames                the video and what follows
    extend backward         its first frames                       what leads up to it, and the video
    join                    the end of one, the start of another   the first video, a passage, the second video

Where a video goes on, its keyframes are blended with what the model made of them; all of its other frames are unchanged.
Keyframes are whole token frames: `Timing` says how many pixel frames that is. Videos and images are tensors [3, T, H, W] in
[-1, 1], or what the pipeline returns as "np" or "pil".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from torch import Tensor

from ..limits import check_text
from ..sizes import Size, Timing
from .clips import Clip, as_video, check_video
from .stitch import Stitch


@dataclass(frozen=True)
class Request:
    """One sample of a packed batch.

    >>> request = Request("a red circle moves left", (13, 48, 48), keyframes={0: clip[:, -5:]})     # goes on from a clip's end

    Args:
        prompt: what to show.
        size: (T, H, W) in pixels.
        keyframes: {first frame: clip [3, t, H, W]} to keep; a first frame below 0 counts from the end.
        init_video: a video [3, T, H, W] to start from instead of noise.
        strength: with `init_video`, the share of the denoising that is done anew: 1 keeps nothing, near 0 nearly everything.
        negative_prompt: what guidance leads away from.
        seed: of the noise; None leaves it to the call.
        frame_step: how far apart in time the frames are, for a model trained on frames sampled from longer clips; not with a VAE
            that compresses time.
        stitch: how the clip is put together with other videos; default: the clip alone.
    """

    prompt: str
    size: Size
    keyframes: Mapping[int, Tensor] = field(default_factory=dict)
    init_video: Tensor | None = None
    strength: float = 1.0
    negative_prompt: str = ""
    seed: int | None = None
    frame_step: float = 1.0
    stitch: Stitch | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not isinstance(self.negative_prompt, str):
            raise TypeError(f"Request: prompt: expected text, got {self.prompt!r} and {self.negative_prompt!r}")
        check_text(self.prompt, "Request: prompt")
        check_text(self.negative_prompt, "Request: negative_prompt")
        size = tuple(self.size) if isinstance(self.size, Sequence) else ()
        if len(size) != 3 or not all(isinstance(n, Integral) and n >= 1 for n in size):
            raise ValueError(f"Request: size: expected (T, H, W), each at least 1, got {self.size}")
        object.__setattr__(self, "size", tuple(int(n) for n in size))
        if not 0 < self.strength <= 1:
            raise ValueError(f"Request: strength: expected a number above 0 and up to 1, got {self.strength}")
        if not 0 < self.frame_step < math.inf:
            raise ValueError(f"Request: frame_step: expected a finite number above 0, got {self.frame_step}")
        if self.seed is not None and (not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**64):
            raise ValueError(f"Request: seed: expected a whole number from 0 to 2**64 - 1 or None, got {self.seed!r}")
        if self.init_video is not None:
            if tuple(self.init_video.shape) != (3, *self.size) or not self.init_video.is_floating_point():
                got = f"{self.init_video.dtype} {list(self.init_video.shape)}"
                raise ValueError(f"Request: init_video: expected floats {[3, *self.size]}, got {got}")
            if not self.init_video.isfinite().all():
                raise ValueError("Request: init_video: expected finite numbers, got NaN or infinity")
        self._check_keyframes()
        if self.stitch is not None:
            self.stitch.check(self.size)

    def _check_keyframes(self) -> None:
        frames, height, width = self.size
        taken: set[int] = set()
        for at, clip in self.keyframes.items():
            start = at + frames if at < 0 else at
            fits = clip.ndim == 4 and clip.shape[0] == 3 and tuple(clip.shape[2:]) == (height, width) and clip.is_floating_point()
            if not fits or not 0 <= start <= frames - clip.shape[1] or not clip.shape[1]:
                expected = f"clips of floats [3, t, {height}, {width}] within {frames} frames"
                raise ValueError(f"Request: keyframes: expected {expected}, got {clip.dtype} {list(clip.shape)} at frame {at}")
            if not clip.isfinite().all():
                raise ValueError(f"Request: keyframes: expected finite numbers, got NaN or infinity at frame {at}")
            places = range(start, start + clip.shape[1])
            if not taken.isdisjoint(places):
                raise ValueError(
                    f"Request: keyframes: expected each frame once, got frames {places.start} to {places.stop - 1} twice"
                )
            taken.update(places)

    @property
    def stitched_size(self) -> Size:
        """(T, H, W) of what `finish` gives."""
        frames, height, width = self.size
        if self.stitch is None:
            return frames, height, width
        around = [0 if video is None else video.shape[1] for video in (self.stitch.before, self.stitch.after)]
        return frames - sum(self.stitch.overlap) + sum(around), height, width

    def finish(self, clip: Tensor) -> Tensor:
        """The generated clip [3, T, H, W], put together as `stitch` says."""
        return clip if self.stitch is None else self.stitch.apply(clip)


def text_to_video(prompt: str, size: Size, *, negative_prompt: str = "", seed: int | None = None) -> Request:
    """A video of `size` (T, H, W). See `Request` for the other arguments, of every task."""
    return Request(prompt, size, negative_prompt=negative_prompt, seed=seed)


def text_to_image(prompt: str, height: int, width: int, *, negative_prompt: str = "", seed: int | None = None) -> Request:
    """An image, as a video of one frame."""
    return Request(prompt, (1, height, width), negative_prompt=negative_prompt, seed=seed)


def image_to_video(
    prompt: str,
    image: Clip,
    frames: int,
    timing: Timing,
    *,
    last: Clip | None = None,
    negative_prompt: str = "",
    seed: int | None = None,
) -> Request:
    """A video of so many frames that begins with an image [3, 1, H, W]; where a first token frame is several, with a still one.

    last: the image that it ends with, of the same size, for a model that takes a single last frame.
    """
    image = as_video(image, "image_to_video: image")
    check_video("image_to_video", "image", image)
    keyframes = {0: image[:, :1].expand(-1, min(timing.first, max(frames, 1)), -1, -1)}
    if last is not None:
        last = as_video(last, "image_to_video: last")
        check_video("image_to_video", "last", last)
        if frames < 2 or last.shape[2:] != image.shape[2:]:
            expected = f"frames of {list(image.shape[2:])} as in image, and at least 2"
            raise ValueError(f"image_to_video: last: expected {expected}, got {list(last.shape[2:])} and {frames}")
        keyframes[frames - 1] = last[:, :1]
    return Request(prompt, (frames, *image.shape[2:]), keyframes, negative_prompt=negative_prompt, seed=seed)


def video_to_video(
    prompt: str, video: Clip, strength: float = 0.7, *, negative_prompt: str = "", seed: int | None = None
) -> Request:
    """The video anew after another prompt; what is the same in both prompts tends to stay."""
    video = as_video(video, "video_to_video: video")
    check_video("video_to_video", "video", video)
    frames, height, width = video.shape[1:]
    return Request(prompt, (frames, height, width), init_video=video, strength=strength, negative_prompt=negative_prompt, seed=seed)


def extend(
    prompt: str,
    video: Clip,
    frames: int,
    timing: Timing,
    *,
    overlap: int = 1,
    backward: bool = False,
    negative_prompt: str = "",
    seed: int | None = None,
) -> Request:
    """The video and `frames` more behind it, or in front of it; what the model sees is blended with what it made of it.

    overlap: how many token frames of the video the model sees, besides the first; fewer if the video is shorter.
    """
    video = as_video(video, "extend: video")
    check_video("extend", "video", video)
    height, width = video.shape[2:]
    if frames < 1:
        raise ValueError(f"extend: frames: expected at least 1, got {frames}")
    if backward:
        seen = _end(video, timing, overlap, "extend: video")
        made = timing.whole(frames)  # the surplus is cut off at the front
        size, stitch = (made + seen, height, width), Stitch(after=video, overlap=(made - frames, seen))
        return Request(prompt, size, {made: video[:, :seen]}, stitch=stitch, negative_prompt=negative_prompt, seed=seed)
    seen = _start(video, timing, overlap, "extend: video")
    size, stitch = (seen + frames, height, width), Stitch(before=video, overlap=(seen, 0))
    return Request(prompt, size, {0: video[:, -seen:]}, stitch=stitch, negative_prompt=negative_prompt, seed=seed)


def join(
    prompt: str,
    first: Clip,
    last: Clip,
    frames: int,
    timing: Timing,
    *,
    overlap: int = 1,
    negative_prompt: str = "",
    seed: int | None = None,
) -> Request:
    """Two videos of one frame size with a passage of `frames` frames between them, a multiple of `timing.stride`.

    The frames of both that the model sees are blended with what it made of them.
    """
    first, last = as_video(first, "join: first"), as_video(last, "join: last")
    check_video("join", "first", first)
    check_video("join", "last", last)
    if first.shape[2:] != last.shape[2:]:
        raise ValueError(f"join: last: expected frames of {list(first.shape[2:])} as in first, got {list(last.shape[2:])}")
    if frames < 1 or frames % timing.stride:
        raise ValueError(f"join: frames: expected a multiple of {timing.stride}, got {frames}")
    height, width = first.shape[2:]
    start, end = _start(first, timing, overlap, "join: first"), _end(last, timing, overlap, "join: last")
    keyframes = {0: first[:, -start:], start + frames: last[:, :end]}
    size, stitch = (start + frames + end, height, width), Stitch(first, last, (start, end))
    return Request(prompt, size, keyframes, stitch=stitch, negative_prompt=negative_prompt, seed=seed)


def _start(video: Tensor, timing: Timing, overlap: int, argument: str) -> int:
    """How many frames of a video's end the start of a clip takes."""
    check_overlap(argument.partition(":")[0], overlap)
    length = video.shape[1]
    if length < timing.first:
        raise ValueError(f"{argument}: expected at least {timing.first} frames, got {length}")
    return timing.first + timing.stride * min(overlap, (length - timing.first) // timing.stride)


def _end(video: Tensor, timing: Timing, overlap: int, argument: str) -> int:
    """How many frames of a video's start the end of a clip takes."""
    check_overlap(argument.partition(":")[0], overlap)
    length = video.shape[1]
    if length < timing.stride:
        raise ValueError(f"{argument}: expected at least {timing.stride} frames, got {length}")
    return timing.stride * min(max(overlap, 1), length // timing.stride)


def check_overlap(task: str, overlap: int) -> None:
    if overlap < 0:
        raise ValueError(f"{task}: overlap: expected at least 0, got {overlap}")
