"""Some of the cases of `reliability/documents.py`, and the check itself: what nothing untrusted may cause is seen."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from reliability.arguments import draw_call
from reliability.documents import KINDS, Documents
from reliability.guarded import Ended, in_a_process
from safetensors.torch import save_file
from typer.main import get_command

from sora_model.cli import app


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Documents:
    return Documents(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("kind", KINDS)
def test_some_cases(kind, documents) -> None:
    """Of another seed than the check's own; of each original one."""
    for number in range(11):
        case = documents.run(kind, 7, number)
        assert not case.faults, case


def test_what_is_tried_reaches_its_command(documents, tmp_path) -> None:
    """A call that dies of its own options would try nothing."""
    seen, commands = set(), get_command(app).commands  # type: ignore[attr-defined]
    for number in range(400):
        work = tmp_path / str(number)
        (work / "out").mkdir(parents=True)
        (work / "case").mkdir()
        call = draw_call(documents.inputs, work, np.random.default_rng((7, number)))
        refusal = None
        try:
            context = commands[call.words[0]].make_context(call.words[0], list(call.words[1:]))
        except typer.BadParameter as error:  # by the value that is tried
            refusal = error.format_message()
        if refusal is not None:
            assert any(name in refusal for name in call.named), (call, refusal)
            continue
        taken = [one for value in context.params.values() for one in (value if isinstance(value, list | tuple) else [value])]
        # Numbers are read, and paths are of pathlib.
        assert call.tried is None or {call.tried, str(Path(call.tried))} & set(map(str, taken)) or "=" in call.what, call
        seen.add((call.words[0], call.what.partition(" ")[0]))
    assert {("export", "out"), ("train", "out"), ("caption", "caption"), ("info", "checkpoint"), ("generate", "generate:")} <= seen


def test_what_is_forbidden_is_seen(tmp_path) -> None:
    """Of the check itself: each thing that must not happen is written down."""
    import pickle
    import socket
    import subprocess

    work = tmp_path / "work" / "3"
    source, out, others = work / "case", work / "out", tmp_path / "originals"
    for folder in (source, out, others):
        folder.mkdir(parents=True)
    (others / "x").write_text("x")
    (out / "link").symlink_to(others)
    elsewhere = Path(tempfile.gettempdir()) / f"{tmp_path.name}-{os.getpid()}"
    (source / "evil.py").write_text("x = 1\n")

    def connect() -> None:
        with socket.socket() as one:
            one.settimeout(0.1)
            one.connect_ex(("127.0.0.1", 9))

    def removes() -> None:
        folder = os.open(others, os.O_RDONLY)
        os.unlink("x", dir_fd=folder)

    def imports() -> None:
        sys.path.insert(0, str(source))
        __import__("evil")

    faults = {
        "subprocess.Popen": lambda: subprocess.run(["true"], check=False),
        "os.system": lambda: os.system("true"),
        "socket.connect": connect,
        "pickle.find_class": lambda: pickle.loads(pickle.dumps(Path)),
        "runs ": imports,
        "writes ": lambda: (source / "x").write_text(""),
        f"writes '{work}/escaped'": lambda: (work / "escaped").write_text(""),
        f"writes '{others}/x'": lambda: (others / "x").write_text("y"),
        f"writes '{out}/link/y'": lambda: (out / "link" / "y").write_text(""),
        f"writes '{elsewhere}'": lambda: (elsewhere.write_text(""), elsewhere.unlink()),
        "os.mkdir": lambda: (source / "y").mkdir(),
        "os.remove": removes,
        "os.rename": lambda: (others / "x").rename(out / "x"),
        # Of what is not written in Python, only what is left is seen.
        f"changes {work}/native": lambda: save_file({"a": torch.zeros(1)}, work / "native"),
        f"changes {others}/made": lambda: save_file({"a": torch.ones(1)}, others / "made"),
    }
    for name, fault in faults.items():
        ended = in_a_process(fault, writable=out, untrusted=source, protected=tmp_path)
        assert any(event.startswith(name) for event in ended.events), (name, ended)
        assert ended.faults([], more=True)

    def harmless() -> None:
        (out / "x").write_text("")
        (out / "link").unlink()  # the link, not what it leads to
        with tempfile.NamedTemporaryFile() as file:
            save_file({"a": torch.zeros(1)}, file.name)
        Path(os.devnull).write_text("")

    assert not in_a_process(harmless, writable=out, untrusted=source, protected=tmp_path).faults([], more=True)
    ended = in_a_process(lambda: os.kill(os.getpid(), 9), writable=out, untrusted=source, protected=tmp_path)
    assert "ended with -9" in ended.faults([], more=True)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("error: --out: no", ""),
        ("a bar\nerror: --out: no\nmore", ""),
        ("╭─ Error ─────╮\n│ Invalid value for '--out': no │\n╰───╯\n", ""),
        ("error: --out: no\n" * 500, "expected one line of an error, got 500 errors"),
        ("error: --steps: no\n--out", "names none of '--out'"),
        ("--out: no", "expected one line of an error, got 0 errors"),
        ("warning: error: --out", "expected one line of an error, got 0 errors"),
        ("╭─ Error ─────╮\n│ --out: │\n│ no │\n╰───╯\n", "expected one line of an error, got 1 errors"),
    ],
)
def test_one_line_names_what_is_wrong(text, fault) -> None:
    """Of the check itself."""
    assert Ended(2, 0.0, 0, 0, text, []).faults(["--out"]) == ([fault] if fault else [])
