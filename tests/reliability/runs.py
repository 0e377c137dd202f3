"""Runs of training that are compared bit for bit, for tests/test_runs.py and crashes.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from sora_model.cli import app


def sora(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def train(out: Path, small: Path, steps: int, *more: object) -> Result:
    return sora("train", out, "--start", small, "--size", "2x16x16", "--tokens", 32, "--steps", steps, *more)


def state(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The step and the tensors that a run is resumed from."""
    with safe_open(run / "training.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])["step"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same_run(run: Path, other: Path) -> None:
    """Weights, averages, moments, the step, the checkpoint and the log, bit for bit; nothing left over."""
    (step, tensors), (other_step, others) = state(run), state(other)
    assert step == other_step
    assert tensors.keys() == others.keys()
    assert any(name.startswith("optimizer.") for name in tensors)
    for name, value in tensors.items():
        assert torch.equal(value, others[name]), name
    for path in (other / "checkpoint").rglob("*.safetensors"):
        ours, theirs = load_file(run / path.relative_to(other)), load_file(path)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint", "loss.csv", "tensorboard", "training.safetensors"]
    steps, losses = zip(*(line.split(",")[:2] for line in (run / "loss.csv").read_text().splitlines()), strict=True)
    assert steps == ("step", *(str(number + 1) for number in range(step)))
    assert losses == tuple(line.split(",")[1] for line in (other / "loss.csv").read_text().splitlines())
