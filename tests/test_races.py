"""ThreadSanitizer sees a race of our loops, and nothing in one without; `make races` runs the kernels under it."""

import pytest
from reliability import races


def test_a_planted_race_is_found_and_a_clean_loop_is_clean() -> None:
    try:
        races.runtimes()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert races.check_sight() == []


def test_reports_name_the_line() -> None:
    """Only of modules that are ours: those of torch keep their addresses."""
    frame = "#0 <null> <null> (libtorch_cpu.so+0x123)"
    assert races.readable(frame) == frame
    (module,) = (races.ROOT / "sora_kernels").glob("_cpu*.so")
    assert races.readable(f"#0 <null> <null> ({module.name}+0x1000)") != f"#0 <null> <null> ({module.name}+0x1000)"


def test_a_module_that_is_not_instrumented_is_refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["races", "3"])
    with pytest.raises(SystemExit, match="2"):
        races.main()
    assert "expected a module _cpu that was built with SORA_KERNELS_SANITIZE=thread" in capsys.readouterr().err
