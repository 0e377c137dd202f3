"""How to train: `TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass


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
        accumulation: batches whose gradients make one step.
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
        if self.steps is None and self.minutes is None:
            raise ValueError("TrainConfig: steps, minutes: expected a limit, got None for both")
        for name in ("steps", "minutes", "learning_rate", "gradient_clip", "accumulation", "save_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"TrainConfig: {name}: expected a number above 0, got {value}")
        for name in ("ema_decay", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"TrainConfig: {name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if self.warmup < 0 or self.weight_decay < 0:
            got = f"{self.warmup} and {self.weight_decay}"
            raise ValueError(f"TrainConfig: warmup, weight_decay: expected numbers of at least 0, got {got}")
        for name, known in (("optimizer", ("muon", "adamw")), ("mixed_precision", ("no", "bf16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"TrainConfig: {name}: expected {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}")
