"""Wan's image-to-video pipelines, whose transformers take images as further channels and as CLIP's tokens: diffusers' videos."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import sora
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from test_dit import awake
from test_pipeline_wan import GUIDANCE, NEGATIVE, PROMPTS, SHOWN, STEPS, picture, theirs, transformer, vae
from test_pretrained_text import MODELS, tokenizer
from test_wan_folders import changed, edit
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from sora_model import Request, SoraPipeline, extend, image_to_video, text_to_video, video_to_video
from sora_model.codec.image_encoder import ImageEncoder
from sora_model.data import read_comment, write_video
from sora_model.model.experts import Experts
from sora_model.pipeline.checkpoint import read_outline
from sora_model.pipeline.offload import put_in_turn
from sora_model.training.dit import DiffusionObjective

GIVEN = 4 + 16  # channels: whether each of four frames is given, and a latent
SIZE = 9, 64, 96


def save(kind: str, folder: Path) -> Path:
    """A pipeline of tiny models with random weights, as diffusers saves it: Wan 2.1's with CLIP, 2.2's with two experts, 2.1's of
    first and last frames."""
    torch.manual_seed(0)
    clip = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    options = {} if kind == "experts" else {"image_dim": 24, "added_kv_proj_dim": 32}
    if kind == "ends":
        options["pos_embed_seq_len"] = 2 * 17
    parts = {
        "tokenizer": tokenizer(),
        "text_encoder": MODELS["umt5"]().eval(),
        "vae": vae(False).eval(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": transformer(16, GIVEN, **options).eval(),
        "image_encoder": None,
        "image_processor": None,
    }
    if kind == "experts":
        parts |= {"transformer_2": transformer(16, GIVEN).eval(), "boundary_ratio": 0.9}
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        parts["image_encoder"] = awake(CLIPVisionModel(clip)).eval()
        parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    WanImageToVideoPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp("wan")) for kind in ("clip", "experts", "ends")}


def images() -> list[Image.Image]:
    return [picture(64, 96), Image.fromarray(np.asarray(picture(64, 96))[::-1].copy())]


@pytest.mark.parametrize("kind", ["clip", "experts", "ends"])
def test_image_to_video_is_that_of_diffusers(folders: dict[str, Path], kind: str) -> None:
    """Two images in one batch with guidance; diffusers makes them one by one."""
    pipe = WanImageToVideoPipeline.from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    pipeline, pictures = SoraPipeline.from_pretrained(folders[kind]), images()
    assert isinstance(pipeline.dit, Experts) == (kind == "experts")
    assert pipeline.trained_keyframes == ("first and last" if kind == "ends" else "first")
    lasts = [[pictures[1]], [pictures[0]]] if kind == "ends" else [None, None]
    requests = [
        image_to_video(prompt, [image], SIZE[0], pipeline.timing, last=last, negative_prompt=NEGATIVE)
        for prompt, image, last in zip(PROMPTS, pictures, lasts, strict=True)
    ]
    latents = pipeline(requests, generator=5, output_type="latent", **SHOWN)
    videos = pipeline(requests, generator=5, output_type="np", **SHOWN)
    for i, (prompt, image, last) in enumerate(zip(PROMPTS, pictures, lasts, strict=True)):
        given = {"image": image, **({"last_image": last[0]} if last else {})}
        want = theirs(pipe, pipeline, prompt, SIZE, 5 + i, "latent", **given)[0]
        assert want.std() > 0.1
        torch.testing.assert_close(latents[i], want, rtol=1e-5, atol=1e-5)
        seen = theirs(pipe, pipeline, prompt, SIZE, 5 + i, "np", **given)[0]
        torch.testing.assert_close(torch.as_tensor(videos[i]), seen.float(), rtol=0, atol=1e-4)
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_sizes_and_images_of_a_batch_may_differ(folders: dict[str, Path]) -> None:
    """Each result is that of its request alone; sizes that no latent has are made larger and cut."""
    pipeline = SoraPipeline.from_pretrained(folders["clip"])
    torch.manual_seed(0)
    pictures = torch.rand(3, 1, 40, 50) * 2 - 1, torch.rand(3, 1, 32, 32) * 2 - 1
    requests = [image_to_video(p, x, n, pipeline.timing) for p, x, n in zip(PROMPTS, pictures, (6, 5), strict=True)]
    videos = pipeline(requests, generator=[1, 2], **SHOWN)
    assert [tuple(video.shape) for video in videos] == [(3, 6, 40, 50), (3, 5, 32, 32)]
    for i, request in enumerate(requests):
        (alone,) = pipeline(request, generator=1 + i, **SHOWN)
        torch.testing.assert_close(videos[i], alone, rtol=0, atol=1e-4)
    put_in_turn(pipeline.parts, torch.device("cpu", 0))
    torch.testing.assert_close(pipeline(requests, generator=[1, 2], **SHOWN), videos, rtol=0, atol=1e-5)


def test_what_it_was_not_trained_for_is_refused(folders: dict[str, Path]) -> None:
    pipeline = SoraPipeline.from_pretrained(folders["experts"])
    clip = torch.zeros(3, 9, 32, 32)
    expected = "keyframes: expected the first frame alone, as this transformer was trained, got"
    first = {0: clip[:, :1]}
    for request, got in (
        (text_to_video("blue", (5, 32, 32)), "none"),
        (video_to_video("blue", clip, 0.5), "none"),
        (extend("blue", clip, 4, pipeline.timing), "5 from frame 0"),
        (image_to_video("blue", clip, 9, pipeline.timing, last=clip), "1 from frame 0, 1 from frame 8"),
    ):
        with pytest.raises(ValueError, match=f"SoraPipeline: {expected} {got}"):
            pipeline(request, **SHOWN)
    anyway = pipeline.replaced(trained_keyframes="any")
    requests = [extend("blue", clip, 4, pipeline.timing), image_to_video("blue", clip, 9, pipeline.timing, last=clip)]
    requests += [Request("blue", (9, 32, 32), first, clip, 0.5)]
    assert all(video.isfinite().all() for video in anyway(requests, generator=0, **SHOWN))
    with pytest.raises(ValueError, match="keyframes: expected at least one, which this transformer goes on from, got none"):
        anyway("blue", (5, 32, 32), **SHOWN)
    with pytest.raises(ValueError, match=r"keyframes: expected the first frame and the last, as this .* got 1 from frame 0"):
        SoraPipeline.from_pretrained(folders["ends"])(Request("blue", (9, 32, 32), first), **SHOWN)
    ends = SoraPipeline.from_pretrained(folders["ends"])
    with pytest.raises(ValueError, match=r"size: expected 1 \+ 4 n frames where the last one is given, got 6"):
        ends(image_to_video("blue", clip, 6, ends.timing, last=clip), **SHOWN)
    with pytest.raises(ValueError, match=r"expected the first frame and the last, .* got 1 from frame 0"):
        ends(Request("blue", (1, 32, 32), first), **SHOWN)
    with pytest.raises(ValueError, match=r"trained_keyframes: expected one of none, first, first and last, any, got 'all'"):
        pipeline.replaced(trained_keyframes="all")
    with pytest.raises(ValueError, match=r"image_to_video: last: expected frames of \[32, 32\] .*, got \[32, 16\] and 9"):
        image_to_video("blue", clip, 9, pipeline.timing, last=clip[..., :16])
    with pytest.raises(ValueError, match="pipeline: expected a transformer without condition_channels"):
        DiffusionObjective(SoraPipeline.from_pretrained(folders["clip"]))


def test_parts_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = SoraPipeline.from_pretrained(folders["clip"])
    with pytest.raises(ValueError, match=r"image_encoder: expected None .*, got ImageEncoder"):
        pipeline.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"SoraPipeline: dit\.config\.image_dim: expected None, got 24"):
        pipeline.replaced(image_encoder=None)
    edit(folders["clip"] / "image_encoder" / "config.json", model_type="bert")
    with pytest.raises(ValueError, match=r"image_encoder.config\.json: expected model_type clip_vision_model, got bert"):
        SoraPipeline.from_pretrained(folders["clip"])
    edit(folders["clip"] / "image_encoder" / "config.json", model_type="clip_vision_model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"crop_size": {"height": 16, "width": 16}},
            r"images of 32 pixels a side, as the model takes, got \[1, 3, 16, 16\]",
        ),
        ({"size": {"shortest_edge": 200000}}, r"size: expected sides of 1 to 2048 pixels, got \{'shortest_edge': 200000\}"),
        ({"size": None}, r"size: expected sides of 1 to 2048 pixels, got None"),
    ],
)
def test_image_processors_that_do_not_fit(folders: dict[str, Path], tmp_path: Path, changes: dict, message: str) -> None:
    """Refused when they are opened; what would replace a method is not read."""
    path = changed(folders["clip"], tmp_path / "changed", lambda _: None) / "image_processor" / "preprocessor_config.json"
    edit(path, resize=3, preprocess="x")
    opened = ImageEncoder.from_pretrained(path.parent.parent / "image_encoder", path.parent)
    tokens = opened([torch.zeros(3, 1, 40, 50), torch.zeros(3, 1, 32, 32)])
    assert tokens.shape == (34, 24)
    edit(path, **changes)
    with pytest.raises(ValueError, match=message):
        ImageEncoder.from_pretrained(path.parent.parent / "image_encoder", path.parent)


def test_parts_that_are_not_there(folders: dict[str, Path], tmp_path: Path) -> None:
    for part in ("image_encoder", "image_processor"):
        folder = changed(folders["clip"], tmp_path / part, lambda target, part=part: shutil.rmtree(target / part))
        for read in (read_outline, SoraPipeline.from_pretrained):
            with pytest.raises(FileNotFoundError, match=f"expected a folder with {part}/"):
                read(folder)


def test_commands(folders: dict[str, Path], tmp_path: Path) -> None:
    image, video = tmp_path / "image.png", tmp_path / "video.mp4"
    write_video(image, torch.zeros(3, 1, 32, 48))
    write_video(video, torch.zeros(3, 9, 32, 48))
    short = ["--steps", STEPS, "--guidance", GUIDANCE, "--frames", 5]
    sora("animate", image, "blue", "--checkpoint", folders["clip"], *short, "--out", tmp_path / "clip")
    sora("animate", image, "blue", "--last", image, "--checkpoint", folders["ends"], *short, "--out", tmp_path / "ends")
    (path,) = (tmp_path / "ends").glob("00*.mp4")
    assert json.loads(read_comment(path))["last"] == str(image)
    requests = tmp_path / "requests.json"
    asked = {"task": "animate", "prompt": "blue", "image": "image.png", "frames": 5}
    requests.write_text(json.dumps([{**asked, "last": "video.mp4"}, {**asked, "last": "image.png"}]))
    sora("batch", requests, "--checkpoint", folders["ends"], *short[:4], "--out", tmp_path / "batch")
    assert len(list((tmp_path / "batch").glob("*.mp4"))) == 2
    message = sora("batch", requests, "--out", tmp_path / "none", code=2).replace("\n", " ")
    assert "batch: request 0: keyframes: expected whole token frames" in message
    assert "got clips of frames {0: 1, 4: 1}" in message
    for command, kind, expected in (
        (["generate", "blue"], "clip", "as this transformer was trained, got none; 'sora animate' takes an image"),
        (["generate", "blue", "--allow-untrained"], "clip", "expected the first frame alone"),
        (["restyle", video, "blue"], "clip", "got none"),
        (["extend", video, "blue"], "clip", "got 5 from frame 0; --allow-untrained does it anyway"),
        (["long", "blue"], "clip", "the first frame alone, as this transformer was trained, got any"),
        (["animate", image, "blue"], "ends", "the first frame and the last, as this transformer was trained, got 1 from frame 0"),
    ):
        message = sora(*command, "--checkpoint", folders[kind], "--out", tmp_path / "none", code=2).replace("\n", " ")
        assert expected in message, message
        assert "--checkpoint: keyframes: " in message
    message = sora("animate", image, "blue", "--last", image, "--out", tmp_path / "none", code=2)
    assert "--last: expected none, as the checkpoint takes no single last frame ('sora join' joins videos)" in message
    text = sora("info", "--checkpoint", folders["clip"])
    assert "CLIP, " in text
    assert "tasks          animate, batch\n" in text
    assert "generate, restyle, extend, join, loop, long, simulate: of keyframes it takes the first frame alone" in text
    assert read_outline(folders["ends"]).size == (81, 480, 832)
