"""Videos as users have them: tensors, arrays and PIL images, in and out."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..sizes import Size

Clip = Any  # what `as_video` takes


def as_video(video: Any, owner: str = "as_video") -> Tensor:
    """A PIL image, several of them, or an array [T, H, W, 3], uint8 or in [0, 1], as [3, T, H, W] in [-1, 1]; a tensor as it is."""
    if isinstance(video, Tensor):
        return video
    if isinstance(video, Image.Image):
        video = [video]
    if isinstance(video, Sequence) and not isinstance(video, str):
        if not video or not all(isinstance(image, Image.Image) for image in video):
            raise ValueError(f"{owner}: expected PIL images, got {type(video[0]).__name__ if video else 'none'}")
        video = np.stack([np.asarray(image.convert("RGB")) for image in video])
    if (
        not isinstance(video, np.ndarray)
        or video.ndim != 4
        or video.shape[3] != 3
        or (video.dtype != np.uint8 and video.dtype.kind != "f")
    ):
        got = f"{video.dtype} {list(video.shape)}" if isinstance(video, np.ndarray) else type(video).__name__
        raise ValueError(f"{owner}: expected a tensor [3, T, H, W], an array [T, H, W, 3] or PIL images, got {got}")
    pixels = torch.from_numpy(video.astype(np.float32)) / (255 if video.dtype == np.uint8 else 1)
    return pixels.permute(3, 0, 1, 2) * 2 - 1


def check_video(task: str, argument: str, video: Tensor) -> None:
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape or not video.is_floating_point():
        got = f"{video.dtype} {list(video.shape)}"
        raise ValueError(f"{task}: {argument}: expected floats [3, T, H, W] with at least one frame, got {got}")


def converted(video: Tensor, output_type: str) -> Any:
    """[3, T, H, W] in [-1, 1] as "pt" (itself), "np" (float32 [T, H, W, 3] in [0, 1]) or "pil" (a list of T images)."""
    if output_type == "pt":
        return video
    frames = ((video + 1) / 2).permute(1, 2, 3, 0).float().cpu().numpy()
    if output_type == "np":
        return frames
    return [Image.fromarray(frame) for frame in (frames * 255).round().astype(np.uint8)]


def pad(video: Tensor, size: Size) -> Tensor:
    """A video [3, T, H, W] made larger below, to the right and at the end, by repeating its border."""
    (t, h, w), (frames, height, width) = video.shape[1:], size
    return F.pad(video[None], (0, width - w, 0, height - h, 0, frames - t), mode="replicate")[0]


def resized(video: Tensor, height: int, width: int) -> Tensor:
    """A video [3, T, h, w] as [3, T, height, width], frame by frame."""
    smaller = height < video.shape[2] or width < video.shape[3]
    frames = F.interpolate(video.transpose(0, 1), (height, width), mode="bicubic", align_corners=False, antialias=smaller)
    return frames.transpose(0, 1).clamp(-1, 1)


def fitted(video: Tensor, height: int, width: int) -> Tensor:
    """A video [3, T, h, w] scaled until it covers height x width, and cut to that evenly around; it keeps its shape.

    video: on the CPU, without a gradient; comes back in float32.
    """
    h, w = video.shape[2:]
    scale = max(height / h, width / w)
    top, left = max((h - height / scale) / 2, 0.0), max((w - width / scale) / 2, 0.0)
    made = torch.empty(*video.shape[:2], height, width, device="cpu")

    # Pillow computes what is shown alone. All of it, scaled, may be many times as large: of a frame brought to a strip, say.
    def fit(plane: np.ndarray, out: np.ndarray) -> None:
        shown = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, box=(left, top, w - left, h - top))
        out[:] = np.asarray(shown)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow works without Python's lock
        list(pool.map(fit, video.flatten(0, 1).float().numpy(), made.flatten(0, 1).numpy()))
    return made.clamp_(-1, 1)
