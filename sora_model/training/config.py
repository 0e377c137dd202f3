"""How to train: `TrainConfig`; settings that are out of range: `SettingError`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class SettingError(ValueError):
    """A setting that cannot be used. The command line calls it by its option."""

    def __init__(self, owner: str, setting: str, problem: str) -> None:
        super().__init__(f"{owner}: {setting}: {problem}")
        self.setting, self.problem = setting, problem


@contextlib.contextmanager
def of_setting(owner: str, setting: str) -> Iterator[None]:
    """Whatever is wrong with the files that a setting leads to is an error that names the setting, too."""
    try:
        yield
    except SettingError:
        raise
    except (ValueError, OSError) as error:
        raise SettingError(owner, setting, str(error)) from error


def check_above(owner: str, settings: dict[str, Any]) -> None:
    """Raises SettingError for numbers that are not above 0, infinity and NaN among them. None is no number."""
    for name, value in settings.items():
        if value is not None and not 0 < value < math.inf:
            raise SettingError(owner, name, f"expected a number above 0, got {value}")


def check_shares(owner: str, settings: dict[str, float]) -> None:
    """Raises SettingError for numbers that are not from 0 to 1."""
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise SettingError(owner, name, f"expected a number from 0 to 1, got {value}")


MOST_ACCUMULATION = 4096  # batches, which are in memory at once


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps, or None for no such limit.
        minutes: wall-clock minutes, or None for no such limit; a resumed run counts those before.
        learning_rate: highest; reached after `warmup` steps, then falling as a cosine.
        final_rate: what it falls to at the end, as a share of it; 1 keeps it.
        optimizer: "muon" (Jordan et al., 2024) for the matrices and kernels inside the model and AdamW for the rest, or "adamw" for
            all. Muon's steps are scaled to AdamW's size, so one learning rate serves both.
        weight_decay: on matrices only.
        gradient_clip: largest norm of all gradients together.
        accumulation: batches whose gradients make one step, at most 4096.
        mixed_precision: "no", or "bf16": matrices multiplied in bfloat16, weights and their averages kept in float32.
        ema_decay: of the averaged weights; the first steps average over fewer.
        save_minutes: between checkpoints; one is always written at the end.
        seed: of everything random.
    """

    steps: int | None = 1000
    minutes: float | None = None
    learning_rate: float = 1e-3
    warmup: int = 50
    final_rate: float = 0.1
    optimizer: str = "muon"
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    accumulation: int = 1
    mixed_precision: str = "no"
    ema_decay: float = 0.999
    save_minutes: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        owner = "TrainConfig"
        if self.steps is None and self.minutes is None:
            raise ValueError("TrainConfig: steps, minutes: expected a limit, got None for both")
        above = ("steps", "minutes", "learning_rate", "gradient_clip", "accumulation", "save_minutes")
        check_above(owner, {name: getattr(self, name) for name in above})
        if self.accumulation > MOST_ACCUMULATION:
            raise SettingError(owner, "accumulation", f"expected at most {MOST_ACCUMULATION}, got {self.accumulation}")
        check_shares(owner, {"ema_decay": self.ema_decay, "final_rate": self.final_rate})
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(owner, name, f"expected a number of at least 0, got {getattr(self, name)}")
        for name, known in (("optimizer", ("muon", "adamw")), ("mixed_precision", ("no", "bf16"))):
            if getattr(self, name) not in known:
                raise SettingError(owner, name, f"expected {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}")
