"""The pipeline: mixed sizes and tasks in one call, reproducible, saved whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from command_line import refused, sora
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from test_dit import awake, small
from torch import Tensor

from sora_model import SoraPipeline, image_to_video
from sora_model.codec.codec import PixelCodec
from sora_model.codec.vae import VideoVAE
from sora_model.diffusion.schedulers import FLOW, flow_scheduler
from sora_model.model.dit import DiT
from sora_model.pipeline.checkpoint import read_outline
from sora_model.pipeline.request import Request
from sora_model.sizes import Timing
from sora_model.text.words import WordEncoder

PROMPTS = ["a red circle moves right", "a blue square", ""]
SIZES = [(4, 16, 24), (2, 8, 8), (6, 8, 16)]


@pytest.fixture(scope="module")
def pipeline() -> SoraPipeline:
    torch.manual_seed(0)
    dit = awake(DiT(small(in_channels=3, patch_size=(2, 4, 4))))
    return SoraPipeline(dit, awake(WordEncoder(32, buckets=64)), FlowMatchEulerDiscreteScheduler(shift=3.0))


def generate(pipeline: SoraPipeline, which: list[int], **options) -> list[Tensor]:
    keyframes, negative = options.pop("keyframes", [{}] * 3), options.pop("negative_prompts", [""] * 3)
    requests = [Request(PROMPTS[i], SIZES[i], keyframes=keyframes[i] or {}, negative_prompt=negative[i]) for i in which]
    return pipeline(requests, num_inference_steps=3, **{"generator": [7 + i for i in which], **options})


def test_many_sizes_in_one_call_as_one_by_one(pipeline: SoraPipeline) -> None:
    videos = generate(pipeline, [0, 1, 2])
    assert [tuple(video.shape) for video in videos] == [(3, *size) for size in SIZES]
    assert all(video.abs().max() <= 1 for video in videos)
    assert torch.equal(videos[0], generate(pipeline, [0, 1, 2], generator=7)[0])  # seed + i
    assert not torch.equal(videos[0], generate(pipeline, [0, 1, 2], generator=8)[0])
    for i, video in enumerate(videos):
        torch.testing.assert_close(generate(pipeline, [i])[0], video, atol=1e-4, rtol=0)
    negative = generate(pipeline, [0, 1, 2], negative_prompts=["a blue square", "", ""])
    assert not torch.allclose(negative[0], videos[0], atol=1e-3)
    torch.testing.assert_close(negative[1], videos[1], atol=1e-4, rtol=0)


def test_every_task_is_a_mask(pipeline: SoraPipeline) -> None:
    torch.manual_seed(1)
    image, start, end = torch.rand(3, 2, 16, 24), torch.rand(3, 2, 8, 16), torch.rand(3, 2, 8, 16)
    seen = []
    videos = generate(
        pipeline, [0, 1, 2], keyframes=[{0: image}, None, {0: start, -2: end}], callback=lambda *args: seen.append(args)
    )
    assert torch.equal(videos[0][:, :2], image)
    assert torch.equal(videos[2][:, :2], start)
    assert torch.equal(videos[2][:, -2:], end)
    assert len(seen) == 3
    assert torch.equal(seen[0][2][0][:, :2], image)
    free = generate(pipeline, [0, 1, 2])
    torch.testing.assert_close(videos[1], free[1], atol=1e-4, rtol=0)
    assert not torch.allclose(videos[0][:, 2:], free[0][:, 2:], atol=1e-3)  # the rest takes note of what is given


class HalvingCodec(PixelCodec):
    """Every second frame, row and column, as a stand-in for a VAE that compresses."""

    compression = (2, 2, 2)

    def encode(self, videos):
        return [video[:, ::2, ::2, ::2] for video in videos]

    def decode(self, latents):
        return [x.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3) for x in latents]


class CausalCodec(HalvingCodec):
    """The first frame alone, then every second one."""

    causal = True

    def encode(self, videos):
        return [torch.cat([video[:, :1, ::2, ::2], video[:, 2::2, ::2, ::2]], dim=1) for video in videos]

    def decode(self, latents):
        return [x.repeat_interleave(2, 1)[:, 1:].repeat_interleave(2, 2).repeat_interleave(2, 3) for x in latents]


def test_latents_smaller_than_pixels(pipeline: SoraPipeline) -> None:
    halving = SoraPipeline(pipeline.dit, pipeline.text_encoder, pipeline.scheduler, HalvingCodec())
    assert halving.timing == (4, 4)
    start = torch.rand(3, 4, 1, 1).repeat_interleave(2, 1)[:, :4].expand(3, 4, 16, 16).contiguous()
    (video,) = halving(Request("x", (8, 16, 16), keyframes={0: start}), num_inference_steps=2, generator=0)
    assert tuple(video.shape) == (3, 8, 16, 16)
    assert torch.equal(video[:, :4], start)
    with pytest.raises(
        ValueError, match=r"expected whole token frames, the first 4 and then 4 at a time, got clips of frames \{2: 4\}"
    ):
        halving(Request("x", (8, 16, 16), keyframes={2: start}))


def test_a_causal_codec_takes_its_first_frame_alone(pipeline: SoraPipeline) -> None:
    torch.manual_seed(0)
    dit = awake(DiT(small(in_channels=3, patch_size=(1, 4, 4))))
    causal = SoraPipeline(dit, pipeline.text_encoder, pipeline.scheduler, CausalCodec())
    assert causal.timing == (1, 2)
    image, end = (torch.rand(3, t, 1, 1).repeat_interleave(t, 1)[:, :t].expand(3, t, 8, 8).contiguous() for t in (1, 2))
    end = end[:, :1].repeat(1, 2, 1, 1)
    requests = [Request("x", (5, 8, 8), keyframes={0: image, -2: end}), Request("y", (1, 8, 8))]
    video, picture = causal(requests, num_inference_steps=2, generator=0)
    assert (tuple(video.shape), tuple(picture.shape)) == ((3, 5, 8, 8), (3, 1, 8, 8))
    assert torch.equal(video[:, :1], image)
    assert torch.equal(video[:, -2:], end)


def test_any_size_is_made_larger_and_cut(pipeline: SoraPipeline) -> None:
    """Sizes that are no whole tokens, with something given in them: the border is repeated, and cut off again."""
    image = torch.rand(3, 2, 9, 14)
    videos = pipeline([Request("x", (3, 9, 14), keyframes={0: image}), "y"], (5, 7, 5), num_inference_steps=2, generator=0)
    assert [tuple(video.shape) for video in videos] == [(3, 3, 9, 14), (3, 5, 7, 5)]
    assert torch.equal(videos[0][:, :2], image)


def test_output_types(pipeline: SoraPipeline) -> None:
    def made(kind: str):
        return pipeline("a red circle", (2, 8, 8), num_inference_steps=2, generator=3, output_type=kind)[0]

    tensor, array, images, latent = (made(kind) for kind in ("pt", "np", "pil", "latent"))
    assert array.shape == (2, 8, 8, 3)
    torch.testing.assert_close(torch.from_numpy(array).permute(3, 0, 1, 2) * 2 - 1, tensor)
    assert [image.size for image in images] == [(8, 8)] * 2
    assert latent.shape == (3, 2, 8, 8)
    with pytest.raises(ValueError, match="guidance_from: expected a number from 0 to 1, got 600"):
        pipeline("a red circle", guidance_from=600)
    with pytest.raises(ValueError, match="output_type: expected one of pt, np, pil, latent, got 'jpg'"):
        made("jpg")


def test_bfloat16_is_near_float32(pipeline: SoraPipeline) -> None:
    def made(precision: str) -> Tensor:
        return pipeline("a red circle", (4, 16, 24), num_inference_steps=3, generator=3, precision=precision)[0]

    near, whole = made("bf16"), made("no")
    assert near.dtype == whole.dtype == torch.float32
    assert 0 < (near - whole).abs().mean() < 0.05
    with pytest.raises(ValueError, match="precision: expected 'no' or 'bf16', got 'fp8'"):
        made("fp8")


def test_generators_and_seeds(pipeline: SoraPipeline) -> None:
    def made(generator, seed=None):
        return pipeline(Request("x", (2, 8, 8), seed=seed), num_inference_steps=2, generator=generator)[0]

    assert torch.equal(made(5), made(torch.Generator().manual_seed(5)))
    assert torch.equal(made(5), made([5]))
    assert torch.equal(made(6, seed=5), made(5))
    assert not torch.equal(made(None), made(None))


@pytest.mark.parametrize("name", FLOW)
def test_the_same_weights_by_any_flow_scheduler(pipeline: SoraPipeline, name: str) -> None:
    """A model whose clean latent is always the same ends there by every scheduler."""
    torch.manual_seed(0)
    dit = DiT(small(in_channels=3, patch_size=(2, 4, 4), prediction="clean"))
    torch.nn.init.constant_(dit.final.bias, 0.25)
    one = SoraPipeline(dit.eval(), pipeline.text_encoder, flow_scheduler(name, like=pipeline.scheduler))
    (video,) = one("a red circle", (4, 16, 24), num_inference_steps=12, generator=0)
    assert (video - 0.25).abs().max() < 0.01
    other = one.with_scheduler(flow_scheduler("euler", like=one.scheduler))
    assert other.dit is dit
    with pytest.raises(ValueError, match="with_scheduler: scheduler: expected one of flow_prediction, got epsilon"):
        one.with_scheduler(DDIMScheduler())
    with pytest.raises(ValueError, match=r"name: expected one of euler, heun, unipc, dpm\+\+, got 'magic'"):
        flow_scheduler("magic", like=one.scheduler)


def test_wrong_inputs_are_named(pipeline: SoraPipeline) -> None:
    with pytest.raises(ValueError, match=r"Request: size: expected \(T, H, W\), each at least 1, got \(0, 16, 16\)"):
        pipeline(["x"], (0, 16, 16))
    with pytest.raises(ValueError, match="requests: expected at least one, got none"):
        pipeline([])
    with pytest.raises(ValueError, match=r"size: expected one \(T, H, W\) or 2, one per request, got 1"):
        pipeline(["x", "y"], [(4, 16, 16)])
    with pytest.raises(TypeError, match="requests: expected prompts and Requests, got 3"):
        pipeline(["x", 3])
    with pytest.raises(TypeError, match="requests: expected prompts and Requests, got 1"):
        pipeline([1])
    with pytest.raises(TypeError, match="requests: expected prompts and Requests, got 1"):
        pipeline(1)
    with pytest.raises(TypeError, match=r"size: expected \(T, H, W\), got '1x16x16'"):
        pipeline(["x"], ["1x16x16"])
    with pytest.raises(TypeError, match=r"generator: expected a seed or a torch\.Generator, or one per request, got '0'"):
        pipeline(["x"], generator="0")
    with pytest.raises(ValueError, match="generator: expected 1, one per request, got 2"):
        pipeline(["x"], (4, 16, 16), generator=[1, 2])
    for clips in ({0: torch.zeros(3, 2, 8, 8)}, {3: torch.zeros(3, 2, 16, 16)}, {0: torch.zeros(3, 16, 16)}):
        with pytest.raises(ValueError, match=r"keyframes: expected clips of floats \[3, t, 16, 16\] within 4 frames"):
            Request("x", (4, 16, 16), keyframes=clips)
    with pytest.raises(ValueError, match="expected whole token frames, the first 2 and then 2 at a time"):
        pipeline(Request("x", (4, 16, 16), keyframes={0: torch.zeros(3, 1, 16, 16)}))
    with pytest.raises(ValueError, match="text_dim: expected 16, got 32"):
        SoraPipeline(pipeline.dit, WordEncoder(16), pipeline.scheduler)
    with pytest.raises(ValueError, match="captioner: expected a checkpoint with a captioner, got one without"):
        pipeline.expand(["x"])
    clean = DiT(small(in_channels=3, prediction="clean"))
    with pytest.raises(ValueError, match=r"expected flow matching with 1000 timesteps.*got DDIMScheduler of epsilon"):
        SoraPipeline(clean, pipeline.text_encoder, DDIMScheduler())


@pytest.mark.parametrize("temporal", [None, 4, 8])
def test_an_outline_needs_no_weights(pipeline: SoraPipeline, temporal: int | None, tmp_path: Path) -> None:
    """What it says is what the pipeline says."""
    if temporal is not None:
        codec = VideoVAE.small(latent_channels=4, channels=(8, 8, 8, 8), temporal=temporal)
        pipeline = SoraPipeline.from_preset("tiny", patch=(1, 2, 2), codec=codec, size=(9, 32, 48))
    pipeline.save_pretrained(tmp_path)
    outline = read_outline(tmp_path)
    assert (outline.size, outline.unit, outline.timing) == (pipeline.size, pipeline.unit, pipeline.timing)
    assert outline.padded((3, 9, 14)) == pipeline._padded((3, 9, 14))
    assert outline.width == pipeline.dit.config.hidden_size
    modules = [m for m in (pipeline.text_encoder, pipeline.dit, pipeline.codec) if isinstance(m, torch.nn.Module)]
    held = [4 * sum(p.numel() for p in module.parameters()) for module in modules]
    assert (outline.weights.encoders, outline.weights.transformers) == (held[0], (held[1],))
    assert outline.weights.others == (0 if temporal is None else pytest.approx(held[2], rel=0.01))  # and buffers


def test_keyframes_that_say_nothing_are_refused() -> None:
    clip = torch.zeros(3, 4, 16, 16)
    wrong = clip.clone()
    wrong[0, 1, 2, 3] = torch.nan
    for keyframes, message in (
        ({0: clip, -8: clip}, "Request: keyframes: expected each frame once, got frames 0 to 3 twice"),
        ({0: clip, 2: clip}, "Request: keyframes: expected each frame once, got frames 2 to 5 twice"),
        ({0: wrong}, "Request: keyframes: expected finite numbers, got NaN or infinity at frame 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Request("x", (8, 16, 16), keyframes=keyframes)
    with pytest.raises(ValueError, match="Request: init_video: expected finite numbers, got NaN or infinity"):
        Request("x", (4, 16, 16), init_video=wrong)
    with pytest.raises(ValueError, match=r"image_to_video: image: expected a tensor \[3, T, H, W\].*, got str"):
        image_to_video("x", "star.png", 9, Timing(1, 4))


def test_options_of_another_type_are_refused() -> None:
    pipeline = SoraPipeline.from_pretrained()
    for option, value in (("window", 5), ("step_cache", "0.1"), ("step_cache", False)):
        with pytest.raises(TypeError, match=f"SoraPipeline: {option}: expected .*, got {value!r}"):
            pipeline("x", **{option: value})
    with pytest.raises(TypeError, match=r"dtype: expected a torch\.dtype of floats, got torch\.int8"):
        SoraPipeline.from_pretrained(dtype=torch.int8)


def test_coding_is_watched_by_those_who_ask(tmp_path: Path) -> None:
    codec = VideoVAE.small(latent_channels=4, channels=(8, 8, 8))
    pipeline = SoraPipeline.from_preset("tiny", patch=(1, 2, 2), codec=codec, size=(5, 16, 16))
    seen: list[tuple[str, int, int]] = []
    video = torch.zeros(3, 5, 16, 16)
    requests = [Request("x", (5, 16, 16), keyframes={0: video[:, :1]}), Request("y", (5, 16, 16), init_video=video, strength=0.5)]
    pipeline(requests, num_inference_steps=2, progress=lambda *told: seen.append(told))
    assert seen == [("encoding", 1280, 1280), ("encoding", 1280, 1280), ("decoding", 16, 16)]


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler(clip_sample=False)])
def test_saved_and_loaded(pipeline: SoraPipeline, tmp_path: Path, scheduler) -> None:
    saved = SoraPipeline(pipeline.dit, pipeline.text_encoder, scheduler)
    for _ in range(2):  # the second replaces the first
        saved.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = SoraPipeline.from_pretrained(tmp_path / "model")
    assert loaded.scheduler.to_json_string() == scheduler.to_json_string()
    for one, other in zip(generate(loaded, [0, 1]), generate(saved, [0, 1]), strict=True):
        assert torch.equal(one, other)


def test_a_failed_save_leaves_the_old_one(pipeline: SoraPipeline, tmp_path: Path, monkeypatch) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "dit" / "model.safetensors").read_bytes()

    def fail(*args, **kwargs) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sora_model.pipeline.checkpoint.json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        pipeline.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "dit" / "model.safetensors").read_bytes() == before


def test_what_cannot_be_loaded_is_named(pipeline: SoraPipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        SoraPipeline.from_pretrained(tmp_path)
    folder = tmp_path / "model"
    config = folder / "dit" / "config.json"

    def saved(**changes) -> None:
        pipeline.save_pretrained(folder)
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    saved(width=3)
    with pytest.raises(ValueError, match="got width"):
        SoraPipeline.from_pretrained(folder)
    saved(depth=5)
    with pytest.raises(ValueError, match=r"model\.safetensors: blocks.*: expected shape \(.*\), got None"):
        SoraPipeline.from_pretrained(folder)
    saved()
    (folder / "dit" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected safetensors, got"):
        SoraPipeline.from_pretrained(folder)
    index = folder / "model_index.json"
    whole = index.read_text()
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"model_index.json: expected a pipeline of this package, got \[\]"):
        SoraPipeline.from_pretrained(folder)
    index.write_text(whole)
    config.write_text("{")
    with pytest.raises(ValueError, match="expected JSON, got"):
        SoraPipeline.from_pretrained(folder)


def test_saved_in_half_the_bytes_and_read_in_float32(pipeline: SoraPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "whole")
    pipeline.save_pretrained(tmp_path / "half", dtype=torch.float16)
    whole, half = ((tmp_path / name / "dit" / "model.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    loaded = SoraPipeline.from_pretrained(tmp_path / "half")
    assert loaded.dit.final.weight.dtype == torch.float32
    assert loaded.size == pipeline.size
    near, far = generate(loaded, [0])[0], generate(pipeline, [0])[0]
    assert 0 < (near - far).abs().max() < 0.05


def test_exported_in_float16(pipeline: SoraPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "whole")
    said = sora("export", tmp_path / "whole", tmp_path / "half")
    assert f"{tmp_path / 'half'}: " in said.replace("\n", "")
    half = load_file(tmp_path / "half" / "dit" / "model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.float16}
    refused("export", tmp_path / "none", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_interrupted_save_leaves_the_old_one(pipeline: SoraPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:  # the old one is out of the way, the new one not yet in place
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(Path, "rename", rename)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    SoraPipeline.from_pretrained(tmp_path / "model")


def test_nothing_but_a_checkpoint_is_replaced(pipeline: SoraPipeline, tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"expected an empty folder or one with a checkpoint to replace, got .*keep"):
        pipeline.save_pretrained(tmp_path / "keep")
    assert (tmp_path / "keep" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"checkpoint: expected a folder, got the file .*thesis\.txt"):
        pipeline.save_pretrained(tmp_path / "keep" / "thesis.txt")
    pipeline.save_pretrained(tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.md").write_text("what I saw")
    with pytest.raises(ValueError, match=r"with a checkpoint to replace, got .*mixed, which holds notes\.md"):
        pipeline.save_pretrained(tmp_path / "mixed")
    own = SoraPipeline(pipeline.dit, pipeline.text_encoder, pipeline.scheduler, HalvingCodec())
    own.codec = type("Codec", (), {"channels": 3})()
    with pytest.raises(TypeError, match="codec: expected a PixelCodec or a VideoVAE, got Codec"):
        own.save_pretrained(tmp_path / "model")
