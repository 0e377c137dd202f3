"""`sora demo`, `eval` and `gallery` with an untrained model: everything they promise is made and named in what they print."""

import json
import math

import pytest
import torch
from command_line import refused, sora

from sora_model import SoraPipeline
from sora_model.codec.vae import VideoVAE
from sora_model.data import read_video
from sora_model.world.config import WorldConfig
from sora_model.world.demo import WANTED
from sora_model.world.evaluate import MEASUREMENTS, Judge, extensions, long_videos
from sora_model.world.figures import Figure, jump, names_word, says_motion
from sora_model.world.world import World


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "untrained"
    SoraPipeline.from_preset("tiny", patch=(1, 16, 16), size=(13, 48, 48)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["pixels", "tubelets", "eight frames a latent"])
def any_checkpoint(request, checkpoint, tmp_path_factory):
    """Pipelines whose token frames are one, two, and one and then eight frames."""
    if request.param == "pixels":
        return checkpoint
    folder = tmp_path_factory.mktemp("other") / "untrained"
    if request.param == "tubelets":
        SoraPipeline.from_preset("tiny", patch=(2, 16, 16), size=(14, 48, 48)).save_pretrained(folder)
    else:
        vae = VideoVAE.small(latent_channels=4, channels=(8, 8, 8, 8), temporal=8)
        SoraPipeline.from_preset("tiny", patch=(1, 2, 2), codec=vae, size=(25, 48, 48)).save_pretrained(folder)
    return folder


def test_demo_makes_what_it_promises(any_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sora_model.world.demo.STEPS", 2)
    text = sora("demo", "--out", tmp_path, "--checkpoint", any_checkpoint).replace("\n", "")
    made = [*sorted((tmp_path / "first").iterdir()), *sorted((tmp_path / "videos").iterdir()), tmp_path / "tasks.png"]
    assert len(made) == 2 + len(WANTED) + 1 + 1, made
    assert all(str(path) in text for path in made)
    shapes = [tuple(read_video(path)[0].shape[1:]) for path in made[2:] if path.suffix == ".mp4"]
    assert shapes == [(t, 4 * h, 4 * w) for *_, (t, h, w) in WANTED if t > 1]
    for peer in ("SDPA per sample", "3D RoPE / torch", "Conv3d"):
        assert peer in text


def test_demo_replaces_all_its_files_or_none(checkpoint, tmp_path, monkeypatch):
    """With --overwrite, those of the same seed."""
    monkeypatch.setattr("sora_model.world.demo.STEPS", 1)
    monkeypatch.setattr("sora_model.world.demo.kernel_table", lambda: "")
    sora("demo", "--out", tmp_path, "--checkpoint", checkpoint, "--seed", 3)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert tmp_path / "first" / "00-a-red-circle-moves-right-seed3.mp4" in files
    assert sum("-seed" in path.name for path in files) == 1 + len(WANTED)
    sora("demo", "--out", tmp_path, "--checkpoint", checkpoint, "--seed", 3, "--overwrite")
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert again.keys() == files.keys()
    assert all(again[path] > files[path] for path in files)


def test_eval_judges_every_task_but_captions(any_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(MEASUREMENTS, "long", lambda judge: long_videos(judge, 26))
    names = [name for name in MEASUREMENTS if name != "caption"]
    text = sora("eval", "--count", 16, "--steps", 1, "--checkpoint", any_checkpoint, "--out", tmp_path / "eval.json").replace(
        "\n", ""
    )
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert len(figures) == len(names)
    assert "left out, as the checkpoint cannot: caption" in text
    assert (tmp_path / "eval.md").read_text().count("\n| ") > len(names)
    assert all(f"{figure['value']:.3g}" in text for task in figures.values() for figure in task.values())
    if SoraPipeline.from_pretrained(any_checkpoint).codec.compression == (1, 1, 1):
        assert figures["image to video"]["given frames, PSNR in dB"]["value"] > 60, "pixels that are given come back as they are"


def test_gallery_makes_a_sheet_per_task(checkpoint, tmp_path):
    text = sora(
        "gallery", "--task", "join", "--task", "simulate", "--steps", 1, "--checkpoint", checkpoint, "--out", tmp_path
    ).replace("\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["join.png", "simulate.png"]
    assert all(str(path) in text for path in tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eval", "gallery"])
def test_tasks_that_cannot_be_are_named(command, checkpoint, tmp_path):
    for task, message in (
        ("dance", "--task: expected names out of text-to-video"),
        ("caption", "--task: expected tasks that this checkpoint can do"),
    ):
        assert message in refused(command, "--task", task, "--checkpoint", checkpoint, "--out", tmp_path / "x.json")
    assert "--out: expected a file that ends in .json" in refused("eval", "--checkpoint", checkpoint, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_jumps_are_told_in_typical_changes():
    steps = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.1, 0.1])
    video = torch.cat([torch.zeros(1), steps.cumsum(0)])[None, :, None, None].expand(3, -1, 4, 4) - 0.5
    assert jump(video, 4) == pytest.approx(5)
    assert jump(video, 3) == pytest.approx(1)
    assert jump(video, 2, 4) == pytest.approx(5)
    assert jump(video, 1, 3) == pytest.approx(1)
    assert jump(0.01 * video, 4) == pytest.approx(0.25), "changes below a hundredth of the range are noise"


def test_figures_hold_or_are_missed():
    assert [Figure(0.9, 0.9).verdict, Figure(0.89, 0.9).verdict] == ["holds", "missed"]
    assert [Figure(1.0, at_most=1).verdict, Figure(1.1, at_most=1).verdict] == ["holds", "missed"]
    assert [Figure(math.nan, 0.9).verdict, Figure(math.nan, at_most=1).verdict] == ["missed", "missed"]
    assert Figure(1.0).verdict == Figure(1.0).bound == ""
    assert Figure(30, 30.0).bound == "at least 30"
    assert Figure(30, at_most=1.5).bound == "at most 1.5"


def test_captions_are_judged_by_their_first_sentence():
    scene = World(WorldConfig.studio()).sample(0, color="green", shape="star", motion="stay")
    other = "A large red ring starts at the left and moves right. The background is dark green. The camera stays still."
    assert not says_motion(other, scene)
    assert not names_word(other, "green")
    assert says_motion(scene.caption(True, 13), scene)
    assert not says_motion("a green star moves up and left", World().sample(0, color="green", shape="star", motion="up"))


def test_an_extension_that_stands_still_is_not_right(checkpoint, monkeypatch):
    pipeline = SoraPipeline.from_pretrained(checkpoint)
    judge = Judge(pipeline, 64)
    wanted = {scene.caption(frames=13): scene for scene in judge.scenes(16, 3000)}

    def truth(self, requests):
        return [wanted[request.prompt].render(*request.size) for request in requests]

    def frozen(self, requests):
        return [video[:, 4:5].expand(-1, video.shape[1], -1, -1) for video in truth(self, requests)]

    for made, low, high in ((truth, 0.95, 1.0), (frozen, 0.0, 0.5)):
        monkeypatch.setattr(Judge, "run", made)
        figures = extensions(judge).figures
        assert low <= figures["motion"].value <= high
    assert MEASUREMENTS["extend"](judge).missed
