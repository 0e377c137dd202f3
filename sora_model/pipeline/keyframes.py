"""Frames that a request gives: which ones a transformer was trained with, and how it sees them.

as clean frames    their latents stay as they are, at noise level 0 (models with a time for each frame)
as a condition     further channels of a latent: which frames are given, and the latent of a video of these and of gray ones
                   (Wan's image-to-video models); CLIP's tokens of the first one, or of both ends, may come on top
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codec.codec import Codec, latent_frames, latent_size, nearest_known
from ..diffusion.masks import CleanFrames
from ..diffusion.sampling import Init
from ..sizes import Size, Timing
from .clips import pad
from .request import Request


class TrainedKeyframes(str, Enum):
    """Which keyframes a transformer was trained with."""

    NONE = "none"
    FIRST = "first"
    FIRST_AND_LAST = "first and last"
    ANY = "any"

    @property
    def as_condition(self) -> bool:
        """Whether they are further channels, of a transformer that needs some."""
        return self in (TrainedKeyframes.FIRST, TrainedKeyframes.FIRST_AND_LAST)

    @property
    def expected(self) -> str:
        """In words, for errors."""
        if self is TrainedKeyframes.NONE:
            return "none, as this transformer was trained with one time for all frames"
        frames = {"first": "the first frame alone", "first and last": "the first frame and the last"}
        return f"{frames.get(self.value, 'any')}, as this transformer was trained"

    def of(self, request: Request) -> dict[int, int] | None:
        """The clips that a request should have, by their first frame how many frames; None is any."""
        last = {max(request.size[0] - 1, 1): 1}
        known: dict[str, dict[int, int]] = {"none": {}, "first": {0: 1}, "first and last": {0: 1, **last}}
        return known.get(self.value)


def known_keyframes(value: TrainedKeyframes | str) -> TrainedKeyframes:
    """One of `TrainedKeyframes`, by its value; another is a ValueError."""
    if value not in list(TrainedKeyframes):
        expected = ", ".join(one.value for one in TrainedKeyframes)
        raise ValueError(f"SoraPipeline: trained_keyframes: expected one of {expected}, got {value!r}")
    return TrainedKeyframes(value)


class Encoded(NamedTuple):
    """What a transformer sees of the videos of requests: latents to start from; clean frames, where there are any; conditions;
    CLIP's tokens of images."""

    init: list[Init | None]
    clean: list[CleanFrames] | None
    conditions: list[Tensor] | None = None
    image_tokens: list[Tensor] | None = None


def check_keyframes(trained: TrainedKeyframes, requests: Sequence[Request], owner: str = "SoraPipeline") -> None:
    """Raises ValueError for keyframes that a transformer was not trained with."""
    for request in requests:
        got, wanted = {place.start: place.stop - place.start for place in _places(request).values()}, trained.of(request)
        if wanted not in (None, got):
            shown = ", ".join(f"{count} from frame {at}" for at, count in sorted(got.items())) or "none"
            raise ValueError(f"{owner}: keyframes: expected {trained.expected}, got {shown}")


def check_any_keyframes(trained: TrainedKeyframes, owner: str = "SoraPipeline") -> None:
    """Raises ValueError for a transformer that was not trained with any, as tasks that go on again and again need."""
    if trained is not TrainedKeyframes.ANY:
        raise ValueError(f"{owner}: keyframes: expected {trained.expected}, got any")


def check_condition(timing: Timing, request: Request) -> None:
    """Raises ValueError for keyframes that cannot be a condition: it needs one, and nothing may follow a last one that is given."""
    if not request.keyframes:
        raise ValueError("SoraPipeline: keyframes: expected at least one, which this transformer goes on from, got none")
    frames, (first, stride) = request.size[0], timing
    if any(place.stop == frames for place in _places(request).values()) and (frames - first) % stride:
        raise ValueError(f"SoraPipeline: size: expected {first} + {stride} n frames where the last one is given, got {frames}")


def init_latent(codec: Codec, request: Request, padded: Size, device: torch.device, **watched: Any) -> Init | None:
    """The latent of `init_video`."""
    if request.init_video is None:
        return None
    (latent,) = codec.encode([pad(request.init_video.to(device, torch.float32), padded)], **watched)
    return Init(latent, request.strength)


def check_whole_frames(timing: Timing, request: Request) -> None:
    """Raises ValueError for keyframes that are not whole token frames, as clean frames must be."""
    first, stride = timing
    edges: list[int] = []  # where given frames begin and end
    for place in sorted(_places(request).values(), key=lambda place: place.start):
        if edges and place.start == edges[-1]:
            edges[-1] = place.stop
        else:
            edges += [place.start, place.stop]
    if any(edge and (edge < first or (edge - first) % stride) for edge in edges):
        lengths = {at: clip.shape[1] for at, clip in request.keyframes.items()}
        raise ValueError(
            f"SoraPipeline: keyframes: expected whole token frames, the first {first} and then {stride} at a time, "
            f"got clips of frames {lengths} in {request.size[0]}"
        )


def clean_frames(codec: Codec, timing: Timing, request: Request, padded: Size, device: torch.device, **watched: Any) -> CleanFrames:
    """The latent frames that are made of keyframes."""
    check_whole_frames(timing, request)
    video, known = _keyframe_video(request, padded, device)
    mask = latent_frames(codec, known)
    if not known.any():
        return CleanFrames(mask, torch.zeros(codec.channels, *latent_size(codec, padded), device=device))
    (latent,) = codec.encode([nearest_known(video, known)], **watched)
    return CleanFrames(mask, latent)


def condition(codec: Codec, request: Request, padded: Size, device: torch.device, **watched: Any) -> Tensor:
    """[ct + C, T', H', W']: for each of the ct frames of a latent frame whether it is given, and the latent."""
    video, known = _keyframe_video(request, padded, device)
    (latent,) = codec.encode([video], **watched)
    ct = codec.compression[0]
    mask = torch.cat([known[:1].expand(ct), known[1:]]).unflatten(0, (-1, ct)).mT  # the first frame has a latent frame of its own
    return torch.cat([mask.to(latent)[:, :, None, None].expand(-1, -1, *latent.shape[2:]), latent])


def shown_images(request: Request, count: int) -> list[Tensor]:
    """The first of the given frames [3, 1, H, W], or with count 2 the first and the last."""
    places = _places(request)
    in_order = [request.keyframes[at] for at in sorted(places, key=lambda at: places[at].start)]
    return [in_order[0][:, :1], in_order[-1][:, -1:]][:count]


def _places(request: Request) -> dict[int, slice]:
    """Where each clip of the keyframes lies, by its key, which counts from the end if it is below 0."""
    starts = {at: at + request.size[0] if at < 0 else at for at in request.keyframes}
    return {at: slice(start, start + request.keyframes[at].shape[1]) for at, start in starts.items()}


def _keyframe_video(request: Request, padded: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """A video [3, T, H, W] of keyframes and gray, and which frames are given: bool [T] on the host."""
    video, known = torch.zeros(3, *padded, device=device), torch.zeros(padded[0], dtype=torch.bool)
    for at, place in _places(request).items():
        clip = request.keyframes[at]
        video[:, place], known[place] = pad(clip.to(video), (clip.shape[1], *padded[1:])), True
    return video, known
