"""The recipe of a video transformer: `DiTRecipe`, `train_dit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...codec.vae import VideoVAE
from ...diffusion.task_mix import TaskMix
from ...model.config import PRESETS
from ...pipeline.pipeline import SoraPipeline
from ...sizes import Size
from ...text.pretrained import PretrainedEncoder
from ..config import SettingError, check_above, check_shares, of_setting
from ..dit import DiffusionObjective
from ..sources import Wanted, refuse
from ..trainer import Trainer
from .common import Preparation, Run, RunSettings, quiet

PREDICTIONS = ("flow", "epsilon", "v")
OWNER = "DiTRecipe"


@dataclass(frozen=True)
class DiTRecipe:
    """What transformer to train, and what on.

    start: checkpoint of a pipeline to start from, with all its parts; the five settings after it are None then. model: a preset;
    default: "tiny". vae: folder of a VAE; default: pixels. text_encoder: folder of a T5, UMT5 or CLIP; default: words, learned
    with the model. patch: (pt, ph, pw); default: (1, 8, 8) of pixels, (1, 2, 2) of latents. prediction: one of PREDICTIONS;
    default: "flow". detailed: share of the samples with their long caption. frames: latent frames seen of a clip, evenly spread;
    default: all. per_frame: share of the samples with a noise level for each frame. checkpointing: compute activations again in
    the backward instead of keeping them.
    """

    start: Path | None = None
    model: str | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    patch: Size | None = None
    prediction: str | None = None
    detailed: float = 0.5
    frames: int | None = None
    per_frame: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        refuse("--start, whose checkpoint has its own", self.parts if self.start else {})
        for name, known in (("model", tuple(PRESETS)), ("prediction", PREDICTIONS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise SettingError(OWNER, name, f"expected one of {', '.join(known)}, got {value!r}")
        check_above(OWNER, {"frames": self.frames})
        check_shares(OWNER, {"detailed": self.detailed, "per_frame": self.per_frame})
        if self.patch is not None and self.patch[0] > 1 and self.frames is not None:
            raise SettingError(OWNER, "frames", f"expected none with a --patch of several frames, got {self.frames}")

    @property
    def parts(self) -> dict[str, str | Path | Size | None]:
        """What an untrained pipeline is made of."""
        names = ("model", "vae", "text_encoder", "patch", "prediction")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> dict[str, str | Path | int | None]:
        """What must be the same where a run is resumed."""
        parts = self.parts
        if self.start is None:
            parts |= {"model": self.model or "tiny", "prediction": self.prediction or "flow"}
        patch = self.patch and "x".join(map(str, self.patch))
        return {"start": self.start, "frames": self.frames, **parts, "patch": patch}  # type: ignore[dict-item]

    def untrained(self, seed: int, device: str) -> SoraPipeline:
        """A pipeline whose transformer is to be trained, its VAE and text encoder from folders, if any are given."""
        codec = encoder = None
        if self.vae is not None:
            with of_setting(OWNER, "vae"):
                codec = VideoVAE.from_pretrained(self.vae).to(device)
        if self.text_encoder is not None:
            with of_setting(OWNER, "text_encoder"):
                encoder = PretrainedEncoder.from_pretrained(self.text_encoder).to(device)
        return SoraPipeline.from_preset(
            self.model or "tiny",
            patch=self.patch or ((1, 8, 8) if codec is None else (1, 2, 2)),
            codec=codec,
            text_encoder=encoder,
            prediction=self.prediction or "flow",
            seed=seed,
            device=device,
        )


def train_dit(out: str | Path, recipe: DiTRecipe, run: RunSettings, show: Run = quiet) -> Trainer:
    """Trains a video transformer, from nothing or from a checkpoint; out/checkpoint is a pipeline."""
    prepared = Preparation(out, run, "dit", recipe.settings)
    before = prepared.parts(recipe.start)
    if before is None:
        pipeline = recipe.untrained(run.config.seed, prepared.device)
    else:
        with of_setting(OWNER, "start" if before == recipe.start else "resume"):
            pipeline = SoraPipeline.from_pretrained(before, device=prepared.device)
    config = pipeline.dit.config
    what = "a VAE that compresses time, or patches of several frames"
    if recipe.frames is not None and (config.patch_size[0] > 1 or pipeline.codec.compression[0] > 1):
        raise SettingError(OWNER, "frames", f"expected none with {what}, got {recipe.frames}")
    pipeline.dit.gradient_checkpointing = recipe.checkpointing
    width = config.hidden_size
    budget = prepared.budget(pipeline.codec, config.patch_size, frames=recipe.frames, attention_width=width)
    clips = prepared.clips(Wanted("dit", pipeline.unit, pipeline.timing, budget))
    if before is None:
        pipeline.size = clips.size
    objective = DiffusionObjective(
        pipeline,
        tasks=TaskMix(per_frame=recipe.per_frame),
        detailed=recipe.detailed,
        num_frames=recipe.frames,
        keep_latents=clips.repeated,
    )
    return prepared.train(objective, clips, budget, show)
