"""What a video VAE learns: to give back what it was given, from latents that stand some noise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import save_whole
from .data import Batch, Source
from .vae import VideoVAE, psnr

NOISE = 0.05  # added to latents, so that neighbours in latent space decode to neighbours
PULL = 1e-4  # weight of the latents' mean square, so that noise stays large beside them


class VAEObjective:
    """Mean squared error of decoded videos, batched by size, and a weak pull of the latents towards 0."""

    def __init__(self, vae: VideoVAE) -> None:
        self.vae, self.model = vae, vae

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        error, pull, count = torch.zeros(()), torch.zeros(()), 0
        sizes: dict[torch.Size, list[Tensor]] = {}
        for video in batch.videos:
            sizes.setdefault(video.shape, []).append(video)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for videos in sizes.values():
                x = torch.stack(videos).to(self.vae.mean.device)
                latents, decoded = self.vae(x, NOISE)
                error = error + (decoded.float() - x).square().sum()
                pull = pull + latents.float().square().mean() * x.numel()
                count += x.numel()
        return (error + PULL * pull) / count

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        save_whole(model, folder)


@torch.no_grad()
def normalize(vae: VideoVAE, videos: list[Tensor]) -> None:
    """Sets the latents' mean and deviation to those of some videos."""
    raw = vae.encode(videos)  # normalised by what the VAE has so far
    every = torch.cat([latent.flatten(1) for latent in raw], dim=1)
    mean, std = vae.mean.flatten(), vae.std.flatten()
    vae.normalize_latents(mean + std * every.mean(1), std * every.std(1))


def finish(vae: VideoVAE, videos: list[Tensor], folder: Path) -> None:
    """Normalises a trained VAE by some videos and saves it again."""
    normalize(vae, videos)
    save_whole(vae, folder)


@torch.no_grad()
def gives_back(vae: VideoVAE, source: Source, indices: Iterable[int]) -> list[float]:
    """PSNR in dB of clips of a source, each encoded and decoded."""
    device = vae.mean.device
    videos = (source.load(index).video.to(device) for index in indices)
    return [psnr(vae.decode(vae.encode([video]))[0], video) for video in videos]
