"""What batches are made of: `Sample`, the `Source` interface, `Batch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..sizes import Size


class Sample(NamedTuple):
    """A clip [3, T, H, W] in [-1, 1] and its caption.

    detailed: a long caption too, if there is one. clean_mask: bool [T], the frames that stay clean, where the clip teaches a task.
    """

    video: torch.Tensor
    caption: str
    detailed: str | None = None
    clean_mask: torch.Tensor | None = None


class Source(Protocol):
    """What the sampler draws from: `FolderSource`, which also has a length, or an endless one, which has none.

    It may have `name(index)`, by which messages call a sample.
    """

    def size(self, index: int) -> Size: ...

    def load(self, index: int, epoch: int = 0) -> Sample: ...


@dataclass
class Batch:
    """One step's samples, of mixed sizes, their indices into the source, and how many tokens they are in all."""

    samples: list[Sample]
    indices: list[int]
    tokens: int

    @property
    def videos(self) -> list[torch.Tensor]:
        return [sample.video for sample in self.samples]

    @property
    def captions(self) -> list[str]:
        return [sample.caption for sample in self.samples]


class Repeated:
    """The first `length` samples of an endless source, again in every epoch: what is computed of them can be kept."""

    def __init__(self, source: Source, length: int) -> None:
        if length < 1:
            raise ValueError(f"Repeated: length must be at least 1, got {length}")
        self.source, self.length = source, length

    def __len__(self) -> int:
        return self.length

    def size(self, index: int) -> Size:
        return self.source.size(index)

    def load(self, index: int, epoch: int = 0) -> Sample:
        return self.source.load(index)
