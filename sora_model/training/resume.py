"""Resuming a run: its state's file, and whether a run can start or go on in a folder."""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..limits import OverLimit
from ..storage.documents import read_json_text
from ..storage.files import check_replaceable, locked, make_folder, settle, whole_file, writing
from ..storage.weights import check_header, opened
from .config import SettingError, TrainConfig

STATE, CHECKPOINT = "training.safetensors", "checkpoint"
MOST_STEPS = 1000  # of a second; no step is so short


def all_settings(settings: Mapping[str, str | int | None], config: TrainConfig, processes: int) -> dict[str, str | int | None]:
    """What must be the same where a run is resumed: what its caller names, and what of its config the batches depend on."""
    return {**settings, "seed": config.seed, "accumulation x processes": config.accumulation * processes}


def check_run(folder: Path, *, resume: bool, settings: Mapping[str, str | int | None]) -> None:
    """Brings to an end what a killed process left half-written in a run's folder, and says whether a run can begin or go on there.

    Raises:
        SettingError: nothing to resume; a fresh run where there is one already, or weights; settings that are not those that the
            run began with (see `Trainer`).
        ValueError: files of others in checkpoint/.
    """
    path, checkpoint = folder / STATE, folder / CHECKPOINT
    for name in (CHECKPOINT, STATE, "loss.csv", "tensorboard") if resume else ():
        if (folder / name).is_symlink():  # a run of others would have files elsewhere written
            raise SettingError(
                "Trainer", "resume", f"expected what the run has written in its folder, got the link {folder / name}"
            )
    for name in (CHECKPOINT, STATE, "loss.csv"):
        settle(folder / name)
    check_replaceable(checkpoint)
    weights = has_weights(checkpoint)
    if not resume and path.exists():
        at = read_state(path)["step"]
        raise SettingError("Trainer", "folder", f"{folder} already holds a run, at step {at}; resume it or choose another folder")
    if not resume and weights:  # of another, or of a run that ended before its first state was whole
        choice = "choose another folder, which can start from these weights, or remove them"
        raise SettingError("Trainer", "folder", f"expected a folder without weights, got {checkpoint}; {choice}")
    if not resume:
        return
    if not path.is_file():
        begin = "" if weights else "; begin without resume"
        raise SettingError("Trainer", "resume", f"expected {path}, which is not there: {saved_alone(folder)}{begin}")
    began = read_state(path)["settings"]
    other = [
        f"{name}: expected {began[name]}, as the run began with, got {value}"
        for name, value in settings.items()
        if name in began and began[name] != value
    ]
    if other:
        raise SettingError("Trainer", "resume", "; ".join(other))


def has_weights(checkpoint: Path) -> bool:
    return checkpoint.is_dir() and any(checkpoint.iterdir())


def saved_alone(folder: Path) -> str:
    """What a run has saved that has no state."""
    if has_weights(folder / CHECKPOINT):
        return f"only the weights in {folder / CHECKPOINT} were saved; another run, elsewhere, can start from them"
    return "nothing was saved"


@contextlib.contextmanager
def only_run(folder: Path, *, fresh: bool) -> Iterator[None]:
    """Keeps a run's folder for this process, until the end or until it is killed.

    Raises SettingError where another process has it; for a fresh run also where another one has ended there meanwhile.
    """
    with writing(folder):
        make_folder(folder)
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
        check_header(path, "Trainer")
        with safe_open(path, "pt") as file:
            text = file.metadata()["state"]
        state = read_json_text(text, f"Trainer: {path}", constants=True)
        found = {name: state[name] for name in ("step", "seconds", "config", "settings")}
        step, seconds = found["step"], found["seconds"]
        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise ValueError(f"seconds {seconds!r}")
        # Batches up to this step are drawn again.
        if type(step) is not int or not 0 <= step <= MOST_STEPS * (60 + seconds):
            raise ValueError(f"step {step!r} after {seconds:g} s")
        if not isinstance(found["config"], dict) or not isinstance(found["settings"], dict):
            raise TypeError("a config or settings that are no objects")
        return found
    except OverLimit:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Trainer: {path}: expected the state of a run of this package, got {error}") from None
    except RuntimeError as error:  # a file that is larger than memory cannot be mapped
        raise ValueError(f"Trainer: {path}: expected a file that this machine can map, got {error}") from None


def write_state(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes what a run is resumed from, all or nothing."""
    text, contiguous = json.dumps(state), {name: value.contiguous() for name, value in tensors.items()}
    with whole_file(path) as temporary:
        save_file(contiguous, temporary, {"state": text, "checksum": _checksum(text, contiguous)})


def read_state_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a run's file. Raises ValueError if a bit of it is not as it was written."""
    with opened(path, "Trainer") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    got = _checksum(metadata["state"], tensors)
    expected = metadata.get("checksum", got)  # files of earlier versions have none
    if got != expected:
        hint = f"its averaged weights are in {path.parent / 'checkpoint'}"
        raise ValueError(f"Trainer: {path}: expected the checksum {expected}, got {got}: the file is damaged; {hint}")
    return tensors


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The CRC-32 of all that `write_state` writes, which takes 0.5 s per GB."""
    total = zlib.crc32(text.encode())
    for name, value in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), total)
        total = zlib.crc32(value.detach().cpu().flatten().view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
