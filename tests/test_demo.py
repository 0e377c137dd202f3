"""`sora demo`, `eval` and `gallery` with an untrained model: everything they promise is made and named in what they print."""

import json

import pytest
from typer.testing import CliRunner

from sora_model.cli import app
from sora_model.data import read_video
from sora_model.demo import WANTED
from sora_model.evaluate import MEASUREMENTS, long_videos
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
    tasks = [word for name in names for word in ("--task", name)]
    text = sora("eval", *tasks, "--count", 16, "--steps", 1, "--checkpoint", checkpoint, "--out", tmp_path / "eval.json")
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert len(figures) == len(names)
    assert all(f"{value:.3g}" in text for task in figures.values() for value, _ in task.values())
    assert all(len(pair) == 2 for task in figures.values() for pair in task.values())
    assert figures["image to video"]["given frames, PSNR in dB"][0] > 60, "pixels that are given come back as they are"


def test_gallery_makes_a_sheet_per_task(checkpoint, tmp_path):
    text = sora("gallery", "--task", "join", "--task", "simulate", "--steps", 1, "--checkpoint", checkpoint, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["join.png", "simulate.png"]
    assert all(str(path) in text for path in tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eval", "gallery"])
def test_unknown_tasks_are_named(command, tmp_path):
    result = CliRunner().invoke(app, [command, "--task", "dance", "--checkpoint", str(tmp_path)])
    assert result.exit_code == 2
    assert "--task: expected names out of text-to-video" in result.output.replace("\n", " ")
