"""What is written in tests/reliability/crashes.py, and what must be true whenever that was interrupted: `SAVES`.

A `Save` has a folder to itself: `prepare` fills it, `act` writes, `recover` looks at what an interrupted `act` left and goes on.
Files outside of the folder, which are only read, lie in `Shared`.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import typer.testing
from small_pipeline import small_pipeline
from torch.nn import Module
from typer.testing import Result

import sora_model.training.log
import sora_model.training.recipes.captioner
import sora_model.training.recipes.vae
import sora_model.training.trainer
from sora_model import SoraPipeline
from sora_model.caption.captioner import CaptionerConfig
from sora_model.cli.files import write_files
from sora_model.codec.vae import VideoVAE
from sora_model.data import write_video
from sora_model.training import recipes

from .runs import assert_same_run, sora, state, train

VAE = ("--tokens", 16)
CAPTIONER = ("--tokens", 32, "--vocabulary", 280)


class Shared(NamedTuple):
    """small: a checkpoint; vae: another; clips: with captions. Under `whole`, what each save leads to if nothing happens to it."""

    small: Path
    vae: Path
    clips: Path
    whole: Path


class Save(NamedTuple):
    """prepare, recover: raise what is wrong. act: returns how a command ended, or, of a function, nothing.

    recover: its last argument says whether `act` came to its end, after which nothing may be lost any more.
    """

    prepare: Callable[[Shared, Path], None]
    act: Callable[[Shared, Path], Result | None]
    recover: Callable[[Shared, Path, bool], None]
    command: bool


def deterministic() -> None:
    """Has equal runs write equal bytes: a clock that counts, names of logs that do, and a rate that no number of steps changes.

    And has them take no time: models, and what a VAE is measured on, are small.
    """
    recipes.vae.SHOWN = 2
    sizes = {"hidden_size": 16, "num_heads": 2, "depth": 1, "decoder_depth": 1}
    recipes.captioner.CaptionerConfig = functools.partial(CaptionerConfig, **sizes)  # type: ignore[assignment, misc]
    torch.set_num_threads(1)
    ticks, moments = itertools.count(), itertools.count()
    sora_model.training.trainer.schedule = lambda *_: 1.0  # type: ignore[assignment]
    sora_model.training.trainer.time = SimpleNamespace(perf_counter=lambda: next(ticks) / 1000)  # type: ignore[assignment]
    clock = {"time": lambda: 0.0, "time_ns": lambda: next(moments)}
    sora_model.training.log.time = SimpleNamespace(**clock)  # type: ignore[assignment]
    # The command is made of the app once: that takes as long as a small training.
    typer.testing._get_command = functools.cache(typer.testing._get_command)


def prepare(work: Path) -> Shared:
    """Checkpoints that are trained in no time, and clips to train on."""
    shared = Shared(work / "small", work / "vae", work / "clips", work / "whole")
    small_pipeline().save_pretrained(shared.small)
    VideoVAE.small(latent_channels=4, channels=(8, 8, 8)).save_pretrained(shared.vae)
    for i, caption in enumerate(("a red circle", "a blue star that moves")):
        write_video(shared.clips / f"{i}.png", torch.zeros(3, 1, 16, 16))
        (shared.clips / f"{i}.txt").write_text(caption)
    return shared


def done(result: Result) -> None:
    assert result.exit_code == 0, result.output


def no_parts(folder: Path) -> None:
    left = [str(path) for path in folder.rglob(".*")]
    assert not left, f"left over: {left}"


class Training:
    """Of `train`, `train-vae` or `train-captioner`: interrupted in its first save, or in a later one."""

    command = True

    def __init__(self, name: str, first: bool) -> None:
        self.name, self.first = name, first

    def run(self, shared: Shared, root: Path, steps: int, *more: object) -> Result:
        if self.name == "train":
            return train(root / "run", shared.small, steps, *more)
        if self.name == "train-vae":
            return sora("train-vae", root / "run", "--start", shared.vae, "--data", shared.clips, *VAE, "--steps", steps, *more)
        options = ["--checkpoint", root / "pipeline", "--data", shared.clips, *CAPTIONER, "--steps", steps]
        return sora("train-captioner", root / "run", *options, *more)

    def prepare(self, shared: Shared, root: Path) -> None:
        if self.name == "train-captioner":
            shutil.copytree(shared.small, root / "pipeline")
        if not (whole := self.whole(shared)).exists():
            whole.mkdir(parents=True)
            if self.name == "train-captioner":
                shutil.copytree(shared.small, whole / "pipeline")
            done(self.run(shared, whole, 3))
        if not self.first:
            done(self.run(shared, root, 1))

    def whole(self, shared: Shared) -> Path:
        return shared.whole / self.name

    def act(self, shared: Shared, root: Path) -> Result:
        return self.run(shared, root, 1) if self.first else self.run(shared, root, 2, "--resume")

    def recover(self, shared: Shared, root: Path, ended: bool) -> None:
        run, expected = root / "run", 1 if self.first else 2
        if (run / "training.safetensors").exists():
            step, _ = state(run)
            assert step == expected or (step == expected - 1 and not ended)
            fresh = self.run(shared, root, 3)
            assert fresh.exit_code == 2, fresh.output
            assert f"already holds a run, at step {step}" in fresh.output.replace("\n", "")
            done(self.run(shared, root, 3, "--resume"))
        else:
            assert self.first, "the state of step 1 is lost"
            assert not ended, "the state of step 1 is lost"
            nothing = self.run(shared, root, 3, "--resume")
            assert nothing.exit_code == 2, nothing.output
            said = nothing.output.replace("\n", "")
            if not (run / "checkpoint").exists():
                assert "nothing was saved; begin without resume" in said
            else:  # whole, and the state is not
                assert f"only the weights in {run / 'checkpoint'} were saved" in said
                fresh = self.run(shared, root, 3)
                assert fresh.exit_code == 2, fresh.output
                assert f"expected a folder without weights, got {run / 'checkpoint'}" in fresh.output.replace("\n", "")
                shutil.rmtree(run / "checkpoint")
            done(self.run(shared, root, 3))
        assert_same_run(run, self.whole(shared) / "run")
        if self.name == "train-captioner":
            assert SoraPipeline.from_pretrained(root / "pipeline").captioner is not None
        no_parts(root)


def _other(shared: Shared) -> SoraPipeline:
    """Other weights than those of `small`, in each part."""
    pipeline = SoraPipeline.from_pretrained(shared.small)
    for part in _parts(pipeline).values():
        for value in part.parameters():
            value.data.add_(0.25)
    return pipeline


def _parts(pipeline: SoraPipeline) -> dict[str, Module]:
    return {name: part for name, part in vars(pipeline).items() if isinstance(part, Module)}


def _same(a: SoraPipeline, b: SoraPipeline) -> bool:
    one, other = _parts(a), _parts(b)
    assert len(one) >= 2  # transformer and text encoder
    states = [(one[name].state_dict(), other[name].state_dict()) for name in one.keys() | other.keys()]
    return all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in states)


class Checkpoint:
    """Of `sora export` or save_pretrained, where there is none yet, or over another one."""

    def __init__(self, command: bool, first: bool) -> None:
        self.command, self.first = command, first

    def prepare(self, shared: Shared, root: Path) -> None:
        if self.command and not self.whole(shared).exists():
            done(sora("export", shared.small, self.whole(shared)))
        if not self.first:
            _other(shared).save_pretrained(root / "out")

    def whole(self, shared: Shared) -> Path:
        """The new checkpoint: an exported one has other dtypes."""
        return shared.whole / "export" if self.command else shared.small

    def act(self, shared: Shared, root: Path) -> Result | None:
        if not self.command:
            SoraPipeline.from_pretrained(shared.small).save_pretrained(root / "out")
            return None
        return sora("export", shared.small, root / "out", "--overwrite")

    def recover(self, shared: Shared, root: Path, ended: bool) -> None:
        import sora_model.storage.files as files

        files.settle(root / "out")
        new, old = SoraPipeline.from_pretrained(self.whole(shared)), _other(shared)
        assert not _same(new, old)
        if (root / "out").exists():
            read = SoraPipeline.from_pretrained(root / "out")
            assert _same(read, new) or (_same(read, old) and not self.first and not ended)
        else:
            assert self.first
            assert not ended
        no_parts(root)
        result = self.act(shared, root)
        if result is not None:
            done(result)
        assert _same(SoraPipeline.from_pretrained(root / "out"), new)
        no_parts(root)


def _clip(value: float, frames: int) -> torch.Tensor:
    return torch.linspace(-1, value, 3 * frames * 32 * 32).reshape(3, frames, 32, 32)


class Video:
    """Of write_video, over another file: the name leads to the old or to the new one, whole."""

    command = False

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def write(self, path: Path, value: float) -> Path:
        return write_video(path, _clip(value, 1 if self.suffix == "png" else 5), comment="a clip")

    def prepare(self, shared: Shared, root: Path) -> None:
        self.write(root / f"a.{self.suffix}", 0.0)

    def act(self, shared: Shared, root: Path) -> None:
        self.write(root / f"a.{self.suffix}", 1.0)

    def recover(self, shared: Shared, root: Path, ended: bool) -> None:
        path = root / f"a.{self.suffix}"
        data = path.read_bytes()
        new = self.write(root.parent / f"new.{self.suffix}", 1.0).read_bytes()
        old = self.write(root.parent / f"old.{self.suffix}", 0.0).read_bytes()
        assert data == new or (data == old and not ended)
        self.act(shared, root)
        assert path.read_bytes() == new
        assert [one.name for one in root.iterdir()] == [path.name]


class Outputs:
    """Of the files of a call: videos of every kind, each whole or not there, and their contact sheet."""

    command = False

    def prepare(self, shared: Shared, root: Path) -> None:
        pass

    def act(self, shared: Shared, root: Path) -> None:
        videos = [_clip(1.0, 5), _clip(0.5, 1)]
        write_files(videos, ["a cat", "a dog"], root / "out", [8.0, 8.0], 1, "gif", seeds=[0, 1])

    def recover(self, shared: Shared, root: Path, ended: bool) -> None:
        from sora_model.data import read_video

        out = root / "out"
        before = sorted(path for path in out.glob("[!.]*")) if out.exists() else []
        assert len(before) == 3 or not ended
        for path in before:
            read_video(path)
        write_files([_clip(0.0, 1)], ["another"], out, [8.0], 1, "mp4")
        names = {path.name for path in before}
        number = max((int(name[:2]) for name in names if name[:2].isdecimal()), default=-1) + 1
        names |= {f"{number:02d}-another.png", f"contact_sheet{f'-{number:02d}' if number else ''}.png"}
        there = {path.name for path in out.iterdir()}
        assert there == names, f"expected {sorted(names)}, got {sorted(there)}"


SAVES: dict[str, Save] = {
    name: Save(one.prepare, one.act, one.recover, one.command)  # type: ignore[attr-defined]
    for name, one in {
        "first save of train": Training("train", True),
        "later save of train": Training("train", False),
        "first save of train-vae": Training("train-vae", True),
        "later save of train-vae": Training("train-vae", False),
        "first save of train-captioner": Training("train-captioner", True),
        "later save of train-captioner": Training("train-captioner", False),
        "export": Checkpoint(True, True),
        "export over another": Checkpoint(True, False),
        "save_pretrained over another": Checkpoint(False, False),
        "mp4": Video("mp4"),
        "gif": Video("gif"),
        "png": Video("png"),
        "files of a call": Outputs(),
    }.items()
}
