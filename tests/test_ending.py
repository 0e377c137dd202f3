"""Trainings that do not come to their end: signals, a lost device, a loss that is not finite, a state that is damaged."""

import os
import pty
import re
import signal
import sys

import pytest
import torch
import typer
from reliability.runs import assert_same_run, state, train
from typer.main import get_command

import sora_model.cli.ending
import sora_model.training.trainer
from sora_model.cli import app
from sora_model.storage.files import WriteError, settle_folder, whole_file
from sora_model.training.optimizers import KernelMuon, check_moments
from sora_model.training.recipes.common import Preparation
from sora_model.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    monkeypatch.setattr("sora_model.training.trainer.schedule", lambda *_: 1.0)  # it follows the number of steps


@pytest.fixture(autouse=True)
def _heard():
    """Signals are heard, which a shell ignores for what it puts into the background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in sora_model.cli.ending.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(small, tmp_path):
    """A run of one step."""
    assert train(tmp_path / "run", small, 1).exit_code == 0
    return tmp_path / "run"


def before_step(monkeypatch, number: int, action) -> None:
    take = Trainer._train_step

    def step(self, batches):
        if self.step == number:
            action()
        return take(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", step)


def raised(error: Exception):
    def action(*_) -> None:
        raise error

    return action


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_says_so(name, small, tmp_path, monkeypatch) -> None:
    whole = tmp_path / "whole"
    assert train(whole, small, 3).exit_code == 0
    with monkeypatch.context() as patch:
        before_step(patch, 1, lambda: signal.raise_signal(getattr(signal, name)))
        result = train(tmp_path / "parts", small, 3)
    assert result.exit_code == 128 + getattr(signal, name), result.output
    assert "stopped at step 2; --resume goes on from there" in result.output
    assert train(tmp_path / "parts", small, 3, "--resume").exit_code == 0
    assert_same_run(tmp_path / "parts", whole)


def test_a_second_signal_ends_it_at_once(run, small, monkeypatch) -> None:
    before = (run / "training.safetensors").read_bytes()
    before_step(monkeypatch, 1, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])
    result = train(run, small, 3, "--resume")
    assert result.exit_code == 143
    assert "stopped by SIGTERM: --resume goes on from the last save, step 1" in result.output
    assert (run / "training.safetensors").read_bytes() == before
    assert not list(run.glob(".*"))


def test_another_signal_is_no_second_one(run, small, monkeypatch) -> None:
    """A launcher passes Ctrl-C on as SIGTERM, to processes that had SIGINT already."""
    before_step(monkeypatch, 1, lambda: [signal.raise_signal(one) for one in (signal.SIGINT, signal.SIGTERM)])
    assert train(run, small, 3, "--resume").exit_code == 130
    assert state(run)[0] == 2


def test_any_signal_that_comes_again_ends_it_at_once(run, small, monkeypatch) -> None:
    """A terminal that is closed sends SIGHUP; what ends the session then sends SIGTERM until it is gone."""
    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM)
    before_step(monkeypatch, 1, lambda: [signal.raise_signal(one) for one in numbers])
    result = train(run, small, 3, "--resume")
    assert result.exit_code == 143
    assert "stopped by SIGTERM: --resume goes on from the last save, step 1" in result.output
    assert state(run)[0] == 1


def test_before_the_first_step_there_is_nothing_to_wait_for(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Preparation, "clips", lambda *_: signal.raise_signal(signal.SIGTERM))
    result = train(tmp_path / "run", small, 3)
    assert result.exit_code == 143
    assert "stopped by SIGTERM: nothing was saved" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_during_a_save(times, run, small, monkeypatch) -> None:
    """Once, it is saved as if nothing had happened; twice, the last save stays."""
    save_file = sora_model.training.resume.save_file

    def signalled(tensors, path, metadata) -> None:
        save_file(tensors, path, metadata)
        for _ in range(times):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("sora_model.training.resume.save_file", signalled)
    result = train(run, small, 2, "--resume")
    assert result.exit_code == (0 if times == 1 else 143), result.output
    assert state(run)[0] == (2 if times == 1 else 1)
    assert not list(run.glob(".*"))


def test_what_is_ignored_stays_ignored(run, small, monkeypatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    before_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGHUP))
    assert train(run, small, 3, "--resume").exit_code == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_terminal_that_is_closed_costs_nothing(small, tmp_path, monkeypatch) -> None:
    """Its hangup is a signal, and whatever is printed from then on fails."""
    reached, go = os.pipe(), os.pipe()

    def wait() -> None:
        os.write(reached[1], b"1")
        os.read(go[0], 1)

    before_step(monkeypatch, 1, wait)
    child, terminal = pty.fork()
    if child == 0:
        status = 70
        try:
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            command = ["train", tmp_path / "run", "--start", small, "--size", "2x16x16", "--tokens", 32, "--steps", 9]
            get_command(app).main([str(one) for one in command])
        except SystemExit as end:
            sys.stdout.flush()
            status = end.code
        finally:
            os._exit(status)
    os.read(reached[0], 1)
    os.close(terminal)
    os.write(go[1], b"1")
    _, ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended) == 128 + signal.SIGHUP
    assert state(tmp_path / "run")[0] == 2


def test_a_lost_device_has_its_own_status(run, small, monkeypatch) -> None:
    before = (run / "training.safetensors").read_bytes()
    nccl = "NCCL error in: ProcessGroupNCCL.cpp:77, remote process exited or there was a network error, NCCL version 2.27.3"
    for text in (
        "CUDA error: unspecified launch failure\nmore",
        nccl,
        "CUDA error: hardware stack error",
        "Connection closed by peer",
    ):
        with monkeypatch.context() as patch:
            before_step(patch, 1, raised(torch.AcceleratorError(text)))
            result = train(run, small, 3, "--resume")
        assert result.exit_code == 75, result.output
        (line,) = [line for line in result.output.splitlines() if "error: " in line]
        assert text.splitlines()[0] in line
        assert line.endswith("; --resume goes on from the last save, step 1")
        assert (run / "training.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "NCCL error in: ProcessGroupNCCL.cpp:77, invalid usage, NCCL version 2.27.3\nDuplicate GPU detected : rank 1",
        "NCCL error in: ProcessGroupNCCL.cpp:77, invalid argument, NCCL version 2.27.3\nncclInvalidArgument: Invalid value",
        "this operation is not supported on this hardware",
    ],
)
def test_a_fault_of_a_program_is_none_of_the_device(text, run, small, monkeypatch) -> None:
    before_step(monkeypatch, 1, raised(RuntimeError(text)))
    with pytest.raises(RuntimeError, match=re.escape(text)):
        train(run, small, 3, "--resume")


def test_a_full_disk_says_where_the_run_goes_on(run, small, monkeypatch) -> None:
    full = WriteError("cannot write training.safetensors: No space left on device")
    monkeypatch.setattr(sora_model.training.trainer, "write_state", raised(full))
    result = train(run, small, 3, "--resume")
    assert result.exit_code == 2
    assert "No space left on device; --resume goes on from the last save, step 1" in result.output.replace("\n", "")


def test_a_full_disk_of_a_first_save(small, tmp_path, monkeypatch) -> None:
    """The checkpoint is written before the state."""
    full = WriteError("cannot write training.safetensors: No space left on device")
    monkeypatch.setattr(sora_model.training.trainer, "write_state", raised(full))
    result = train(tmp_path / "run", small, 1)
    assert result.exit_code == 2
    said = result.output.replace("\n", "")
    assert f"No space left on device; only the weights in {tmp_path / 'run' / 'checkpoint'} were saved; another run, " in said


def test_a_state_that_cannot_be_read_is_no_missing_one(run, small, monkeypatch) -> None:
    before_step(monkeypatch, 1, lambda: [os.truncate(run / "training.safetensors", 100), raised(WriteError("cannot write"))()])
    result = train(run, small, 3, "--resume")
    assert result.exit_code == 2
    assert "cannot write; the last save cannot be read: Trainer: " in result.output.replace("\n", "")


def test_no_memory_is_one_line(run, small, monkeypatch) -> None:
    before_step(monkeypatch, 1, raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")))
    result = train(run, small, 3, "--resume")
    assert result.exit_code == 2
    assert "out of memory: expected a smaller model or batch" in result.output
    assert state(run)[0] == 1


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_overwrites_nothing(value, run, small, monkeypatch) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    loss = sora_model.training.trainer._Loss.forward
    monkeypatch.setattr(sora_model.training.trainer._Loss, "forward", lambda *args: loss(*args) * torch.tensor(float(value)))
    result = train(run, small, 3, "--resume")
    assert result.exit_code == 2
    assert f"the loss is {value} at step 1; nothing of it is saved; try a lower learning rate" in result.output.replace("\n", "")
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before


def test_a_moment_that_is_lost_is_not_saved(run, small, monkeypatch) -> None:
    """It would keep its weight from learning for ever, with a loss that is finite."""
    before = (run / "training.safetensors").read_bytes()
    tensors = Trainer._tensors

    def lost(self):
        found = tensors(self)
        next(value for name, value in found.items() if name.endswith("exp_avg_sq")).fill_(torch.inf)
        return found

    monkeypatch.setattr(Trainer, "_tensors", lost)
    result = train(run, small, 2, "--resume")
    assert result.exit_code == 2
    assert "exp_avg_sq: expected finite numbers, got infinity" in result.output.replace("\n", "")
    assert (run / "training.safetensors").read_bytes() == before


MOMENTS = {"step": torch.ones(()), "exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({**MOMENTS, "exp_avg": torch.zeros(())}, "exp_avg: expected float32 [2, 3], got float32 []"),
        ({**MOMENTS, "exp_avg_sq": torch.zeros(2, 3).half()}, "exp_avg_sq: expected float32 [2, 3], got float16 [2, 3]"),
        ({**MOMENTS, "step": torch.ones(6)}, "step: expected float32 [], got float32 [6]"),
        ({**MOMENTS, "max_exp_avg_sq": torch.zeros(2, 3)}, "max_exp_avg_sq: expected none, got float32 [2, 3]"),
        ({"step": MOMENTS["step"]}, "exp_avg: expected float32 [2, 3], got none"),
        ({"momentum_buffer": torch.zeros(2, 3)}, "step: expected float32 [], got none"),
    ],
)
def test_moments_are_those_of_the_optimizer(moments, message) -> None:
    """It would compute with others, beyond the memory of one that is too small."""
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    adamw, muon = torch.optim.AdamW([parameter]), KernelMuon([parameter], 0.1, 0.0)
    check_moments(MOMENTS, adamw, parameter, "here")
    with pytest.raises(ValueError, match=rf"^here\.{re.escape(message)}$"):
        check_moments(moments, adamw, parameter, "here")
    check_moments({"momentum_buffer": torch.zeros(2, 3)}, muon, parameter, "here")
    with pytest.raises(ValueError, match=r"^here\.momentum_buffer: expected float32 \[2, 3\], got "):
        check_moments({**moments, "momentum_buffer": torch.zeros(())}, muon, parameter, "here")


@pytest.mark.parametrize("name", ["checkpoint", "training.safetensors", "loss.csv", "tensorboard"])
def test_a_link_in_a_run_is_not_written_through(name, run, small, tmp_path) -> None:
    """A run of others would have another file overwritten."""
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    result = train(run, small, 2, "--resume")
    assert result.exit_code == 2
    assert f"--resume: expected what the run has written in its folder, got the link {run / name}" in result.output.replace(
        "\n", ""
    )


def test_what_is_said_of_a_state_steers_no_terminal(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sora_model.training.resume.read_state", raised(ValueError("a key of \x1b]0;others")))
    with pytest.raises(typer.Exit), sora_model.cli.ending.endings(run):
        raise sora_model.cli.ending.Stopped(signal.SIGTERM)
    assert r"a key of \x1b]0;others" in capsys.readouterr().err.replace("\n", "")


def test_a_state_that_cannot_be_mapped_is_named(run, small, monkeypatch) -> None:
    """As one is that is larger than memory."""
    monkeypatch.setattr("sora_model.training.resume.safe_open", raised(RuntimeError("unable to mmap: Cannot allocate memory (12)")))
    result = train(run, small, 2, "--resume")
    assert result.exit_code == 2
    assert "training.safetensors: expected a file that this machine can map, got unable to mmap" in result.output.replace("\n", "")


@pytest.mark.parametrize("where", [0.3, 0.6, 0.999])
def test_a_flipped_bit_is_seen(where, run, small) -> None:
    path = run / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)
    result = train(run, small, 2, "--resume")
    assert result.exit_code == 2
    text = result.output.replace("\n", "")
    assert "training.safetensors: expected the checksum" in text
    assert f"the file is damaged; its averaged weights are in {run / 'checkpoint'}" in text


def test_a_log_of_any_bytes_is_read(run, small) -> None:
    """As a loss of power leaves its last block."""
    with open(run / "loss.csv", "ab") as file:
        file.write(bytes(200_000) + b"\xff\n2,0.5")
    assert train(run, small, 2, "--resume").exit_code == 0
    assert [line.split(",")[0] for line in (run / "loss.csv").read_text().splitlines()] == ["step", "1", "2"]


def test_a_log_without_lines_is_not_read_to_its_end(run, small) -> None:
    with open(run / "loss.csv", "ab") as file:
        file.truncate(2**40)  # zeros, which no disk has to hold
    assert train(run, small, 2, "--resume").exit_code == 0
    assert [line.split(",")[0] for line in (run / "loss.csv").read_text().splitlines()] == ["step", "1", "2"]


@pytest.mark.parametrize("name", ["loss.csv", "training.safetensors"])
def test_a_pipe_in_a_run_is_not_waited_for(name, run, small) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    result = train(run, small, 2, "--resume")
    assert result.exit_code == (0 if name == "loss.csv" else 2), result.output
    assert train(run, small, 2).exit_code == 2


def test_what_any_dead_call_left_in_a_folder_goes(tmp_path) -> None:
    for name in ("a.mp4", "b.mp4"):
        space = tmp_path / f".{name}.12345678.part"
        (space / "new").mkdir(parents=True)
    (tmp_path / ".b.mp4.12345678.part" / "mine").touch()
    with whole_file(tmp_path / "c.mp4") as alive:
        alive.touch()
        settle_folder(tmp_path)
        assert alive.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.mp4.12345678.part", "c.mp4"]
