"""Runs something in a process of its own and says how it ended, what it took, and what it did that nothing untrusted may cause."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .fork import fork

MEMORY, SECONDS = 2**30, 10  # of a command
HANG = 60  # seconds after which it is killed
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
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
# What changes files: where its paths are among its arguments, and the descriptor of the folder that each is relative to.
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
    "os.removexattr": ((0, None),),
}
NOWHERE = (os.devnull, "/proc/self", "/sys")  # in which no file can be made, though a command may be asked to
FOLLOWING = {
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
}  # which change what a link leads to
ERROR = re.compile(r"^error: (.*)$|^╭─ Error ─.*\n((?:│.*\n?)*)", re.MULTILINE)  # a line of ours, or a box of click's


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

    @property
    def errors(self) -> list[str]:
        """What it says is wrong."""
        return [line or box.strip("│ \n") for line, box in ERROR.findall(self.text)]

    def faults(self, named: Sequence[str], *, well: bool = True, more: bool = False) -> list[str]:
        """What is wrong with it. named: of which one must be in the one line of an error. well: it may also end well."""
        found, errors = list(self.events), self.errors
        if self.code == 0:
            found += [] if well else ["ended well"]
            found += [f"ended well with an error: {errors[0]}"] if errors else []
        elif self.code != 2:
            found.append(f"ended with {self.code}")
        elif len(errors) != 1 or "\n" in errors[0]:
            found.append(f"expected one line of an error, got {len(errors)} errors")
        elif not any(name in errors[0] for name in named):
            found.append(f"names none of {', '.join(map(repr, named))}")
        if "Traceback" in self.text:
            found.append("a traceback")
        if (memory := self.more if more else self.memory) > MEMORY:
            found.append(f"{memory >> 20} MiB")
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.1f} s")
        return found


def sora(arguments: Sequence[str], folder: Path | None = None) -> Callable[[], None]:
    """A command of `sora` as something to run, in a folder; default, the present one."""

    def run() -> None:
        from sora_model.cli import app

        if folder is not None:
            os.chdir(folder)
        app(list(arguments))

    return run


def in_a_process(run: Callable[[], None], *, writable: Path, untrusted: Path, protected: Path) -> Ended:
    """Runs a function in a fork of this process, which has imported what it needs.

    writable: the folder that it may write to, besides one for what is temporary that is its own. untrusted: the folder that no code
    may come from. protected: the folder in which nothing else may change, not even by code that no audit event tells of.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        tempfile.TemporaryFile("w+") as noted,
        tempfile.TemporaryDirectory() as temporary,
    ):
        states = _states(protected, writable)

        def guarded() -> None:
            noted.write(f"{_resident()}\n")
            noted.flush()
            _limit()
            os.environ["COLUMNS"] = "10000"  # no line is wrapped
            os.environ["TMPDIR"] = tempfile.tempdir = temporary
            _watch(noted.fileno(), (writable, Path(temporary)), untrusted)
            run()

        child = fork(guarded, output.fileno())
        _, status, usage = os.wait4(child, 0)
        output.seek(0)
        noted.seek(0)
        before, *events = [json.loads(line) for line in noted]
        after = _states(protected, writable)
        events += [f"changes {path}" for path in sorted({*states, *after}) if states.get(path) != after.get(path)]
        memory = usage.ru_maxrss * 1024
        code = os.waitstatus_to_exitcode(status)
        return Ended(
            code, usage.ru_utime + usage.ru_stime, memory, memory - before, output.read(100_000), list(dict.fromkeys(events))
        )


def _states(folder: Path, but: Path) -> dict[str, tuple[int, ...]]:
    """What differs once something in a folder has changed, outside another one."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if os.path.join(place, name) != str(but)]
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            state = os.lstat(path)
            # A folder's times change with what is in it, which has states of its own or is not asked for.
            times = () if stat.S_ISDIR(state.st_mode) else (state.st_size, state.st_ctime_ns)
            found[path] = (state.st_ino, state.st_mode, *times)
    return found


def _limit() -> None:
    """Ends this process after too long, and refuses it far too much memory, so that the machine lives on."""
    resource.setrlimit(resource.RLIMIT_CPU, (HANG, HANG))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 6 * MEMORY, size + 6 * MEMORY))
    signal.alarm(HANG)
    sys.dont_write_bytecode = True


def _watch(noted: int, writable: Sequence[Path], untrusted: Path) -> None:
    """Writes down what is forbidden, as soon as the interpreter tells of it."""
    places = [os.path.realpath(path) for path in (*writable, *NOWHERE)]
    source = os.path.realpath(untrusted)

    def is_writable(path: object, folder: object = None, *, follow: bool = True) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor that was opened before
        text = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            text = os.path.join(os.path.realpath(f"/proc/self/fd/{folder}"), text)
        head, tail = os.path.split(text)
        real = os.path.realpath(text) if follow or tail in ("", ".", "..") else os.path.join(os.path.realpath(head), tail)
        return any(real == place or real.startswith(place + os.sep) for place in places)

    def heard(event: str, args: tuple) -> None:
        forbidden = None
        if event == "subprocess.Popen" and args[1][1:] == [TEMPLATES]:  # a process of little memory and time
            return
        if event in FORBIDDEN:
            forbidden = f"{event} {args[:2]!r:.200}"
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITES and not is_writable(args[0]):
            forbidden = f"writes {args[0]!r}"
        elif event in CHANGES:
            paths = [(args[path], None if place is None else args[place]) for path, place in CHANGES[event]]
            if not all(is_writable(*one, follow=event in FOLLOWING) for one in paths):
                forbidden = f"{event} {args[:2]!r}"
        elif event == "exec":
            if os.path.realpath(args[0].co_filename).startswith(source + os.sep):
                forbidden = f"runs {args[0].co_filename}"
        elif event == "import" and isinstance(args[1], str) and os.path.realpath(args[1]).startswith(source + os.sep):
            forbidden = f"imports {args[1]}"
        if forbidden is not None:
            os.write(noted, (json.dumps(forbidden) + "\n").encode())

    sys.addaudithook(heard)


def _resident() -> int:
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
