"""Resuming a run: its state's file, and whether a run can start or go on in a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..storage.files import check_replaceable, locked, settle, writing
from .config import SettingError, TrainConfig

STATE = "training.safetensors"


def all_settings(settings: Mapping[str, str | int | None], config: TrainConfig, processes: int) -> dict[str, str | int | None]:
    """What must be the same where a run is resumed: what its caller names, and what of its config the batches depend on."""
    return {**settings, "seed": config.seed, "accumulation x processes": config.accumulation * processes}


def check_run(folder: Path, *, resume: bool, settings: Mapping[str, str | int | None]) -> None:
    """Brings to an end what a killed process left half-written in a run's folder, and says whether a run can begin or go on there.

    Raises:
        SettingError: nothing to resume; a fresh run where there is one already; settings that are not those that the run began
            with (see `Trainer`).
        ValueError: files of others in checkpoint/.
    """
    path = folder / STATE
    for name in ("checkpoint", STATE, "loss.csv"):
        settle(folder / name)
    check_replaceable(folder / "checkpoint")
    if not resume and path.exists():
        at = read_state(path)["step"]
        raise SettingError("Trainer", "folder", f"{folder} already holds a run, at step {at}; resume it or choose another folder")
    if not resume:
        return
    if not path.is_file():
        raise SettingError("Trainer", "resume", f"expected {path}, which is not there: nothing was saved; begin without resume")
    began = read_state(path)["settings"]
    other = [
        f"{name}: expected {began[name]}, as the run began with, got {value}"
        for name, value in settings.items()
        if name in began and began[name] != value
    ]
    if other:
        raise SettingError("Trainer", "resume", "; ".join(other))


@contextlib.contextmanager
def only_run(folder: Path, *, fresh: bool) -> Iterator[None]:
    """Keeps a run's folder for this process, until the end or until it is killed.

    Raises SettingError where another process has it; for a fresh run also where another one has ended there meanwhile.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as free:
        if not free:
            raise SettingError("Trainer", "folder", f"expected a folder that no other run is writing to, got {folder}")
        if fresh:
            check_run(folder, resume=False, settings={})
        yield


def check_idle(folder: Path) -> None:
    """Raises SettingError where a process is training in a folder."""
    if folder.is_dir():
        with only_run(folder, fresh=False):
            pass


def read_state(path: Path) -> dict[str, Any]:
    """What a run's file says beside its tensors: step, seconds, config and settings."""
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            return {name: state[name] for name in ("step", "seconds", "config", "settings")}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Trainer: {path}: expected the state of a run of this package, got {error}") from None
