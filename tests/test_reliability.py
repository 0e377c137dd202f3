"""What the checks of tests/reliability print, and what is made of it."""

import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from reliability.outcome import Outcome, outcomes

import tests.reliability.__main__ as program

ROOT = Path(__file__).parent.parent


def test_what_is_printed_is_what_is_read() -> None:
    printed = [
        Outcome("media", 500, 0, seconds=3.5, memory=700 << 20),
        Outcome("properties of rope_3d", 10_000, 2),
        Outcome("soak", 3, 0, seconds=0.1),
    ]
    assert outcomes("something else: 3 cases\n" + "\n".join(map(str, printed)) + "\n1 failures\n") == printed


def run(*lines: str, status: int = 0) -> program.Run:
    code = f"import sys; print({chr(10).join(lines)!r}); sys.exit({status})"
    with mock.patch.dict(program.TARGETS, sound=program.Target("", ("a",))):
        return program.attacked("sound", [sys.executable, "-c", code], program.versions(), program.where())


def test_every_name_can_be_read() -> None:
    with pytest.raises(ValueError, match="Outcome: name: expected one without a colon, got 'soak: steps'"):
        str(Outcome("soak: steps", 1, 0))


def test_processes_of_one_name_are_one_row(capfd) -> None:
    found = run("a: 3 cases, 0 failed, longest 1.0 s", "noise", "b: 1 cases, 0 failed", "a: 4 cases, 1 failed, longest 0.5 s")
    assert found.outcomes == [Outcome("a", 7, 1, 1.0), Outcome("b", 1, 0)]
    assert found.failed == 1
    assert "noise" in capfd.readouterr().out


def test_one_that_dies_is_a_failure() -> None:
    assert run("a: 3 cases, 0 failed", status=66).outcomes[1] == Outcome("sound, which ended with status 66", 1, 1)


def test_one_that_tries_nothing_is_a_failure() -> None:
    assert run("done").outcomes == [Outcome("a, which reported nothing", 1, 1)]
    assert run("b: 3 cases, 2 failed").outcomes == [Outcome("b", 3, 2), Outcome("a, which reported nothing", 1, 1)]
    assert run("a: 0 cases, 0 failed").outcomes == [Outcome("a", 0, 1)]


def test_one_that_found_something_is_counted_once() -> None:
    assert run("a: 3 cases, 2 failed", status=1).outcomes == [Outcome("a", 3, 2)]


def test_runs_are_kept_as_they_are(tmp_path) -> None:
    before = [run("a: 3 cases, 0 failed, longest 1.5 s, at most 20 MiB", "b: 1 cases, 0 failed")]
    assert program.read(tmp_path / "runs.json") == []
    (tmp_path / "runs.json").write_text(program.written(before))
    assert program.read(tmp_path / "runs.json") == before


def test_the_page_is_the_file() -> None:
    """Nobody edits the table by hand."""
    assert program.PAGE.read_text() == program.page(program.read(program.JSON))


def test_every_target_is_one_of_the_makefile() -> None:
    found = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(program.TARGETS) <= set(found)


def test_every_outcome_on_the_page_is_one_of_its_target() -> None:
    """But for those that say what went wrong."""
    for one in program.read(program.JSON):
        assert {outcome.name for outcome in one.outcomes if ", which " not in outcome.name} <= set(
            program.TARGETS[one.target].outcomes
        )


def test_another_target_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["reliability", "fuzz"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert "error: TARGET: expected some of property, fuzz-calls" in capsys.readouterr().err
