"""Frames that a request gives: which ones a transformer was trained with, and how it sees them.

as clean frames    their latents stay as they are, at noise level 0 (models with a time for each frame)
as a condition     further channels of a latent: which frames are given, and the latent of a video of these and of gray ones
                   (Wan's image-to-video models); CLIP's tokens of the first one, or of both ends, may come on top
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codec.codec import Codec, latent_frames, latent_size, nearest_known
from ..diffusion.masks import CleanFrames
from ..diffusion.sampling import Init
from ..sizes import Size, Timing
from ..storage.weights import GIVEN_FRAMES
from .clips import pad
from .request import Request

# Which frames a transformer was trained with, of what a request may give.
NONE, FIRST, ENDS, ANY = GIVEN_FRAMES
TRAINED = {
    NONE: "none, as this transformer was trained with one time for all frames",
    FIRST: "the first frame alone, as this transformer was trained",
    ENDS: "the first frame and the last, as this transformer was trained",
}


class Given(NamedTuple):
    """What requests give of their videos: latents to start from; clean frames, where any are; conditions; CLIP's tokens."""

    init: list[Init | None]
    clean: list[CleanFrames] | None
    conditions: list[Tensor] | None = None
    images: list[Tensor] | None = None


def check_keyframes(given_frames: str, requests: Sequence[Request] | None = None, owner: str = "SoraPipeline") -> None:
    """Raises ValueError for keyframes that a transformer was not trained with.

    given_frames: which ones it was. requests: default: of a task that goes on from any frames.
    """
    if given_frames == ANY:
        return
    if requests is None:
        raise ValueError(f"{owner}: keyframes: expected {TRAINED[given_frames]}, got any")
    for request in requests:
        got = {place.start: place.stop - place.start for place in _places(request).values()}
        wanted: dict[str, dict[int, int]] = {NONE: {}, FIRST: {0: 1}, ENDS: {0: 1, request.size[0] - 1: 1}}
        if got != wanted[given_frames]:
            shown = ", ".join(f"{count} from frame {at}" for at, count in sorted(got.items())) or "none"
            raise ValueError(f"{owner}: keyframes: expected {TRAINED[given_frames]}, got {shown}")


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
        if edges and place.start <= edges[-1]:
            edges[-1] = max(edges[-1], place.stop)
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
    video, known = _given(request, padded, device)
    mask = latent_frames(codec, known)
    if not known.any():
        return CleanFrames(mask, torch.zeros(codec.channels, *latent_size(codec, padded), device=device))
    (latent,) = codec.encode([nearest_known(video, known)], **watched)
    return CleanFrames(mask, latent)


def condition(codec: Codec, request: Request, padded: Size, device: torch.device, **watched: Any) -> Tensor:
    """[ct + C, T', H', W']: for each of the ct frames of a latent frame whether it is given, and the latent."""
    video, known = _given(request, padded, device)
    (latent,) = codec.encode([video], **watched)
    ct = codec.compression[0]
    mask = torch.cat([known[:1].expand(ct), known[1:]]).unflatten(0, (-1, ct)).mT  # the first frame has a latent frame of its own
    return torch.cat([mask.to(latent)[:, :, None, None].expand(-1, -1, *latent.shape[2:]), latent])


def shown_images(request: Request, count: int) -> list[Tensor]:
    """The first of the given frames [3, 1, H, W], or with count 2 the first and the last."""
    at = sorted(_places(request).items(), key=lambda pair: pair[1].start)
    first, last = request.keyframes[at[0][0]], request.keyframes[at[-1][0]]
    return [first[:, :1], last[:, -1:]][:count]


def _places(request: Request) -> dict[int, slice]:
    """Where each clip of the keyframes lies, by its key, which counts from the end if it is below 0."""
    starts = {at: at + request.size[0] if at < 0 else at for at in request.keyframes}
    return {at: slice(start, start + request.keyframes[at].shape[1]) for at, start in starts.items()}


def _given(request: Request, padded: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """A video [3, T, H, W] of keyframes and gray, and which frames are given: bool [T] on the host."""
    video, known = torch.zeros(3, *padded, device=device), torch.zeros(padded[0], dtype=torch.bool)
    for at, place in _places(request).items():
        clip = request.keyframes[at]
        video[:, place], known[place] = pad(clip.to(video), (clip.shape[1], *padded[1:])), True
    return video, known
