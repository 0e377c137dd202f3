"""Contact sheets of every task: what the measurements of `evaluate` look at, a few of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data import contact_sheet
from ..pipeline.pipeline import SoraPipeline
from .evaluate import MEASUREMENTS, Judge

ROWS, COLUMNS = 4, 12


def make(
    pipeline: SoraPipeline, tasks: Sequence[str], out: Path, steps: int = 30, guidance: float = 3.0, seed: int = 2026
) -> list[Path]:
    """Writes a PNG per task; returns their paths."""
    judge, paths = Judge(pipeline, 32, steps, guidance, seed), []
    for name in tasks:
        shown = MEASUREMENTS[name](judge)
        videos, labels = shown.videos[:ROWS], shown.labels[:ROWS]
        columns = min(COLUMNS, max(video.shape[1] for video in videos))
        paths.append(contact_sheet(out / f"{name}.png", videos, labels, columns=columns, cell=80 if columns > 1 else 240))
    return paths
