"""diffusers' Wan pipelines, saved and opened as a `SoraPipeline`: the same videos, and Sora's tasks on TI2V."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import sora
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from test_dit import awake
from test_pretrained_text import MODELS, tokenizer
from torch import Tensor, nn

from sora_model import SoraPipeline, extend, image_to_video, join, text_to_image, text_to_video, video_to_video
from sora_model.data import Batch, read_comment, read_video
from sora_model.model.conditioning import PackedText
from sora_model.model.convert.wan import from_diffusers_wan
from sora_model.model.experts import Experts
from sora_model.pipeline.tasks import Simulation, long_video, loop
from sora_model.text.pretrained import clean_caption
from sora_model.training.dit import DiffusionObjective
from sora_model.world.config import WorldConfig
from sora_model.world.source import WorldSource
from sora_model.world.world import World

PROMPTS = ["a red circle moves right", "blue"]
NEGATIVE = "right right"
STEPS, GUIDANCE = 3, 4.0
SHOWN = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}


def transformer(channels: int, given: int = 0, **options) -> WanTransformer3DModel:
    """given: further channels, of a condition."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 48, "text_dim": 16}
    channels_of = {"in_channels": channels + given, "out_channels": channels}
    return awake(WanTransformer3DModel(**sizes, **channels_of, rope_max_seq_len=64, **options))


def vae(residual: bool) -> AutoencoderKLWan:
    """Of 16 channels: the norms of random decoders of 4 make twenty times as much and more of a latent's rounding errors."""
    common = {"base_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if not residual:
        return AutoencoderKLWan(**common, z_dim=16)
    channels = 48
    statistics = {"latents_mean": [0.1] * channels, "latents_std": [0.7] * channels}
    of_patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "is_residual": True}
    return AutoencoderKLWan(**common, **of_patches, **statistics, z_dim=channels, decoder_base_dim=16)


def save(kind: str, folder: Path) -> Path:
    """A pipeline of tiny models with random weights, as diffusers saves it."""
    torch.manual_seed(0)
    ti2v = kind.startswith("ti2v")
    parts = {
        "tokenizer": tokenizer(),
        "text_encoder": MODELS["umt5"]().eval(),
        "vae": vae(ti2v).eval(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": transformer(48 if ti2v else 16).eval(),
        "expand_timesteps": ti2v,
    }
    if kind == "experts":
        parts |= {"transformer_2": awake(transformer(16)).eval(), "boundary_ratio": 0.8}
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=5.0)
    if kind == "ti2v image":
        WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None).save_pretrained(folder)
    else:
        WanPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp("wan")) for kind in ("t2v", "experts", "ti2v", "ti2v image")}


def noise(pipeline: SoraPipeline, size: tuple[int, int, int], seed: int) -> Tensor:
    """What the pipeline of this package starts from, as diffusers' takes it."""
    frames, height, width = size
    ct, ch, cw = pipeline.codec.compression
    shape = pipeline.codec.channels, 1 + (frames - 1) // ct, height // ch, width // cw
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))[None]


def theirs(pipe, pipeline: SoraPipeline, prompt: str, size: tuple[int, int, int], seed: int, output: str, **more) -> Tensor:
    frames, height, width = size
    out = pipe(
        prompt=prompt, negative_prompt=NEGATIVE, height=height, width=width, num_frames=frames,
        latents=noise(pipeline, size, seed), output_type=output, **SHOWN, **more,
    ).frames  # fmt: skip
    return torch.as_tensor(np.asarray(out)) if output == "np" else out


@pytest.mark.parametrize("kind", ["t2v", "experts", "ti2v"])
def test_text_to_video_is_that_of_diffusers(folders: dict[str, Path], kind: str) -> None:
    """Two prompts of two sizes, in one batch with guidance; diffusers makes them one by one."""
    pipe = WanPipeline.from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    pipeline = SoraPipeline.from_pretrained(folders[kind])
    assert isinstance(pipeline.dit, Experts) == (kind == "experts")
    of_kind = {"t2v": (50, 5.0, 0.0, None, 16), "experts": (40, 4.0, 0.0, 3.0, 16), "ti2v": (50, 5.0, 0.0, None, 24)}
    assert tuple(pipeline.defaults) == of_kind[kind]
    sizes = [(9, 64, 96), (1, 96, 32)]
    requests = [text_to_video(p, s, negative_prompt=NEGATIVE) for p, s in zip(PROMPTS, sizes, strict=True)]
    latents = pipeline(requests, generator=5, output_type="latent", **SHOWN)
    videos = pipeline(requests, generator=5, output_type="np", **SHOWN)
    for i, (prompt, size) in enumerate(zip(PROMPTS, sizes, strict=True)):
        want = theirs(pipe, pipeline, prompt, size, 5 + i, "latent")[0]
        assert want.std() > 0.1
        torch.testing.assert_close(latents[i], want, rtol=1e-5, atol=1e-5)
        seen = theirs(pipe, pipeline, prompt, size, 5 + i, "np")[0]
        torch.testing.assert_close(torch.as_tensor(videos[i]), seen.float(), rtol=0, atol=1e-4)


def test_each_expert_has_its_guidance(folders: dict[str, Path]) -> None:
    """diffusers' guidance_scale_2, where one of both may be 1."""
    pipe = WanPipeline.from_pretrained(folders["experts"])
    pipe.set_progress_bar_config(disable=True)
    pipeline, size = SoraPipeline.from_pretrained(folders["experts"]), (5, 32, 32)
    request = text_to_video(PROMPTS[0], size, negative_prompt=NEGATIVE)
    for second in (2.5, 1.0):
        (latents,) = pipeline(request, generator=5, output_type="latent", guidance_scale_2=second, **SHOWN)
        want = theirs(pipe, pipeline, PROMPTS[0], size, 5, "latent", guidance_scale_2=second)[0]
        torch.testing.assert_close(latents, want, rtol=1e-5, atol=1e-5)
    (one,) = pipeline(request, generator=5, output_type="latent", **SHOWN)
    assert (one - latents).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance_scale_2: expected None for one transformer, got 2"):
        SoraPipeline.from_pretrained(folders["t2v"])(request, guidance_scale_2=2, **SHOWN)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_image_to_video_is_that_of_diffusers(folders: dict[str, Path]) -> None:
    pipe = WanImageToVideoPipeline.from_pretrained(folders["ti2v image"])
    pipe.set_progress_bar_config(disable=True)
    pipeline, size, image = SoraPipeline.from_pretrained(folders["ti2v image"]), (9, 64, 96), picture(64, 96)
    request = image_to_video(PROMPTS[0], [image], size[0], pipeline.timing, negative_prompt=NEGATIVE)
    (latents,) = pipeline(request, generator=5, output_type="latent", **SHOWN)
    want = theirs(pipe, pipeline, PROMPTS[0], size, 5, "latent", image=image)[0]
    torch.testing.assert_close(latents, want, rtol=1e-5, atol=1e-5)
    (video,) = pipeline(request, generator=5, output_type="np", **SHOWN)
    seen = theirs(pipe, pipeline, PROMPTS[0], size, 5, "np", image=image)[0]
    torch.testing.assert_close(torch.as_tensor(video), seen.float(), rtol=0, atol=1e-4)


class Times(nn.Module):
    """A transformer that notes the times that it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.seen = inner, inner.config, []

    @property
    def final(self) -> nn.Linear:
        return self.inner.final

    def forward(self, latents: list[Tensor], timesteps: Tensor, *args: object, **options: object) -> list[Tensor]:
        self.seen.append(timesteps.clone())
        return self.inner(latents, timesteps, *args, **options)


def test_times_of_frames_are_those_of_diffusers(folders: dict[str, Path]) -> None:
    """For image to video: diffusers' time of each token, one per frame, at each step."""
    pipe = WanImageToVideoPipeline.from_pretrained(folders["ti2v image"])
    pipe.set_progress_bar_config(disable=True)
    pipeline, size, image = SoraPipeline.from_pretrained(folders["ti2v image"]), (9, 64, 96), picture(64, 96)
    given = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["timestep"][0]), with_kwargs=True)
    theirs(pipe, pipeline, PROMPTS[0], size, 5, "latent", image=image)
    watched = pipeline.replaced(dit=Times(pipeline.dit))
    watched(image_to_video(PROMPTS[0], [image], size[0], pipeline.timing), generator=5, output_type="latent", **SHOWN)
    assert len(watched.dit.seen) == STEPS
    for ours, of_tokens in zip(watched.dit.seen, given[::2], strict=True):  # one pass with the prompt, one without
        assert torch.equal(ours.repeat(1), torch.cat([of_tokens.unflatten(0, (3, -1))[:, 0]] * 2))


def test_every_task_in_one_batch(folders: dict[str, Path]) -> None:
    """On TI2V. Each result is that of its request alone, and frames that were given come back."""
    pipeline = SoraPipeline.from_pretrained(folders["ti2v"])
    torch.manual_seed(0)
    clip, other = torch.rand(2, 3, 9, 32, 64) * 2 - 1
    timing = pipeline.timing
    requests = [
        text_to_video(PROMPTS[0], (5, 32, 32)),
        text_to_image(PROMPTS[1], 64, 32),
        image_to_video(PROMPTS[0], clip[:, :1], 9, timing),
        video_to_video(PROMPTS[1], clip, 0.5),
        extend(PROMPTS[0], clip, 4, timing),
        extend(PROMPTS[0], clip, 4, timing, backward=True),
        join(PROMPTS[1], clip, other, 4, timing),
    ]
    seeds = list(range(len(requests)))
    videos = pipeline(requests, generator=seeds, **SHOWN)
    for request, seed, video in zip(requests, seeds, videos, strict=True):
        (alone,) = pipeline(request, generator=seed, **SHOWN)
        torch.testing.assert_close(video, alone, rtol=0, atol=1e-4)
        assert tuple(video.shape[1:]) == request.stitched_size
    coded = pipeline.coded(clip[:, :1])
    torch.testing.assert_close(videos[2][:, :1], coded, rtol=0, atol=1e-4)
    assert torch.equal(videos[4][:, :4], clip[:, :4])
    assert torch.equal(videos[5][:, -4:], clip[:, -4:])
    assert torch.equal(videos[6][:, :4], clip[:, :4])
    assert torch.equal(videos[6][:, -5:], other[:, -5:])


def test_tasks_of_several_passes(folders: dict[str, Path]) -> None:
    pipeline = SoraPipeline.from_pretrained(folders["ti2v"])
    options = {"seed": 0, **SHOWN}
    assert loop(pipeline, PROMPTS[0], (5, 32, 32), passage=4, **options).shape == (3, 9, 32, 32)
    assert long_video(pipeline, PROMPTS, 13, (9, 32, 32), **options).shape == (3, 13, 32, 32)


def test_without_times_of_frames_keyframes_are_refused(folders: dict[str, Path]) -> None:
    pipeline = SoraPipeline.from_pretrained(folders["t2v"])
    clip = torch.zeros(3, 5, 32, 32)
    pipeline(video_to_video(PROMPTS[0], clip, 0.5), generator=0, **SHOWN)
    with pytest.raises(ValueError, match="keyframes: expected none, as this transformer was trained with one time for all frames"):
        pipeline(image_to_video(PROMPTS[0], clip[:, :1], 5, pipeline.timing), **SHOWN)
    for task in (loop, Simulation):
        with pytest.raises(ValueError, match="keyframes: expected none"):
            task(pipeline, PROMPTS[0], (5, 32, 32))
    with pytest.raises(ValueError, match="keyframes: expected none"):
        long_video(pipeline, PROMPTS, 13, (9, 32, 32))


def test_in_bfloat16(folders: dict[str, Path]) -> None:
    """Weights in bfloat16, but for those that Wan keeps in float32."""
    pipeline = SoraPipeline.from_pretrained(folders["ti2v"], dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in pipeline.dit.named_parameters()}
    assert dtypes["final.weight"] == torch.bfloat16
    assert dtypes["blocks.0.offset"] == dtypes["time_embed.0.weight"] == torch.float32
    wide = SoraPipeline.from_pretrained(folders["ti2v"])
    got, want = (p(PROMPTS[0], (5, 32, 32), generator=0, output_type="latent", **SHOWN)[0] for p in (pipeline, wide))
    assert (got - want).norm() < 0.1 * want.norm()


def test_commands(folders: dict[str, Path], tmp_path: Path) -> None:
    """They take a checkpoint's own steps and guidance, and refuse what it cannot do before they read its weights."""
    out = sora("generate", PROMPTS[0], "--checkpoint", folders["t2v"], "--size", "1x32x32", "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("00*.png")
    settings = json.loads(read_comment(path))
    assert (settings["steps"], settings["guidance"], settings["guidance_from"]) == (50, 5.0, 0.0)
    assert "1 video of 1x32x32" in out
    options = ["--checkpoint", folders["t2v"], "--out", tmp_path / "none"]
    for command in (["animate", path, "blue"], ["long", "blue"], ["loop", "blue"], ["simulate", "blue"]):
        message = sora(*command, *options, code=2)
        assert "--checkpoint: keyframes: expected none, as this transformer was trained with one time for all" in message.replace(
            "\n", " "
        )
    anyway = [*options, "--frames", 5, "--steps", 1, "--allow-untrained"]
    assert "warning: the transformer was not trained with these frames given" in sora("animate", path, "blue", *anyway)
    short = ["--frames", 5, "--checkpoint", folders["ti2v"], "--steps", 1, "--precision", "bf16"]
    sora("animate", path, "blue", *short, "--out", tmp_path / "animated")
    (path,) = (tmp_path / "animated").glob("*.mp4")
    assert read_video(path)[1] == 24
    shown = sora("animate", picture_file(tmp_path, 1200, 900), "blue", *short[:6], "--out", tmp_path / "scaled")
    assert "frames of 1200x900 are scaled down to 1096x822" in shown
    message = sora("generate", "blue", "--guidance-2", 3, *options, code=2)
    assert "--guidance-2: expected none for a checkpoint with one transformer, got 3" in message
    of_experts = ["--checkpoint", folders["experts"], "--size", "1x32x32", "--steps", 1]
    sora("generate", "blue", *of_experts, "--out", tmp_path / "two")
    sora("generate", "blue", *of_experts, "--guidance", 2, "--guidance-2", 1, "--out", tmp_path / "one")
    settings = [json.loads(read_comment(next((tmp_path / name).glob("00*.png")))) for name in ("two", "one")]
    assert [(one["guidance"], one["guidance_2"]) for one in settings] == [(4.0, 3.0), (2.0, 1.0)]


def picture_file(folder: Path, height: int, width: int) -> Path:
    picture(height, width).save(folder / "picture.png")
    return folder / "picture.png"


def test_prompts_are_cut_and_cleaned(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    assert clean_caption(" a&amp;amp;b \n c ") == "a&b c"
    encoder = SoraPipeline.from_pretrained(folders["t2v"]).text_encoder
    text: PackedText = encoder(["a " * 600, " a\n red "])
    assert text.cu_seqlens.tolist() == [0, 512, 515]
    (warning,) = caplog.messages
    assert warning.startswith("a prompt of 601 tokens is cut to 512, without: a a a")
    assert warning.endswith("a ...")
    for _ in range(20):
        encoder(["a " * 600])
    assert len(caplog.messages) == 10


def test_trained_further(folders: dict[str, Path]) -> None:
    """With the tasks of this package, so that what comes out knows times of frames."""
    pipeline = SoraPipeline.from_pretrained(folders["t2v"])
    objective = DiffusionObjective(pipeline)
    source = WorldSource(World(WorldConfig.simple()), [(5, 32, 32)])
    objective.loss(Batch([source.load(i) for i in range(2)], [0, 1], 16), torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None for p in pipeline.dit.parameters())
    assert objective.averaged(objective.model).trained_keyframes == "any"
    with pytest.raises(ValueError, match="DiffusionObjective: pipeline: expected one transformer, got Experts"):
        DiffusionObjective(SoraPipeline.from_pretrained(folders["experts"]))


def test_each_sample_has_its_expert(folders: dict[str, Path]) -> None:
    experts = SoraPipeline.from_pretrained(folders["experts"]).dit
    assert experts.boundary == 800
    latents = [torch.randn(16, n, 4, 4) for n in (1, 2, 3)]
    with torch.no_grad():
        got = experts(latents, torch.tensor([800.0, 799.0, 100.0]))
        of_frames = experts(latents, torch.tensor([800.0, 0.0, 799.0, 0.0, 900.0, 3.0]))
        torch.testing.assert_close(got[0], experts.high(latents[:1], torch.tensor([800.0]))[0])
        torch.testing.assert_close(got[1:], experts.low(latents[1:], torch.tensor([799.0, 100.0])))
        torch.testing.assert_close(of_frames[1], experts.low(latents[1:2], torch.tensor([0.0, 799.0]))[0])
        torch.testing.assert_close(of_frames[2], experts.high(latents[2:], torch.tensor([0.0, 900.0, 3.0]))[0])
    experts.gradient_checkpointing = True
    assert experts.high.gradient_checkpointing
    assert experts.low.gradient_checkpointing


def test_a_scheduler_of_other_timesteps_is_refused_with_experts(folders: dict[str, Path]) -> None:
    pipeline = SoraPipeline.from_pretrained(folders["experts"])
    with pytest.raises(ValueError, match="scheduler: expected one of 1000 timesteps with Experts, got 100"):
        pipeline.with_scheduler(FlowMatchEulerDiscreteScheduler(num_train_timesteps=100))


def test_other_classes_are_not_converted() -> None:
    with pytest.raises(ValueError, match="transformer: expected a WanTransformer3DModel, got Linear"):
        from_diffusers_wan(nn.Linear(2, 2))
