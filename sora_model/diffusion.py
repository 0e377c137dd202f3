"""Noise, loss, guidance and sampling with diffusers' schedulers, over latents of many sizes. Every task is a mask.

Each token frame of a sample has its own noise level. A frame that is given has level 0: it is fed clean, it is left out of
the loss, and sampling returns it as it came.

    text to video    nothing is given            image to video    frame 0 is
    extension        a prefix or a suffix is     joining           both ends are

The training loss draws the same masks, so one network learns all of them.

Flow matching follows FlowMatchEulerDiscreteScheduler: x_sigma = (1 - sigma) x + sigma noise, and the target is noise - x. The other
schedulers say what they want in `prediction_type`: the noise ("epsilon"), the velocity ("v_prediction") or x ("sample").
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conditioning import PackedText
from .dit import DiT

# (latents, timesteps, which samples of the batch these are) -> predictions
Denoiser = Callable[[list[Tensor], Tensor, Sequence[int]], list[Tensor]]
Callback = Callable[[int, Tensor, list[Tensor]], None]


@dataclass(frozen=True)
class TaskMix:
    """How often each task is trained, as relative weights. Images and clips too short for a task are trained as a simpler one.

    per_frame: share, from 0 to 1, of the clips whose every token frame has a noise level of its own (diffusion forcing: Chen et
    al., 2024), so that the model also learns from frames that are nearly, but not quite, given.
    """

    text_to_video: float = 0.7
    image_to_video: float = 0.1
    extension: float = 0.1
    joining: float = 0.1
    per_frame: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.text_to_video, self.image_to_video, self.extension, self.joining)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"TaskMix: expected weights >= 0, not all 0, got {weights}")
        if not 0 <= self.per_frame <= 1:
            raise ValueError(f"TaskMix: per_frame: expected a number from 0 to 1, got {self.per_frame}")

    def given(self, num_frames: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws a task and a mask for a clip: bool [num_frames], True where a frame is given. At least one is not.

        >>> TaskMix(0, 0, 0, joining=1).given(6)
        tensor([ True,  True, False, False, False,  True])
        """
        weights = torch.tensor([self.text_to_video, self.image_to_video, self.extension, self.joining], dtype=torch.float32)
        task = int(torch.multinomial(weights, 1, generator=generator))

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        head = tail = 0
        if task == 3 and num_frames > 2:
            head = between(1, num_frames - 2)
            tail = between(1, num_frames - 1 - head)
        elif task == 2 and num_frames > 1:
            head = between(1, num_frames - 1)
            if between(0, 1):
                head, tail = 0, head
        elif task > 0 and num_frames > 1:
            head = 1
        frame = torch.arange(num_frames)
        return (frame < head) | (frame >= num_frames - tail)


@dataclass(frozen=True)
class NoisedBatch:
    """A training step's input and target.

    latents: [C, T, H, W] each, noised where not given. timesteps: [B], or [F] where frames are given; see `DiT.forward`.
    targets: like latents. given: bool [T] each on the host, or None.
    """

    latents: list[Tensor]
    timesteps: Tensor
    targets: list[Tensor]
    given: list[Tensor] | None


def prediction_type(scheduler: Any) -> str:
    """What the scheduler wants predicted: "flow_prediction", "epsilon", "v_prediction" or "sample"."""
    return scheduler.config.get("prediction_type", "flow_prediction")


def add_noise(
    scheduler: Any,
    latents: Sequence[Tensor],
    *,
    given: Sequence[Tensor] | None = None,
    context: Sequence[Tensor] | None = None,
    per_frame: Sequence[bool] | None = None,
    patch_frames: int = 1,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    generator: torch.Generator | None = None,
) -> NoisedBatch:
    """Noises each latent to a random level of its own.

    >>> masks = [TaskMix().given(latent.shape[1]) for latent in latents]
    >>> batch = add_noise(scheduler, latents, given=masks)
    >>> diffusion_loss(dit(batch.latents, batch.timesteps, text), batch).backward()

    Args:
        scheduler: of diffusers. With flow matching sigma is logit-normal (Esser et al., 2024), then moved by the scheduler's
            `shift`; otherwise the timestep is uniform. Levels are spread evenly over the batch (Kingma et al., 2021).
        latents: [C, T, H, W] each.
        given: bool [T] each, True for the frames that stay clean; whole token frames.
        context: latents that given frames are taken from; default: `latents`.
        per_frame: for each latent, whether every token frame has a level of its own; default: none.
        patch_frames: pt.
        logit_mean, logit_std: of the logit of sigma.
        generator: on the host, so that a seed means the same on every device.
    """
    samples, device = len(latents), latents[0].device
    noise = [torch.randn(latent.shape, generator=generator).to(latent) for latent in latents]
    # One level from each of `samples` equal slices of (0, 1), in random order: less variance than independent draws.
    slices = torch.randperm(samples, generator=generator)
    levels = list(((slices + torch.rand(samples, generator=generator)) / samples).split(1))
    for i, own in enumerate(per_frame or ()):
        if own:
            levels[i] = torch.rand(latents[i].shape[1] // patch_frames, generator=generator)
    prediction, steps = prediction_type(scheduler), scheduler.config.num_train_timesteps
    if prediction == "flow_prediction":
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        normals = [torch.special.ndtri(level.clamp(1e-6, 1 - 1e-6)) for level in levels]
        sigmas = [torch.sigmoid(logit_mean + logit_std * normal) for normal in normals]
        timesteps = [(shift * sigma / (1 + (shift - 1) * sigma) * steps).to(device) for sigma in sigmas]
    else:
        timesteps = [(level * steps).long().to(device) for level in levels]
    pairs = [
        _noised(scheduler, prediction, x, n, t.repeat_interleave(patch_frames) if len(t) > 1 else t)
        for x, n, t in zip(latents, noise, timesteps, strict=True)
    ]
    noised, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    masks = _check_given(given, latents, patch_frames)
    if masks is not None:
        noised = _fill(noised, latents if context is None else context, masks)
    return NoisedBatch(noised, _frame_levels(timesteps, latents, masks, patch_frames), targets, masks)


def _noised(scheduler: Any, prediction: str, x: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """A latent [C, T, H, W] at timesteps [1] or [T], and what is to be predicted of it."""
    if prediction == "flow_prediction":
        sigma = (timesteps / scheduler.config.num_train_timesteps).to(x)[:, None, None]
        return torch.lerp(x, noise, sigma), noise - x
    # Frames as a batch: schedulers take one timestep for each of it.
    frames, noises, timesteps = x.transpose(0, 1), noise.transpose(0, 1), timesteps.expand(x.shape[1])
    noised = scheduler.add_noise(frames, noises, timesteps).transpose(0, 1)
    if prediction == "epsilon":
        return noised, noise
    if prediction == "v_prediction":
        return noised, scheduler.get_velocity(frames, noises, timesteps).transpose(0, 1)
    if prediction == "sample":
        return noised, x
    raise ValueError(f"add_noise: scheduler: expected a known prediction_type, got {prediction!r}")


def diffusion_loss(predictions: Sequence[Tensor], batch: NoisedBatch) -> Tensor:
    """Mean squared error over everything that was not given, in float32: a scalar.

    predictions: [C, T, H, W] each; channels past the target's (a learned variance) do not count.
    """
    total, count = torch.zeros((), device=batch.targets[0].device), 0
    for i, (prediction, target) in enumerate(zip(predictions, batch.targets, strict=True)):
        error = (prediction[: target.shape[0]].float() - target.float()).square()
        frames = target.shape[1]
        if batch.given is not None and batch.given[i].any():
            wanted = ~batch.given[i]
            frames = int(wanted.sum())
            error = error * wanted.to(error)[:, None, None]
        total = total + error.sum()
        count += target[:, 0].numel() * frames
    if count == 0:
        raise ValueError("diffusion_loss: batch.given: expected at least one frame to learn, got all given")
    return total / count


def guided(
    dit: DiT,
    *,
    text: PackedText | None = None,
    null_text: PackedText | None = None,
    labels: Tensor | None = None,
    frame_steps: Sequence[float] | None = None,
    guidance_scale: float = 1.0,
    guidance_from: float = 0.0,
) -> Denoiser:
    """Classifier-free guidance as a function of (latents, timesteps, samples): null + guidance_scale * (conditioned - null).

    Both predictions come from one packed batch of twice the samples. A guidance_scale of 1 needs the conditioned one alone, and
    so do timesteps below guidance_from: at low noise guidance adds little but its faults (Kynkäänniemi et al., 2024).

    Args:
        text: captions of the samples.
        null_text: what guidance leads away from: empty or negative captions. Default: no text at all.
        labels: int64 [B]; num_classes is their null.
        frame_steps: see `DiT.forward`.
        guidance_from: the lowest timestep with guidance.
    """
    channels, negative = dit.config.in_channels, null_text
    if text is not None and guidance_scale != 1 and negative is None:
        negative = PackedText.empty(text.num_samples, text.tokens.shape[1])

    def denoise(latents: list[Tensor], timesteps: Tensor, which: Sequence[int]) -> list[Tensor]:
        own_text = None if text is None else text.select(which)
        own_labels = None if labels is None else labels[list(which)]
        steps = None if frame_steps is None else [frame_steps[i] for i in which]
        if guidance_scale == 1 or timesteps.max() < guidance_from:
            return [x[:channels] for x in dit(latents, timesteps, own_text, own_labels, steps)]
        if own_text is not None and negative is not None:
            own_text = PackedText.concat([own_text, negative.select(which).to(own_text.tokens.device, own_text.tokens.dtype)])
        if own_labels is not None and dit.config.num_classes is not None:
            own_labels = torch.cat([own_labels, torch.full_like(own_labels, dit.config.num_classes)])
        both_steps = None if steps is None else [*steps, *steps]
        both = [x[:channels] for x in dit([*latents, *latents], timesteps.repeat(2), own_text, own_labels, both_steps)]
        pairs = zip(both[: len(latents)], both[len(latents) :], strict=True)
        return [torch.lerp(null, conditioned, guidance_scale) for conditioned, null in pairs]

    return denoise


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: Any,
    noise: Sequence[Tensor],
    *,
    num_inference_steps: int = 50,
    given: Sequence[tuple[Tensor, Tensor]] | None = None,
    begin: Sequence[tuple[Tensor, float] | None] | None = None,
    patch_frames: int = 1,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
) -> list[Tensor]:
    """Turns noise into latents, all samples together; what a sample becomes does not depend on the others.

    >>> noise = [torch.randn(3, 8, 32, 32), torch.randn(3, 1, 32, 48)]
    >>> latents = sample(guided(dit, text=text, guidance_scale=4), scheduler, noise, num_inference_steps=30)

    Each sample is stepped by its own copy of the scheduler, so that those that keep a history, threshold or draw noise treat it as
    if it were alone.

    Args:
        denoise: (latents, timesteps, samples) -> predictions; see `guided`.
        scheduler: any of diffusers' with set_timesteps and step.
        noise: [C, T, H, W] each, float32, on the model's device.
        num_inference_steps: steps.
        given: for each sample a mask, bool [T], of the frames to keep (whole token frames), and a latent [C, T, H, W] with them.
        begin: for each sample a latent to start from and a strength in (0, 1], or None: it is noised, and only that share of the
            steps is made (SDEdit: Meng et al., 2021). Samples join the batch where their steps begin.
        patch_frames: pt.
        generators: one per sample, for schedulers that draw noise.
        callback: called after each step with (step, timestep, latents).
    """
    masks = _check_given([mask for mask, _ in given], noise, patch_frames) if given else None
    clean = [latent for _, latent in given] if given else []
    device = noise[0].device
    steppers = [copy.deepcopy(scheduler) for _ in noise]
    for stepper in steppers:
        stepper.set_timesteps(num_inference_steps, device=device)
    options: list[dict[str, Any]] = [{} for _ in noise]
    if generators is not None and "generator" in inspect.signature(scheduler.step).parameters:
        options = [{"generator": generator} for generator in generators]
    latents = [x * getattr(stepper, "init_noise_sigma", 1.0) for x, stepper in zip(noise, steppers, strict=True)]
    times = steppers[0].timesteps
    starts = [0] * len(latents)
    for i, start in enumerate(begin or ()):
        if start is not None:
            starts[i], latents[i] = _begin(steppers[i], times, noise[i], *start)
    for step, t in enumerate(times):
        which = [i for i in range(len(latents)) if starts[i] <= step]
        if not which:
            continue
        inputs = [_scaled(steppers[i], latents[i], t) for i in which]
        kept = None if masks is None else [masks[i] for i in which]
        if kept is not None:
            inputs = _fill(inputs, [clean[i] for i in which], kept)
        levels = _frame_levels([t[None]] * len(which), inputs, kept, patch_frames)
        for i, prediction in zip(which, denoise(inputs, levels, which), strict=True):
            latents[i] = steppers[i].step(prediction.to(latents[i]), t, latents[i], **options[i], return_dict=False)[0]
        if callback is not None:
            callback(step, t, latents if masks is None else _fill(latents, clean, masks))
    return latents if masks is None else _fill(latents, clean, masks)


def _begin(scheduler: Any, times: Tensor, noise: Tensor, latent: Tensor, strength: float) -> tuple[int, Tensor]:
    """The first step to make, and the latent noised for it."""
    if not 0 < strength <= 1:
        raise ValueError(f"sample: begin: expected a strength above 0 and up to 1, got {strength}")
    order = getattr(scheduler, "order", 1)
    start = round((1 - strength) * len(times)) // order * order
    start = min(start, len(times) - 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    add = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
    latent, noise, t = latent.to(noise)[None], noise[None], times[start : start + 1]
    return start, (add(latent, t, noise) if hasattr(scheduler, "scale_noise") else add(latent, noise, t))[0]


def _scaled(scheduler: Any, latent: Tensor, t: Tensor) -> Tensor:
    """What the scheduler wants the model to see; flow matching has no such scaling."""
    return scheduler.scale_model_input(latent, t) if hasattr(scheduler, "scale_model_input") else latent


def _check_given(given: Sequence[Tensor] | None, latents: Sequence[Tensor], patch_frames: int) -> list[Tensor] | None:
    """The masks on the host; None if they give nothing, as one level per sample is cheaper than one per frame."""
    if given is None:
        return None
    for i, (mask, latent) in enumerate(zip(given, latents, strict=True)):
        if mask.dtype != torch.bool or mask.shape != latent.shape[1:2]:
            got = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"given[{i}]: expected torch.bool [{latent.shape[1]}], one per latent frame, got {got}")
        if not torch.equal(mask, mask[::patch_frames].repeat_interleave(patch_frames)):
            where = mask.nonzero().flatten().tolist()
            raise ValueError(f"given[{i}]: expected whole token frames of {patch_frames} latent frames, got frames {where}")
    masks = [mask.cpu() for mask in given]
    return masks if any(mask.any() for mask in masks) else None


def _fill(latents: Sequence[Tensor], clean: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """latents, with the given frames of `clean` in place."""
    return [
        torch.where(mask.to(x.device)[:, None, None], c.to(x), x) if mask.any() else x
        for x, c, mask in zip(latents, clean, masks, strict=True)
    ]


def _frame_levels(levels: Sequence[Tensor], latents: Sequence[Tensor], masks: Sequence[Tensor] | None, patch_frames: int) -> Tensor:
    """Levels of each sample, [1] or one per token frame -> [B] where one says all, else one per token frame [F], 0 where given."""
    if masks is None and all(len(level) == 1 for level in levels):
        return torch.cat(list(levels))
    rows = []
    for i, (level, latent) in enumerate(zip(levels, latents, strict=True)):
        row = level.expand(latent.shape[1] // patch_frames)
        rows.append(row if masks is None else row * ~masks[i][::patch_frames].to(row.device))
    return torch.cat(rows)
