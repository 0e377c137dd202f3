"""The recipe of a captioner: `CaptionerRecipe`, `train_captioner`."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ...caption.captioner import LEAST_VOCABULARY, Captioner, CaptionerConfig, train_tokenizer
from ...pipeline.pipeline import SoraPipeline
from ...storage.files import check_replaceable, settle
from ...storage.weights import read_index
from ..captioner import CaptionObjective
from ..config import SettingError, of_setting
from ..resume import STATE, check_idle
from ..sources import Clips, Wanted
from ..trainer import Trainer
from .common import Preparation, Run, RunSettings, quiet

OWNER = "CaptionerRecipe"


@dataclass(frozen=True)
class CaptionerRecipe:
    """What captioner to train.

    checkpoint: of a pipeline, which gets the captioner. frames: latent frames seen of a clip, evenly spread; 0 sees tubelets of
    all. vocabulary: tokens that captions are written in: each byte, 4 marks, and those learned from captions. longest: tokens of
    the longest caption.
    """

    checkpoint: Path
    frames: int = 4
    vocabulary: int = 512
    longest: int = 128

    def __post_init__(self) -> None:
        for name, least in (("frames", 0), ("vocabulary", LEAST_VOCABULARY), ("longest", 2)):
            if getattr(self, name) < least:
                raise SettingError(OWNER, name, f"expected at least {least}, got {getattr(self, name)}")

    def untrained(self, pipeline: SoraPipeline, clips: Clips) -> Captioner:
        """A captioner of the pipeline's latents, its words learned from the clips' captions."""
        tokenizer = train_tokenizer(clips.captions(), self.vocabulary)
        config = CaptionerConfig(
            in_channels=pipeline.codec.channels,
            patch_size=pipeline.dit.config.patch_size,
            num_frames=self.frames or None,
            vocabulary=len(tokenizer),
            longest=self.longest,
        )
        return Captioner(config, tokenizer)


def train_captioner(out: str | Path, recipe: CaptionerRecipe, run: RunSettings, show: Run = quiet) -> Trainer:
    """Trains a captioner on the latents of a pipeline's VAE, and puts it into the pipeline's checkpoint."""
    settle(recipe.checkpoint)
    check_replaceable(recipe.checkpoint)
    prepared = Preparation(out, run, "captioner", vars(recipe))
    _check_run_ended(Path(recipe.checkpoint).parent)
    with of_setting(OWNER, "checkpoint"):
        # The captioner goes in there, and another library's pipeline has no place for it.
        read_index(Path(recipe.checkpoint), OWNER)
        pipeline = SoraPipeline.from_pretrained(recipe.checkpoint, device=prepared.device)
    budget = prepared.budget(pipeline.codec, pipeline.dit.config.patch_size, frames=recipe.frames or None)
    clips = prepared.clips(Wanted("captioner", pipeline.unit, pipeline.timing, budget))
    before = prepared.parts()
    if before is not None:
        captioner = Captioner.from_pretrained(before)
    else:
        torch.manual_seed(run.config.seed)
        captioner = recipe.untrained(pipeline, clips)
    captioner.to(prepared.device)
    # Words learned anew from captions that have changed since would give the weights another meaning.
    words = json.dumps(captioner.tokenizer.get_vocab(), sort_keys=True)
    prepared.settings["words learned from the captions"] = f"{zlib.crc32(words.encode()):08x}"
    trainer = prepared.train(CaptionObjective(captioner, pipeline.codec), clips, budget, show)
    if trainer.accelerator.is_main_process:
        latest = SoraPipeline.from_pretrained(recipe.checkpoint)  # it may have been trained further meanwhile
        latest.replaced(captioner=Captioner.from_pretrained(prepared.out / "checkpoint")).save_pretrained(recipe.checkpoint)
    return trainer


def _check_run_ended(folder: Path) -> None:
    """A run that goes on would save the parts that it began with over the captioner."""
    if not (folder / STATE).is_file():
        return
    try:
        check_idle(folder)
    except SettingError:
        raise SettingError(OWNER, "checkpoint", f"expected the checkpoint of a run that has ended, got that of {folder}") from None
