"""How often training draws each task, and the mask of clean frames that it draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskMix:
    """How often each task is trained, as relative weights. Images and clips too short for a task are trained as a simpler one.

    per_frame: share, from 0 to 1, of the clips whose every token frame has a noise level of its own (diffusion forcing: Chen et
    al., 2024), so that the model also learns from frames that are nearly, but not quite, clean.
    """

    text_to_video: float = 0.7
    image_to_video: float = 0.1
    extension: float = 0.1
    joining: float = 0.1
    per_frame: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.text_to_video, self.image_to_video, self.extension, self.joining)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"TaskMix: expected weights >= 0, not all 0, got {weights}")
        if not 0 <= self.per_frame <= 1:
            raise ValueError(f"TaskMix: per_frame: expected a number from 0 to 1, got {self.per_frame}")

    def draw_mask(self, num_frames: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws a task and a mask for a clip: bool [num_frames], True for clean frames. At least one is not.

        >>> TaskMix(0, 0, 0, joining=1).draw_mask(6)
        tensor([ True,  True, False, False, False,  True])
        """
        weights = torch.tensor([self.text_to_video, self.image_to_video, self.extension, self.joining], dtype=torch.float32)
        task = int(torch.multinomial(weights, 1, generator=generator))

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        head = tail = 0
        if task == 3 and num_frames > 2:
            head = between(1, num_frames - 2)
            tail = between(1, num_frames - 1 - head)
        elif task == 2 and num_frames > 1:
            head = between(1, num_frames - 1)
            if between(0, 1):
                head, tail = 0, head
        elif task > 0 and num_frames > 1:
            head = 1
        frame = torch.arange(num_frames)
        return (frame < head) | (frame >= num_frames - tail)
