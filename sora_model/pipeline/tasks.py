"""Tasks of several passes: large frames by way of small ones, and loops, long videos and simulated worlds, which are extension or
joining, repeated.

refined       a small draft, enlarged and made anew in part
loop          a clip, and a passage from its end back to its beginning
long_video    a clip, extended until it is long enough
Simulation    a clip, extended by a chunk for every action
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sizes import Size
from .clips import resized
from .pipeline import SoraPipeline
from .request import Request, check_overlap, extend, join, video_to_video

REDONE = 0.25  # of the denoising, on an enlarged draft


def refined(
    pipeline: SoraPipeline,
    prompts: Sequence[str],
    sizes: Sequence[Size],
    draft: int,
    *,
    strength: float = REDONE,
    negative_prompt: str = "",
    seed: int = 0,
    **options: Any,
) -> list[Tensor]:
    """Videos [3, T, H, W] of large frames by way of small ones: drafts are generated, enlarged, noised and denoised again (SDEdit).

    >>> refined(pipeline, ["a red circle"], [(1, 128, 192)], draft=64)[0].shape             # the draft has 64 x 96 pixels
    torch.Size([3, 1, 128, 192])

    What is where is settled by the draft, at sizes that the model has seen in training, and only the last steps work on large
    frames.

    Args:
        sizes: (T, H, W) of each video.
        draft: pixels along the shorter side of a draft; fewer than of any video.
        strength: share of the denoising that is done anew on the enlarged draft.
        options: of the pipeline's call.
    """
    small = []
    for frames, height, width in sizes:
        shorter = min(height, width)
        if not 1 <= draft < shorter:
            raise ValueError(
                f"refined: draft: expected from 1 to {shorter - 1} pixels, as the shorter side has {shorter}, got {draft}"
            )
        small.append((frames, round(height * draft / shorter), round(width * draft / shorter)))
    asked = [Request(p, size, negative_prompt=negative_prompt) for p, size in zip(prompts, small, strict=True)]
    drafts = pipeline(asked, generator=seed, **options)  # type: ignore[arg-type]
    large = [resized(video, *size[1:]) for video, size in zip(drafts, sizes, strict=True)]
    again = [video_to_video(p, x, strength, negative_prompt=negative_prompt) for p, x in zip(prompts, large, strict=True)]
    return pipeline(again, generator=seed, **options)  # type: ignore[arg-type]


def loop(pipeline: SoraPipeline, prompt: str, size: Size | None = None, **options: Any) -> Tensor:
    """A video [3, T, H, W] whose last frame leads to its first.

    >>> loop(pipeline, "a red circle moves right", (13, 48, 48), passage=12).shape
    torch.Size([3, 25, 48, 48])

    Where it begins is free, as it has no end: it is turned so that it changes least from the last frame to the first.

    Args:
        size: of the clip, before the way back; default: the pipeline's.
        options: see `close`.
    """
    return turned(close(pipeline, prompt, size, **options))


def close(
    pipeline: SoraPipeline,
    prompt: str,
    size: Size | None = None,
    *,
    passage: int | None = None,
    passage_prompt: str | None = None,
    negative_prompt: str = "",
    overlap: int = 1,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """A clip and a passage from its end back to its beginning: [3, T, H, W].

    Args:
        size: of the clip, before the passage.
        passage: frames of the way back, a multiple of `timing.stride`; default: about as many as the clip has.
        passage_prompt: what the passage shows; default: the prompt.
        overlap: token frames at both ends that the passage sees.
        options: of the pipeline's call.
    """
    pipeline.check_any_keyframes()
    timing, common = pipeline.timing, {"negative_prompt": negative_prompt}
    (clip,) = pipeline([Request(prompt, size or pipeline.size, seed=seed, **common)], **options)  # type: ignore[arg-type]
    passage = max(clip.shape[1] // timing.stride, 1) * timing.stride if passage is None else passage
    way_prompt = prompt if passage_prompt is None else passage_prompt
    way = join(way_prompt, clip, clip, passage, timing, overlap=overlap, seed=seed + 1, **common)
    (joined,) = pipeline([way], **options)
    # The clip stands before the passage, where its end fades into it, and behind it, where its start does: here it does both.
    frames = clip.shape[1]
    faded = (joined[:, :frames] + joined[:, -frames:] - clip.to(joined)).clamp(-1, 1)
    return torch.cat([faded, joined[:, frames:-frames]], dim=1)


def turned(video: Tensor) -> Tensor:
    """A loop that begins where it changes least from the frame before."""
    changes = (video - video.roll(1, dims=1)).square().mean((0, 2, 3))
    return video.roll(-int(changes.argmin()), dims=1)


def long_video(
    pipeline: SoraPipeline,
    prompts: str | Sequence[str],
    frames: int,
    size: Size | None = None,
    *,
    negative_prompt: str = "",
    overlap: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Tensor:
    """A video of so many frames, made a chunk at a time: [3, frames, H, W].

    Each chunk sees the end of what there is, and is as long with it as the first one. Memory and time per chunk do not grow.

    Args:
        prompts: one for all chunks, or one after the other; the last one stays.
        frames: in all.
        size: (T, H, W) of a chunk; default: the pipeline's.
        overlap: token frames, besides the first, that a chunk sees of the one before.
        progress: called after each chunk, the first one included, with its number of new frames; `frames` in all.
        options: of the pipeline's call.
    """
    chunks = [prompts] if isinstance(prompts, str) else list(prompts)
    if not chunks or frames < 1:
        raise ValueError(f"long_video: expected at least one prompt and one frame, got {len(chunks)} and {frames}")
    world = Simulation(pipeline, chunks[0], size, negative_prompt=negative_prompt, overlap=overlap, seed=seed, **options)
    report = progress or (lambda new: None)
    done = min(world.video.shape[1], frames)
    report(done)
    while done < frames:
        new = min(world.act(chunks[min(world.chunks, len(chunks) - 1)]).shape[1], frames - done)
        done += new
        report(new)
    return world.video[:, :frames]


class Simulation:
    """A world that goes on as its actions say, a chunk at a time.

    >>> world = Simulation(pipeline, "a red circle moves right")
    >>> world.act("a red circle moves up").shape                # the new frames alone
    torch.Size([3, 8, 48, 48])
    >>> world.video.shape
    torch.Size([3, 21, 48, 48])

    Args:
        prompt: what the first chunk shows.
        size: (T, H, W) of a chunk, with what it sees of the one before; default: the pipeline's.
        overlap: token frames, besides the first, that a chunk sees of the one before.
        seed: of the first chunk; the next ones count up.
        first: a video [3, T, H, W] to begin with instead of generating one.
        options: of the pipeline's call.
    """

    def __init__(
        self,
        pipeline: SoraPipeline,
        prompt: str,
        size: Size | None = None,
        *,
        negative_prompt: str = "",
        overlap: int = 1,
        seed: int = 0,
        first: Tensor | None = None,
        **options: Any,
    ) -> None:
        check_overlap("Simulation", overlap)
        pipeline.check_any_keyframes()
        self.pipeline, self.overlap, self.seed, self.options = pipeline, overlap, seed, options
        self.frames, self.negative_prompt = (size or pipeline.size)[0], negative_prompt
        self.seen = pipeline.timing.first + pipeline.timing.stride * overlap
        if self.frames <= self.seen:
            raise ValueError(f"Simulation: size: expected more than the {self.seen} frames that a chunk sees, got {self.frames}")
        if first is None:
            request = Request(prompt, size or pipeline.size, seed=seed, negative_prompt=negative_prompt)
            (first,) = pipeline([request], **options)
        self._parts, self.chunks = [first[:, : -self.seen]], 1
        self._recent = first[:, -self.seen :]  # what the next chunk sees, and fades from

    @property
    def video(self) -> Tensor:
        """Everything so far [3, T, H, W]; those of the last frames that the next chunk sees will fade into it."""
        return torch.cat([*self._parts, self._recent], dim=1)

    def act(self, prompt: str) -> Tensor:
        """The world goes on as the prompt says; returns the new frames [3, t, H, W], which `video` may yet fade."""
        known, seed = self._recent.shape[1], self.seed + self.chunks
        request = extend(
            prompt, self._recent, self.frames - known, self.pipeline.timing, overlap=self.overlap, seed=seed,
            negative_prompt=self.negative_prompt,
        )  # fmt: skip
        (clip,) = self.pipeline([request], **self.options)
        self._parts.append(clip[:, : -self.seen])
        self._recent = clip[:, -self.seen :]
        self.chunks += 1
        return clip[:, known:]
