"""Tests and measures on the GPU at hand as much as a limit of seconds lets it, in one command and without network.

    python -m benchmarks.gpu OUT [--seconds 420] [--prepared DIR]
    python -m benchmarks.gpu prepare DIR          what can be compiled without a GPU (prepare.py)

OUT gets rows.jsonl, a line for each measurement, check and test as soon as it is there, logs, and summary.txt, which is printed
last: at most 8 files of at most 16 MiB. `python -m benchmarks.gpu.results OUT` keeps the rows for docs/performance.md.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu import GPUS, SIMULATED, prepared, rows, simulate, table
from benchmarks.gpu.driver import Run, say
from benchmarks.gpu.stages import stages

SECONDS = 420.0  # of everything; stages get more or less of theirs in proportion
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
RESERVED = 5.0  # for processes to die and for the table


def main(words: list[str]) -> int:
    if words[:1] == ["prepare"]:
        from benchmarks.gpu import prepare  # needs torch and Triton, which the driver does without

        return prepare.main(words[1:])
    names = [stage.name for stage in stages()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=folder_of, metavar="OUT")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="the limit of everything (default: %(default)g)"
    )
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="the folder that `prepare` filled")
    every = f"some of {' '.join(names)}, with commas, in the order in which to run them (default: all)"
    parser.add_argument("--stages", default=",".join(names), metavar="STAGE,...", help=every)
    parser.add_argument(
        "--items", type=int, default=1_000_000, metavar="N", help="run at most N items of each process, for a quick look"
    )
    parser.add_argument("--simulate", choices=list(GPUS), help="rehearse it on a GPU that is not there")
    arguments = parser.parse_args(words)
    wanted = arguments.stages.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--stages: expected some of {','.join(names)}, got {unknown[0]!r}")
    if not (math.isfinite(arguments.seconds) and arguments.seconds >= 10):
        parser.error(f"--seconds: expected a number of at least 10, got {arguments.seconds:g}")
    if arguments.items < 1:
        parser.error(f"--items: expected at least 1, got {arguments.items}")
    if arguments.prepared and not os.path.isfile(arguments.prepared / prepared.MANIFEST):
        parser.error(f"--prepared: {arguments.prepared} has no {prepared.MANIFEST}; `python -m benchmarks.gpu prepare` writes it")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        fcntl.flock(os.open(arguments.out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        for old in ("rows.jsonl", "summary.txt", *{stage.log for stage in stages()}):
            (arguments.out / old).unlink(missing_ok=True)
    except BlockingIOError:
        parser.error(f"OUT: {arguments.out}: another run writes there")
    except OSError as error:
        parser.error(f"OUT: {arguments.out}: {error.strerror}")
    os.environ[rows.MOST] = str(arguments.items)
    os.environ.pop(SIMULATED, None)
    if arguments.simulate:
        simulate(arguments.simulate)
    return drive(arguments.out, arguments.seconds, str(arguments.prepared.resolve() if arguments.prepared else ""), wanted)


def folder_of(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got nothing")
    return Path(text)


def end(number: int, _: Any) -> None:
    """The first signal ends the run, and nothing its table."""
    ignore_signals()
    sys.exit(128 + number)


def ignore_signals() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def drive(out: Path, seconds: float, folder: str, wanted: list[str]) -> int:
    """Runs the stages and prints the table, whatever happens to the stages and whoever ends the driver."""
    for descriptor in range(3):  # a closed one would be given to a file
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    run, status = Run(out, seconds, seconds / SECONDS), 0
    known = {stage.name: stage for stage in stages(folder)}
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH") or os.defpath, "/usr/local/cuda/bin"])
    cache = Path(temporary()) / f"gpu-kernels-{os.getpid()}"  # whoever writes to it first makes it
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    try:
        for name in wanted:
            try:
                run.stage(known[name], RESERVED)
            except Exception as error:  # a fault of the driver's own must not cost the stages that follow
                run.outcomes.append(f"{name}: {rows.one_line(error)}")
                status = 1
    except SystemExit as error:
        run.outcomes.append("interrupted: the stages above are all that ran")
        status = int(error.code or 0)
    ignore_signals()
    text = table.summary(run.rows, run.outcomes, seconds - run.left())
    run.files.append("summary.txt", text + "\n")
    say(text)
    shutil.rmtree(cache, ignore_errors=True)
    return status or int(table.failures(run.rows) > 0)


def temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # nothing can be written: Triton will say so, kernel by kernel
        return "/tmp"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
