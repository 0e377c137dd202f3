"""Text as the model sees it: packed tokens of any lengths, and one vector per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedText:
    """Captions of a packed batch.

    >>> from sora_model.text.words import WordEncoder
    >>> text = WordEncoder(dim=256)(["a red circle moves right", ""])
    >>> text.tokens.shape, text.cu_seqlens.tolist(), text.pooled.shape
    (torch.Size([6, 256]), [0, 5, 6], torch.Size([2, 256]))

    Attributes:
        tokens: [M, D], laid end to end, for cross-attention. A caption may have none: that sample has no text.
        cu_seqlens: int32 [B+1], where each caption starts and ends.
        pooled: [B, D], what a caption says as one vector, for adaLN.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    pooled: Tensor

    @property
    def num_samples(self) -> int:
        return self.pooled.shape[0]

    @classmethod
    def empty(cls, num_samples: int, dim: int) -> PackedText:
        """No text at all, for each of `num_samples`; `dim` is D."""
        return cls(torch.zeros(0, dim), torch.zeros(num_samples + 1, dtype=torch.int32), torch.zeros(num_samples, dim))

    @classmethod
    def concat(cls, texts: Sequence[PackedText]) -> PackedText:
        """The captions of several batches, one after the other."""
        starts = [texts[0].cu_seqlens[:1]]
        for text in texts:
            starts.append(text.cu_seqlens[1:] + starts[-1][-1])
        tokens, pooled = torch.cat([text.tokens for text in texts]), torch.cat([text.pooled for text in texts])
        return cls(tokens, torch.cat(starts), pooled)

    def select(self, samples: Sequence[int]) -> PackedText:
        """The captions of some samples, in that order; all of them in theirs are the text itself."""
        if list(samples) == list(range(self.num_samples)):
            return self
        bounds = self.cu_seqlens.tolist()
        tokens = [self.tokens[bounds[i] : bounds[i + 1]] for i in samples]
        cu_seqlens = torch.tensor([0, *accumulate(len(part) for part in tokens)], dtype=torch.int32)
        return PackedText(torch.cat(tokens), cu_seqlens.to(self.cu_seqlens.device), self.pooled[list(samples)])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PackedText:
        """Moved to a device, and its vectors to a dtype."""
        cu_seqlens = self.cu_seqlens.to(device)
        return PackedText(self.tokens.to(device, dtype), cu_seqlens, self.pooled.to(device, dtype))


class Samples(NamedTuple):
    """The arguments of `DiT.forward`."""

    latents: Sequence[Tensor]
    timesteps: Tensor
    text: PackedText | None = None
    labels: Tensor | None = None
    frame_steps: Sequence[float] | None = None
    image_tokens: Sequence[Tensor] | None = None

    def levels(self, patch_frames: int) -> tuple[Tensor, ...]:
        """The timesteps of each sample, [1] or one per token frame."""
        lengths = [x.shape[1] // patch_frames for x in self.latents]
        return self.timesteps.split(lengths if len(self.timesteps) != len(self.latents) else 1)

    def select(self, which: Sequence[int], patch_frames: int) -> Samples:
        """Some of them, in that order."""
        levels, chosen = self.levels(patch_frames), list(which)
        return Samples(
            [self.latents[i] for i in chosen],
            torch.cat([levels[i] for i in chosen]),
            None if self.text is None else self.text.select(chosen),
            None if self.labels is None else self.labels[chosen],
            None if self.frame_steps is None else [self.frame_steps[i] for i in chosen],
            None if self.image_tokens is None else [self.image_tokens[i] for i in chosen],
        )


class TextEncoder(Protocol):
    """Anything that turns captions into `PackedText`: `WordEncoder`, or T5, UMT5 or CLIP as a `PretrainedEncoder`.

    dim: width of tokens and pooled. An empty caption must give the null conditioning of classifier-free guidance.
    """

    dim: int

    def __call__(self, captions: Sequence[str]) -> PackedText: ...

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None: ...


def drop_captions(captions: Sequence[str], probability: float, generator: torch.Generator | None = None) -> list[str]:
    """Empties each caption with `probability`, so that the model learns to do without (classifier-free guidance)."""
    if not 0 <= probability <= 1:
        raise ValueError(f"drop_captions: probability: expected a number from 0 to 1, got {probability}")
    dropped = torch.rand(len(captions), generator=generator) < probability
    return ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
