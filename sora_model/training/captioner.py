"""What a captioner learns: the captions of clips, short and detailed, and a detailed caption from a short one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..caption.captioner import Captioner
from ..codec.codec import Codec
from ..data import Batch
from ..storage.files import save_whole


class CaptionObjective:
    """Likelihood of a clip's captions from its latent, and of its long caption from its short one.

    Args:
        captioner: what to train.
        codec: pixels -> latents; it stays as it is.
        noise: of the latents, in their deviations, so that what the pipeline generates can be captioned as well.
    """

    def __init__(self, captioner: Captioner, codec: Codec, *, noise: float = 0.1) -> None:
        self.captioner, self.model, self.codec, self.noise = captioner, captioner, codec, noise

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        device = self.captioner.patch_embed.weight.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            latents = self.codec.encode([video.to(device) for video in batch.videos])
            latents = [x + self.noise * torch.randn(x.shape, generator=generator).to(x) for x in latents]
        long = (torch.rand(len(latents), generator=generator) < 0.5).tolist()
        long = [wanted and sample.detailed is not None for wanted, sample in zip(long, batch.samples, strict=True)]
        captions = [sample.detailed or "" if d else sample.caption for sample, d in zip(batch.samples, long, strict=True)]
        loss = self.captioner.loss(self.captioner.see(latents), captions, long)
        pairs = [(sample.caption, sample.detailed) for sample in batch.samples if sample.detailed is not None]
        # Without any, an empty one for nothing: several processes wait for the gradients of all weights.
        prompts, longs = zip(*(pairs or [("", "")]), strict=True)
        expansion = self.captioner.loss(self.captioner.words(prompts), longs, [True] * len(longs))
        return loss + (1 if pairs else 0) * expansion

    def save(self, model: nn.Module, folder: Path) -> None:
        save_whole(model, folder)
