"""How a training ends that does not come to its end: signals, a lost device, and the exit status of each.

The first signal stops the training after the step in hand, and it is saved. The same signal again, or one while there is no step to
wait for, ends the command at once: what is being written is taken back, and the last save stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from .app import errors, fail
from .text import one_line

if TYPE_CHECKING:
    from ..training.trainer import Trainer

STATUSES = """Exit status: 0 done; 1 a fault of the program, with a traceback; 2 a wrong option or file, a loss that is not finite,
no memory, or a disk that cannot be written to; 75 the device or another process is lost, --resume on another machine; 128 + N
stopped by signal N (130 SIGINT, 143 SIGTERM, 129 SIGHUP) and saved if a step was done, --resume goes on. torchrun ends with 1."""
LOST = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What CUDA says of a device that works no more, and NCCL and Gloo of another process that is gone. Not "an illegal memory access"
# and "device-side assert triggered", which are faults of a program, nor NCCL's ncclInvalidUsage ("Duplicate GPU detected") and its
# like: a script that tries again would do so for ever.
LOST_DEVICE = re.compile(
    "unspecified launch failure|uncorrectable|hardware (stack )?error|GPU is lost|device.s. is/are busy or unavailable"
    "|CUDA error: unknown error|NVLink error|driver shutting down|ncclRemoteError|ncclSystemError|unhandled system error"
    "|remote process exit|Connection closed by peer|Connection reset by peer",
    re.IGNORECASE,
)


class Stopped(BaseException):
    """A signal that the command ends for at once. No Exception, as nothing on the way may take it for a fault."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Hears signals within its block, in the main thread. trainer: what the first one stops, while there are steps."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.number: int | None = None  # of the first one
        self.heard: set[int] = set()
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> Signals:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        if threading.current_thread() is threading.main_thread():
            # Where a signal is ignored, as by nohup or what a shell put into the background, it stays ignored.
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        for descriptor in self._terminals:
            if not os.isatty(descriptor):  # it was closed: what is still said must not fail
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)
        if self.trainer is None or number in self.heard:
            signal.signal(number, signal.SIG_DFL)  # a third one ends the process whatever it is in
            raise Stopped(number)
        self.heard.add(number)
        self.number = self.number or number
        self.trainer.stop()


@contextlib.contextmanager
def endings(out: Path) -> Iterator[Signals]:
    """Ends the command with one line and its status where a signal or a lost device ends a training in `out`."""
    try:
        with Signals() as signals:
            yield signals
    except Stopped as stopped:
        _say(f"stopped by {stopped}: {_last_save(out)}")
        raise typer.Exit(128 + stopped.number) from None
    except OSError as error:
        from ..storage.files import WriteError

        if not isinstance(error, WriteError):
            raise
        raise WriteError(f"{error}; {_last_save(out)}") from error
    except RuntimeError as error:
        if LOST_DEVICE.search(str(error)) is None:
            raise
        fail(f"the device or another process is lost: {str(error).splitlines()[0]}; {_last_save(out)}", LOST)


def _last_save(out: Path) -> str:
    from ..training.resume import STATE, read_state, saved_alone

    try:
        if not (out / STATE).exists():
            return saved_alone(out)
        return f"--resume goes on from the last save, step {read_state(out / STATE)['step']}"
    except (ValueError, OSError) as error:
        return f"the last save cannot be read: {error}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        errors.print(one_line(line), highlight=False, soft_wrap=True, markup=False)
