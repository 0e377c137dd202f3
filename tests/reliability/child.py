"""Runs something in a process of its own and says how it ended, what it took, and what it did that nothing untrusted may cause."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .fork import fork

MEMORY, SECONDS = 2**30, 10  # of a command
HANG = 60  # seconds after which it is killed
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TEMPLATES = str(Path(__file__).parents[2] / "sora_model" / "caption" / "template.py")  # what renders chat templates
FORBIDDEN = {
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.fork",
    "os.forkpty",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "pickle.find_class",
    "urllib.Request",
}
# What changes files: how many paths come first, and where the descriptor of the folder is that they are relative to.
CHANGES = {
    "os.rename": (2, 2),
    "os.remove": (1, 1),
    "os.rmdir": (1, 1),
    "os.mkdir": (1, 2),
    "os.link": (2, 2),
    "os.symlink": (2, 2),
    "os.truncate": (1, None),
    "os.chmod": (1, 2),
}


class Ended(NamedTuple):
    """How a command ended.

    code: its exit status, or minus the number of the signal that ended it. seconds: of a processor, whatever else the machine
    does; who waits is killed after HANG. memory: bytes that it had at most. more: of those, what
    this process did not have. events: what it did of what is forbidden.
    """

    code: int
    seconds: float
    memory: int
    more: int
    text: str
    events: list[str]

    def faults(self, named: Sequence[str], *, well: bool = True, more: bool = False) -> list[str]:
        """What is wrong with it. named: of which one must be in the one line of an error. well: it may also end well."""
        found = list(self.events)
        if self.code == 0:
            found += [] if well else ["ended well"]
        elif self.code != 2:
            found.append(f"ended with {self.code}")
        elif not any(name in self.text for name in named):
            found.append(f"names none of {', '.join(map(repr, named))}")
        if "Traceback" in self.text:
            found.append("a traceback")
        if self.code == 2 and "error: " not in self.text and "Error" not in self.text:
            found.append("no line that begins with error")
        if (memory := self.more if more else self.memory) > MEMORY:
            found.append(f"{memory >> 20} MiB")
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.1f} s")
        return found


def sora(arguments: Sequence[str]) -> Callable[[], None]:
    """A command of `sora` as something to run."""

    def run() -> None:
        from sora_model.cli import app

        app(list(arguments))

    return run


def in_a_process(run: Callable[[], None], *, writable: Path, untrusted: Path) -> Ended:
    """Runs a function in a fork of this process, which has imported what it needs.

    writable: the folder that it may write to, besides the system's temporary one. untrusted: the folder that no code may come from.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output, tempfile.TemporaryFile("w+") as noted:
        before = _resident()

        def guarded() -> None:
            _limit()
            _watch(noted.fileno(), writable, untrusted)
            run()

        child = fork(guarded, output.fileno())
        _, status, usage = os.wait4(child, 0)
        output.seek(0)
        noted.seek(0)
        events = [json.loads(line) for line in noted]
        memory = usage.ru_maxrss * 1024
        code = os.waitstatus_to_exitcode(status)
        return Ended(
            code, usage.ru_utime + usage.ru_stime, memory, memory - before, output.read(100_000), list(dict.fromkeys(events))
        )


def _limit() -> None:
    """Ends this process after too long, and refuses it far too much memory, so that the machine lives on."""
    resource.setrlimit(resource.RLIMIT_CPU, (HANG, HANG))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 6 * MEMORY, size + 6 * MEMORY))
    signal.alarm(HANG)
    sys.dont_write_bytecode = True


def _watch(noted: int, writable: Path, untrusted: Path) -> None:
    """Writes down what is forbidden, as soon as the interpreter tells of it."""
    places = [os.path.realpath(path) for path in (writable, "/dev/null", "/proc/self")]
    temporary, source = os.path.realpath(tempfile.gettempdir()), os.path.realpath(untrusted)

    def is_writable(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor that was opened before
        real = os.path.realpath(os.fsdecode(path))
        # Libraries make folders of their own for what is temporary; the case itself lies there, too, and may not be touched.
        own = real.startswith(temporary + os.sep) and not real.startswith(os.path.dirname(source) + os.sep)
        return own or any(real == place or real.startswith(place + os.sep) for place in places)

    def heard(event: str, args: tuple) -> None:
        told = None
        if event == "subprocess.Popen" and args[1][1:] == [TEMPLATES]:  # a process of little memory and time
            return
        if event in FORBIDDEN:
            told = f"{event} {args[:2]!r:.200}"
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITES and not is_writable(args[0]):
            told = f"writes {args[0]!r}"
        elif event in CHANGES:
            paths, place = CHANGES[event]
            relative = place is not None and isinstance(args[place], int) and args[place] >= 0  # to a folder that was opened
            if not relative and not all(is_writable(one) for one in args[:paths]):
                told = f"{event} {args[:2]!r}"
        elif event == "exec":
            if os.path.realpath(args[0].co_filename).startswith(source + os.sep):
                told = f"runs {args[0].co_filename}"
        elif event == "import" and isinstance(args[1], str) and os.path.realpath(args[1]).startswith(source + os.sep):
            told = f"imports {args[1]}"
        if told is not None:
            os.write(noted, (json.dumps(told) + "\n").encode())

    sys.addaudithook(heard)


def _resident() -> int:
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
