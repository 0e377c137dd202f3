"""The recipe of a video VAE: `VAERecipe`, `train_vae`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ...codec.vae import VideoVAE
from ...sizes import Timing
from ..config import SettingError, check_above, of_setting
from ..sources import Wanted, refuse
from ..trainer import Trainer
from ..vae import VAEObjective, clips_of, finish, reconstruction_psnr
from .common import Preparation, Run, RunSettings, quiet

OWNER, SHOWN = "VAERecipe", 64  # clips that a trained VAE is measured on
FRAMES = 13  # the most that are taken of a file: a VAE sees no further


@dataclass(frozen=True)
class VAERecipe:
    """What VAE to train.

    start: folder of a VAE to start from; the three settings after `decoder_only` are None then. decoder_only: leave the latents as
    they are. channels: of a latent; default: 16. temporal: frames per latent frame after the first, 4, the default, or 8. spatial:
    pixels per latent position along height and width, 8, the default, or 16.
    """

    start: Path | None = None
    decoder_only: bool = False
    channels: int | None = None
    temporal: int | None = None
    spatial: int | None = None

    def __post_init__(self) -> None:
        parts = {"channels": self.channels, "temporal": self.temporal, "spatial": self.spatial}
        refuse("--start, whose checkpoint has its own", parts if self.start else {})
        check_above(OWNER, {"channels": self.channels})
        for name, known in (("temporal", (4, 8)), ("spatial", (8, 16))):
            if parts[name] not in (None, *known):
                raise SettingError(OWNER, name, f"expected {known[0]} or {known[1]}, got {parts[name]}")

    @property
    def settings(self) -> dict[str, Path | int | None]:
        """What must be the same where a run is resumed."""
        channels, temporal, spatial = (None,) * 3 if self.start else self.sizes
        return {
            "start": self.start, "decoder_only": self.decoder_only, "channels": channels, "temporal": temporal, "spatial": spatial
        }  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels, temporal and spatial compression of a new one."""
        return self.channels or 16, self.temporal or 4, self.spatial or 8


class Reconstruction(NamedTuple):
    """How well a VAE gives back clips: PSNR in dB of each, and whether training saw them."""

    psnr: list[float]
    seen: bool


def train_vae(out: str | Path, recipe: VAERecipe, run: RunSettings, show: Run = quiet) -> tuple[Trainer, Reconstruction | None]:
    """Trains a VAE; out/checkpoint is one of diffusers. Only the main process measures it."""
    prepared = Preparation(out, run, "vae", recipe.settings)
    before = prepared.parts(recipe.start)
    torch.manual_seed(run.config.seed)
    if before is None:
        channels, temporal, spatial = recipe.sizes
        vae = VideoVAE.small(latent_channels=channels, temporal=temporal, spatial=spatial)
    else:
        with of_setting(OWNER, "start" if before == recipe.start else "resume"):
            vae = VideoVAE.from_pretrained(before)
    vae.to(prepared.device)
    budget = prepared.budget(vae, (1, 1, 1))
    wanted = Wanted("vae", vae.compression, Timing(1, vae.compression[0]), budget, frames=FRAMES, captions=False)
    clips = prepared.clips(wanted)
    trainer = prepared.train(VAEObjective(vae, decoder_only=recipe.decoder_only), clips, budget, show)
    if not trainer.accelerator.is_main_process:
        return trainer, None
    trained = VideoVAE.from_pretrained(prepared.out / "checkpoint").to(prepared.device)
    learned = trainer.sampler.usable[:SHOWN] or range(SHOWN)
    if not recipe.decoder_only:
        finish(trained, clips_of(clips.source, learned), prepared.out / "checkpoint")
    shown = reconstruction_psnr(trained, clips_of(clips.source, clips.unseen or learned))
    return trainer, Reconstruction(shown, seen=not clips.unseen)
