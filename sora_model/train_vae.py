"""What a video VAE learns: to give back what it was given, from latents that stand some noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import save_whole
from .data import Batch, MediaError, Source
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
    count, total, squares = 0, torch.zeros(vae.channels), torch.zeros(vae.channels)
    for video in videos:
        latent = vae.encode([video])[0].flatten(1).cpu()  # normalised by what the VAE has so far
        count, total, squares = count + latent.shape[1], total + latent.sum(1), squares + latent.square().sum(1)
    if count == 0:
        raise ValueError("train-vae: expected at least one clip that can be decoded, got none")
    mean, std = total / count, (squares / count - (total / count) ** 2).sqrt()
    old_mean, old_std = vae.mean.flatten().cpu(), vae.std.flatten().cpu()
    vae.normalize_latents(old_mean + old_std * mean, old_std * std)
    save_whole(vae, folder)


@torch.no_grad()
def gives_back(vae: VideoVAE, videos: Iterable[Tensor]) -> list[float]:
    """PSNR in dB of videos, each encoded and decoded."""
    return [psnr(vae.decode(vae.encode([video]))[0].cpu(), video) for video in videos]
