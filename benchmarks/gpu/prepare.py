"""Compiles ahead of time, on a machine without a GPU, what the driver needs: python -m benchmarks.gpu prepare DIR [--python PYTHON]

The modules are built for this Python. Then the driver's own stages run on a simulated GPU (simulated.py), without its deadlines:
what they launch there is what they launch on a GPU, and Triton's cache has it when they are done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import GPUS, prepared, rows, simulate, stages
from benchmarks.gpu.driver import Run, Task

ROOT = Path(__file__).parents[2]
LOGS = "logs"  # of the stages, in DIR
# The stages left out launch only kernels that these launch, or such as are compiled by torch.
COMPILED = ["smoke", "capture", "attention", "memory", "tests", "tuning", "float16"]
PATIENCE = 40  # times a stage's seconds


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu prepare", description=(__doc__ or "").partition(":")[0], allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--python", help="the Python to prepare for, with the torch and Triton that the GPU's machine has")
    parser.add_argument("--arch", default="sm90", choices=list(GPUS), help="the GPU's architecture (default: %(default)s)")
    parser.add_argument("--triton", metavar="VERSION", help="stop unless that Python has this version of Triton, such as 3.6")
    every = f"whose kernels to compile: some of {' '.join(COMPILED)}, with commas (default: all)"
    parser.add_argument("--stages", default=",".join(COMPILED), metavar="STAGE,...", help=every)
    arguments = parser.parse_args(words)
    wanted = arguments.stages.split(",")
    if unknown := [name for name in wanted if name not in COMPILED]:
        parser.error(f"--stages: expected some of {','.join(COMPILED)}, got {unknown[0]!r}")
    if arguments.python is not None:
        return another(parser, arguments.python, words)
    if problem := triton_problem(arguments.triton):
        parser.error(problem)
    try:
        (arguments.folder / prepared.MODULES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"DIR: {arguments.folder}: {error.strerror}")
    return prepare(arguments.folder, arguments.arch, wanted)


def another(parser: argparse.ArgumentParser, python: str, words: list[str]) -> int:
    """The same, by another Python."""
    if shutil.which(python) is None:
        parser.error(f"--python: no program {python!r}")
    index = next(i for i, word in enumerate(words) if word.startswith("--python"))
    rest = words[:index] + words[index + (1 if "=" in words[index] else 2) :]
    return subprocess.run([python, "-m", "benchmarks.gpu", "prepare", *rest], check=False).returncode


def triton_problem(wanted: str | None) -> str:
    try:
        import triton
    except ImportError:
        return "this Python has no Triton"
    if wanted and not f"{triton.__version__}.".startswith(f"{wanted}."):
        return f"--triton: expected {wanted}, this Python has {triton.__version__}"
    return ""


def prepare(folder: Path, arch: str, wanted: list[str]) -> int:
    import triton

    reason = build(arch)
    failed = int(reason is not None)
    if reason:
        print(reason, flush=True)
    simulate(arch)
    with tempfile.TemporaryDirectory() as cache:
        failed |= compile_all(wanted, Path(cache), folder / LOGS)
        prepared.pack(Path(cache), folder / prepared.KERNELS)
    copied: dict[str, str] = {}
    built = [] if reason else sorted((ROOT / "sora_kernels").glob(f"*{prepared.suffix()}"))  # old ones are worse than none
    for path in built:
        shutil.copyfile(path, folder / prepared.MODULES / path.name)
        copied[path.name] = prepared.sha256([path.read_bytes()])
    known: dict[str, Any] = {
        "suffix": prepared.suffix(), "sources": prepared.sources(ROOT), "modules": copied, "capability": arch.removeprefix("sm"),
        "triton": prepared.triton_hash(), "triton_version": triton.__version__,
        "kernels": prepared.sha256([(folder / prepared.KERNELS).read_bytes()]),
    }  # fmt: skip
    (folder / prepared.MANIFEST).write_text(json.dumps(known, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {', '.join(copied)}, kernels for {arch} by Triton {triton.__version__}: {size / 1e6:.1f} MB")
    return failed


def build(arch: str) -> str | None:
    """Builds the modules in place for this Python; why that failed, if it did."""
    environment = {**os.environ, "SORA_KERNELS_CUDA": "1"}
    if arch not in ("sm80", "sm90"):  # for which modules are built by default
        environment.setdefault("SORA_KERNELS_CUDA_ARCHS", f"80;{arch.removeprefix('sm')}a")
    try:
        prepared.build(ROOT, environment)
    except RuntimeError as error:
        return str(error)
    return None


def patient(task: Task) -> Task:
    return replace(task, seconds=PATIENCE * task.seconds, item_seconds=PATIENCE * task.item_seconds)


def compile_all(wanted: list[str], cache: Path, logs: Path) -> int:
    """Runs the stages in which kernels are launched; 1 if any of them did not get to its end."""
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logs.mkdir(exist_ok=True)
    for old in logs.iterdir():
        old.unlink()
    run = Run(logs, 24 * 3600.0)
    for stage in stages.stages():
        if stage.name in wanted:
            run.stage(replace(stage, seconds=PATIENCE * stage.seconds, tasks=[patient(task) for task in stage.tasks]))
    print(f"{sum(1 for _ in rows.of_kind(run.rows, 'compiled'))} kernels compiled")
    return int(any(how in row for row in run.rows for how in ("cut", "hung", "crashed")))
