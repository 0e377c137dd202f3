"""What the command line refuses: everything that can be, in one line that names the option, before a model is loaded."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from command_line import invoke, refused

from sora_model import SoraPipeline
from sora_model.cli.app import check_folder, main, say
from sora_model.data import read_video, write_video

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4", torch.zeros(3, 4, 16, 16))
    write_video(folder / "b.mp4", torch.zeros(3, 4, 16, 24))
    write_video(folder / "a.png", torch.zeros(3, 1, 16, 16))
    (folder / "a.txt").write_text("a red circle")
    (folder / "file").write_text("mine")
    return folder


def test_letters_that_a_terminal_lacks(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    main()
    say("a \u0451\u0436")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"a \\u0451\\u0436\n"


TASKS = {
    "generate": ["x"],
    "animate": ["{media}/a.png", "x"],
    "restyle": ["{media}/a.mp4", "x"],
    "extend": ["{media}/a.mp4", "x"],
    "join": ["{media}/a.mp4", "{media}/a.mp4"],
    "loop": ["x"],
    "long": ["x"],
    "simulate": ["x", "--action", "y"],
    "batch": ["{media}/requests.json"],
    "gallery": [],
    "demo": [],
}
RUNS = {"train": [], "train-vae": [], "train-captioner": ["--checkpoint", "{media}/model"], "scaling": []}


def filled(args, media: Path) -> list[str]:
    return [str(arg).replace("{media}", str(media)) for arg in args]


@pytest.mark.parametrize("command", [*TASKS, *RUNS])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{media}/file", "expected a folder, got the file {media}/file"),
        ("{media}/file/sub/deep", "expected a folder, got the file {media}/file"),
        ("{media}/link", "expected a folder, got the file {media}/link"),
        ("/proc/nothing", "expected a folder that can be written to, got /proc/nothing: "),
        ("{media}/" + 300 * "x", "xxx: File name too long"),
    ],
)
def test_an_output_that_cannot_be_is_refused_at_once(command, place, message, media, unloaded) -> None:
    if not (media / "link").is_symlink():
        (media / "link").symlink_to("nowhere/at/all")
    (media / "requests.json").write_text('[{"prompt": "x"}]')
    before = sorted(media.iterdir())
    option = [place] if command in RUNS else ["--out", place]
    text = refused(command, *filled([*option, *{**TASKS, **RUNS}[command]], media))
    assert f"error: {'OUT' if command in RUNS else '--out'}: " in text
    assert message.replace("{media}", str(media)) in text
    assert sorted(media.iterdir()) == before
    assert (media / "file").read_text() == "mine"


def test_a_folder_without_permission_is_refused(tmp_path) -> None:
    """As another user than root, who may do everything."""
    (tmp_path / "locked").mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match=r"--out: expected a folder that can be written to, got .*new: Permission denied"):
            check_folder(tmp_path / "locked" / "new")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["00-x.mp4", "contact_sheet.png"])
def test_a_folder_in_the_place_of_a_file_is_refused(name, tmp_path, unloaded) -> None:
    (tmp_path / name).mkdir()
    assert f"--out: expected a folder for files, got one with the folder {tmp_path / name}" in refused(
        "generate", "x", "--out", tmp_path
    )
    (tmp_path / "eval.md").mkdir()
    assert f"--out: expected a file, got the folder {tmp_path}/eval.md" in refused("eval", "--out", tmp_path / "eval.json")
    (tmp_path / "first").write_text("mine")
    assert f"--out: expected a folder, got the file {tmp_path}/first" in refused("demo", "--out", tmp_path)


def test_a_study_looks_for_runs_before_the_first(small, tmp_path, unloaded) -> None:
    (tmp_path / "run-6x256").mkdir()
    (tmp_path / "run-6x256" / "training.safetensors").write_bytes(b"of someone")
    assert "run-6x256/training.safetensors: expected the state of a run" in refused("scaling", tmp_path)


def test_checking_a_folder_leaves_no_trace(tmp_path) -> None:
    check_folder(tmp_path / "a" / "b")
    check_folder(tmp_path)
    assert not list(tmp_path.iterdir())


NO_CAPTIONER = "captioner: expected a checkpoint with a captioner, got one without"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--size", "big"], "--size: expected TxHxW, such as 8x32x48, got 'big'"),
        (["generate", "x", "--size", "1x0x8"], "--size: expected (T, H, W), each at least 1, got (1, 0, 8)"),
        (
            ["generate", "x", "--size", "9x32x32", "--draft", "32"],
            "--draft: expected fewer pixels than the shorter side",
        ),
        (["generate", "x", "--scheduler", "magic"], "--scheduler: expected one of euler, heun, unipc, dpm++, got 'magic'"),
        (["generate", "x", "--guidance", "nan"], "--guidance: expected a finite number, got nan"),
        (["generate", "x", "--fps", "inf"], "--fps: expected a finite number, got inf"),
        (["generate", "x", "--guidance", "1e29"], "--guidance: expected at most 1000, got 1e+29"),
        (["generate", "x", "--count", "1" + 20 * "0"], "'--count': "),
        (["generate", "x", "--out", ""], "'--out': expected a path, got ''"),
        (["generate", "x", "--checkpoint", ""], "'--checkpoint': expected a path, got ''"),
        (["caption", ""], "expected a path, got ''"),
        (
            ["generate", "x", "--out", "{media}/new/" + 300 * "a"],
            "--out: expected a folder that can be written to, got {media}/new/a",
        ),
        (["generate", "ok", "\udcff"], "PROMPTS: expected text in UTF-8, got '\\udcff'"),
        (["expand", "\udcff"], "PROMPTS: expected text in UTF-8, got '\\udcff'"),
        (["generate", "x", "--negative", "\udcff"], "--negative: expected text in UTF-8, got '\\udcff'"),
        (["loop", "x", "--size", "1x16x16"], "--size: expected a clip of at least 4 frames, got 1"),
        (["generate", "x", "--size", "999999999x1x1"], "--size: expected videos for which the memory of"),
        (["generate", "x", "--size", "1x20000x8"], "--size: expected frames of at most 16384 pixels along a side, got 20000"),
        (["caption", "{media}/pipe.mp4"], "cannot read {media}/pipe.mp4: expected a file, got a pipe or a device"),
        (["animate", "{media}/pipe.mp4", "x"], "cannot read {media}/pipe.mp4: expected a file, got a pipe or a device"),
        (["generate", "x", "--seed", "99999999999999999999"], "9223372036854775808"),
        (["generate", "x", "--negative", "y", "--guidance", "1"], "--negative: expected none with --guidance 1, which has no use"),
        (
            ["generate", "x", "--guidance-from", "0.5", "--guidance", "1"],
            "--guidance-from: expected none with --guidance 1, got 0.5",
        ),
        (["generate", "x", "--max-pixels", "99"], "--max-pixels: expected none where no file is read, got 99"),
        (["generate", "x", "--steps", "99999999999999999999"], "'--steps': "),
        (["long", "a", "b", "c", "--seconds", "0.7"], "PROMPTS: expected at most 1, one for each chunk of --seconds 0.7, got 3"),
        (["animate", "{media}/none.png", "x"], "none.png: it does not exist"),
        (["restyle", "{media}/a.mp4", "x", "--strength", "0"], "strength: expected a number above 0 and up to 1, got 0"),
        (["loop", "x", "--size", "6x16"], "--size: expected TxHxW"),
        (["long", "x", "--seconds", "0"], "--seconds: expected at least one frame"),
        (["long", "x", "--seconds", "1e29"], "--seconds: expected at most 1e+09, got 1e+29"),
        (["long", "x", "--seconds", "nan"], "--seconds: expected a finite number, got nan"),
        (["simulate", "x", "--size", "6x16"], "--size: expected TxHxW"),
        (["caption", "{media}/none.mp4"], "none.mp4: it does not exist"),
        (
            ["generate", "x", "--expand", "--checkpoint", "{media}/words"],
            NO_CAPTIONER,
        ),
        (
            ["caption", "{media}/a.mp4", "--checkpoint", "{media}/words"],
            NO_CAPTIONER,
        ),
        (
            ["recaption", "{media}", "--checkpoint", "{media}/words"],
            NO_CAPTIONER,
        ),
        (
            ["recaption", "{media}/none"],
            "FOLDER: expected a folder of videos and images, got {media}/none (there",
        ),
        (["expand", "x", "--checkpoint", "{media}/words"], NO_CAPTIONER),
        (
            ["train", "{media}/new", "--data", "{media}/file"],
            "--data: expected a folder of videos and images, got {media}/file",
        ),
        (["train", "{media}/new", "--model", "XXL"], "--model: expected one of tiny, XS, S, B, L, XL, got 'XXL'"),
        (["train", "{media}/new", "--patch", "8x8"], "--patch: expected TxHxW, such as 8x32x48, got '8x8'"),
        (["train", "{media}/new", "--size", "8x8"], "--size: expected TxHxW"),
        (["train", "{media}/new", "--detailed", "2"], "--detailed: expected a number from 0 to 1, got 2"),
        (["train", "{media}/new", "--per-frame", "2"], "--per-frame: expected"),
        (["train", "{media}/new", "--learning-rate", "nan"], "--learning-rate: expected a finite number, got nan"),
        (["train", "{media}/new", "--learning-rate", "1e300"], "--learning-rate: expected a number of at most 1e+30, got 1e+300"),
        (["train", "{media}/new", "--data", ""], "--data: expected a folder or a source, got ''"),
        (["train", "{media}/new", "--steps", "0"], "steps: expected a number above 0, got 0"),
        (["train", "{media}/new", "--resume"], "training.safetensors, which is not there: nothing was saved"),
        (["train", "{media}/new", "--accumulation", "9" * 30], "--accumulation: expected at most 4096, got 999"),
        (["train", "{media}/new", "--patch", ""], "--patch: expected TxHxW, such as 8x32x48, got ''"),
        (["train", "{media}/new", "--device", "cuda:" + "9" * 5000], "--device: expected cpu, cuda or cuda:N, got 'cuda:999"),
        (["train", "{media}/new", "--device", "cuda:\u0663"], "--device: expected cpu, cuda or cuda:N, got 'cuda:"),
        (["train-vae", "{media}/new", "--ema", "2"], "--ema: expected a number from 0 to 1, got 2"),
        (
            ["train-captioner", "{media}/new", "--checkpoint", "{media}"],
            "expected an empty folder or one with a checkpoint to replace",
        ),
        (
            ["train-captioner", "{media}/words/new", "--checkpoint", "{media}/words", "--data", "world:simple"],
            "OUT: expected a folder that is neither --checkpoint nor in or around it, got {media}/words/new",
        ),
        (
            ["train-captioner", "{media}", "--checkpoint", "{media}/words", "--data", "world:simple"],
            "OUT: expected a folder that is neither --checkpoint nor in or around it, got {media}",
        ),
        (["export", "{media}/words", "{media}"], "expected an empty folder or one with a checkpoint to replace, got {media}"),
        (
            ["export", "{media}/words", "{media}/words"],
            "OUT: expected a folder that is neither CHECKPOINT nor in or around it, got",
        ),
        (
            ["export", "{media}/words", "{media}/words/dit", "--overwrite"],
            "OUT: expected a folder that is neither CHECKPOINT nor in",
        ),
        (["export", "{media}/words", "{media}/linked", "--overwrite"], "OUT: expected a folder that is neither CHECKPOINT nor in"),
        (
            ["export", "{media}/words", "{media}/linked/dit", "--overwrite"],
            "OUT: expected a folder that is neither CHECKPOINT nor in",
        ),
        (["export", "{media}/words", "{media}/file/x"], "OUT: expected a folder, got the file {media}/file"),
        (["eval", "--out", "{media}/figures.txt"], "--out: expected a file that ends in .json, got {media}/figures.txt"),
        (["eval", "--out", "{media}/file/x.json"], "--out: expected a folder, got the file {media}/file"),
        (["eval", "--task", "dance"], "--task: expected names out of "),
        (["gallery", "--task", "dance", "--out", "{media}/new"], "--task: expected names out of "),
        (["scaling", "{media}/new", "--compute", "inf"], "--compute: expected a finite number, got inf"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_model_is_loaded(args, message, media, unloaded) -> None:
    (media / "words").mkdir(exist_ok=True)
    index = {"_class_name": "SoraPipeline", "size": [4, 16, 16], "vae": False, "captioner": False}
    (media / "words" / "model_index.json").write_text(json.dumps(index))
    if not (media / "linked").is_symlink():
        (media / "linked").symlink_to("words")
        os.mkfifo(media / "pipe.mp4")
    out = [] if "--out" in args or args[0] not in TASKS else ["--out", media / "new"]
    assert message.replace("{media}", str(media)) in refused(*filled(args, media), *out)
    assert not (media / "new").exists()


def test_a_run_with_another_seed_is_not_gone_on_with(small, tmp_path, monkeypatch) -> None:
    """Which is found before a model is loaded."""
    options = [tmp_path / "run", "--size", "2x16x16", "--tokens", 32]
    assert invoke("train", *options, "--start", small, "--steps", 1).exit_code == 0

    def loaded(*_, **__):
        raise AssertionError("a model was loaded before everything was checked")

    monkeypatch.setattr(SoraPipeline, "from_pretrained", loaded)
    for more, message in ((["--seed", 1], "seed: expected 0"), (["--accumulation", 2], "accumulation x processes: expected 1")):
        assert f"{message}, as the run began with, got" in refused("train", *options, "--steps", 2, "--resume", *more)


def test_a_run_goes_on_with_what_it_learns_from(small, media, tmp_path) -> None:
    """Where it began with files, and they are not named again, it must not learn from a world."""
    common = ["--start", small, "--tokens", 32]
    for name, began, other, message in (
        ("files", ["--data", media], ["--size", "2x16x16"], f"--data: expected {media}, as the run began with, got world:simple"),
        ("world", ["--size", "2x16x16"], ["--data", media], f"--data: expected world:simple, as the run began with, got {media}"),
    ):
        assert invoke("train", tmp_path / name, *common, *began, "--steps", 1).exit_code == 0
        assert message in refused("train", tmp_path / name, *common, *other, "--steps", 2, "--resume")


def test_a_clip_that_is_too_long_to_be_held_is_refused(media, unloaded) -> None:
    message = "a.mp4: expected at most 3 frames of 16x16, got 4; cut it, or take a smaller --max-pixels"
    line = refused("--limit", f"clip-pixels={3 * 16 * 16}", "restyle", media / "a.mp4", "x", "--out", media / "new")
    assert message in line
    assert "'sora --limit clip-pixels=1024 COMMAND ...' raises the limit" in line


def test_names_with_a_colon(small, media, tmp_path) -> None:
    """Which libraries of videos take for a protocol."""
    out = tmp_path / "run:1"
    result = invoke("generate", "clip: 1", "--checkpoint", small, "--out", out, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["00-clip-1-seed0.mp4", "contact_sheet.png"]
    assert read_video(out / "00-clip-1-seed0.mp4")[0].shape[1] == 2
    run = tmp_path / "train:1"
    assert invoke("train", run, "--start", small, "--size", "2x16x16", "--tokens", 32, "--steps", 1).exit_code == 0
    again = invoke("generate", "x", "--checkpoint", run / "checkpoint", "--out", out, "--steps", 1)
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("args", "there"),
    [
        (["eval", "--out", "{tmp}/figures.json"], "figures.md"),
        (["gallery", "--out", "{tmp}"], "loop.png"),
        (["demo", "--out", "{tmp}"], "tasks.png"),
        (["scaling", "{tmp}"], "scaling.json"),
        (["scaling", "{tmp}"], "scaling.png"),
    ],
)
def test_figures_and_sheets_are_not_replaced_unasked(args, there, tmp_path, unloaded) -> None:
    (tmp_path / there).write_text("mine")
    args = [arg.format(tmp=tmp_path) for arg in args]
    option = "--out" if "--out" in args else "OUT"
    expected = f"{option}: expected a place for new files, got one with {tmp_path / there}; --overwrite replaces it"
    assert expected in refused(*args)
    with pytest.raises(AssertionError, match="a model was loaded"):
        invoke(*args, "--overwrite")
    assert (tmp_path / there).read_text() == "mine"


def test_a_checkpoint_is_not_exported_over_another_unasked(small, tmp_path) -> None:
    """An empty folder is nothing to lose."""
    out = tmp_path / "half"
    out.mkdir()
    assert invoke("export", small, out).exit_code == 0
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert f"error: OUT: expected a place for new files, got one with {out}; --overwrite replaces it" in refused(
        "export", small, out
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == written
    assert invoke("export", small, out, "--overwrite").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} != written


@pytest.mark.parametrize("command", ["eval", "gallery", "demo"])
@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_are_none_are_refused(command, seed, unloaded) -> None:
    assert "--seed" in refused(command, "--seed", seed)
