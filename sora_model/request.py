"""What a pipeline is asked for: `Request`, and one function per task that makes one. Every task is a mask of given frames.

    request                 given                                  comes back
    text_to_video           nothing                                the clip
    text_to_image           nothing                                a clip of one frame
    image_to_video          the first frame                        the clip
    video_to_video          nothing; starts from a noised video    the clip
    extend                  the video's last frames                the video and what follows
    extend backward         its first frames                       what leads up to it, and the video
    join                    the end of one, the start of another   one video: the first, a passage, the second

Where a video goes on, the given frames fade into what the model made of them; those that it does not see come back as they were.
Frames are given in whole token frames; see `Timing` for how many pixel frames that is. Videos and images are tensors
[3, T, H, W] in [-1, 1], or what the pipeline puts out as "np" or "pil".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import Size

Clip = Any  # what `as_video` takes


class Timing(NamedTuple):
    """How pixel frames make token frames: `lead` of them the first one, `grain` each other.

    A clip, and what is given of its start, has lead + grain * n frames; what is given of its end has grain * n. A causal video VAE
    that compresses time by 4 has (1, 4) with patches of one latent frame, pixels alone have (1, 1).
    """

    lead: int
    grain: int

    def whole(self, frames: int) -> int:
        """The fewest frames a clip can have, from `frames` on."""
        return self.lead + self.grain * -(-max(frames - self.lead, 0) // self.grain)


@dataclass(frozen=True)
class Request:
    """One sample of a packed batch.

    >>> Request("a red circle moves left", (13, 48, 48), given={0: clip[:, -5:]})        # goes on from the end of a clip

    Args:
        prompt: what to show.
        size: (T, H, W) in pixels.
        given: {first frame: clip [3, t, H, W]} to keep; a first frame below 0 counts from the end.
        begin: a video [3, T, H, W] to start from instead of noise.
        strength: with `begin`, the share of the denoising that is done anew: 1 keeps nothing, near 0 nearly everything.
        negative_prompt: what guidance leads away from.
        seed: of the noise; None leaves it to the call.
        frame_step: how far apart in time the frames are, for a model trained on frames sampled from longer clips; not with a VAE
            that compresses time.
        before: what the result goes on from [3, t, H, W], to be put in front of it.
        after: likewise behind it.
        cut: how many of the first and of the last frames of the result `before` and `after` have, too: there the one fades into the
            other. Without `before` or `after`, how many frames are left out.
    """

    prompt: str
    size: Size
    given: Mapping[int, Tensor] = field(default_factory=dict)
    begin: Tensor | None = None
    strength: float = 1.0
    negative_prompt: str = ""
    seed: int | None = None
    frame_step: float = 1.0
    before: Tensor | None = None
    after: Tensor | None = None
    cut: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not isinstance(self.negative_prompt, str):
            raise ValueError(f"Request: prompt: expected text, got {self.prompt!r} and {self.negative_prompt!r}")
        size = tuple(self.size) if isinstance(self.size, Sequence) else ()
        if len(size) != 3 or not all(isinstance(n, Integral) and n >= 1 for n in size):
            raise ValueError(f"Request: size: expected (T, H, W), each at least 1, got {self.size}")
        object.__setattr__(self, "size", tuple(int(n) for n in size))
        if not 0 < self.strength <= 1:
            raise ValueError(f"Request: strength: expected a number above 0 and up to 1, got {self.strength}")
        if self.frame_step <= 0:
            raise ValueError(f"Request: frame_step: expected a number above 0, got {self.frame_step}")
        if not (self.seed is None or isinstance(self.seed, Integral)):
            raise ValueError(f"Request: seed: expected a whole number or None, got {self.seed!r}")
        frames, height, width = self.size
        if len(self.cut) != 2 or min(self.cut) < 0 or sum(self.cut) > frames:
            raise ValueError(f"Request: cut: expected two numbers from 0 on, at most {frames} in all, got {self.cut}")
        if self.begin is not None and (tuple(self.begin.shape) != (3, *self.size) or not self.begin.is_floating_point()):
            got = f"{self.begin.dtype} {list(self.begin.shape)}"
            raise ValueError(f"Request: begin: expected floats {[3, *self.size]}, got {got}")

        def fits(clip: Tensor) -> bool:
            return clip.ndim == 4 and clip.shape[0] == 3 and tuple(clip.shape[2:]) == (height, width) and clip.is_floating_point()

        for at, clip in self.given.items():
            start = at + frames if at < 0 else at
            if not fits(clip) or not 0 <= start <= frames - clip.shape[1] or not clip.shape[1]:
                expected = f"clips of floats [3, t, {height}, {width}] within {frames} frames"
                raise ValueError(f"Request: given: expected {expected}, got {clip.dtype} {list(clip.shape)} at frame {at}")

        for name, video, shared in (("before", self.before, self.cut[0]), ("after", self.after, self.cut[1])):
            if video is not None and (not fits(video) or video.shape[1] < shared):
                expected = f"floats [3, t, {height}, {width}] with the {shared} frames that the result has, too"
                raise ValueError(f"Request: {name}: expected {expected}, got {video.dtype} {list(video.shape)}")

    def finish(self, clip: Tensor) -> Tensor:
        """What was generated [3, T, H, W], put together with what it goes on from.

        A VAE does not give frames back as they were. Fading over those that both have hides what a cut between them would show.
        """
        head, body, tail = clip.split([self.cut[0], clip.shape[1] - sum(self.cut), self.cut[1]], dim=1)
        parts = [body]
        if self.before is not None:
            alone, shared = self.before.to(clip).tensor_split([self.before.shape[1] - self.cut[0]], dim=1)
            parts = [alone, _fade(shared, head), *parts]
        if self.after is not None:
            shared, alone = self.after.to(clip).tensor_split([self.cut[1]], dim=1)
            parts = [*parts, _fade(tail, shared), alone]
        return torch.cat(parts, dim=1)


def _fade(first: Tensor, second: Tensor) -> Tensor:
    """The same frames twice [3, t, H, W]: the first ones become, more and more, the second ones."""
    weight = torch.arange(1, first.shape[1] + 1, device=first.device)[:, None, None] / (first.shape[1] + 1)
    return torch.lerp(first, second, weight.to(first))


def text_to_video(prompt: str, size: Size, **options: object) -> Request:
    """A video of `size` (T, H, W). options: negative_prompt, seed."""
    return Request(prompt, size, **options)  # type: ignore[arg-type]


def text_to_image(prompt: str, height: int, width: int, **options: object) -> Request:
    """An image, as a video of one frame."""
    return Request(prompt, (1, height, width), **options)  # type: ignore[arg-type]


def image_to_video(prompt: str, image: Clip, frames: int, timing: Timing, **options: object) -> Request:
    """A video of so many frames that begins with an image [3, 1, H, W]; where a first token frame is several, with a still one."""
    image = as_video(image)
    _check_video("image_to_video", "image", image)
    given = image[:, :1].expand(-1, min(timing.lead, max(frames, 1)), -1, -1)
    return Request(prompt, (frames, *image.shape[2:]), given={0: given}, **options)  # type: ignore[arg-type]


def video_to_video(prompt: str, video: Clip, strength: float = 0.7, **options: object) -> Request:
    """The video anew after another prompt; what is the same in both prompts tends to stay."""
    video = as_video(video)
    _check_video("video_to_video", "video", video)
    frames, height, width = video.shape[1:]
    return Request(prompt, (frames, height, width), begin=video, strength=strength, **options)  # type: ignore[arg-type]


def extend(
    prompt: str, video: Clip, frames: int, timing: Timing, *, overlap: int = 1, backward: bool = False, **options: object
) -> Request:
    """The video and `frames` more behind it, or in front of it; what the model sees of it fades into what is made.

    overlap: how many token frames of the video the model sees, besides the first; fewer if the video is shorter.
    """
    video = as_video(video)
    _check_video("extend", "video", video)
    height, width = video.shape[2:]
    if frames < 1:
        raise ValueError(f"extend: frames: expected at least 1, got {frames}")
    if backward:
        seen = _end(video, timing, overlap, "extend: video")
        made = timing.whole(frames)  # what is over is cut off its front
        given, size = {made: video[:, :seen]}, (made + seen, height, width)
        return Request(prompt, size, given=given, after=video, cut=(made - frames, seen), **options)  # type: ignore[arg-type]
    seen = _start(video, timing, overlap, "extend: video")
    size = (seen + frames, height, width)
    return Request(prompt, size, given={0: video[:, -seen:]}, before=video, cut=(seen, 0), **options)  # type: ignore[arg-type]


def join(prompt: str, first: Clip, last: Clip, frames: int, timing: Timing, *, overlap: int = 1, **options: object) -> Request:
    """Two videos of one frame size with a passage of `frames` frames between them, a multiple of the timing's grain.

    What the model sees of both fades into what is made.
    """
    first, last = as_video(first), as_video(last)
    _check_video("join", "first", first)
    _check_video("join", "last", last)
    check_joined(first, last)
    if frames < 1 or frames % timing.grain:
        raise ValueError(f"join: frames: expected a multiple of {timing.grain}, got {frames}")
    height, width = first.shape[2:]
    start, end = _start(first, timing, overlap, "join: first"), _end(last, timing, overlap, "join: last")
    given = {0: first[:, -start:], start + frames: last[:, :end]}
    size = (start + frames + end, height, width)
    return Request(prompt, size, given=given, before=first, after=last, cut=(start, end), **options)  # type: ignore[arg-type]


def check_joined(first: Tensor, last: Tensor) -> None:
    if first.shape[2:] != last.shape[2:]:
        raise ValueError(f"join: last: expected frames of {list(first.shape[2:])} as in first, got {list(last.shape[2:])}")


def _start(video: Tensor, timing: Timing, overlap: int, argument: str) -> int:
    """How many frames of a video's end the start of a clip takes."""
    check_overlap(argument.partition(":")[0], overlap)
    length = video.shape[1]
    if length < timing.lead:
        raise ValueError(f"{argument}: expected at least {timing.lead} frames, got {length}")
    return timing.lead + timing.grain * min(overlap, (length - timing.lead) // timing.grain)


def _end(video: Tensor, timing: Timing, overlap: int, argument: str) -> int:
    """How many frames of a video's start the end of a clip takes."""
    check_overlap(argument.partition(":")[0], overlap)
    length = video.shape[1]
    if length < timing.grain:
        raise ValueError(f"{argument}: expected at least {timing.grain} frames, got {length}")
    return timing.grain * min(max(overlap, 1), length // timing.grain)


def check_overlap(task: str, overlap: int) -> None:
    if overlap < 0:
        raise ValueError(f"{task}: overlap: expected at least 0, got {overlap}")


def as_video(video: Any) -> Tensor:
    """A PIL image, several of them, or an array [T, H, W, 3], uint8 or in [0, 1], as [3, T, H, W] in [-1, 1]; a tensor as it is."""
    if isinstance(video, Tensor):
        return video
    if isinstance(video, Image.Image):
        video = [video]
    if isinstance(video, Sequence) and not isinstance(video, str):
        if not video or not all(isinstance(image, Image.Image) for image in video):
            raise ValueError(f"as_video: expected PIL images, got {type(video[0]).__name__ if video else 'none'}")
        video = np.stack([np.asarray(image.convert("RGB")) for image in video])
    if (
        not isinstance(video, np.ndarray)
        or video.ndim != 4
        or video.shape[3] != 3
        or (video.dtype != np.uint8 and video.dtype.kind != "f")
    ):
        got = f"{video.dtype} {list(video.shape)}" if isinstance(video, np.ndarray) else type(video).__name__
        raise ValueError(f"as_video: expected a tensor [3, T, H, W], an array [T, H, W, 3] or PIL images, got {got}")
    pixels = torch.from_numpy(video.astype(np.float32)) / (255 if video.dtype == np.uint8 else 1)
    return pixels.permute(3, 0, 1, 2) * 2 - 1


def _check_video(task: str, argument: str, video: Tensor) -> None:
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape or not video.is_floating_point():
        got = f"{video.dtype} {list(video.shape)}"
        raise ValueError(f"{task}: {argument}: expected floats [3, T, H, W] with at least one frame, got {got}")
