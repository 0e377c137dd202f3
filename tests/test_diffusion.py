"""Noising, loss, guidance and sampling: right for diffusers' schedulers, for every task, and alone as packed."""

from collections.abc import Sequence
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from test_dit import CAPTIONS, SIZES, awake, latents_of, small
from torch import Tensor

from sora_model import SoraPipeline
from sora_model.diffusion.guidance import guided
from sora_model.diffusion.loss import diffusion_loss
from sora_model.diffusion.masks import CleanFrames
from sora_model.diffusion.noise import add_noise
from sora_model.diffusion.sampling import Init, sample
from sora_model.diffusion.schedulers import FLOW, flow_scheduler
from sora_model.diffusion.task_mix import TaskMix
from sora_model.model.conditioning import PackedText
from sora_model.model.config import DiTConfig
from sora_model.model.dit import DiT
from sora_model.text.words import WordEncoder

SHAPES = [(4, *size) for size in SIZES]
MASKS = [torch.tensor(mask) for mask in ([1, 0, 0, 1], [0], [1, 0], [1, 1, 1, 0, 0, 0])]
MASKS = [mask.bool() for mask in MASKS]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flow_matching_pairs() -> None:
    clean = latents_of(SIZES)
    batch = add_noise(FlowMatchEulerDiscreteScheduler(), clean, generator=seeded())
    assert batch.timesteps.shape == (4,)
    for x, noised, target, t in zip(clean, batch.latents, batch.targets, batch.timesteps, strict=True):
        noise = target + x
        torch.testing.assert_close(noised, (1 - t / 1000) * x + t / 1000 * noise)
        assert abs(noise.std() - 1) < 0.15
    # A straight line: one Euler step of diffusers' own scheduler along the target ends at the clean latent.
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[batch.timesteps[0].item() / 1000])
    end = scheduler.step(batch.targets[0], scheduler.timesteps[0], batch.latents[0]).prev_sample
    torch.testing.assert_close(end, clean[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["shift", "flow_shift"])
def test_sigmas_are_logit_normal_and_shifted(kind: str, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if kind == "flow_shift":
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        scheduler = diffusers.UniPCMultistepScheduler(**flow, flow_shift=shift)
    batch = add_noise(scheduler, [torch.zeros(1, 1, 1, 1)] * 4000, logit_mean=0.5, logit_std=0.8, generator=seeded())
    sigma = batch.timesteps / 1000
    logit = torch.logit(sigma / (shift - (shift - 1) * sigma))  # the shift undone
    assert abs(logit.mean() - 0.5) < 0.01
    assert abs(logit.std() - 0.8) < 0.01


def test_levels_are_spread_over_the_batch() -> None:
    batch = add_noise(DDPMScheduler(), [torch.zeros(1, 1, 1, 1)] * 10, generator=seeded())
    assert sorted(t // 100 for t in batch.timesteps.tolist()) == list(range(10))
    assert batch.timesteps.tolist() != sorted(batch.timesteps.tolist())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm_pairs_are_solved_by_ddim(prediction: str) -> None:
    """A model that predicts the target exactly takes DDIM back to the clean latent in one step."""
    clean = latents_of(SIZES)
    config = {"prediction_type": prediction, "clip_sample": False}
    batch = add_noise(DDPMScheduler(**config), clean, generator=seeded())
    assert batch.timesteps.dtype == torch.int64
    for x, noised, target, t in zip(clean, batch.latents, batch.targets, batch.timesteps, strict=True):
        scheduler = DDIMScheduler(**config)
        scheduler.set_timesteps(1)
        back = scheduler.step(target, t, noised).pred_original_sample
        torch.testing.assert_close(back, x, atol=1e-2, rtol=0)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler()], ids=["flow", "ddpm"])
def test_given_frames_are_clean_and_at_level_0(scheduler) -> None:
    clean = latents_of(SIZES)
    batch = add_noise(scheduler, clean, clean_masks=MASKS, generator=seeded())
    assert batch.timesteps.shape == (sum(t for t, _, _ in SIZES),)
    assert torch.equal(batch.timesteps == 0, torch.cat(MASKS))
    for x, noised, mask in zip(clean, batch.latents, MASKS, strict=True):
        assert torch.equal(noised[:, mask], x[:, mask])
        assert (noised[:, ~mask] - x[:, ~mask]).abs().amax((0, 2, 3)).min() > 0.01
    nothing = add_noise(scheduler, clean, clean_masks=[torch.zeros(t, dtype=torch.bool) for t, _, _ in SIZES])
    assert nothing.timesteps.shape == (4,)  # rows per sample: cheaper, and the same


def test_loss_leaves_out_what_was_given() -> None:
    clean = latents_of(SIZES)
    batch = add_noise(FlowMatchEulerDiscreteScheduler(), clean, clean_masks=MASKS, generator=seeded())
    predictions = [torch.randn(8, *x.shape[1:], requires_grad=True) for x in clean]  # four channels of variance too
    loss = diffusion_loss(predictions, batch)
    errors = [(p[:4] - target)[:, ~mask].flatten() for p, target, mask in zip(predictions, batch.targets, MASKS, strict=True)]
    torch.testing.assert_close(loss, torch.cat(errors).square().mean())
    loss.backward()
    for prediction, mask in zip(predictions, MASKS, strict=True):
        assert not prediction.grad[:, mask].any()
        assert prediction.grad[:4][:, ~mask].all()
    everything = replace(batch, clean_masks=[torch.ones_like(mask) for mask in MASKS])
    with pytest.raises(ValueError, match="only clean ones"):
        diffusion_loss(predictions, everything)


def test_masks_must_fill_token_frames() -> None:
    clean = latents_of([(4, 8, 8)])
    scheduler = FlowMatchEulerDiscreteScheduler()
    batch = add_noise(scheduler, clean, clean_masks=[torch.tensor([True, True, False, False])], patch_frames=2)
    assert (batch.timesteps == 0).tolist() == [True, False]
    with pytest.raises(ValueError, match=r"clean_masks\[0\]: expected whole token frames of 2 latent frames, got frames \[0\]"):
        add_noise(scheduler, clean, clean_masks=[torch.tensor([True, False, False, False])], patch_frames=2)
    with pytest.raises(ValueError, match=r"clean_masks\[0\]: expected torch.bool \[4\]"):
        add_noise(scheduler, clean, clean_masks=[torch.zeros(4)])


def test_task_mix() -> None:
    generator = seeded()
    masks = {task: [mix.draw_mask(6, generator) for _ in range(200)] for task, mix in {
        "text": TaskMix(1, 0, 0, 0), "image": TaskMix(0, 1, 0, 0), "extension": TaskMix(0, 0, 1, 0), "joining": TaskMix(0, 0, 0, 1)
    }.items()}  # fmt: skip
    assert not any(mask.any() for mask in masks["text"])
    assert all(mask.tolist() == [True] + [False] * 5 for mask in masks["image"])
    prefix = [mask for mask in masks["extension"] if mask[0]]
    suffix = [mask for mask in masks["extension"] if not mask[0]]
    assert {int(mask.sum()) for mask in prefix} == {int(mask.sum()) for mask in suffix} == {1, 2, 3, 4, 5}
    assert all(mask.int().diff().abs().sum() == 1 for mask in masks["extension"])
    assert all(mask[0] and mask[-1] and not mask.all() and mask.int().diff().abs().sum() == 2 for mask in masks["joining"])
    assert not TaskMix(0, 1, 1, 1).draw_mask(1).any()  # an image
    assert all(TaskMix(0, 1, 1, 1).draw_mask(2, generator).sum() == 1 for _ in range(20))
    drawn = [TaskMix(3, 1, 0, 0).draw_mask(4, generator).any().item() for _ in range(1000)]
    assert 200 < sum(drawn) < 300
    with pytest.raises(ValueError, match="expected weights >= 0"):
        TaskMix(0, 0, 0, 0)


def model() -> tuple[DiT, WordEncoder]:
    torch.manual_seed(0)
    return awake(DiT(small())), awake(WordEncoder(32))


@pytest.mark.parametrize("per_frame", [False, True], ids=["per sample", "per frame"])
def test_guidance(per_frame: bool) -> None:
    dit, encoder = model()
    text, null, latents = encoder(CAPTIONS), encoder([""] * 4), latents_of(SIZES)
    levels = torch.rand(sum(t for t, _, _ in SIZES) if per_frame else 4) * 1000
    conditioned, unconditioned = dit(latents, levels, text), dit(latents, levels, null)
    for scale in (0.0, 1.0, 4.0):
        outputs = guided(dit, text=text, null_text=null, guidance_scale=scale)(latents, levels, range(4))
        for output, c, u in zip(outputs, conditioned, unconditioned, strict=True):
            torch.testing.assert_close(output, u + scale * (c - u), atol=1e-4, rtol=0)
    limited = guided(dit, text=text, null_text=null, guidance_scale=4.0, guidance_from=levels.max().item() + 1)
    for output, c in zip(limited(latents, levels, range(4)), conditioned, strict=True):
        torch.testing.assert_close(output, c, atol=1e-4, rtol=0)
    default = guided(dit, text=text, guidance_scale=0.0)(latents, levels, range(4))
    torch.testing.assert_close(default[0], dit(latents, levels, PackedText.empty(4, 32))[0], atol=1e-5, rtol=0)


def test_guidance_of_classes_drops_the_variance() -> None:
    config = DiTConfig.from_dict({**small(text_dim=None, num_classes=10, learn_sigma=True).to_dict()})
    dit, latents, labels = awake(DiT(config)), latents_of(SIZES), torch.tensor([1, 2, 3, 4])
    levels = torch.full((4,), 100.0)
    outputs = guided(dit, labels=labels, guidance_scale=2.0)(latents, levels, range(4))
    conditioned, null = dit(latents, levels, labels=labels), dit(latents, levels, labels=torch.full((4,), 10))
    for output, c, u in zip(outputs, conditioned, null, strict=True):
        torch.testing.assert_close(output, (2 * c - u)[:4], atol=1e-4, rtol=0)


def noise_of(shapes: Sequence[Sequence[int]], seeds: Sequence[int]) -> tuple[list[Tensor], list[torch.Generator]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.randn(tuple(shape), generator=g) for shape, g in zip(shapes, generators, strict=True)], generators


SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, stochastic": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "ddim": DDIMScheduler(),
    "ddim, thresholding": DDIMScheduler(thresholding=True),
    "ddpm": DDPMScheduler(),
    "euler": diffusers.EulerDiscreteScheduler(),
    "dpm++": diffusers.DPMSolverMultistepScheduler(),
    "unipc, flow": diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "heun": diffusers.HeunDiscreteScheduler(),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_packed_sampling_equals_sampling_alone(scheduler) -> None:
    """Mixed tasks, mixed sizes, guidance: each sample is what it would have been alone, and given frames stay as they are."""
    dit, encoder = model()
    clean = latents_of(SIZES)

    def run(which: list[int], masks: list[Tensor]) -> list[Tensor]:
        noise, generators = noise_of([SHAPES[i] for i in which], seeds=[10 + i for i in which])
        text, null = encoder([CAPTIONS[i] for i in which]), encoder([""] * len(which))
        denoise = guided(dit, text=text, null_text=null, guidance_scale=2.0)
        kept = [CleanFrames(masks[i], clean[i]) for i in which]
        return sample(denoise, scheduler, noise, num_inference_steps=4, clean=kept, generators=generators)

    packed = run([0, 1, 2, 3], MASKS)
    for i, mask in enumerate(MASKS):
        (alone,) = run([i], MASKS)
        assert alone.isfinite().all()
        assert (packed[i] - alone).abs().max() < 1e-4 * alone.abs().max().clamp(min=1)
        assert torch.equal(packed[i][:, mask], clean[i][:, mask])
        assert not torch.allclose(packed[i][:, ~mask], clean[i][:, ~mask], atol=0.1)


class Perfect:
    """A denoiser that knows the one answer, and notes what it is asked."""

    def __init__(self, answers: list[Tensor]) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, latents: list[Tensor], timesteps: Tensor, which: Sequence[int]) -> list[Tensor]:
        self.asked.append((latents, timesteps))
        levels = timesteps if len(timesteps) == len(latents) else timesteps.view(len(latents), -1).amax(1)
        # Flow: x_sigma = (1 - sigma) x + sigma noise, so that noise - x = (x_sigma - x) / sigma.
        return [(x - answer) / (t / 1000) for x, answer, t in zip(latents, [self.answers[i] for i in which], levels, strict=True)]


def test_a_perfect_model_is_sampled_to_its_answer() -> None:
    answers = latents_of(SIZES)
    denoise, seen = Perfect(answers), []
    noise, _ = noise_of(SHAPES, seeds=range(4))
    latents = sample(
        denoise, FlowMatchEulerDiscreteScheduler(), noise, num_inference_steps=7, callback=lambda *args: seen.append(args)
    )
    for latent, answer in zip(latents, answers, strict=True):
        torch.testing.assert_close(latent, answer, atol=1e-5, rtol=0)
    assert len(denoise.asked) == 7
    assert [step for step, _, _ in seen] == list(range(7))
    assert denoise.asked[0][1].tolist() == [1000.0] * 4
    assert torch.equal(seen[-1][2][0], latents[0])


def test_the_model_sees_given_frames_clean_at_every_step() -> None:
    answers = latents_of([(4, 8, 8), (4, 4, 4)])
    masks = [torch.tensor([True, False, False, False]), torch.tensor([False, False, True, True])]
    denoise = Perfect([x + 1 for x in answers])
    noise, _ = noise_of([x.shape for x in answers], seeds=[1, 2])
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="epsilon")  # scales what the model sees
    sample(
        denoise, scheduler, noise, num_inference_steps=3, clean=[CleanFrames(*pair) for pair in zip(masks, answers, strict=True)]
    )
    assert [timesteps[1].item() for _, timesteps in denoise.asked] == [999, 499.5, 0]
    first = torch.cat([latent[:, ~mask].flatten() for latent, mask in zip(denoise.asked[0][0], masks, strict=True)])
    assert 0.8 < first.std() < 1.2  # scaled from a noise of about 14, as the scheduler wants
    for latents, timesteps in denoise.asked:
        assert torch.equal(timesteps, torch.where(torch.cat(masks), 0, timesteps[1]))
        for latent, answer, mask in zip(latents, answers, masks, strict=True):
            assert torch.equal(latent[:, mask], answer[:, mask])


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_a_sample_may_begin_from_a_latent(scheduler) -> None:
    """A video partly noised, packed with one from pure noise: each is what it is alone, and a low strength keeps the latent."""
    dit, encoder = model()
    (start,) = latents_of(SIZES[:1])

    def run(which: list[int], strength: float) -> list[Tensor]:
        noise, generators = noise_of([SHAPES[i] for i in which], seeds=[10 + i for i in which])
        denoise = guided(dit, text=encoder([CAPTIONS[i] for i in which]))
        init = [Init(start, strength) if i == 0 else None for i in which]
        return sample(denoise, scheduler, noise, num_inference_steps=6, init=init, generators=generators)

    packed = run([0, 1], 0.5)
    for i in (0, 1):
        (alone,) = run([i], 0.5)
        assert (packed[i] - alone).abs().max() < 1e-4 * alone.abs().max().clamp(min=1)
    near, far = run([0], 1 / 6)[0], run([0], 1.0)[0]
    assert (near - start).abs().mean() < (far - start).abs().mean()


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("strength", [0.85, 0.5, 0.2])
def test_a_begun_sample_is_as_noisy_as_the_model_is_told(name: str, strength: float) -> None:
    scheduler = flow_scheduler(name, like=FlowMatchEulerDiscreteScheduler(shift=3.0))
    (latent,), (noise,) = latents_of([(2, 4, 4)]), noise_of([(4, 2, 4, 4)], seeds=[5])[0]
    asked: list[tuple[Tensor, Tensor]] = []

    def denoise(latents: list[Tensor], timesteps: Tensor, which: Sequence[int]) -> list[Tensor]:
        asked.append((latents[0], timesteps))
        return [noise - latent]

    sample(denoise, scheduler, [noise], num_inference_steps=20, init=[Init(latent, strength)])
    seen, level = asked[0]
    # Some round their timesteps to whole numbers.
    torch.testing.assert_close(seen, torch.lerp(latent, noise, float(level) / 1000), rtol=1e-3, atol=6e-3)
    assert len(asked) == pytest.approx(strength * (40 if name == "heun" else 20), abs=2)


def test_begin_strength_is_checked() -> None:
    answers = latents_of(SIZES)
    with pytest.raises(ValueError, match="init: expected a strength above 0 and up to 1, got 0"):
        sample(Perfect(answers), FlowMatchEulerDiscreteScheduler(), answers, init=[Init(answers[0], 0), None, None, None])


def test_every_frame_may_have_a_level_of_its_own() -> None:
    latents, scheduler = latents_of(SIZES), FlowMatchEulerDiscreteScheduler()
    batch = add_noise(scheduler, latents, per_frame=[True, False, True, False], generator=seeded())
    frames = [latent.shape[1] for latent in latents]
    levels = batch.timesteps.split(frames)
    assert len(batch.timesteps) == sum(frames)
    for own, level in zip((True, False, True, False), levels, strict=True):
        assert len(level.unique()) == (len(level) if own else 1)
    for latent, noised, target, level in zip(latents, batch.latents, batch.targets, levels, strict=True):
        sigma = (level / 1000)[:, None, None]
        torch.testing.assert_close(noised, latent + sigma * target)
    ddpm = add_noise(DDPMScheduler(), latents, per_frame=[True] * 4, generator=seeded())
    for i, (latent, noised, noise) in enumerate(zip(latents, ddpm.latents, ddpm.targets, strict=True)):
        t = ddpm.timesteps.split(frames)[i]
        kept = DDPMScheduler().alphas_cumprod[t.long()][:, None, None]
        torch.testing.assert_close(noised, kept.sqrt() * latent + (1 - kept).sqrt() * noise)
    with pytest.raises(ValueError, match="per_frame: expected a number from 0 to 1, got 2"):
        TaskMix(per_frame=2)


@pytest.mark.parametrize(("prediction", "network"), [("flow", "direct"), ("flow", "clean"), ("epsilon", "direct"), ("v", "direct")])
def test_learns_two_images_by_their_captions(prediction: str, network: str) -> None:
    """Training and sampling agree, of flow matching and of DDPM: a tiny model paints the picture that the caption names."""
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "patch_size": (1, 2, 2), "hidden_size": 32, "depth": 2, "num_heads": 2, "text_dim": 16}
    dit = DiT(DiTConfig(**sizes, prediction=network))
    encoder = WordEncoder(16, buckets=64, depth=0)
    scheduler = SoraPipeline.from_preset("tiny", patch=(1, 8, 8), prediction=prediction).scheduler
    optimizer = torch.optim.Adam([*dit.parameters(), *encoder.parameters()], lr=5e-3)
    captions = ["white", "black"] * 4
    images = [torch.full((1, 1, 4, 4), 1.0 if caption == "white" else -1.0) for caption in captions]
    generator = seeded()
    for _ in range(80):
        batch = add_noise(scheduler, images, generator=generator)
        loss = diffusion_loss(dit(batch.latents, batch.timesteps, encoder(captions)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise, _ = noise_of([(1, 1, 4, 4)] * 2, seeds=[0, 1])
    white, black = sample(guided(dit, text=encoder(["white", "black"])), scheduler, noise, num_inference_steps=8)
    assert (white - 1).abs().mean() < 0.5
    assert (black + 1).abs().mean() < 0.5
