"""CPU kernels under ThreadSanitizer: python -m tests.reliability.races 20 --seed 0

Every op runs forward and backward on COUNT random layouts and on one whose outputs are large, by 2 to 4 threads of OpenMP, and is
then called by several Python threads at once. Module `_cpu` has to be built with SORA_KERNELS_SANITIZE=thread (`make races` does
it in a copy of the tree).

GCC's OpenMP runtime waits in ways that ThreadSanitizer does not see. LLVM's serves instead, torch's loops among ours, and its tool
Archer says which loop's end comes before what. Before anything counts, a race that is planted in a loop of ours must be found, and
the same loop without it must be clean.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .outcome import Outcome

ROOT = Path(__file__).parents[2]
OPENMP_THREADS = (2, 3, 4)
# Of a module that is not instrumented nothing is seen, nor what orders its accesses. The reports get their lines here: reading
# the debugging information of all of torch takes minutes.
OPTIONS = "ignore_noninstrumented_modules=1:symbolize=0:exitcode=0"


class Runtimes(NamedTuple):
    sanitizer: Path
    openmp: Path
    archer: Path


def runtimes() -> Runtimes:
    """Raises FileNotFoundError where one is missing."""
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run([compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout.strip()
    archers = sorted(Path("/usr/lib").glob("llvm-*/lib/libarcher.so"), key=lambda path: int(re.sub(r"\D", "", path.parts[3])))
    if not Path(found).is_absolute() or not archers:
        raise FileNotFoundError("races: expected GCC's libtsan.so and LLVM's libomp.so with libarcher.so (Debian: libomp-19-dev)")
    return Runtimes(Path(found).resolve(), archers[-1].with_name("libomp.so"), archers[-1])


def compiled_race(folder: Path) -> Path:
    """racy.cpp, compiled as the kernels are."""
    library = folder / "racy.so"
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fopenmp", "-fsanitize=thread"]
    flags += ["-DSORA_TIER=baseline", "-DSORA_VECTOR_BYTES=16"]
    source = Path(__file__).with_name("racy.cpp")
    subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", library], check=True)
    return library


class Watched(NamedTuple):
    """What a process printed, and ThreadSanitizer's reports of it."""

    printed: str
    reports: list[str]


def watched(*arguments: object, tier: str = "") -> Watched:
    """This program with these arguments under ThreadSanitizer, with the kernels of a tier."""
    libraries = runtimes()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "LD_PRELOAD": f"{libraries.sanitizer} {libraries.openmp}",
            "OMP_TOOL_LIBRARIES": str(libraries.archer),
            "KMP_BLOCKTIME": "0",
            "OMP_NUM_THREADS": "3",
            **({"SORA_KERNELS_ISA": tier} if tier else {}),
            "TSAN_OPTIONS": f"{OPTIONS}:log_path={folder}/report",
        }
        # It wants addresses where they are without randomization.
        command = ["setarch", "-R", sys.executable, "-m", "tests.reliability.races", *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        texts = [path.read_text() for path in Path(folder).iterdir()]
    reports = [report for text in texts for report in re.findall(r"WARNING: ThreadSanitizer: .*?(?=\n=====|\Z)", text, re.DOTALL)]
    return Watched(done.stdout, [readable(report) for report in reports])


def readable(report: str) -> str:
    """With the function and the line of what is ours."""
    modules = {"racy.so": None, **{path.name: path for path in (ROOT / "sora_kernels").glob("_cpu*.so")}}

    def place(frame: re.Match) -> str:
        path = modules.get(frame[1])
        if path is None or shutil.which("addr2line") is None:
            return frame[0]
        command = ["addr2line", "-f", "-C", "-s", "-e", str(path), frame[2]]
        return " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:2])

    return re.sub(r"<null> <null> \((\S+?)\+(0x[0-9a-f]+)\)", place, report)


def calls(count: int, seed: int, seconds: float) -> Iterator[tuple[str, str]]:
    """Runs everything, in a process that is watched; yields (function, backend) of every call."""
    import torch

    from benchmarks.works import works
    from sora_kernels import backends
    from sora_kernels.layout import PackedLayout
    from tests.reliability.random_works import DTYPES, results, works_of
    from tests.reliability.together import Callers, Known

    from .entries import workload

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    # Outputs of more than 4 MiB, which are written past the caches.
    large = PackedLayout.from_grids([(2, 24, 24), (1, 3, 5)])
    torch.manual_seed(seed)
    with backends.record() as recorded:
        for threads in OPENMP_THREADS:
            torch.set_num_threads(threads)
            for dtype in DTYPES:
                workload(dtype)
                for work in works(dtype, 64, 1024, layout=large, slack=1, make=make):
                    if "attention" not in work.op:
                        results(work)
            for step in range(count):
                for work in works_of(seed, step):
                    results(work)
        known = Known(seed)
        with Callers(known, f"{seed}") as callers:
            time.sleep(seconds)
        yield from recorded
    for failure in callers.failures:
        raise AssertionError(failure)


def run(count: int, seed: int, seconds: float) -> None:
    """In a process that is watched: prints how many calls of which kernels there were."""
    from sora_kernels import backends

    warnings.simplefilter("ignore")
    made = [function for function, backend in calls(count, seed, seconds) if backend == "cpu"]
    module = backends.BACKENDS["cpu"].load()
    missing = {name for name in backends.FUNCTIONS if hasattr(module, name)} - set(made)
    if missing:
        raise AssertionError(f"no call of {sorted(missing)}")
    print(f"{len(made)} calls of {len(set(made))} kernels, {module.isa()}")


def add_up(library: str, racy: bool) -> None:
    function = ctypes.CDLL(library).add_up
    function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_bool], ctypes.c_int64
    function(10_000, racy)


def check_sight() -> list[str]:
    """What is wrong with what ThreadSanitizer sees."""
    with tempfile.TemporaryDirectory() as folder:
        library = compiled_race(Path(folder))
        clean, planted = (watched(0, "--library", library, *more).reports for more in ((), ("--racy",)))
    failures = [f"a loop without a race is reported: {report}" for report in clean]
    return failures + ([] if any("data race" in report for report in planted) else ["a planted race is not found"])


def is_watchable() -> bool:
    """Whether module _cpu is built for ThreadSanitizer."""
    spec = importlib.util.find_spec("sora_kernels._cpu")
    return spec is not None and spec.origin is not None and b"__tsan_write" in Path(spec.origin).read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="random layouts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10, help="of several Python threads at once")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--racy", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiers", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        add_up(options.library, options.racy)
        return 0
    if options.tiers:
        from tests.sweep import tiers

        print(*tiers())
        return 0
    if options.run:
        run(options.count, options.seed, options.seconds)
        return 0
    if not is_watchable():
        parser.error("count: expected a module _cpu that was built with SORA_KERNELS_SANITIZE=thread (see `make races`)")
    failures = check_sight()
    cases = 0
    for tier in watched(0, "--tiers").printed.split():
        done = watched(options.count, "--seed", options.seed, "--seconds", options.seconds, "--run", tier=tier)
        failures += [f"{tier}: {report}" for report in done.reports]
        cases += int(done.printed.split()[0])
        print(done.printed, end="", flush=True)
    print(*failures, sep="\n")
    print(Outcome("data races (ThreadSanitizer)", cases, len(failures)))
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main())
