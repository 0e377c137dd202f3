"""`sora demo`, `eval` and `gallery` with an untrained model: everything they promise is made and named in what they print."""

import json

import pytest
from typer.testing import CliRunner

from sora_model.cli import app
from sora_model.data import World, WorldConfig, read_video
from sora_model.demo import WANTED
from sora_model.evaluate import MEASUREMENTS, Judge, extensions, long_videos
from sora_model.pipeline import SoraPipeline


def sora(*args) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.replace("\n", "")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "untrained"
    SoraPipeline.from_preset("tiny", patch=(1, 16, 16), size=(13, 48, 48)).save_pretrained(folder)
    return folder


def test_demo_makes_what_it_promises(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sora_model.demo.STEPS", 2)
    text = sora("demo", "--out", tmp_path, "--checkpoint", checkpoint)
    made = [*sorted((tmp_path / "first").iterdir()), *sorted((tmp_path / "videos").iterdir()), tmp_path / "tasks.png"]
    assert len(made) == 2 + len(WANTED) + 1 + 1, made
    assert all(str(path) in text for path in made)
    shapes = [tuple(read_video(path)[0].shape[1:]) for path in made[2:] if path.suffix == ".mp4"]
    assert shapes == [(t, 4 * h, 4 * w) for *_, (t, h, w) in WANTED if t > 1]
    for peer in ("SDPA per sample", "3D RoPE / torch", "Conv3d"):
        assert peer in text


def test_eval_judges_every_task_but_captions(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(MEASUREMENTS, "long", lambda judge: long_videos(judge, 26))
    names = [name for name in MEASUREMENTS if name != "caption"]
    text = sora("eval", "--count", 16, "--steps", 1, "--checkpoint", checkpoint, "--out", tmp_path / "eval.json")
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert len(figures) == len(names)
    assert "left out, as the checkpoint cannot: caption" in text
    assert (tmp_path / "eval.md").read_text().count("\n| ") > len(names)
    assert all(f"{value:.3g}" in text for task in figures.values() for value, _ in task.values())
    assert all(len(pair) == 2 for task in figures.values() for pair in task.values())
    assert figures["image to video"]["given frames, PSNR in dB"][0] > 60, "pixels that are given come back as they are"


def test_gallery_makes_a_sheet_per_task(checkpoint, tmp_path):
    text = sora("gallery", "--task", "join", "--task", "simulate", "--steps", 1, "--checkpoint", checkpoint, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["join.png", "simulate.png"]
    assert all(str(path) in text for path in tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eval", "gallery"])
def test_tasks_that_cannot_be_are_named(command, checkpoint, tmp_path):
    for task, message in (
        ("dance", "--task: expected names out of text-to-video"),
        ("caption", "--task: expected tasks that this checkpoint can do"),
    ):
        result = CliRunner().invoke(
            app, [command, "--task", task, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "x.json")]
        )
        assert result.exit_code == 2
        assert message in result.output.replace("\n", " ")
    result = CliRunner().invoke(app, ["eval", "--checkpoint", str(checkpoint), "--out", str(tmp_path)])
    assert "--out: expected a file that ends in .json" in result.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_measurements_fail_where_they_should(checkpoint):
    """A model that makes nothing out of the given frames fails; the world itself passes."""
    from sora_model.evaluate import _names, _says_motion

    scene = World(WorldConfig.studio()).sample(0, color="green", shape="star", motion="stay")
    other = "A large red ring starts at the left and moves right. The background is dark green. The camera stays still."
    assert not _says_motion(other, scene)
    assert not _names(other, "green")
    assert _says_motion(scene.caption(True, 13), scene)
    assert not _says_motion("a green star moves up and left", World().sample(0, color="green", shape="star", motion="up"))


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
        assert low <= figures["motion"][0] <= high
    assert MEASUREMENTS["extend"](judge).missed
