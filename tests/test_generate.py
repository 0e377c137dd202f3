"""The commands that generate: what they say before and while they work, sizes, words, actions; errors of any depth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import invoke, sora
from PIL import Image

from sora_model import SoraPipeline
from sora_model.cli.actions import about
from sora_model.cli.run import errors_by_option
from sora_model.data import probe, read_comment, read_video, write_video
from sora_model.pipeline import clips
from sora_model.pipeline.checkpoint import read_outline

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--size", "2000001x4096x4096"], "--size: expected videos that the memory of"),
        (["generate", "x", "--size", "999999999x999999999x999999999"], "--size: expected videos that the memory of"),
        (["generate", "x", "--format", "gif", "--fps", "60"], "--fps: expected at most 50 for gif, got 60"),
        (["generate", "x", "--fps", "1001"], "--fps: expected at most 1000 for mp4, got 1001"),
        (["restyle", "{media}/fast.mp4", "x", "--format", "gif"], "--fps: expected at most 50 for gif, got 60"),
        (["generate", "x", "--scale", "1000"], "--scale: expected frames of at most 16384 pixels along a side, got 48000"),
        (
            ["generate", "x", "--checkpoint", "{media}/none"],
            "--checkpoint: expected a folder with model_index.json, got {media}/none",
        ),
        (
            ["caption", "{media}/a.mp4", "--checkpoint", "{media}"],
            "--checkpoint: expected a folder with model_index.json, got {media}",
        ),
        (["animate", "{media}/large.png", "x", "--size", "5x16x16"], "--size: expected HxW, such as 48x80, each at least 1"),
        (["animate", "{media}/large.png", "x", "--size", "0x16"], "--size: expected HxW, such as 48x80, each at least 1"),
        (
            ["animate", "{media}/large.png", "x", "--size", "16x16", "--max-pixels", "9"],
            "--max-pixels: expected none with --size, which says the size, got 9",
        ),
        (["animate", "{media}/large.png", "x", "--frames", "9" * 400], "--frames: expected videos that the memory of"),
        (["restyle", "{media}/a.mp4", "x", "--strength", "7"], "--strength: expected a number above 0 and up to 1, got 7"),
        (["extend", "{media}/large.png", "x", "--backward"], "VIDEO: expected at least 4 frames, got 1"),
        (["join", "{media}/a.mp4", "{media}/a.mp4", "--frames", "6"], "--frames: expected a multiple of 4, got 6"),
        (["join", "{media}/large.png", "{media}/large.png"], "LAST: expected at least 4 frames, got 1"),
        (["loop", "x", "--passage", "1"], "--passage: expected a multiple of 4, the frames of a latent frame, got 1"),
        (["long", "x", "--seconds", "-3"], "--seconds: expected at least one frame, which is 0.125, got -3"),
        (["long", "x", "--seconds", "1e9"], "--seconds: expected videos that the memory of"),
        (["long", "x", "--overlap", "3"], "--overlap: expected more than the 13 frames that a chunk sees, got 13"),
        (["simulate", "x", "--size", "5x16x16"], "--size: expected more than the 5 frames that a chunk sees, got 5"),
    ],
)
def test_the_option_that_is_wrong_is_named_before_a_model_is_loaded(args, message, media, unloaded, tmp_path) -> None:
    out = [] if args[0] == "caption" else ["--out", tmp_path / "new"]
    said = sora(*(arg.replace("{media}", str(media)) for arg in args), *out, code=2)
    assert f"error: {message.replace('{media}', str(media))}" in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if not line.startswith("warning: ")]) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("Storage size calculation overflowed with sizes=[3, 1, 2]"),
        RuntimeError("numel: integer multiplication overflow"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 37.69 GiB.\nGPU 0 has"),
        MemoryError(),
    ],
)
def test_memory_that_cannot_be_had_is_one_line(error, small, tmp_path, monkeypatch) -> None:
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(SoraPipeline, "__call__", fails)
    said = sora("generate", "x", "--checkpoint", small, "--out", tmp_path, code=2).splitlines()[-1]
    assert said.startswith("error: not enough memory for videos of this size and number: ")
    with pytest.raises(ValueError, match="out of memory: expected a smaller model or batch"), errors_by_option():
        fails()


@pytest.mark.parametrize("fault", ["shapes do not fit", "value cannot be converted to type int without overflow"])
def test_other_faults_of_a_program_are_not_hidden(fault, small, tmp_path, monkeypatch) -> None:
    def fails(*_, **__):
        raise RuntimeError(fault)

    monkeypatch.setattr(SoraPipeline, "__call__", fails)
    with pytest.raises(RuntimeError, match=fault):
        sora("generate", "x", "--checkpoint", small, "--out", tmp_path)
    with pytest.raises(RuntimeError, match=fault), errors_by_option():
        fails()


@pytest.mark.parametrize("package", ["typer", "rich", "av", "diffusers"])
def test_without_the_extra_it_says_what_to_install(package, tmp_path) -> None:
    code = f"import sys\nsys.modules[{package!r}] = None\nsys.argv = ['sora', 'generate', 'x']\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}from sora_model.cli import app\napp()"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {package}")
    assert done.stderr.endswith(" is not installed, which commands need: pip install 'sora_kernels[model]'\n")


def test_sizes_of_inputs(small, media, tmp_path) -> None:
    """Scaled down to what the checkpoint is for, or as asked; nothing of it in silence."""
    common = ["x", "--checkpoint", small, "--steps", 1, "--out", tmp_path]
    said = sora("animate", media / "large.png", *common, "--frames", 2)
    assert "large.png: frames of 120x90 are scaled down to 36x27, --max-pixels takes more" in said
    assert probe(tmp_path / "00-x-seed0.mp4") == (2, 36, 28)
    assert read_outline(small).enlarged * 16 * 16 >= 36 * 27
    said = sora("animate", media / "large.png", *common, "--frames", 2, "--size", "16x40")
    assert "scaled down" not in said
    assert probe(tmp_path / "01-x-seed0.mp4") == (2, 16, 40)
    sora("restyle", media / "b.mp4", *common, "--size", "24x24")
    assert probe(tmp_path / "02-x-seed0.mp4") == (4, 24, 24)
    sora("animate", media / "large.png", *common, "--frames", 1, "--max-pixels", 99999)
    assert probe(tmp_path / "03-x-seed0.png") == (1, 120, 90)


def test_a_joined_video_has_the_size_of_the_first(small, media, tmp_path) -> None:
    common = ["x", "--checkpoint", small, "--steps", 1, "--out", tmp_path, "--frames", 2]
    said = sora("join", media / "a.mp4", media / "b.mp4", *common)
    assert f"b.mp4: frames of 16x24 are resized to 16x16, as {media}/a.mp4 has them" in said
    assert probe(tmp_path / "00-x-seed0.mp4") == (10, 16, 16)
    made, last = read_video(tmp_path / "00-x-seed0.mp4")[0], read_video(media / "b.mp4")[0]
    assert (made[:, -1].int() - last[:, -1, :, 4:20].int()).abs().float().mean() < 12, "cut, not pressed together"
    assert "resized" not in sora("join", media / "a.mp4", media / "a.mp4", *common)
    requests = tmp_path / "requests.json"
    requests.write_text(
        json.dumps([{"task": "join", "prompt": "", "first": str(media / "b.mp4"), "last": str(media / "a.mp4"), "frames": 2}])
    )
    assert "a.mp4: frames of 16x16 are resized to 16x24" in sora("batch", requests, *common[1:-2])


def test_what_is_to_be_made_is_said_first(small, tmp_path) -> None:
    said = sora("generate", "x", "y", "--checkpoint", small, "--steps", 1, "--out", tmp_path, "--seed", 3, "--size", "3x16x17")
    assert said.splitlines()[0] == "2 videos of 3x16x17, seed 3: 36 tokens at once, about 0.5 GB of memory"


def test_unknown_words_are_named(tmp_path, monkeypatch) -> None:
    """One line, of any prompt; words that were learned, marks and other checkpoints are not complained of."""
    monkeypatch.setattr(SoraPipeline, "__call__", lambda self, requests, **_: [torch.zeros(3, *one.size) for one in requests])
    common = ["--out", tmp_path, "--size", "5x16x16"]
    said = sora("generate", "an astronaut, in red", "a purple Astronaut", *common, "--negative", "blurry")
    assert "warning: words that the checkpoint has not learned: astronaut, blurry; 'sora vocabulary' lists what it has\n" in said
    assert "warning" not in sora("generate", "A red circle moves right.", *common)


def test_an_unknown_word_is_named_once(tmp_path, monkeypatch) -> None:
    """Not again at every action of a simulation."""
    monkeypatch.setattr(SoraPipeline, "__call__", lambda self, requests, **_: [torch.zeros(3, *one.size) for one in requests])
    actions = [word for action in ("flies", "sits", "flies") for word in ("--action", action)]
    options = ["--out", tmp_path, "--negative", "blurry", "--size", "9x16x16"]
    said = sora("simulate", "an astronaut moves right", *actions, *options)
    named = [line.partition("learned: ")[2].partition(";")[0] for line in said.splitlines() if line.startswith("warning: words")]
    assert named == ["astronaut, blurry", "flies", "sits"]


def test_the_vocabulary_is_listed(small) -> None:
    words = sora("vocabulary").split()
    assert {"red", "circle", "moves", "background"} <= set(words)
    assert "astronaut" not in words
    assert words == sorted(words)
    assert "--checkpoint: expected one with text_encoder/vocab.txt, got " in sora("vocabulary", "--checkpoint", small, code=2)


def test_a_vae_that_cannot_code_the_input_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(SoraPipeline, "__call__", lambda self, requests, **_: [torch.zeros(3, *one.size) for one in requests])
    torch.manual_seed(0)
    noise = write_video(tmp_path / "noise.png", 2 * torch.rand(3, 1, 48, 48) - 1)
    plain = write_video(tmp_path / "plain.png", torch.full((3, 1, 48, 48), -0.5))
    said = sora("animate", noise, "a red circle", "--out", tmp_path / "out")
    assert "noise.png: the checkpoint's VAE gives back its first frame with a PSNR of" in said
    assert "PSNR" not in sora("animate", plain, "a red circle", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("present", "action", "prompt"),
    [
        ("a red circle moves right", "moves up", "a red circle moves up"),
        ("a red cross moves right", "stays still", "a red cross stays still"),
        ("a red circle moves right", "it moves up", "a red circle moves up"),
        ("a red circle moves right", "a blue star moves up", "a blue star moves up"),
        ("a red circle moves right", "The circle grows", "The circle grows"),
        ("a cat", "sits", "a cat sits"),
        ("red circle moves", "red circle stays", "red circle stays"),
        ("a cat is asleep", "jumps.", "a cat jumps."),
    ],
)
def test_an_action_keeps_the_present_object(present, action, prompt) -> None:
    assert about(present, action) == prompt


def test_a_simulation_shows_what_an_action_looks_like(small, tmp_path) -> None:
    args = ["simulate", "a cat moves left", "--checkpoint", str(small), "--out", str(tmp_path), "--steps", "1", "--size", "4x16x16"]
    result = invoke(*args, typed="moves up\na dog sits\nit sleeps\n\n")
    assert "'moves up' is about the present object, as in 'a cat moves up'" in result.output
    actions = ["a cat moves up", "a dog sits", "a dog sleeps"]
    assert [line for line in result.output.splitlines() if line.startswith("action: ")] == [f"action: {one}" for one in actions]
    (made,) = tmp_path.glob("*.mp4")
    assert json.loads(read_comment(made))["actions"] == actions


def test_frames_that_are_enlarged_count_as_they_become(small, media, tmp_path) -> None:
    options = ["extend", media / "a.mp4", "x", "--frames", 2, "--size", "160x160", "--checkpoint", small, "--out", tmp_path / "out"]
    said = sora("--limit", "clip-pixels=50000", *options, code=2)
    assert "a.mp4: with frames of 160x160: expected at most 50000 pixels, got 102400; " in said


def test_a_file_that_is_too_slow_is_refused_before_the_work(unloaded, tmp_path) -> None:
    frames = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in (0, 200)]
    frames[0].save(tmp_path / "slow.gif", save_all=True, append_images=frames[1:], duration=655_350)
    said = sora("restyle", tmp_path / "slow.gif", "x", "--out", tmp_path / "out", code=2)
    assert "error: --fps: expected at least 0.01, got 0.0015" in said


def test_a_strip_is_scaled_without_what_is_cut_off() -> None:
    """Of a square frame brought to a strip, its middle is shown; whole it would have 16384 x 16384 pixels."""
    video = torch.linspace(-1, 1, 64).expand(3, 8, 64, 64)
    made = clips.fitted(video.mT, 1, 16384)
    assert made.shape == (3, 8, 1, 16384)
    torch.testing.assert_close(made, torch.zeros_like(made), rtol=0, atol=1e-6)
    made = clips.fitted(video, 16384, 4096)
    torch.testing.assert_close(made[:, 0, 5, ::256], video[:, 0, 0, 24:40], rtol=0, atol=0.02)
    assert torch.equal(clips.fitted(video, 64, 64), video)


def test_frames_of_one_row_are_scaled_within_max_pixels(tmp_path) -> None:
    """A file of a few hundred bytes, whose longer side is nearly all pixels that it has."""
    Image.new("RGB", (65535, 1)).save(tmp_path / "row.png")
    assert read_video(tmp_path / "row.png", max_pixels=2304)[0].shape == (3, 1, 1, 2304)
    Image.new("RGB", (1, 9)).save(tmp_path / "column.png")
    assert read_video(tmp_path / "column.png", max_pixels=5)[0].shape == (3, 1, 5, 1)


def test_a_side_that_no_file_can_have(media, unloaded, tmp_path) -> None:
    said = sora("animate", media / "a.mp4", "a", "--size", "99999999x1", "--out", tmp_path / "out", code=2)
    assert "a.mp4: with frames of 99999999x1: expected at most 16384 pixels along a side" in said


def test_windows_and_step_cache(tmp_path: Path) -> None:
    """Files carry them, and what the cache left out is said."""
    fast = ["--window", "1x2x2", "--step-cache", "0.3", "--out", tmp_path / "fast"]
    out = sora("generate", "a red circle", "--size", "5x32x32", *fast)
    assert " passes of samples without most blocks; when they ran again, what they add had changed by " in out
    (path,) = (tmp_path / "fast").glob("00*.mp4")
    settings = json.loads(read_comment(path))
    assert (settings["window"], settings["step_cache"]) == ("1x2x2", 0.3)
    sora("generate", "a red circle", "--size", "5x32x32", "--out", tmp_path / "whole")
    fast_one, whole = (read_video(next((tmp_path / name).glob("00*.mp4")))[0] for name in ("fast", "whole"))
    assert not torch.equal(fast_one, whole)
    assert "--window: expected TxHxW, such as 5x9x9, got '5x9'" in sora("generate", "a", "--window", "5x9", code=2)
    assert "--offload: expected a GPU as --device" in sora("generate", "a", "--offload", code=2)
    with pytest.raises(ValueError, match="SoraPipeline: window: expected three numbers of tokens"):
        SoraPipeline.from_pretrained()("a red circle", window=(5, 0, 9))
