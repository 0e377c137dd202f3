"""The pipeline: mixed sizes and tasks in one call, reproducible, saved whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from test_dit import awake, small
from torch import Tensor

from sora_model.dit import DiT
from sora_model.pipeline import SoraPipeline
from sora_model.text import WordEncoder
from sora_model.vae import PixelCodec

PROMPTS = ["a red circle moves right", "a blue square", ""]
SIZES = [(4, 16, 24), (2, 8, 8), (6, 8, 16)]


@pytest.fixture(scope="module")
def pipeline() -> SoraPipeline:
    torch.manual_seed(0)
    dit = awake(DiT(small(in_channels=3, patch_size=(2, 4, 4))))
    return SoraPipeline(dit, awake(WordEncoder(32, buckets=64)), FlowMatchEulerDiscreteScheduler(shift=3.0))


def generate(pipeline: SoraPipeline, which: list[int], **options) -> list[Tensor]:
    prompts, sizes = [PROMPTS[i] for i in which], [SIZES[i] for i in which]
    return pipeline(prompts, sizes, num_inference_steps=3, **{"seeds": [7 + i for i in which], **options})


def test_many_sizes_in_one_call_as_one_by_one(pipeline: SoraPipeline) -> None:
    videos = generate(pipeline, [0, 1, 2])
    assert [tuple(video.shape) for video in videos] == [(3, *size) for size in SIZES]
    assert all(video.abs().max() <= 1 for video in videos)
    assert torch.equal(videos[0], generate(pipeline, [0, 1, 2], seeds=7)[0])  # seed + i
    assert not torch.equal(videos[0], generate(pipeline, [0, 1, 2], seeds=8)[0])
    for i, video in enumerate(videos):
        torch.testing.assert_close(generate(pipeline, [i])[0], video, atol=1e-4, rtol=0)
    negative = generate(pipeline, [0, 1, 2], negative_prompts=["a blue square", "", ""])
    assert not torch.allclose(negative[0], videos[0], atol=1e-3)
    torch.testing.assert_close(negative[1], videos[1], atol=1e-4, rtol=0)


def test_every_task_is_a_mask(pipeline: SoraPipeline) -> None:
    torch.manual_seed(1)
    image, start, end = torch.rand(3, 2, 16, 24), torch.rand(3, 2, 8, 16), torch.rand(3, 2, 8, 16)
    seen = []
    videos = generate(pipeline, [0, 1, 2], given=[{0: image}, None, {0: start, -2: end}], callback=lambda *args: seen.append(args))
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


def test_latents_smaller_than_pixels(pipeline: SoraPipeline) -> None:
    halving = SoraPipeline(pipeline.dit, pipeline.text_encoder, pipeline.scheduler, HalvingCodec())
    start = torch.rand(3, 4, 1, 1).repeat_interleave(2, 1)[:, :4].expand(3, 4, 16, 16).contiguous()
    (video,) = halving(["x"], [(8, 16, 16)], given=[{0: start}], num_inference_steps=2, seeds=0)
    assert tuple(video.shape) == (3, 8, 16, 16)
    assert torch.equal(video[:, :4], start)
    with pytest.raises(ValueError, match=r"divisible by \(4, 8, 8\)"):
        halving(["x"], [(8, 16, 20)])
    with pytest.raises(ValueError, match="multiples of 2 frames"):
        halving(["x"], [(8, 16, 16)], given=[{1: start}])


def test_wrong_inputs_are_named(pipeline: SoraPipeline) -> None:
    with pytest.raises(ValueError, match=r"divisible by \(2, 4, 4\) \(patch_size \(2, 4, 4\).*got \(4, 16, 26\)"):
        pipeline(["x"], [(4, 16, 26)])
    with pytest.raises(ValueError, match=r"sizes: expected .* got \(0, 16, 16\)"):
        pipeline(["x"], [(0, 16, 16)])
    with pytest.raises(ValueError, match="sizes: expected 2, one per prompt, got 1"):
        pipeline(["x", "y"], [(4, 16, 16)])
    with pytest.raises(ValueError, match="seeds: expected 1, one per prompt, got 2"):
        pipeline(["x"], [(4, 16, 16)], seeds=[1, 2])
    for clips in ({0: torch.zeros(3, 2, 8, 8)}, {3: torch.zeros(3, 2, 16, 16)}, {0: torch.zeros(3, 16, 16)}):
        with pytest.raises(ValueError, match=r"given: expected clips \[3, t, 16, 16\] within 4 frames"):
            pipeline(["x"], [(4, 16, 16)], given=[clips])
    with pytest.raises(ValueError, match="expected whole token frames of 2 latent frames"):
        pipeline(["x"], [(4, 16, 16)], given=[{0: torch.zeros(3, 1, 16, 16)}])
    with pytest.raises(ValueError, match="text_dim: expected 16, got 32"):
        SoraPipeline(pipeline.dit, WordEncoder(16), pipeline.scheduler)
    clean = DiT(small(in_channels=3, prediction="clean"))
    with pytest.raises(ValueError, match=r"expected flow matching with 1000 timesteps.*got DDIMScheduler of epsilon"):
        SoraPipeline(clean, pipeline.text_encoder, DDIMScheduler())


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
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def fail(*args, **kwargs) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sora_model.pipeline.json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        pipeline.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_what_cannot_be_loaded_is_named(pipeline: SoraPipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        SoraPipeline.from_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["dit"]["width"] = 3
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="got width"):
        SoraPipeline.from_pretrained(tmp_path / "model")


def test_dtype_is_kept(pipeline: SoraPipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    half = SoraPipeline(DiT(small(in_channels=3, text_dim=32)).bfloat16(), WordEncoder(32), FlowMatchEulerDiscreteScheduler())
    half.save_pretrained(tmp_path / "model")
    loaded = SoraPipeline.from_pretrained(tmp_path / "model")
    assert loaded.dit.final.weight.dtype == torch.bfloat16
    (video,) = loaded(["x"], [(2, 8, 8)], num_inference_steps=2, seeds=0)
    assert video.dtype == torch.float32
