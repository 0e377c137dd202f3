"""What a video VAE learns: to give back what it was given, from latents that stand some noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..codec.codec import nearest_known, pixel_frames, psnr
from ..codec.vae import VideoVAE
from ..data import Batch, MediaError, Source
from ..storage.files import save_whole

NOISE = 0.05  # added to latents, so that neighbours in latent space decode to neighbours
FINE_NOISE = 0.02  # when only the decoder learns, from latents that stay as they are
KEYFRAME_ENDS = 1 / 3  # share of clips whose end is encoded as keyframes
ABSOLUTE = 0.1  # weight of the absolute error beside the squared one, which hardly sees the small errors of plain parts
PULL = 1e-4  # weight of the latents' mean square, so that noise stays large beside them


class VAEObjective:
    """Squared and absolute error of decoded videos, batched by size, and a weak pull of the latents towards 0.

    Of a third of the clips an end is encoded as the pipeline encodes keyframes (`codec.nearest_known`): without what comes before
    it, which the decoder then sees.

    Args:
        vae: what to train.
        decoder_only: leave latents as they are, so that a transformer trained on them stays of use.
    """

    def __init__(self, vae: VideoVAE, *, decoder_only: bool = False) -> None:
        self.vae, self.model, self.decoder_only = vae, vae, decoder_only
        if decoder_only:
            for name, parameter in vae.model.named_parameters():
                parameter.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        error, pull, count = torch.zeros(()), torch.zeros(()), 0
        sizes: dict[torch.Size, list[Tensor]] = {}
        for video in batch.videos:
            sizes.setdefault(video.shape, []).append(video)
        for videos in sizes.values():
            x = torch.stack(videos).to(self.vae.mean.device)
            latents = self._latents(x, generator)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            decoded = self.vae.from_raw(latents + (FINE_NOISE if self.decoder_only else NOISE) * noise)
            off = decoded.float() - x
            error = error + off.square().sum() + ABSOLUTE * off.abs().sum()
            pull = pull + latents.float().square().mean() * x.numel()
            count += x.numel()
        return (error + (0 if self.decoder_only else PULL) * pull) / count

    def _latents(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Latents of videos of one size; of a third, drawn anew, a random end is encoded as keyframes."""
        latents = self.vae.raw_latents(x)
        frames = latents.shape[2]
        chosen = (torch.rand(len(x), generator=generator) < KEYFRAME_ENDS).nonzero().flatten().tolist()
        if frames < 2 or not chosen:
            return latents
        end = torch.arange(frames) >= int(torch.randint(1, frames, (), generator=generator))
        known = pixel_frames(self.vae, end)
        at_end = self.vae.raw_latents(torch.stack([nearest_known(x[i], known) for i in chosen]))
        rows = list(latents.unbind(0))
        for i, latent in zip(chosen, at_end, strict=True):
            rows[i] = torch.where(end[:, None, None].to(latent.device), latent, rows[i])
        return torch.stack(rows)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        save_whole(model, folder)


def clips_of(source: Source, indices: Iterable[int]) -> Iterator[Tensor]:
    """Videos of a source, one at a time; files that cannot be decoded are left out."""
    for index in indices:
        try:
            yield source.load(index).video
        except MediaError:
            continue


@torch.no_grad()
def finish(vae: VideoVAE, videos: Iterable[Tensor], folder: Path) -> None:
    """Sets the mean and deviation of a trained VAE's latents to those of some videos, and saves it again."""
    vae.normalize_latents(torch.zeros(vae.channels), torch.ones(vae.channels))
    count, total, squares = 0, torch.zeros(vae.channels), torch.zeros(vae.channels)
    for video in videos:
        latent = vae.encode([video])[0].flatten(1).cpu()
        count, total, squares = count + latent.shape[1], total + latent.sum(1), squares + latent.square().sum(1)
    if count == 0:
        raise ValueError("train-vae: expected at least one clip that can be decoded, got none")
    mean = total / count
    vae.normalize_latents(mean, (squares / count - mean.square()).clamp(min=1e-6).sqrt())  # a channel may be constant
    save_whole(vae, folder)


@torch.no_grad()
def reconstruction_psnr(vae: VideoVAE, videos: Iterable[Tensor]) -> list[float]:
    """PSNR in dB of videos, each encoded and decoded."""
    return [psnr(vae.decode(vae.encode([video]))[0].cpu(), video) for video in videos]
