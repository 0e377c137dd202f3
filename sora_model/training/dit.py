"""What a pipeline learns: to remove noise from every frame that is not clean, at every size and for every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..codec.codec import latent_frames, nearest_known, pixel_frames
from ..data import Batch, Sample
from ..diffusion.loss import diffusion_loss
from ..diffusion.noise import add_noise
from ..diffusion.task_mix import TaskMix
from ..model.conditioning import drop_captions
from ..model.dit import DiT
from ..model.experts import Experts
from ..model.patches import uniform_frames
from ..pipeline.keyframes import TrainedKeyframes
from ..pipeline.pipeline import SoraPipeline

SMALLEST_SIGMA = 0.05  # below it, errors of a predicted clean latent count no more than there (JiT: Li and He, 2025)


def smallest_sigma(dit: DiT) -> float:
    """What `diffusion_loss` takes of that name: only a predicted clean latent becomes a velocity by a division by sigma."""
    return SMALLEST_SIGMA if dit.config.prediction == "clean" else 0.0


class CleanMask(NamedTuple):
    """bool [T'], the latent frames that are clean, and whether the clip itself says so, the same in every epoch."""

    mask: Tensor
    of_lesson: bool


class DiffusionObjective:
    """The diffusion loss of a pipeline's transformer, and of its text encoder where that can be trained.

    Args:
        pipeline: what to train, on the device to train on; its VAE stays as it is.
        tasks: how often each task is trained; a clip that teaches one itself comes with a mask.
        detailed: share of the samples shown with their long caption, where they have one.
        caption_dropout: share of captions emptied, for classifier-free guidance.
        num_frames: n_t, to learn from so many latent frames of a clip, evenly spread (`patches.uniform_frames`), each cut as in
            ViT; default: all of them, cut into tubelets.
        keep_latents: keep every clip's latent, by its index in the source, instead of encoding it again: for sources that give
            the same clip in every epoch.
    """

    def __init__(
        self,
        pipeline: SoraPipeline,
        *,
        tasks: TaskMix | None = None,
        detailed: float = 0.0,
        caption_dropout: float = 0.1,
        num_frames: int | None = None,
        keep_latents: bool = False,
    ) -> None:
        if isinstance(pipeline.dit, Experts):
            raise ValueError("DiffusionObjective: pipeline: expected one transformer, got Experts (train each by itself)")
        if pipeline.dit.config.condition_channels:
            raise ValueError("DiffusionObjective: pipeline: expected a transformer without condition_channels, got one with")
        if not 0 <= detailed <= 1:
            raise ValueError(f"DiffusionObjective: detailed: expected a share from 0 to 1, got {detailed}")
        self.pipeline, self.tasks = pipeline, tasks or TaskMix()
        if num_frames is not None and pipeline.dit.config.patch_size[0] != 1:
            got = pipeline.dit.config.patch_size
            raise ValueError(f"DiffusionObjective: num_frames: expected a model with patches (1, ph, pw), got {got}")
        if num_frames is not None and pipeline.codec.compression[0] > 1:
            got = pipeline.codec.compression
            raise ValueError(f"DiffusionObjective: num_frames: expected a codec that leaves time as it is, got compression {got}")
        self.detailed, self.caption_dropout, self.num_frames = detailed, caption_dropout, num_frames
        self.model = nn.ModuleDict({"dit": pipeline.dit})
        if isinstance(pipeline.text_encoder, nn.Module) and any(p.requires_grad for p in pipeline.text_encoder.parameters()):
            self.model["text_encoder"] = pipeline.text_encoder
        self._latents: dict[int, Tensor] | None = {} if keep_latents else None
        self._contexts: dict[int, Tensor] = {}  # of clips whose mask is the same in every epoch

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        pt, scheduler = self.pipeline.dit.config.patch_size[0], self.pipeline.scheduler
        with torch.no_grad(), torch.autocast(self.pipeline.dit.final.weight.device.type, enabled=False):
            latents = self._encode(batch)
            masks = [self._lesson_mask(sample) for sample in batch.samples]
            steps = None
            if self.num_frames is not None:
                masks = [None if mask is None else uniform_frames(mask[None], self.num_frames)[0][0] for mask in masks]
                latents, steps = map(list, zip(*(uniform_frames(x, self.num_frames) for x in latents), strict=True))
            clean = [self._clean_mask(mask, x, generator) for mask, x in zip(masks, latents, strict=True)]
            context = self._context(batch, latents, clean)
            per_frame = (torch.rand(len(latents), generator=generator) < self.tasks.per_frame).tolist()
            noised = add_noise(
                scheduler, latents, clean_masks=[one.mask for one in clean], context=context, per_frame=per_frame, patch_frames=pt,
                generator=generator,
            )  # fmt: skip
        long = (torch.rand(len(latents), generator=generator) < self.detailed).tolist()
        captions = [
            sample.detailed or sample.caption if d else sample.caption for sample, d in zip(batch.samples, long, strict=True)
        ]
        text = self.pipeline.text_encoder(drop_captions(captions, self.caption_dropout, generator))
        predictions = self.pipeline.dit(noised.latents, noised.timesteps, text, frame_steps=steps)
        return diffusion_loss(predictions, noised, smallest_sigma=smallest_sigma(self.pipeline.dit))

    def averaged(self, model: Any) -> SoraPipeline:
        """The pipeline with other weights, which have learned all tasks."""
        return self.pipeline.replaced(**dict(model.named_children()), trained_keyframes=TrainedKeyframes.ANY)

    def save(self, model: nn.Module, folder: Path) -> None:
        self.averaged(model).save_pretrained(folder)

    def _context(self, batch: Batch, latents: list[Tensor], clean: list[CleanMask]) -> list[Tensor]:
        """The latents that clean frames are taken from: as the pipeline encodes them, from the clean frames alone.

        Latents of a clip's start do not depend on what follows. Those of its end depend on what a causal VAE saw before it.
        """
        codec, context = self.pipeline.codec, list(latents)
        ends = [i for i, (mask, _) in enumerate(clean) if mask.any() and not mask[: int(mask.sum())].all()]
        if codec.compression[0] == 1 or not ends:
            return context
        device = latents[0].device
        new = [i for i in ends if batch.indices[i] not in self._contexts]
        known = [nearest_known(batch.videos[i], pixel_frames(codec, clean[i].mask)).to(device) for i in new]
        encoded = dict(zip(new, codec.encode(known), strict=True))
        if self._latents is not None:
            encoded = {i: x.half() for i, x in encoded.items()}
            self._contexts |= {batch.indices[i]: x for i, x in encoded.items() if clean[i].of_lesson}
        for i in ends:
            context[i] = (encoded[i] if i in encoded else self._contexts[batch.indices[i]]).float()
        return context

    def _encode(self, batch: Batch) -> list[Tensor]:
        device, kept = self.pipeline.dit.final.weight.device, self._latents
        new = [i for i, index in enumerate(batch.indices) if kept is None or index not in kept]
        encoded = dict(zip(new, self.pipeline.codec.encode([batch.videos[i].to(device) for i in new]), strict=True))
        if kept is None:
            return list(encoded.values())
        kept |= {batch.indices[i]: latent.half() for i, latent in encoded.items()}
        return [kept[index].float() for index in batch.indices]

    def _lesson_mask(self, sample: Sample) -> Tensor | None:
        """Mask [T'] of the latent frames that are clean, if the clip itself teaches a task."""
        return None if sample.clean_mask is None else latent_frames(self.pipeline.codec, sample.clean_mask)

    def _clean_mask(self, lesson: Tensor | None, latent: Tensor, generator: torch.Generator) -> CleanMask:
        """The clip's own mask, if something is left to learn with it, or a drawn one."""
        if lesson is not None and not lesson.all():
            return CleanMask(lesson, True)
        pt = self.pipeline.dit.config.patch_size[0]
        return CleanMask(self.tasks.draw_mask(latent.shape[1] // pt, generator).repeat_interleave(pt), False)
