"""The tests under the lowest versions that pyproject.toml declares: python -m tests.reliability.floors FOLDER

Makes a virtual environment in FOLDER, with the lowest Python (`--python` takes another) and exactly the lowest version of every
package. What these packages need in turn is the newest that they take. Unpacks the sdist there, builds module `_cpu` in it, and
runs the tests of what depends most on versions, or with `--all` everything but emulated GPU kernels.

The integration of diffusers takes tested versions only, which need a newer Python. So it has an environment of its own, in which
its tests run. Logs stay in FOLDER.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.reliability import sdist
from tests.reliability.outcome import Outcome
from tests.reliability.suite import Result, pytest_options, read_results

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along

ROOT = Path(__file__).parents[2]
# flash-attn is built on a machine with a GPU. The tools of dev are pinned, as they judge the code and do not run it.
EXTRAS = ("triton", "model", "bench", "test")
INTEGRATION_PYTHON = "python3.11"  # the lowest that its diffusers takes
CHOSEN = (
    "adaln", "attention_arguments", "batch", "checkpoint", "cli", "compile", "dit", "files", "images", "layout", "library",
    "norm_rope", "pipeline", "pretrained_text", "rope", "sampler", "torch_private", "torch_sdpa", "train", "transformers", "vae",
    "videos", "weights", "words", "writing",
)  # fmt: skip
CHOSEN_INTEGRATION = ("tests/test_diffusers_backend.py", "tests/test_diffusers_wan.py")


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(project: dict[str, Any], extras: Iterable[str]) -> list[Requirement]:
    """What the build, the package and some of its extras need; not the package itself, which an extra may name."""
    optional = project["project"]["optional-dependencies"]
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    lines += [line for extra in extras for line in optional[extra]]
    found = map(Requirement, lines)
    return [requirement for requirement in found if requirement.name != project["project"]["name"]]


def floor(requirement: Requirement) -> Version:
    """The lowest version that it allows, which it has to name.

    >>> floor(Requirement("diffusers>=0.42,<0.43"))
    <Version('0.42')>

    Raises:
        ValueError: naming the requirement.
    """
    lowest = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    if len(lowest) != 1:
        raise ValueError(f"pyproject.toml: {requirement}: expected one lowest version, such as >=1.2, got {len(lowest)}")
    return lowest[0]


def floors(project: dict[str, Any], extras: Iterable[str]) -> dict[str, Version]:
    """The lowest version of each package with which all that `requirements` names is satisfied."""
    found: dict[str, Version] = {}
    for requirement in requirements(project, extras):
        name = canonicalize_name(requirement.name)
        found[name] = max(floor(requirement), found.get(name, Version("0")))
    return found


def lowest_python(project: dict[str, Any]) -> str:
    """The command of the lowest Python, such as python3.10."""
    return f"python{floor(Requirement('python' + project['project']['requires-python']))}"


def constraints(versions: dict[str, Version]) -> str:
    """The file that holds pip to them."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


class Environment(NamedTuple):
    """A virtual environment in a folder, with its logs, and the unpacked sdist that it builds and tests."""

    folder: Path
    tree: Path

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def make(self, python: str, versions: dict[str, Version]) -> None:
        """Of a Python, exactly these versions, the newest of what they need, and module `_cpu`; keeps what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.python.exists():
            subprocess.run([python, "-m", "venv", self.folder / "venv"], check=True)
        has, asked = (subprocess.check_output([one, "--version"], text=True).strip() for one in (self.python, python))
        if has != asked:
            sys.exit(f"floors: expected {self.folder} without an environment, or with one of {asked}, got {has}")
        file = self.folder / "constraints.txt"
        file.write_text(constraints(versions))
        self.need("pip", "-m", "pip", "install", "--disable-pip-version-check", "-c", file, *sorted(versions))
        # In a folder that all Pythons share, as the kernels' objects do not depend on one.
        self.need("build", "setup.py", "build_ext", "--inplace", "--build-temp", self.tree / "build" / "shared")

    def run(self, name: str, *command: str | Path) -> int:
        """The exit status of Python with these arguments, whose output goes into a log of that name."""
        variables = {**os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1", "SORA_KERNELS_CUDA": "0"}
        with self.log(name).open("w") as out:
            arguments = [self.python, *command]
            return subprocess.run(arguments, cwd=self.tree, env=variables, stdout=out, stderr=out, check=False).returncode

    def need(self, name: str, *command: str | Path) -> None:
        """The same; ends the program if it fails."""
        if self.run(name, *command):
            sys.exit(f"python {' '.join(map(str, command[:3]))} ... failed; see {self.log(name)}")

    def test(self, *arguments: str) -> list[Result]:
        """What the tests that ran came to; what failed is printed."""
        report = self.folder / "tests.xml"
        report.unlink(missing_ok=True)
        status = self.run("tests", "-m", "pytest", *pytest_options(report), *arguments)
        ran = read_results(report, status)
        for result in ran:
            if not result.passed:
                print(f"failed: {result.test}; see {self.log('tests')}")
        return ran


def of_integration() -> list[str]:
    """Test files that import the integration of diffusers, which takes tested versions of it only."""
    needs = re.compile(r"integrations[./]diffusers|diffusers_contract")
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py")) if needs.search(path.read_text())]


def check_python(command: str, option: str) -> None:
    """Raises ValueError, naming the option, for a Python that does not run or cannot make environments.

    What stands on PATH under its name may be a script of pyenv's, without that version.
    """
    try:
        done = subprocess.run([command, "-c", "import ensurepip, venv"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{option}: expected a Python, got {command}: {error.strerror}") from None
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise ValueError(f"{option}: expected a Python with venv, got {command}, which ends with {done.returncode}: {said[-500:]}")


def main() -> None:
    declared = project()
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.floors", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the virtual environments (7 GB each) and logs; kept for the next time")
    parser.add_argument("--python", default=lowest_python(declared), help="by default %(default)s")
    parser.add_argument("--integration-python", default=INTEGRATION_PYTHON, help="that of diffusers' integration, %(default)s")
    parser.add_argument("--all", action="store_true", help="every test but those of emulated GPU kernels and of the GPU driver")
    args = parser.parse_args()

    try:
        check_python(args.python, "--python")
        check_python(args.integration_python, "--integration-python")
    except ValueError as error:
        sys.exit(f"floors: {error}")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tree = sdist.unpacked(sdist.made(folder), folder)
    lowest, integration = (Environment(folder / name, tree) for name in ("lowest", "integration"))
    apart = of_integration()
    lowest.make(args.python, floors(declared, EXTRAS))
    chosen = ["tests"] if args.all else [f"tests/test_{name}.py" for name in CHOSEN]
    ran = lowest.test(*chosen, *(f"--ignore={path}" for path in apart))
    integration.make(args.integration_python, floors(declared, (*EXTRAS, "diffusers")))
    ran += integration.test(*(apart if args.all else CHOSEN_INTEGRATION))

    failed = sum(not result.passed for result in ran)
    print(Outcome("lowest versions", len(ran), failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
