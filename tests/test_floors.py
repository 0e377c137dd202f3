"""What pyproject.toml declares: lowest versions, and extras without which each module says what is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.reliability import floors, sdist, suite

ROOT = Path(__file__).parent.parent
DECLARED = floors.project()
# Of the extras, by the names that are imported.
OPTIONAL = (
    "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "av", "ftfy", "matplotlib", "rich", "typer",
)  # fmt: skip
WITHOUT = f"import sys\nfor name in {OPTIONAL}:\n    sys.modules[name] = None\n"


def test_every_package_has_a_lowest_version() -> None:
    extras = DECLARED["project"]["optional-dependencies"]
    assert set(floors.EXTRAS) < set(extras)
    versions = floors.floors(DECLARED, extras)
    assert versions["torch"] >= Version("2.11")
    assert versions["diffusers"] == Version("0.42"), "the highest of what several extras ask for"
    assert floors.floors(DECLARED, floors.EXTRAS)["diffusers"] < Version("0.42")
    assert "sora-kernels" not in versions


def test_a_command_that_dies_in_silence_fails() -> None:
    for code, failure in (("0", ""), ("3", "it ended with status 3\n")):
        assert sdist.ended(sdist.run(ROOT, "-c", f"import os; os._exit({code})")) == failure


def test_another_python_is_not_taken_in_silence(tmp_path) -> None:
    environment = floors.Environment(tmp_path, tmp_path)
    for path, version in ((environment.python, "3.10.1"), (tmp_path / "python", "3.12.1")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho Python {version}\n")
        path.chmod(0o755)
    with pytest.raises(SystemExit, match=r"expected .* without an environment, or with one of Python 3.12.1, got Python 3.10.1"):
        environment.make(str(tmp_path / "python"), {})


@pytest.mark.parametrize("text", ["ninja", "torch!=2.10", "torch<3"])
def test_what_has_no_lowest_version_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"pyproject.toml: {text}: expected one lowest version"):
        floors.floor(Requirement(text))


def test_constraints_are_what_pip_reads() -> None:
    lines = floors.constraints(floors.floors(DECLARED, floors.EXTRAS)).splitlines()
    for requirement in map(Requirement, lines):
        assert [part.operator for part in requirement.specifier] == ["=="], requirement
    assert "torch==2.11" in lines
    assert floors.lowest_python(DECLARED) == "python3.10"


def test_versions_of_continuous_integration_are_allowed() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {floors.canonicalize_name(r.name): floors.floor(r) for r in map(Requirement, filter(None, lines))}
    for requirement in floors.requirements(DECLARED, DECLARED["project"]["optional-dependencies"]):
        name = floors.canonicalize_name(requirement.name)
        if name != "flash-attn":
            assert requirement.specifier.contains(pinned[name]), f"{requirement}, but constraints.txt has {pinned[name]}"


def test_the_integration_of_diffusers_asks_for_what_it_takes() -> None:
    attention_backend = pytest.importorskip("sora_kernels.integrations.diffusers.attention_backend", exc_type=ValueError)
    line, *_ = DECLARED["project"]["optional-dependencies"]["diffusers"]
    for version in attention_backend.TESTED:
        assert Requirement(line).specifier.contains(f"{version}.0")
    lowest, *_, highest = sorted(map(Version, [*attention_backend.TESTED, *attention_backend.TESTED]))
    assert not Requirement(line).specifier.contains(f"{lowest.major}.{lowest.minor - 1}.0")
    assert not Requirement(line).specifier.contains(f"{highest.major}.{highest.minor + 1}.0")


def test_a_run_that_ends_early_has_failed(tmp_path) -> None:
    report = tmp_path / "tests.xml"
    assert [result.passed for result in suite.read_results(report, 0)] == [False]
    report.write_text('<s><testcase classname="t" name="a"/><testcase classname="t" name="b"><skipped/></testcase></s>')
    assert suite.read_results(report, 0) == [("t::a", True)]
    assert [result.passed for result in suite.read_results(report, 2)] == [True, False]
    report.write_text('<s><testcase classname="t" name="a"><error/></testcase></s>')
    assert suite.read_results(report, 1) == [("t::a", False)]


def test_a_python_that_does_not_run_is_named(tmp_path) -> None:
    """Before any work. A shim of pyenv's stands on PATH for versions that are not there."""
    floors.check_python(sys.executable, "--python")
    shim = tmp_path / "python3.10"
    shim.write_text('#!/bin/sh\necho "pyenv: python3.10: command not found\n" >&2\nexit 127\n')
    shim.chmod(0o755)
    for command, problem in ((shim, "which ends with 127: pyenv: python3.10: command"), (tmp_path / "none", "No such file")):
        done = subprocess.run(
            [sys.executable, "-m", "tests.reliability.floors", str(tmp_path / "floors"), "--python", str(command)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode != 0
        assert done.stderr.startswith("floors: --python: expected a Python"), done.stderr
        assert problem in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "floors").exists()


def test_an_sdist_takes_the_place_of_earlier_ones(tmp_path, monkeypatch) -> None:
    """Of another version, say, in a folder that is kept."""

    def makes(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / "sora_kernels-2.0.tar.gz").touch()
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(sdist, "run", makes)
    for version in ("1.0", "3.0"):
        (tmp_path / f"sora_kernels-{version}.tar.gz").touch()
    assert sdist.made(tmp_path).name == "sora_kernels-2.0.tar.gz"


def test_files_and_tests_of_the_sdist_are_two_outcomes() -> None:
    found = [sdist.Check("a"), sdist.Check("b", "it is missing"), sdist.Check("t", "", sdist.TESTS)]
    assert [(one.name, one.cases, one.failed) for one in sdist.outcomes(found)] == [(sdist.FILES, 2, 1), (sdist.TESTS, 1, 0)]
    assert sdist.outcomes(found[:2])[1] == (sdist.TESTS, 1, 1, None, None), "no test ran"


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_kernels_need_no_extra() -> None:
    """Every public name, `python -m sora_kernels.info`, and all modules but those that are for one of the packages."""
    code = """
import importlib, pkgutil, sora_kernels
from sora_kernels import info
for name in sora_kernels.__all__:
    getattr(sora_kernels, name)
assert "triton" in info.report()
for module in pkgutil.walk_packages(sora_kernels.__path__, "sora_kernels.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name.partition(".")[0])
"""
    needs = dict(line.split() for line in run(code))
    assert needs.pop("sora_kernels.triton") == "triton"
    assert needs == {f"sora_kernels.integrations.{name}": name for name in ("diffusers", "transformers")}


def test_the_model_says_which_extra_it_needs() -> None:
    code = """
import sora_model
for name in sora_model.__all__:
    try:
        getattr(sora_model, name)
    except ModuleNotFoundError as error:
        print(error)
"""
    said = run(code)
    assert "safetensors is not installed, which sora_model.SoraPipeline needs: pip install 'sora_kernels[model]'" in said
    assert all(line.endswith(" needs: pip install 'sora_kernels[model]'") for line in said), said
