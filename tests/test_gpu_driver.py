"""The driver for GPUs, rehearsed without one: nothing that a process does costs the rows of another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import driver, table
from benchmarks.gpu.driver import Run, Stage, Task
from benchmarks.gpu.prepared import first_error

ROOT = Path(__file__).parents[1]
BEGIN = "from benchmarks.gpu import rows; rows.emit(begin=0, item='one'); rows.emit(check='one', ok=True, errors=[0], ran=[]); "


def run(tmp_path: Path, *tasks: Task, seconds: float = 60.0) -> Run:
    made = Run(tmp_path, seconds)
    made.stage(Stage("stage", seconds, "stage.log", tasks))
    return made


def program(name: str, code: str, seconds: float = 30.0, **options) -> Task:
    return Task(name, [sys.executable, "-c", BEGIN + code], seconds, **options)


def outcome(made: Run, name: str) -> str:
    (line,) = [line for line in made.outcomes if line.startswith(f"stage, {name}: ")]
    return line.removeprefix(f"stage, {name}: ").rpartition(" (")[0]


def test_rows_of_others_come_back(tmp_path: Path) -> None:
    """Of processes that raise, crash, print half a row, or hang and ignore whoever asks them to stop, and of one that does not."""
    ignoring = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    made = run(
        tmp_path,
        program("raises", "raise SystemExit('no luck')"),
        program("crashes", "import ctypes; ctypes.string_at(0)"),
        program("cut", "import os; os.write(1, b'@row {\"check\": 1'); os._exit(0)"),
        program("hangs", f"{ignoring} time.sleep(100)", seconds=3),
        program("works", "rows.emit(check='two', ok=True, errors=[0], ran=[])"),
    )
    assert outcome(made, "raises") == "exit 1: no luck in one"
    assert outcome(made, "crashes").startswith("SIGSEGV in one")
    assert outcome(made, "hangs").startswith("out of time after")
    assert outcome(made, "works") == outcome(made, "cut") == "done"
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert written == made.rows
    checks = [(row["task"], row["check"]) for row in written if "check" in row]
    assert {("raises", "one"), ("hangs", "one"), ("works", "one"), ("works", "two")} <= set(checks)
    assert "==> stage, raises <==" in (tmp_path / "stage.log").read_text()


def test_an_item_that_kills_costs_that_item(tmp_path: Path) -> None:
    """Another process goes on with the next, after a crash, a GPU that answers no more, and an item that takes too long."""
    code = """
import ctypes, os, time
from benchmarks.gpu import rows
for i in range(rows.first_item(), 5):
    rows.emit(begin=i, item=f"item {i}")
    if i == 1: ctypes.string_at(0)
    if i == 2: os._exit(rows.FAILED_GPU)
    if i == 3: time.sleep(100)
    rows.emit(check=i, ok=True, errors=[0], ran=[])
"""
    made = run(tmp_path, Task("family", [sys.executable, "-c", code], 60, item_seconds=5), seconds=100)
    assert [row["check"] for row in made.rows if "check" in row] == [0, 4]
    assert outcome(made, "family").split("; ")[:2] == ["SIGSEGV in item 1", "its GPU failed in item 2"]
    assert outcome(made, "family").split("; ")[2].startswith("hung after")
    assert table.failures(made.rows) == 3


def test_a_test_that_kills_costs_that_test(tmp_path: Path) -> None:
    """pytest goes on with the next, whatever -k left out before it, and a last test that kills is no other fault."""
    (tmp_path / "test_it.py").write_text(
        "import ctypes, pytest\n"
        "def test_other(): raise SystemExit\n"
        "@pytest.mark.parametrize('i', range(4))\n"
        "def test_this(i): assert i != 1 or ctypes.string_at(0)\n"
        "def test_this_last(): ctypes.string_at(0)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.plugin", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    environment = {"SIMULATED_GPU": "sm90", "CUDA_VISIBLE_DEVICES": ""}
    task = Task("tests", [*command, "-k", "this", tmp_path / "test_it.py"], 100, environment=environment)
    made = run(tmp_path, task, seconds=100)
    tests = [(row["test"].partition("::")[2], row["outcome"]) for row in made.rows if "test" in row]
    assert tests == [(f"test_this[{i}]", "passed") for i in (0, 2, 3)], made.outcomes
    parts = outcome(made, "tests").split("; ")
    assert [part.partition("::")[2] for part in parts] == ["test_this[1]", "test_this_last"]
    assert all(part.startswith("SIGSEGV in ") for part in parts)


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '100']); rows.emit(pid=p.pid); "
    made = run(tmp_path, program("ends", code), program("late", f"{code} p.wait()", 3))
    pids = [row["pid"] for row in made.rows if "pid" in row]
    assert len(pids) == 2
    end = time.monotonic() + 5  # a signal is sent at once, and acted on soon
    while running := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < end, running


def test_a_build_ends_with_its_stage(tmp_path: Path) -> None:
    """ninja gives each compiler a process group of its own."""
    code = "import os, time; pid = os.fork(); pid or os.setpgid(0, 0); pid and rows.emit(pid=pid); time.sleep(100)"
    made = run(tmp_path, program("build", code, 3))
    (pid,) = (row["pid"] for row in made.rows if "pid" in row)
    end = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < end


def test_odd_output_costs_nobody_else(tmp_path: Path) -> None:
    """Rows of other shapes, half ones before whole ones, a line that is a row's beginning many times, another alphabet."""
    odd = r"""
import sys
print('@row {"begin": "x"}'); print('@row {"begin": -5, "item": 1}'); print('@row {"check": 1}'); print('@row {"test": 1}')
print('@row {"error": 1}'); print('@row {"machine": "x"}'); print('@row {"ms": [], "implementation": "a", "op": "b"}')
print('@row ' + '[' * 5000 + ']' * 5000); print('@row {"che@row {"check": "two", "ok": true}')
print('@row {"error": "\ud800"}'); print('@row {' * 40000); sys.stdout.buffer.write(b'\xff\n')
"""
    made = run(tmp_path, program("odd", odd), program("works", ""), seconds=20)
    assert outcome(made, "works") == "done"
    assert "two" in [row.get("check") for row in made.rows]
    assert "works" in table.summary(made.rows, made.outcomes, 1.0)
    assert table.failures(made.rows) > 0


def test_a_restart_that_dies_is_told(tmp_path: Path) -> None:
    code = """
import sys
from benchmarks.gpu import rows
if rows.first_item(): raise ImportError("libcuda is gone")
rows.emit(begin=0, item="one"); rows.emit(error="e", item="one"); sys.exit(rows.FAILED_GPU)
"""
    made = run(tmp_path, Task("family", [sys.executable, "-c", code], 30))
    assert outcome(made, "family") == "its GPU failed in one; exit 1: ImportError: libcuda is gone; 1 failed, first one: e"


def test_more_rows_than_a_task_may_have(tmp_path: Path, monkeypatch) -> None:
    """The rest is not kept, but which item runs is still known."""
    monkeypatch.setattr(driver, "MOST_ROWS", 1000)
    code = "[rows.emit(check=i, ok=True) for i in range(1000)]; rows.emit(begin=7, item='late'); raise SystemExit('no luck')"
    made = run(tmp_path, program("floods", code), program("works", ""))
    assert outcome(made, "floods").startswith("more than 0 MiB of rows")
    assert outcome(made, "floods").endswith("exit 1: no luck in late")
    assert outcome(made, "works") == "done"
    assert len(made.rows) < 100


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_the_limit_holds(tmp_path: Path) -> None:
    """Stages get what is left, and are skipped if nothing is."""
    start, made = time.monotonic(), Run(tmp_path, 5)
    for name in ("first", "second"):
        made.stage(Stage("stage", 50, "stage.log", [program(name, "import time; time.sleep(100)", 50)]), reserved=1.0)
    assert time.monotonic() - start < 15
    assert outcome(made, "first").startswith("out of time after")
    assert made.outcomes[1] == "stage, second: skipped: no time left"


def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    made = run(
        tmp_path, program("no tool", "", needs=["no-such-tool"]), Task("no file", ["/no/such/file"], 5), program("works", "")
    )
    assert made.outcomes[:2] == [
        "stage, no tool: skipped: no no-such-tool on the PATH",
        "stage, no file: not started: [Errno 2] No such file or directory: '/no/such/file'",
    ]
    assert outcome(made, "works") == "done"


def test_a_full_disk_costs_the_files_alone(tmp_path: Path, capsys) -> None:
    for name in ("rows.jsonl", "stage.log"):
        (tmp_path / name).symlink_to("/dev/full")
    made = run(tmp_path, program("works", "print('hello')"))
    assert [row["check"] for row in made.rows if "check" in row] == ["one"]
    printed = capsys.readouterr().out
    assert printed.count("not written: rows.jsonl: No space left on device") == 1
    assert "stage, works: done" in printed


def test_files_stay_small(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(driver, "LARGEST", 10_000)
    run(tmp_path, program("talks", "print(('x' * 99 + chr(10)) * 1000)"))
    assert (tmp_path / "stage.log").stat().st_size <= 10_000
    assert capsys.readouterr().out.count("not written: stage.log is as large as it may be") == 1


def test_table_is_short() -> None:
    many = [{"test": f"tests/test_{i}.py::test", "outcome": "failed", "reason": "x" * 500} for i in range(100)]
    speed = {"dtype": "bfloat16", "pass": "forward", "implementation": "sora_kernels", "ms": [1, 1, 1], "useful_gbps": 1.0}
    many += [{"op": f"op {i}", **speed} for i in range(500)]
    text = table.summary(many, ["stage, task: done"] * 50, 400)
    assert len(text) < 12_000
    assert "tests failed: 100 of 100" in text
    assert text.endswith("... and more in rows.jsonl")


def command(*arguments: str | Path, tools: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, (str(tools or ""), os.environ["PATH"])))
    words = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    variables = {**os.environ, "PATH": paths, **environment}
    return subprocess.run(words, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out", "--seconds", "1"], "--seconds: expected a number of at least 10, got 1"),
        (["out", "--seconds", "inf"], "--seconds: expected a number of at least 10, got inf"),
        ([""], "OUT: expected a folder, got nothing"),
        (["out", "--items", "0"], "--items: expected at least 1, got 0"),
        (["out", "--seconds", "nan"], "--seconds: expected a number of at least 10, got nan"),
        (["out", "--stages", "smoke,speed"], "--stages: expected some of setup,smoke,"),
        (["out", "--prepared", "nowhere"], "--prepared: nowhere has no manifest.json"),
        (["/dev/null/out"], "OUT: /dev/null/out: Not a directory"),
        (["prepare", "DIR", "--stages", "peers"], "--stages: expected some of smoke,capture,"),
        (["prepare", "DIR", "--triton", "2.0"], "--triton: expected 2.0, this Python has"),
        (["prepare", "DIR", "--python", "no-such-python"], "--python: no program 'no-such-python'"),
        (["prepare", "/dev/null/dir"], "DIR: /dev/null/dir: Not a directory"),
    ],
)
def test_bad_arguments(words: list[str], message: str) -> None:
    done = command(*words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_without_a_gpu(tmp_path: Path) -> None:
    """Each stage says it in one line, and the rest goes on."""
    done = command(tmp_path, "--stages", "smoke,capture,attention,memory,tuning")
    lines = done.stdout.splitlines()[:5]
    assert [line.partition(",")[0] for line in lines] == ["smoke", "capture", "attention", "memory", "tuning"]
    assert all("skipped: torch " in line for line in lines), lines
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_prepared_folder_that_is_none(tmp_path: Path) -> None:
    """The reason is told, and what is missing is made here."""
    (tmp_path / "manifest.json").write_text("{")
    done = command(tmp_path / "out", "--simulate", "sm90", "--stages", "setup", "--prepared", tmp_path)
    assert "kernels: JSONDecodeError" in done.stdout
    assert "; compiled when first used" in done.stdout
    assert "modules: JSONDecodeError" in done.stdout
    assert "built here" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_torch(tmp_path: Path) -> None:
    """The driver needs none, and says what its processes lack."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is broken')\n")
    done = command(tmp_path / "out", "--stages", "smoke", PYTHONPATH=str(tmp_path))
    assert "smoke, smoke: exit 1: ImportError: libtorch.so is broken" in done.stdout
    assert done.returncode == 1


def test_whoever_ends_the_driver_gets_the_table(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--stages", "smoke", "--simulate", "sm90"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "rows.jsonl").exists() and process.poll() is None:
            time.sleep(0.1)
        again = command(tmp_path, "--stages", "smoke")
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate()
    assert again.returncode == 2
    assert "another run writes there" in again.stderr
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted: the stages above are all that ran" in text
    assert "interrupted" in (tmp_path / "summary.txt").read_text()


def test_first_error_of_a_build() -> None:
    text = "[1/2] compile a\nFAILED: [code=127] a.o\nno-such-cc -c a.cpp\n/bin/sh: 1: no-such-cc: not found\nninja: build stopped\n"
    assert first_error(text) == "/bin/sh: 1: no-such-cc: not found"
    assert first_error("b.cpp:3:1: error: expected ';'\nmore") == "b.cpp:3:1: error: expected ';'"
    assert first_error("sora_kernels: SORA_KERNELS_CUDA=1, but no nvcc\n") == "sora_kernels: SORA_KERNELS_CUDA=1, but no nvcc"
