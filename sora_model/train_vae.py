"""What a video VAE learns: to give back what it was given, from latents that stand some noise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import whole_folder
from .data import Batch, Source
from .vae import VideoVAE

NOISE = 0.05  # added to latents, so that neighbours in latent space decode to neighbours
PULL = 1e-4  # weight of the latents' mean square, so that noise stays large beside them


class VAEObjective:
    """Mean squared error of decoded videos, batched by size, and a weak pull of the latents towards 0."""

    def __init__(self, vae: VideoVAE) -> None:
        self.vae, self.model = vae, vae

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        error, pull, count = torch.zeros(()), torch.zeros(()), 0
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        sizes: dict[torch.Size, list[Tensor]] = {}
        for video in batch.videos:
            sizes.setdefault(video.shape, []).append(video)
        for videos in sizes.values():
            x = torch.stack(videos).to(self.vae.mean.device)
            latents, decoded = self.vae(x, NOISE)
            error = error + (decoded.float() - x).square().sum()
            pull = pull + latents.float().square().mean() * x.numel()
            count += x.numel()
        return (error + PULL * pull) / count

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        with whole_folder(folder) as partial:
            model.save_pretrained(partial)  # type: ignore[operator]


@torch.no_grad()
def normalize(vae: VideoVAE, videos: list[Tensor]) -> None:
    """Sets the latents' mean and deviation to those of some videos."""
    latents = [vae._encode(video[None])[0].flatten(1) for video in videos]
    every = torch.cat(latents, dim=1)
    vae.normalize_latents(every.mean(1), every.std(1))


@torch.no_grad()
def psnr(vae: VideoVAE, videos: list[Tensor]) -> list[float]:
    """Peak signal-to-noise ratio of each video encoded and decoded, in dB, of a range of 2."""
    decoded = vae.decode(vae.encode(videos))
    return [10 * torch.log10(4 / (y - x).square().mean()).item() for x, y in zip(videos, decoded, strict=True)]


def finish(vae: VideoVAE, videos: list[Tensor], folder: Path) -> None:
    """Normalises a trained VAE by some videos and saves it again."""
    normalize(vae, videos)
    with whole_folder(folder) as partial:
        vae.save_pretrained(partial)


def held_out_psnr(vae: VideoVAE, source: Source, indices: Iterable[int]) -> list[float]:
    """PSNR of clips of a source, one at a time."""
    device = vae.mean.device
    return [psnr(vae, [source.load(index).video.to(device)])[0] for index in indices]
