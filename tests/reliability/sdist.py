"""The sdist, taken away from the repository: python -m tests.reliability.sdist [--all]

Makes it, compares its files with those of git, builds a wheel from it and looks at what is in there. Then runs commands of the
installed wheel in another folder, and tests from the unpacked sdist: a few, or with `--all` everything but emulated GPU kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.reliability.outcome import Outcome
from tests.reliability.suite import pytest_options, read_results

ROOT = Path(__file__).parents[2]
LEFT_OUT = {".ci/run", ".gitignore"}  # of the repository, not of what it distributes
ARCHIVES = "sora_kernels-*.tar.gz"
FILES, TESTS = "files and commands of the sdist", "tests of the sdist"  # the outcomes
CHOSEN = ("floors", "layout", "reliability", "setup", "words")
COMMANDS = (
    ("-m", "sora_kernels.info"),
    ("-m", "sora_model.cli", "info"),
    ("-m", "sora_model.cli", "generate", "a red ball", "--size", "1x32x32", "--steps", "1", "--out", "out"),
)


class Check(NamedTuple):
    """What was looked at, and what was wrong with it, if anything. outcome: what it counts for."""

    name: str
    wrong: str = ""
    outcome: str = FILES


def made(folder: Path) -> Path:
    """The archive of an sdist, made in a folder, where it takes the place of this package's earlier ones, of other versions too.

    One at a time: on its way it is a folder in the repository.

    Raises:
        RuntimeError: with what setup.py says.
    """
    for earlier in folder.glob(ARCHIVES):
        earlier.unlink()
    command = ["setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--formats=gztar", "--dist-dir", folder]
    done = run(ROOT, *command)
    if done.returncode:
        raise RuntimeError(f"the sdist cannot be made: {done.stderr}")
    (archive,) = folder.glob(ARCHIVES)
    return archive


def packed(archive: Path) -> set[str]:
    """Names in it, without the folder that all lie in."""
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def unpacked(archive: Path, folder: Path) -> Path:
    """The folder that all lie in, unpacked in another; of an earlier one only what was built stays."""
    tree = folder / archive.name.removesuffix(".tar.gz")
    for path in tree.iterdir() if tree.exists() else ():
        if path.is_file():
            path.unlink()
        elif path.name != "build":
            shutil.rmtree(path)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return tree


def tracked() -> list[str] | None:
    """Files of the repository; None where it is no checkout, or without git."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def run(folder: Path, *arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in a folder, where `path` is what it imports from."""
    variables = {**os.environ, "SORA_KERNELS_CUDA": "0", "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False)


def ended(done: subprocess.CompletedProcess[str]) -> str:
    """How a command failed; "" of one that did not."""
    return f"it ended with status {done.returncode}\n{done.stdout}{done.stderr}" if done.returncode else ""


def wheel_checks(wheel: Path, names: list[str]) -> Iterator[Check]:
    """All of both packages, the compiled module, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = {name for name in names if name.startswith(("sora_kernels/", "sora_model/"))}
    for name in sorted(ours):
        yield Check(f"wheel has {name}", "" if name in inside else "it is missing")
    built = {name for name in inside if name.startswith("sora_kernels/_c") and name.endswith(".so")}
    yield Check("wheel has module _cpu", "" if any("/_cpu." in name for name in built) else "it is missing")
    yield Check("wheel has nothing else", ", ".join(sorted(inside - ours - built)))


def checks(folder: Path, all_tests: bool) -> Iterator[Check]:
    archive = made(folder)
    names = tracked()
    if names is None:
        sys.exit("sdist: only a checkout, with git, tells what belongs to the repository")
    inside = packed(archive)
    for name in names:
        if name not in LEFT_OUT:
            yield Check(f"sdist has {name}", "" if name in inside else "it is missing: see MANIFEST.in")

    done = run(folder, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, archive)
    yield Check("a wheel is built from the sdist", ended(done))
    if done.returncode:
        return
    (wheel,) = folder.glob("*.whl")
    yield from wheel_checks(wheel, names)

    site, elsewhere = folder / "site", folder / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archived:
        archived.extractall(site)
    for command in COMMANDS:
        done = run(elsewhere, *command, path=site)
        yield Check(f"installed: python {' '.join(command)}", ended(done))
    yield Check("a picture was generated", "" if list(elsewhere.glob("out/*.png")) else "there is none")

    tree = unpacked(archive, folder)
    for module in (site / "sora_kernels").glob("_c*.so"):
        module.rename(tree / "sora_kernels" / module.name)
    chosen = ["tests"] if all_tests else [f"tests/test_{name}.py" for name in CHOSEN]
    report = folder / "tests.xml"
    done = run(tree, "-m", "pytest", *pytest_options(report), *chosen, path=tree)
    for result in read_results(report, done.returncode):
        yield Check(result.test, "" if result.passed else f"it fails in the sdist; pytest says\n{done.stdout[-3000:]}", TESTS)


def outcomes(found: list[Check]) -> list[Outcome]:
    """Of files and commands, and of tests; where these did not run, as without a wheel, they are one that failed."""
    tests = [check for check in found if check.outcome == TESTS] or [Check("no test ran", "no test ran", TESTS)]
    files = [check for check in found if check.outcome == FILES]
    return [Outcome(checks[0].outcome, len(checks), sum(bool(check.wrong) for check in checks)) for checks in (files, tests)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.sdist", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every test but those of emulated GPU kernels and of the GPU driver")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = list(checks(Path(folder), args.all))
    for check in found:
        if check.wrong:
            print(f"failed: {check.name}: {check.wrong}")
    for outcome in outcomes(found):
        print(outcome)
    sys.exit(any(check.wrong for check in found))


if __name__ == "__main__":
    main()
