"""What is trained on, by name and from ordinary files; recipes without the command line; settings and runs that are refused."""

import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import invoke, refused

from sora_model import SoraPipeline
from sora_model.data import FolderSource, PackedSampler, write_video
from sora_model.data.budget import Fit, TokenBudget
from sora_model.rooms import rooms_with
from sora_model.training.config import SettingError, TrainConfig
from sora_model.training.recipes.common import RunSettings
from sora_model.training.recipes.dit import DiTRecipe, train_dit
from sora_model.training.sources import common_size, training_data

ROOT = Path(__file__).parent.parent


def clip(folder: Path, name: str, frames: int, height: int, width: int) -> None:
    """Of random squares: noise takes a decoder four times as long."""
    squares = torch.rand(3, frames, height // 8, width // 8) * 2 - 1
    write_video(folder / name, squares.repeat_interleave(8, 2).repeat_interleave(8, 3))
    (folder / name).with_suffix(".txt").write_text(f"clip {name}")


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory) -> Path:
    """Clips of phones and cameras, though short: none of them fits the default budget as it is."""
    folder = tmp_path_factory.mktemp("ordinary")
    clip(folder, "long.mp4", 300, 64, 112)
    clip(folder, "tall.mp4", 40, 640, 360)
    clip(folder, "wide.mp4", 40, 360, 640)
    clip(folder, "photo.png", 1, 720, 1280)
    return folder


def test_a_room_brings_its_commands_and_data():
    assert rooms_with("commands") == ["world"]
    assert rooms_with("training_data") == ["world"]
    listed = invoke("--help").output
    assert all(f"│ {name} " in listed for name in ("generate", "train", "eval", "gallery", "demo", "scaling"))


def test_nothing_else_breaks_without_the_world(ordinary, tmp_path):
    """A copy of the package without that room trains on files, and says which sources it has."""
    for package in ("sora_kernels", "sora_model"):
        (tmp_path / package).mkdir()
        for one in (ROOT / package).iterdir():
            if one.name not in ("world", "__pycache__"):
                (tmp_path / package / one.name).symlink_to(one)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sora_model.cli", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    listed = run("--help").stdout
    assert "train-vae" in listed
    assert "demo" not in listed
    files = run("train", "run", "--data", ordinary, "--steps", 1, "--tokens", 64)
    assert files.returncode == 0, files.stderr
    default = run("train", "other", "--steps", 1)
    assert default.returncode == 2
    assert "--data: expected a folder of videos and images, or one of the sources none; got world:simple" in default.stderr


@pytest.mark.parametrize("name", ["world:simple", "world:studio,lessons,large,clips=20000", "world:rich,clips=7"])
def test_a_source_is_called_by_one_name(name):
    assert training_data(name).name == name
    assert training_data("world:studio,clips=3,large,lessons").name == "world:studio,lessons,large,clips=3"


def test_a_folder_may_have_the_name_of_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("world:simple").mkdir()
    assert training_data("world:simple").name == str(tmp_path / "world:simple")


@pytest.mark.parametrize("command", [["train"], ["train-vae"], ["train-captioner", "--checkpoint", "{small}"]])
def test_ordinary_clips_are_cut_and_scaled_to_fit(command, ordinary, small, tmp_path, caplog):
    """By default, and one line says so."""
    shutil.copytree(small, tmp_path / "pipeline")
    args = [arg.format(small=tmp_path / "pipeline") for arg in command]
    with caplog.at_level(logging.WARNING, "sora_model"):
        result = invoke(args[0], tmp_path / "run", *args[1:], "--data", ordinary, "--steps", 1, "--tokens", 512)
    assert result.exit_code == 0, result.output
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("sora_model")]
    expected = (
        r"[23] videos are cut to \d+ frames and scaled to about \d+x\d+ and 1 image is scaled to about \d+x\d+, "
        r"to fit --tokens 512; --max-frames, --max-pixels and --tokens change that"
    )
    assert re.fullmatch(expected, message)


@pytest.mark.parametrize("width", [None, 128])
@pytest.mark.parametrize("tokens", [16, 256, 4096])
def test_what_is_fitted_fills_the_budget(width, tokens, ordinary):
    budget = TokenBudget((1, 8, 8), tokens, attention_width=width)
    source = FolderSource(ordinary, multiple_of=(1, 8, 8), first=1, max_frames=32, fit=Fit(budget))
    assert source.fitted
    for i in range(len(source)):
        size = source.size(i)
        assert budget.holds(size)
        assert budget.cost(budget.count(size)) > 0.4 * tokens or i not in source.fitted
        assert tuple(source.load(i).video.shape[1:]) == size
    assert len(PackedSampler(source, **vars(budget)).usable) == len(source)


def test_what_fits_stays_as_it_is(tmp_path):
    clip(tmp_path, "a.mp4", 6, 32, 48)
    clip(tmp_path, "b.mp4", 6, 64, 96)
    budget = TokenBudget((1, 8, 8), 200)
    source = FolderSource(tmp_path, multiple_of=(1, 8, 8), first=1, fit=Fit(budget))
    assert source.size(0) == (6, 32, 48)
    assert source.fitted == [1]
    assert source.size(1)[0] == 6, "it keeps as many frames as a cube of tokens has, and is scaled"


def test_a_clip_that_is_cut_is_drawn_anew_in_every_epoch(ordinary):
    source = FolderSource(ordinary, multiple_of=(1, 8, 8), first=1, fit=Fit(TokenBudget((1, 8, 8), 256)))
    long = next(i for i in range(len(source)) if source.name(i).endswith("long.mp4"))
    first, second = (source.load(long, epoch).video for epoch in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("given", "kept"), [("--max-frames", 32), ("--max-pixels", 10**6)])
def test_a_limit_that_was_told_is_kept(given, kept, ordinary, tmp_path):
    """The other one gives way."""
    result = invoke("train", tmp_path / "run", "--data", ordinary, "--steps", 1, given, kept)
    assert result.exit_code == 0, result.output


def test_what_is_too_large_even_so_names_file_and_options(ordinary, tmp_path):
    message = refused("train", tmp_path / "run", "--data", ordinary, "--max-frames", 32, "--max-pixels", 10**6, "--steps", 1)
    assert re.search(
        r"error: --data: none of .* 4 .* fits: .*wide.mp4 of size .* more than --tokens 4096; "
        r"a larger --tokens takes it, or a smaller --max-pixels, --max-frames",
        message,
    )


def test_a_folder_of_videos_and_some_photos_makes_videos(tmp_path):
    """Though no two videos have the same size, and the photos do."""
    for i in range(8):
        clip(tmp_path, f"{i}.mp4", 4 + i, 16 + 8 * i, 32)
    for i in range(2):
        clip(tmp_path, f"photo{i}.png", 1, 32, 32)
    result = invoke("train", tmp_path / "run", "--data", tmp_path, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert SoraPipeline.from_pretrained(tmp_path / "run" / "checkpoint").size == (7, 40, 32)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(1, 8, 8)] * 3 + [(5, 8, 16)], (1, 8, 8)),
        ([(1, 8, 8), (5, 8, 16)], (5, 8, 16)),
        ([(5, 8, 16), (9, 64, 64), (3, 16, 16), (1, 8, 8)], (3, 16, 16)),
        ([(5, 8, 16), (5, 8, 16), (9, 64, 64), (9, 8, 8)], (5, 8, 16)),
    ],
)
def test_the_common_size_is_a_vote_by_kind_and_area(sizes, expected):
    assert common_size(sizes) == expected


def test_a_recipe_needs_no_command_line(tmp_path):
    run = RunSettings(sizes=((2, 16, 16),), tokens=32, config=TrainConfig(steps=2))
    trainer = train_dit(tmp_path / "run", DiTRecipe(), run)
    assert trainer.step == 2
    assert SoraPipeline.from_pretrained(tmp_path / "run" / "checkpoint").size == (2, 16, 16)


def test_a_recipe_checks_its_settings():
    with pytest.raises(SettingError, match="DiTRecipe: detailed: expected a number from 0 to 1, got 2"):
        DiTRecipe(detailed=2)
    with pytest.raises(SettingError, match="RunSettings: tokens: expected a number above 0, got 0"):
        RunSettings(tokens=0)
    for value in (float("nan"), float("inf"), -1.0, 0.0):
        with pytest.raises(SettingError, match=f"TrainConfig: minutes: expected a number above 0, got {value}"):
            TrainConfig(minutes=value)


def small_run(out: Path, *more: object) -> list[str]:
    return [str(arg) for arg in ("train", out, "--size", "2x16x16", "--tokens", 32, *more)]


def test_two_runs_in_one_folder(small, tmp_path):
    """The second is refused while the first lives, before it loads anything; a killed one leaves nothing locked."""
    out = tmp_path / "run"
    code = "import sys, time\nfrom pathlib import Path\nfrom sora_model.training.resume import only_run\n"
    code += "with only_run(Path(sys.argv[1]), fresh=True):\n    print('begun', flush=True)\n    time.sleep(600)\n"
    first = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "begun\n"
        message = refused(*small_run(out, "--start", tmp_path / "none", "--steps", 1))
        assert f"error: OUT: expected a folder that no other run is writing to, got {out}" in message
        assert list(out.iterdir()) == []
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    result = invoke(*small_run(out, "--start", small, "--steps", 1))
    assert result.exit_code == 0, result.output


def test_a_trainer_has_its_folder_for_itself(small, tmp_path):
    """From its first step on, and a run that has ended meanwhile is not written over."""
    one = RunSettings(sizes=((2, 16, 16),), tokens=32, config=TrainConfig(steps=2))
    other = RunSettings(sizes=((2, 16, 16),), tokens=32, config=TrainConfig(steps=2, seed=1))
    refusals = []

    def meanwhile(trainer) -> None:
        steps = trainer.train()
        next(steps)
        with pytest.raises(SettingError, match="folder: expected a folder that no other run is writing to") as error:
            train_dit(tmp_path / "run", DiTRecipe(start=small), other)
        refusals.append(error.value)
        list(steps)

    def late(trainer) -> None:
        train_dit(tmp_path / "late", DiTRecipe(start=small), other)
        list(trainer.train())

    train_dit(tmp_path / "run", DiTRecipe(start=small), one, meanwhile)
    assert len(refusals) == 1
    with pytest.raises(SettingError, match=r"folder: .* already holds a run, at step 2"):
        train_dit(tmp_path / "late", DiTRecipe(start=small), one, late)


def test_one_process_shows_what_several_do(ordinary, tmp_path):
    """One bar, and one line of each kind."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "sora_model.cli"]
    launch += ["train", str(tmp_path / "run"), "--data", str(ordinary), "--tokens", "64", "--steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training") == 1, done.stdout
    assert done.stdout.count("checkpoint: ") == 1, done.stdout
    assert done.stderr.count("to fit --tokens 64") == 1, done.stderr


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weights_have_the_modes_of_ordinary_files(mask, small, tmp_path):
    before = os.umask(mask)
    try:
        result = invoke(*small_run(tmp_path / "run", "--start", small, "--steps", 1))
        assert result.exit_code == 0, result.output
        assert invoke("export", tmp_path / "run" / "checkpoint", tmp_path / "exported").exit_code == 0
    finally:
        os.umask(before)
    found = [path for folder in ("run", "exported") for path in [tmp_path / folder, *(tmp_path / folder).rglob("*")]]
    modes = {path: (path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in found}
    assert sum(path.suffix == ".safetensors" for path in found) >= 5
    assert all(mode == (0o777 if folder else 0o666) & ~mask for folder, mode in modes.values()), modes


NUMBERS = ("minutes", "learning-rate", "ema", "save-minutes")
OWN = {"train": ("detailed", "per-frame"), "train-vae": (), "train-captioner": ()}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
@pytest.mark.parametrize(("command", "option"), [(command, one) for command, own in OWN.items() for one in (*NUMBERS, *own)])
def test_numbers_that_are_none_are_refused(command, option, value, small, tmp_path, monkeypatch):
    """Before a model is loaded, by their option."""

    def loaded(*_, **__):
        raise AssertionError("a model was loaded before everything was checked")

    monkeypatch.setattr(SoraPipeline, "from_preset", loaded)
    monkeypatch.setattr(SoraPipeline, "from_pretrained", loaded)
    more = ["--checkpoint", small] if command == "train-captioner" else []
    message = refused(command, tmp_path / "run", *more, f"--{option}", value)
    assert re.match(rf"error: --{option}: expected a (finite )?number.*, got {value}", message), message
    assert not (tmp_path / "run").exists()


KNOWN = "--data: expected world: and one of simple, studio, rich, then any of lessons, large, clips=N with commas between; got "


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--steps", "0"], "--steps: expected a number above 0, got 0"),
        (["train", "--accumulation", "0"], "--accumulation: expected a number above 0, got 0"),
        (["train", "--ema", "1.5"], "--ema: expected a number from 0 to 1, got 1.5"),
        (["train", "--size", "100000x100000x100000"], "--size: expected (T, H, W), each at least 1, of at most 268435456 pixels"),
        (["train", "--size", "1x4096x4096"], "--size: of size (T, H, W) = (1, 4096, 4096) is 262144 tokens that count as"),
        (["train", "--size", "1x20x20"], "--size: of size (1, 20, 20), as a latent (1, 20, 20), does not divide"),
        (["train", "--tokens", "60"], "--data: a batch needs min_sizes = 4 different sizes within --tokens 60; sizes (T, H, W)"),
        (["train", "--data", "world:studio,large,loops"], KNOWN + "world:studio,large,loops"),
        (["train", "--data", "world:"], KNOWN + "world:"),
        (["train", "--data", "world:simple,large,large"], KNOWN + "world:simple,large,large"),
        (["train", "--data", "world:rich,clips=0"], KNOWN + "world:rich,clips=0"),
        (
            ["train", "--data", "sky:blue"],
            "--data: expected a folder of videos and images, or one of the sources world:...; got sky:blue",
        ),
        (["train", "--data", "world:rich,large", "--size", "1x8x8"], "--data: expected a world without large, as --size says all"),
        (
            ["train-vae", "--data", "world:rich,lessons"],
            "--data: expected a world without lessons and large, which only",
        ),
        (["train", "--max-pixels", "99"], "--max-pixels: expected none with a world, whose clips have their own sizes, got 99"),
        (["train", "--patch", "2x8x8", "--frames", "2"], "--frames: expected none with a --patch of several frames, got 2"),
        (["train", "--vae", "{tmp}"], "--vae: VideoVAE.from_pretrained: expected a folder with config.json"),
        (["train", "--start", "{tmp}"], "--start: "),
        (["train-vae", "--temporal", "5"], "--temporal: expected 4 or 8, got 5"),
        (["train-vae", "--channels", "100000000000"], "out of memory: expected a smaller model or batch"),
    ],
)
def test_what_is_refused_names_its_option(args, message, tmp_path):
    text = refused(args[0], tmp_path / "run", *(arg.format(tmp=tmp_path) for arg in args[1:]))
    assert text.startswith(f"error: {message}"), text
    assert not (tmp_path / "run").exists()


def test_a_held_out_loss_is_the_one_that_is_trained(tmp_path, monkeypatch):
    """Of the same batch, noise and levels: a scaling study measures what its models learn."""
    from sora_model.diffusion.noise import add_noise
    from sora_model.diffusion.task_mix import TaskMix
    from sora_model.training.dit import DiffusionObjective
    from sora_model.world.scaling import held_out_loss
    from sora_model.world.source import WorldSource
    from sora_model.world.world import World

    pipeline = SoraPipeline.from_preset("tiny", patch=(1, 8, 8)).eval()
    torch.nn.init.normal_(pipeline.dit.final.weight, std=0.1)  # zero at first, whose loss says little
    batch = PackedSampler(WorldSource(World(), [(3, 16, 16), (1, 16, 24)]), (1, 8, 8), 256).batch(0)

    def same(*args, **options):
        return add_noise(*args, **{**options, "generator": torch.Generator().manual_seed(0)})

    monkeypatch.setattr("sora_model.training.dit.add_noise", same)
    objective = DiffusionObjective(pipeline, tasks=TaskMix(1, 0, 0, 0), caption_dropout=0.0)
    trained = objective.loss(batch, torch.Generator().manual_seed(5)).item()
    assert held_out_loss(pipeline, batch) == pytest.approx(trained, rel=1e-6)
