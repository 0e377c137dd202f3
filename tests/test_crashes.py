"""A sample of what reliability/crashes.py interrupts; and what it is made of finds what it is made for."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from reliability.crashes import Case, Crashes
from reliability.disk import LOSSES, Call, Disk
from reliability.interposed import Fault, Interposed, in_child
from reliability.outcome import outcomes
from reliability.saves import Shared

from sora_model.data import write_video
from sora_model.storage.files import WriteError

ROOT = Path(__file__).parent.parent


def test_some_of_all_crash_points() -> None:
    command = [sys.executable, "-m", "tests.reliability.crashes", "24"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one.failed for one in outcomes(done.stdout)] == [0, 0, 0]
    assert sum(one.cases for one in outcomes(done.stdout)) >= 24


def test_a_recovery_that_dies_in_silence_fails(tmp_path) -> None:
    crashes = object.__new__(Crashes)
    crashes.root, crashes.shared, crashes.log, crashes._seen = tmp_path / "root", None, tmp_path / "log", {}
    crashes.saves = {"save": mock.Mock(recover=lambda *_: signal.raise_signal(signal.SIGKILL))}
    for _ in range(2):  # a state that was looked at before is not looked at again
        assert crashes._recovered("save", {}, complete=True) == "going on from it ends with status -9: "


@pytest.fixture
def writing(tmp_path):
    """Writes a file carelessly, in a child whose call number `at` goes wrong; returns how it ended, and the folder."""
    interposed = Interposed()

    def write(at: int, fault: Fault):
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "a").write_text("old")

        def act() -> int:
            interposed.arm(folder, tmp_path / "spare", at, fault)
            with open(folder / "b", "w") as file:  # calls 1 to 3: open, write, close
                file.write("new!")
            (folder / "b").rename(folder / "a")
            return interposed.disarm()

        return in_child(act, tmp_path / "log"), folder

    return write


def test_every_call_is_counted(writing) -> None:
    ended, folder = writing(0, Fault.nothing)
    assert ended.status == 4
    assert (folder / "a").read_text() == "new!"


@pytest.mark.parametrize(("at", "left"), [(1, {"a": "old"}), (2, {"a": "old", "b": ""}), (4, {"a": "old", "b": "new!"})])
def test_a_call_can_be_the_last(at, left, writing) -> None:
    ended, folder = writing(at, Fault.killed)
    assert ended.status == -9
    assert {path.name: path.read_text() for path in folder.iterdir()} == left


@pytest.mark.parametrize(
    ("fault", "at", "problem"),
    [
        (Fault.full_disk, 2, "No space left on device"),
        (Fault.io_errors, 4, "Input/output error"),
        (Fault.read_only, 1, "Read-only file system"),
    ],
)
def test_a_disk_can_fail(fault, at, problem, writing) -> None:
    ended, folder = writing(at, fault)
    assert problem in ended.output
    assert (folder / "a").read_text() == "old"


@pytest.mark.parametrize("fault", [Fault.interrupted, Fault.short_writes])
def test_what_goes_on_is_whole(fault, writing) -> None:
    ended, folder = writing(1, fault)
    assert ended.status >= 4
    assert (folder / "a").read_text() == "new!"


def test_a_loss_of_power_takes_what_was_not_flushed(tmp_path) -> None:
    """Names of a folder, the rest of a file; what was replaced without a flush comes back."""
    before, root, kept = (tmp_path / name for name in ("before", "root", "kept"))
    for folder in (before, root, kept):
        folder.mkdir()
    (before / "a").write_text("old")
    (root / "a").write_text("safe and not")
    (kept / "3").write_text("old")
    disk = Disk(before, root, kept)
    for call in (
        Call(1, "create", f"{root}/b", ""),
        Call(2, "flush", f"{root}/b", "4"),
        Call(3, "rename", f"{root}/b", f"{root}/a"),
    ):
        disk.follow(call)
    left = {loss: dict(disk.left(loss)) for loss in LOSSES}
    assert left["names lost"] == {"a": b"old"}
    assert left["bytes torn"] == {"a": b"safe and"}
    assert left["bytes zeroed"] == {"a": b"safe" + bytes(8)}
    disk.follow(Call(4, "flush", str(root), ""))
    assert dict(disk.left("names lost")) == {"a": b"safe and"}
    disk.follow(Call(5, "truncate", f"{root}/a", "2"))  # and written again, in place
    assert dict(disk.left("bytes zeroed")) == {"a": b"sa" + bytes(10)}


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("suffix", ["gif", "mp4", "png"])
def test_a_video_survives_signals(suffix, at, tmp_path) -> None:
    """Every other call is interrupted, as on a file system of a network."""
    interposed, folder = Interposed(), tmp_path / "folder"
    folder.mkdir()

    def act() -> None:
        interposed.arm(folder, tmp_path / "spare", at, Fault.interrupted)
        write_video(folder / f"a.{suffix}", torch.zeros(3, 1, 16, 16))
        interposed.disarm()

    ended = in_child(act, tmp_path / "log")
    assert ended.status == 0, ended.output


def test_what_says_that_it_saved_has(tmp_path) -> None:
    """A function that keeps an error of its disk to itself."""

    def check() -> None:
        crashes = Crashes(tmp_path / "work")
        name = "save_pretrained over another"
        crashes.prepare(name)
        sound = crashes.saves[name]
        case = Case(name, 1, Fault.full_disk)
        assert [one.problem for one in crashes.check(case, 1)] == [None]

        def silent(shared: Shared, root: Path) -> None:
            with contextlib.suppress(WriteError):
                sound.act(shared, root)

        crashes.saves[name] = sound._replace(act=silent)
        (found,) = crashes.check(case, 1)
        assert found.problem is not None
        assert "AssertionError" in found.problem

    ended = in_child(check, tmp_path / "log")  # what it replaces is replaced there alone
    assert ended.status == 0, ended.output
