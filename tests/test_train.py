"""Training end to end through the command line: real video files, resuming, generating, and one clear line for bad input."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from command_line import invoke
from safetensors.torch import load_file

from sora_model.cli.app import parse_size
from sora_model.data import read_video

SIZES = [(6, 32, 32), (4, 24, 40), (9, 48, 24)]
TINY = ["--patch", "1x8x8", "--tokens", "256"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three MP4 files of different sizes and lengths, written with PyAV, an image, captions, and one broken file."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for i, (frames, height, width) in enumerate(SIZES):
        with av.open(str(folder / f"clip{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            color = rng.integers(64, 255, 3)
            for t in range(frames):
                image = np.zeros((height, width, 3), np.uint8)
                image[8:16, 2 * t : 2 * t + 8] = color
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        (folder / f"clip{i}.txt").write_text(f"a box of colour {i} moves right")
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "broken.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    """A run of 3 steps on those files."""
    folder = tmp_path_factory.mktemp("runs") / "files"
    result = invoke("train", folder, "--data", clips, "--steps", 3, *TINY)
    assert result.exit_code == 0, result.output
    return folder, result


def losses(folder):
    with open(folder / "loss.csv", newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def test_trains_on_real_files_and_names_the_broken_one(run):
    folder, result = run
    assert list(losses(folder)) == [1, 2, 3]
    assert all(np.isfinite(list(losses(folder).values())))
    assert "broken.mp4" in result.output
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "checkpoint" / "dit" / "model.safetensors").is_file()


def test_resumed_run_equals_one_that_was_not_stopped(run, clips, tmp_path):
    folder, _ = run
    first = invoke("train", tmp_path / "half", "--data", clips, "--steps", 3, *TINY)
    assert first.exit_code == 0, first.output
    assert losses(tmp_path / "half") == losses(folder), "the same seed must give the same run"
    for path in (folder, tmp_path / "half"):
        result = invoke("train", path, "--data", clips, "--steps", 5, *TINY, "--resume")
        assert result.exit_code == 0, result.output
    a, b = losses(folder), losses(tmp_path / "half")
    assert list(a) == [1, 2, 3, 4, 5]
    assert a == b
    one, other = (load_file(path / "checkpoint" / "dit" / "model.safetensors") for path in (folder, tmp_path / "half"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("option", "value"), [("--seed", 1), ("--tokens", 512), ("--patch", "1x4x4"), ("--accumulation", 2)])
def test_a_run_is_not_resumed_as_another(option, value, run, clips):
    folder, _ = run
    before = (folder / "training.safetensors").read_bytes()
    result = invoke("train", folder, "--data", clips, "--steps", 9, *TINY, "--resume", option, value)
    assert result.exit_code == 2
    assert re.search(
        f"resume: .*{option.strip('-')}[a-z ]*: expected .*, as the run began with, got {value}", result.output.replace("\n", " ")
    )
    assert (folder / "training.safetensors").read_bytes() == before


def test_all_that_differs_is_named_at_once(run):
    result = invoke("train", run[0], "--steps", 9, "--resume")
    assert result.exit_code == 2
    text = result.output.replace("\n", "")
    assert all(f"{name}: expected" in text for name in ("--tokens", "--patch"))
    assert "already" not in text


def test_all_processes_stop_at_the_same_step(tmp_path):
    """A signal that one of them gets stops both, and the run is whole."""
    code = (
        "import os, signal, sys\n"
        "from sora_model.training.trainer import Trainer\n"
        "take = Trainer._train_step\n"
        "def step(self, batches):\n"
        "    if self.step == 2 and os.environ['RANK'] == '1':\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    return take(self, batches)\n"
        "Trainer._train_step = step\n"
        "from sora_model.cli import app\n"
        "app()\n"
    )
    (tmp_path / "stopped.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "stopped.py")]
    launch += ["train", str(tmp_path / "run"), "--size", "2x16x16", "--tokens", "64", "--steps", "50"]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "stopped at step 3" in done.stdout, done.stderr
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert (tmp_path / "run" / "training.safetensors").is_file()


def test_an_interrupted_run_is_saved_and_goes_on(clips, tmp_path, monkeypatch, request):
    """Ctrl-C ends a run after the step in hand; resumed, it takes the steps that it would have taken."""
    from sora_model.training.trainer import Trainer

    take = Trainer._train_step

    def interrupted(self, batches):
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return take(self, batches)

    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it puts into the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ignored))
    monkeypatch.setattr("sora_model.training.trainer.schedule", lambda *_: 1.0)  # it follows the number of steps
    whole = invoke("train", tmp_path / "whole", "--data", clips, "--steps", 4, *TINY)
    assert whole.exit_code == 0, whole.output
    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    result = invoke("train", tmp_path / "parts", "--data", clips, "--steps", 4, *TINY)
    assert result.exit_code == 130, result.output
    assert "stopped at step 2; --resume goes on from there" in result.output
    assert (tmp_path / "parts" / "checkpoint" / "dit" / "model.safetensors").is_file()
    monkeypatch.setattr(Trainer, "_train_step", take)
    result = invoke("train", tmp_path / "parts", "--data", clips, "--steps", 4, *TINY, "--resume")
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_checkpoint_is_where_another_run_starts(run, tmp_path):
    result = invoke(
        "train", tmp_path / "more", "--start", run[0] / "checkpoint", "--steps", 1, "--tokens", 256, "--size", "2x16x16"
    )
    assert result.exit_code == 0, result.output
    configs = [json.loads((path / "checkpoint" / "model_index.json").read_text()) for path in (run[0], tmp_path / "more")]
    assert configs[0]["size"] == configs[1]["size"], "a finer run keeps the size that is made by default"


def test_the_default_size_is_that_of_the_files(run, clips):
    size = json.loads((run[0] / "checkpoint" / "model_index.json").read_text())["size"]
    assert tuple(size) in SIZES


@pytest.mark.parametrize("world", ["simple", "studio", "rich"])
@pytest.mark.parametrize(
    ("command", "more"), [("train", []), ("train", ["--vae", "vae"]), ("train-vae", []), ("train-vae", ["--temporal", "8"])]
)
def test_default_sizes_fit_default_batches(command, more, world, tmp_path, monkeypatch):
    """What a bare command trains on can be cut into patches and fits a batch."""
    from sora_model.codec.vae import VideoVAE
    from sora_model.training.trainer import Trainer

    VideoVAE.small(latent_channels=4, channels=(8, 8, 8)).save_pretrained(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_train_step", lambda self, batches: (float(len(batches)), 0.0))
    monkeypatch.setattr("sora_model.training.recipes.vae.reconstruction_psnr", lambda *_: [30.0])
    monkeypatch.setattr("sora_model.training.recipes.vae.finish", lambda *_: None)
    result = invoke(command, tmp_path / "run", "--data", f"world:{world}", "--steps", 30, *more)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_survives_saving(optimizer, tmp_path, monkeypatch):
    """A run resumed from disk goes on exactly as if it had not stopped."""
    # The schedule follows the number of steps, which differs here.
    monkeypatch.setattr("sora_model.training.trainer.schedule", lambda *_: 1.0)
    from sora_model import SoraPipeline
    from sora_model.data import PackedSampler
    from sora_model.training.config import TrainConfig
    from sora_model.training.dit import DiffusionObjective
    from sora_model.training.trainer import Trainer
    from sora_model.world.source import WorldSource
    from sora_model.world.world import World

    def trainer(folder, steps, **options):
        pipeline = SoraPipeline.from_preset("tiny", patch=(1, 8, 8))
        sampler = PackedSampler(WorldSource(World(), [(2, 16, 16), (1, 16, 24)]), pipeline.unit, 64)
        return Trainer(
            DiffusionObjective(pipeline), sampler, TrainConfig(steps=steps, optimizer=optimizer), tmp_path / folder, **options
        )

    one = trainer("whole", 4)
    whole = [step.loss for step in one.train()]
    one.save()  # once more, when the log is closed
    parts = [step.loss for step in trainer("parts", 2).train()]
    parts += [step.loss for step in trainer("parts", 4, resume=True).train()]
    assert parts == whole


def test_unknown_optimizer():
    from sora_model.training.config import TrainConfig

    with pytest.raises(ValueError, match="TrainConfig: optimizer: expected 'muon' or 'adamw', got 'sgd'"):
        TrainConfig(optimizer="sgd")


def test_generates_mixed_sizes_in_one_batch(run, tmp_path):
    folder, _ = run
    prompts = ["a box of colour 1 moves right", "a box", "two boxes"]
    sizes = ["--size", "4x24x40", "--size", "1x32x32", "--size", "6x40x24"]
    result = invoke("generate", *prompts, "--checkpoint", folder / "checkpoint", *sizes, "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = ["00-a-box-of-colour-1-moves-right-seed0.mp4", "01-a-box-seed1.png", "02-two-boxes-seed2.mp4", "contact_sheet.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [tuple(read_video(tmp_path / name)[0].shape) for name in names[:3]] == [(3, 4, 24, 40), (3, 1, 32, 32), (3, 6, 40, 24)]
    assert all(name in result.output for name in names)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddpm_trains_and_samples(prediction, tmp_path):
    world = ["--size", "2x16x16", "--size", "1x16x24"]
    result = invoke("train", tmp_path / "run", "--steps", 2, *world, "--tokens", 32, "--prediction", prediction)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "checkpoint" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    out = ["--size", "2x16x16", "--steps", 2, "--out", tmp_path / "out", "--format", "gif"]
    result = invoke("generate", "a red circle", "--checkpoint", tmp_path / "run" / "checkpoint", *out)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "00-a-red-circle-seed0.gif").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["train", "{tmp}/run", "--data", "{tmp}/none", "--steps", "1"],
            "--data: expected a folder of videos and images, got {tmp}/none (there is no such folder)",
        ),
        (["train", "{tmp}/run", "--steps", "1", "--model", "XXL"], "--model: expected one of tiny, XS, S, B, L, XL, got 'XXL'"),
        (["train", "{tmp}/run", "--steps", "1", "--size", "3x20x20"], "(3, 20, 20)"),
        (["train", "{tmp}/run", "--steps", "1", "--detailed", "1.5"], "error: --detailed: expected a number from 0 to 1, got 1.5"),
        (["train", "{tmp}/run", "--steps", "1", "--vae", "{tmp}/none"], "expected a folder with config.json, got {tmp}/none"),
        (["train", "{tmp}/run", "--steps", "1", "--tokens", "4"], "more than --tokens 4"),
        (["train", "{tmp}/run", "--steps", "0"], "error: --steps: expected a number above 0, got 0"),
        (["train", "{tmp}/run", "--resume"], "resume: expected {tmp}/run/training.safetensors, which is not there"),
        (
            ["train", "{tmp}/run", "--start", "x", "--vae", "y"],
            "--vae: expected none with --start, whose checkpoint has its own, got y",
        ),
        (
            ["train", "{tmp}/run", "--data", "{tmp}", "--size", "1x8x8"],
            "--size: expected none with --data, whose files have their own",
        ),
        (["train-vae", "{tmp}/run", "--start", "x", "--channels", "4"], "--channels: expected none with --start"),
        (["generate", "a cat", "--checkpoint", "{tmp}/none"], "expected a folder with model_index.json"),
        (["generate", "a", "b", "--checkpoint", "x", "--size", "1x8x8", "--size", "1x8x8", "--size", "1x8x8"], "expected 1 or 2"),
        (["generate", "a cat", "--checkpoint", "{tmp}", "--size", "big"], "expected TxHxW, such as 8x32x48, got 'big'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, tmp_path):
    result = invoke(*(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    assert result.exit_code == 2
    text = result.output.replace("\n", "")
    assert message.replace("{tmp}", str(tmp_path)) in text
    assert "Traceback" not in text
    assert not list(tmp_path.rglob("*.safetensors")), "nothing half-written"


def test_a_run_is_not_overwritten(run, clips):
    result = invoke("train", run[0], "--data", clips, "--steps", 1, *TINY)
    assert result.exit_code == 2
    assert "already holds a run" in result.output


def test_weights_are_not_overwritten(run, clips, tmp_path):
    """Somebody's checkpoint, or what a run saved that had no disk left for its state."""
    shutil.copytree(run[0] / "checkpoint", tmp_path / "run" / "checkpoint")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = invoke("train", tmp_path / "run", "--data", clips, "--steps", 1, *TINY)
    assert result.exit_code == 2
    assert "OUT: expected a folder without weights, got " in result.output
    result = invoke("train", tmp_path / "run", "--data", clips, "--steps", 1, *TINY, "--resume")
    assert result.exit_code == 2
    assert f"only the weights in {tmp_path / 'run' / 'checkpoint'} were saved" in result.output.replace("\n", "")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_is_over_says_what_limits_it(clips, tmp_path):
    for more in ([], ["--resume"]):
        result = invoke("train", tmp_path / "run", "--data", clips, "--steps", 1, *TINY, *more)
        assert result.exit_code == 0, result.output
    assert "nothing left to train: step 1 was the last one; a higher --steps adds some" in result.output


def test_parse_size():
    assert parse_size("8x32x48") == (8, 32, 48)


def test_two_processes_learn_what_one_does_of_twice_the_batches(tmp_path):
    """accelerate's processes take the batches in turn: the losses are those of one process that accumulates two batches."""
    world = ["--size", "2x16x16", "--size", "1x16x24", "--tokens", "64", "--steps", "3", "--seed", "1"]
    one = invoke("train", tmp_path / "one", *world, "--accumulation", 2)
    assert one.exit_code == 0, one.output
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["-m", "sora_model.cli", "train", str(tmp_path / "two"), *world]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    names = [load_file(tmp_path / name / "checkpoint" / "dit" / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(names[0][key], names[1][key], atol=2e-3) for key in names[0])


@pytest.mark.parametrize(
    "options",
    [
        ["--precision", "bf16", "--checkpointing", "--per-frame", "0.5", "--detailed", "1", "--tokens", "256"],
        ["--data", "world:studio,lessons,clips=20", "--size", "13x32x32", "--size", "1x32x32", "--patch", "1x16x16"],
        ["--frames", "2", "--size", "4x16x16"],
    ],
)
def test_options_of_training(options, tmp_path):
    result = invoke("train", tmp_path / "run", "--steps", 2, *options)
    assert result.exit_code == 0, result.output
    assert all(np.isfinite(list(losses(tmp_path / "run").values())))


def test_a_vae_is_trained_and_a_model_on_its_latents(clips, tmp_path):
    sizes = ["--size", "5x32x32", "--size", "1x32x48"]
    result = invoke("train-vae", tmp_path / "vae", "--steps", 2, "--channels", 4, "--tokens", 64, *sizes)
    assert result.exit_code == 0, result.output
    assert "PSNR of 64 unseen clips: " in result.output
    result = invoke("train-vae", tmp_path / "vae", "--steps", 3, "--channels", 4, "--tokens", 64, *sizes, "--resume")
    assert result.exit_code == 0, result.output
    more = ["--start", tmp_path / "vae" / "checkpoint", "--decoder-only"]
    result = invoke("train-vae", tmp_path / "decoder", "--steps", 1, "--tokens", 64, *sizes, *more)
    assert result.exit_code == 0, result.output
    files = invoke("train-vae", tmp_path / "files", "--steps", 1, "--channels", 4, "--data", clips, "--max-frames", 5)
    assert files.exit_code == 0, files.output
    vae = tmp_path / "vae" / "checkpoint"
    result = invoke("train", tmp_path / "run", "--vae", vae, "--steps", 2, "--tokens", 64, "--data", clips)
    assert result.exit_code == 0, result.output
    out = ["--size", "5x32x32", "--steps", 1, "--out", tmp_path / "out"]
    result = invoke("generate", "a box", "--checkpoint", tmp_path / "run" / "checkpoint", *out)
    assert result.exit_code == 0, result.output
    assert tuple(read_video(tmp_path / "out" / "00-a-box-seed0.mp4")[0].shape[1:]) == (5, 32, 32)


def test_the_training_commands_of_the_documentation(clips, tmp_path, monkeypatch):
    """As they stand there, but for their minutes, on a folder of files."""
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    block = text[text.index("## Commands") :].split("```")[1]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips, "DIR")
    commands = [line.partition("#")[0].split() for line in block.strip().splitlines()]
    assert [command[1] for command in commands] == ["train-vae", "train", "train-captioner", "recaption", "train"]
    for command in commands:
        words = ["1" if before == "--minutes" else word for before, word in pairwise(command)]
        result = invoke(*("--steps" if word == "--minutes" else word for word in words))
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / "outputs" / "more" / "checkpoint" / "captioner").is_dir()


def test_a_scaling_study(tmp_path, monkeypatch):
    monkeypatch.setattr("sora_model.world.scaling.MOST_STEPS", 40)
    result = invoke("scaling", tmp_path, "--compute", "2e10")
    assert result.exit_code == 0, result.output
    points = json.loads((tmp_path / "scaling.json").read_text())
    assert {point["model"] for point in points} == {"1 x 32", "2 x 64", "4 x 128", "6 x 256"}
    assert all((0 < point["loss"] < 5 and point["compute"] <= 2.1e10) or point["step"] == 1 for point in points)
    assert max(point["step"] for point in points) == 40
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_given_ends_are_trained_as_they_are_given(tmp_path):
    """A causal VAE's latents of an end depend on what came before it: the model learns from those that the pipeline will have."""
    import torch

    from sora_model import SoraPipeline
    from sora_model.codec.vae import VideoVAE
    from sora_model.data import Batch, Sample
    from sora_model.diffusion.task_mix import TaskMix
    from sora_model.pipeline.keyframes import clean_frames
    from sora_model.pipeline.request import Request
    from sora_model.training.dit import DiffusionObjective
    from sora_model.world.config import WorldConfig
    from sora_model.world.world import World

    torch.manual_seed(0)
    vae = VideoVAE.small(latent_channels=4, channels=(8, 8, 8)).eval()
    pipeline = SoraPipeline.from_preset("tiny", patch=(1, 1, 1), codec=vae, size=(13, 16, 16))
    video = World(WorldConfig.studio()).sample(1).render(13, 16, 16)
    clean = torch.arange(13) >= 9
    objective = DiffusionObjective(pipeline, tasks=TaskMix(1, 0, 0, 0))
    batch = Batch([Sample(video, "x", clean_mask=clean), Sample(video, "y"), Sample(video, "z", clean_mask=~clean)], [0, 1, 2], 0)
    latents = objective._encode(batch)
    lessons = [objective._lesson_mask(sample) for sample in batch.samples]
    masks = [objective._clean_mask(mask, x, None) for mask, x in zip(lessons, latents, strict=True)]
    context = objective._context(batch, latents, masks)
    request = Request("x", (13, 16, 16), keyframes={9: video[:, 9:]})
    _, expected = clean_frames(pipeline.codec, pipeline.timing, request, request.size, pipeline.device)
    assert torch.allclose(context[0], expected, atol=1e-5)
    assert not torch.allclose(context[0], latents[0], atol=1e-3)
    assert all(torch.equal(context[i], latents[i]) for i in (1, 2))
    keeps = DiffusionObjective(pipeline, tasks=TaskMix(1, 0, 0, 0), keep_latents=True)
    keeps._context(batch, latents, masks)
    kept = keeps._context(Batch([s._replace(video=0 * s.video) for s in batch.samples], [0, 1, 2], 0), latents, masks)
    assert torch.equal(kept[0], context[0].half().float())
