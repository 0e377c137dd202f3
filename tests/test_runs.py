"""A run survives whatever happens to it; reliability/crashes.py interrupts its saves at every system call."""

import contextlib
import csv
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reliability.runs import assert_same_run, sora, state, train

from sora_model import SoraPipeline
from sora_model.data import write_video
from sora_model.diffusion.task_mix import TaskMix  # noqa: F401
from sora_model.training.resume import only_run
from sora_model.training.trainer import Trainer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Hundreds of tiny steps, which waiting for other threads makes slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    monkeypatch.setattr("sora_model.training.trainer.schedule", lambda *_: 1.0)  # it follows the number of steps


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    """A run of three steps that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sora_model.training.trainer.schedule", lambda *_: 1.0)
        result = train(out, small, 3)
    assert result.exit_code == 0, result.output
    return out


@contextlib.contextmanager
def no_file_larger_than(limit: int):
    """Writes really fail then, in C and Rust too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("00-x-seed0.mp4", ["generate", "x", "--checkpoint", "{small}", "--out", "{tmp}/out", "--steps", 1]),
        (
            "00-x-seed0.gif",
            [
                "generate",
                "x",
                "--checkpoint",
                "{small}",
                "--out",
                "{tmp}/out",
                "--steps",
                1,
                "--format",
                "gif",
                "--size",
                "2x64x64",
            ],
        ),
        ("00-x-seed0.png", ["generate", "x", "--checkpoint", "{small}", "--out", "{tmp}/out", "--steps", 1, "--size", "1x64x64"]),
        ("exported", ["export", "{small}", "{tmp}/exported"]),
    ],
)
def test_whatever_cannot_be_written_is_named(name, args, small, tmp_path) -> None:
    with no_file_larger_than(100):
        result = sora(*(str(arg).format(small=small, tmp=tmp_path) for arg in args))
    assert result.exit_code == 2, result.output
    assert re.search(f"error: cannot write .*{name}: .*file too large", result.output, re.IGNORECASE | re.DOTALL), result.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing half-written"


@pytest.mark.parametrize("limit", [0, 200, 2000, 20_000, 60_000])
def test_the_kernel_says_so_too(limit, small, tmp_path) -> None:
    run = tmp_path / "run"
    assert train(run, small, 1).exit_code == 0
    with no_file_larger_than(limit):
        result = train(run, small, 2, "--resume")
    assert result.exit_code == 2, result.output
    assert re.search(r"error: cannot write .*: .*file too large", result.output, re.IGNORECASE | re.DOTALL), result.output
    assert state(run)[0] == 1
    assert train(run, small, 2, "--resume").exit_code == 0


@pytest.mark.parametrize(("call", "at"), [("rename", 2), ("replace", 1), ("fsync", 5)])
def test_a_process_that_is_really_killed(call, at, small, whole, tmp_path) -> None:
    """By SIGKILL, just before its call number `at` in the save of step 2."""
    if sys.version_info < (3, 11) and call != "fsync":
        pytest.skip("pathlib keeps the functions of os that it found when it was imported")
    run = tmp_path / "run"
    assert train(run, small, 1).exit_code == 0
    code = f"""
import os, signal, sys
import sora_model.training.trainer
sora_model.training.trainer.schedule = lambda *_: 1.0
save = sora_model.training.trainer.Trainer.save
def dying(trainer):
    calls, made = [], os.{call}
    def killed(*args, **options):
        calls.append(args)
        if len(calls) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(*args, **options)
    os.{call} = killed
    save(trainer)
sora_model.training.trainer.Trainer.save = dying
from sora_model.cli import app
app()
"""
    command = ["train", run, "--start", small, "--size", "2x16x16", "--tokens", 32, "--steps", 2, "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(run.glob(".*.part")), "it died in the middle"
    result = train(run, small, 3, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_run(run, whole)


def test_a_run_goes_on_without_its_checkpoint(small, whole, tmp_path) -> None:
    run = tmp_path / "run"
    assert train(run, small, 1).exit_code == 0
    shutil.rmtree(run / "checkpoint")
    assert train(run, small, 2, "--resume").exit_code == 0
    shutil.rmtree(run / "checkpoint")
    result = train(run, small, 3, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_run(run, whole)


def test_a_vae_goes_on_without_its_checkpoint(tmp_path) -> None:
    options = ["--size", "1x16x16", "--size", "5x16x16", "--tokens", 16, "--channels", 4]
    for name in ("whole", "parts"):
        for steps in (1, 2):
            if name == "parts" and steps == 2:
                shutil.rmtree(tmp_path / "parts" / "checkpoint")
            result = sora("train-vae", tmp_path / name, "--steps", steps, *options, *(["--resume"] if steps == 2 else []))
            assert result.exit_code == 0, result.output
    (_, one), (_, other) = (state(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_a_captioner_is_not_put_into_a_run_that_goes_on(small, tmp_path) -> None:
    """The run's next save would have the parts that it began with."""
    assert train(tmp_path / "run", small, 1).exit_code == 0
    with only_run(tmp_path / "run", fresh=False):
        result = sora("train-captioner", tmp_path / "captioner", "--checkpoint", tmp_path / "run" / "checkpoint", "--steps", 1)
    assert result.exit_code == 2
    expected = f"--checkpoint: expected the checkpoint of a run that has ended, got that of {tmp_path / 'run'}"
    assert expected in result.output.replace("\n", "")


def test_a_captioner_goes_on_without_its_checkpoint(small, tmp_path) -> None:
    """With the same words; if the captions have changed since, it says so."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for i, caption in enumerate(("a red circle", "a blue star that moves")):
        write_video(clips / f"{i}.png", torch.zeros(3, 1, 16, 16))
        (clips / f"{i}.txt").write_text(caption)
    for name in ("whole", "parts"):
        shutil.copytree(small, tmp_path / f"{name}-pipeline")
        for steps in (1, 2):
            run = tmp_path / name
            if name == "parts" and steps == 2:
                shutil.rmtree(run / "checkpoint")
            command = ["train-captioner", run, "--checkpoint", tmp_path / f"{name}-pipeline", "--data", clips, "--tokens", 32]
            command += ["--steps", steps, "--vocabulary", 280, *(["--resume"] if steps == 2 else [])]
            result = sora(*command)
            assert result.exit_code == 0, result.output
    (_, one), (_, other) = (state(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], value) for name, value in other.items())
    shutil.rmtree(tmp_path / "parts" / "checkpoint")
    (clips / "0.txt").write_text("xyzzy xyzzy xyzzy plugh plugh plugh")
    result = sora(*command)
    assert result.exit_code == 2
    assert re.search("words learned from the captions: expected .*, as the run began with, got", result.output.replace("\n", " "))


def test_a_good_state_is_not_replaced_by_one_that_is_lost(small, tmp_path, monkeypatch) -> None:
    """The last step may be the one that makes a weight infinite, which the loss does not see."""
    run = tmp_path / "run"
    assert train(run, small, 1).exit_code == 0
    step = Trainer._train_step

    def broken(self, batches):
        result = step(self, batches)
        self.model["dit"].final.weight.data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(Trainer, "_train_step", broken)
    result = train(run, small, 2, "--resume")
    assert result.exit_code == 2
    assert "error: Trainer: save: dit.final.weight: expected finite numbers, got infinity" in result.output.replace("\n", "")
    assert state(run)[0] == 1
    SoraPipeline.from_pretrained(run / "checkpoint")


def test_tensorboard_reads_what_was_written(whole) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert sorted(read.Tags()["scalars"]) == ["learning_rate", "loss", "tokens_per_second"]
    with open(whole / "loss.csv", newline="") as file:
        rows = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert {one.step: pytest.approx(one.value, abs=1e-6) for one in read.Scalars("loss")} == rows


def test_a_captioner_leaves_a_pipeline_that_was_trained_meanwhile(small, tmp_path, monkeypatch) -> None:
    pipeline, save = tmp_path / "pipeline", Trainer.save
    shutil.copytree(small, pipeline)

    def meanwhile(self) -> None:
        save(self)
        trained = SoraPipeline.from_pretrained(pipeline)
        trained.dit.final.weight.data.fill_(0.25)
        trained.save_pretrained(pipeline)

    monkeypatch.setattr(Trainer, "save", meanwhile)
    options = ["--size", "2x16x16", "--tokens", 32, "--steps", 1, "--vocabulary", 280]
    result = sora("train-captioner", tmp_path / "run", "--checkpoint", pipeline, *options)
    assert result.exit_code == 0, result.output
    after = SoraPipeline.from_pretrained(pipeline)
    assert after.captioner is not None
    assert (after.dit.final.weight == 0.25).all()


def test_a_broken_state_is_told_as_it_is(small, tmp_path) -> None:
    """A folder whose state cannot be read does not hold a run that could be resumed."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "training.safetensors").write_bytes(b"half a fi")
    for more in ([], ["--resume"]):
        result = train(run, small, 1, *more)
        assert result.exit_code == 2
        text = result.output.replace("\n", "")
        assert "training.safetensors: expected the state of a run of this package, got" in text
        assert "already" not in text
