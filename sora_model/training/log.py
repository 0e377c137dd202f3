"""What every step of a run did, on disk: loss.csv and tensorboard/ in its folder.

TensorBoard's own writer is a thread, which cannot say that the disk is full but by a traceback. So its records are written here.
"""

from __future__ import annotations

import csv
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..storage.files import flush, whole_file, writing

COLUMNS = ("step", "loss", "learning_rate", "tokens_per_second", "seconds")
LONGEST = 1000  # characters of a row, and more
CURVES = ("loss", "learning_rate", "tokens_per_second")


@dataclass(frozen=True)
class Step:
    """What one step did. sizes: (T, H, W) of its samples; seconds: since the run began, earlier parts of it included."""

    step: int
    loss: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    seconds: float
    sizes: list[tuple[int, ...]]


class TrainLog:
    """Writes a row per step, after those that an earlier part of the run wrote up to `step`.

    >>> with TrainLog(Path.cwd(), step=0) as log:
    ...     log.add(Step(1, loss=0.5, learning_rate=1e-3, tokens=2048, tokens_per_second=900.0, seconds=2.3, sizes=[(4, 6, 6)]))
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.table, self.board = folder / "loss.csv", folder / "tensorboard"
        rows = _rows_until(self.table, step)
        with whole_file(self.table) as partial, open(partial, "w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
            csv.writer(file).writerows(rows)
        with writing(self.table):
            self._rows = open(self.table, "a", newline="", buffering=1)  # noqa: SIM115 (closed on leaving)
        with writing(self.board):
            self.board.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._events = open(self.board / name, "ab", buffering=0)  # noqa: SIM115
            self._records: Any = RecordWriter(self._events)
            self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def add(self, done: Step) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        row = (done.step, f"{done.loss:.6f}", f"{done.learning_rate:.6g}", f"{done.tokens_per_second:.1f}", f"{done.seconds:.2f}")
        with writing(self.table):
            csv.writer(self._rows).writerow(row)
        values = [Summary.Value(tag=name, simple_value=getattr(done, name)) for name in CURVES]
        with writing(self.board):
            event = Event(wall_time=time.time(), step=done.step, summary=Summary(value=values))
            self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Waits until the disk has all rows so far."""
        for path, file in ((self.table, self._rows), (self.board, self._events)):
            with writing(path):
                os.fsync(file.fileno())
                flush(path if path.is_dir() else path.parent)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes both files; what cannot be written then is an error, unless there is one already."""
        try:
            with writing(self.board):
                self._events.close()
            with writing(self.table):
                self._rows.close()
        except OSError:
            if error is None:
                raise


def _rows_until(path: Path, step: int) -> Iterator[list[str]]:
    """The rows up to a step, in order: a killed run may leave later ones, and half of one; a loss of power, any bytes.

    A line that is longer than a row ends the log, however large the file is. What is no file, such as a pipe, has no rows.
    """
    if step == 0 or not path.is_file():
        return
    with path.open(encoding="ascii", errors="replace") as file:
        while 0 < len(line := file.readline(LONGEST)) < LONGEST:
            row = line.rstrip("\n").split(",")
            if len(row) == len(COLUMNS) and row[0].isdecimal() and int(row[0]) <= step:
                yield row
