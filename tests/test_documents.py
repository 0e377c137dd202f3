"""Checkpoints, batch files, prompts and paths of others: some of the cases of `reliability/documents.py`, and what was mended."""

import inspect
import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import typer
from reliability.arguments import draw_call
from reliability.child import Ended, in_a_process
from reliability.documents import KINDS, Documents
from reliability.templates import TEMPLATES
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

from sora_model import Request, SoraPipeline
from sora_model.caption.template import TemplateRefused, render
from sora_model.cli import app
from sora_model.cli.app import to_path
from sora_model.cli.text import visible
from sora_model.limits import Limits, limits, raised_limits, set_limits
from sora_model.storage.documents import read_json_file
from sora_model.storage.tokenizer import check_tokenizer, tokenize
from sora_model.storage.weights import read_json, read_shapes
from sora_model.text.words import Vocabulary


@pytest.fixture(autouse=True)
def _limits_as_they_are():
    before = limits()
    yield
    set_limits(before)


def refused(*words: object) -> str:
    said = CliRunner().invoke(app, [str(word) for word in words])
    assert said.exit_code == 2, said.output
    assert "Traceback" not in said.output
    return " ".join(said.output.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "a twice in one object"),
        ('{"a": NaN}', "NaN, which is no number of JSON"),
        ('{"a": -1e999}', "-1e999, which is too large a number"),
        (f'{{"a": {"9" * 41}}}', "a number of 41 digits"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "its depth: expected at most 64 .*, got 65; 'sora --limit json-depth=65"),
        ('{"a": "' + "x" * 2**24 + '"}', r"a\.json: expected at most 16777216 bytes, got 16777225; 'sora --limit json-bytes="),
        ("\ufeff[1]", "expected an object, got list"),
    ],
)  # fmt: skip
def test_json_is_read_strictly(text, message, tmp_path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"owner: .*{message}"):
        read_json(tmp_path / "a.json", "owner")


def test_many_names_take_no_time(tmp_path) -> None:
    """They were compared each with each."""
    (tmp_path / "a.json").write_text("{" + ", ".join(f'"{i}": 1' for i in range(200_000)) + "}")
    ended = in_a_process(
        lambda: len(read_json_file(tmp_path / "a.json")), writable=tmp_path, untrusted=tmp_path, protected=tmp_path
    )
    assert ended.code == 0
    assert ended.seconds < 5


def test_headers_have_a_limit(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    for length in (2**24 + 1, 2**60, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(
            ValueError, match=rf"a\.safetensors: expected safetensors, got 10 bytes that begin as a header of {length}"
        ):
            read_shapes([path], "owner")
    length = 2**24 + 1
    with path.open("wb") as file:  # as large as it says, of zeros that no disk has to hold
        file.write(struct.pack("<Q", length))
        file.truncate(length + 8)
    with pytest.raises(ValueError, match=rf"header of safetensors: .* got {length}; 'sora --limit header-bytes={length} "):
        read_shapes([path], "owner")
    with raised_limits(header_bytes=2**60), pytest.raises(ValueError, match="expected safetensors, got"):
        read_shapes([path], "owner")


def test_limits_are_checked() -> None:
    assert limits() == Limits()
    for value in (0, -1, 1.5, True, 2**63):
        with pytest.raises(ValueError, match="set_limits: text: expected a whole number from 1 to"), raised_limits(text=value):
            pass
    with (
        pytest.raises(ValueError, match=r"raised_limits: expected names out of picture_pixels, .*, got pixels"),
        raised_limits(pixels=1),
    ):
        pass
    with pytest.raises(TypeError, match="set_limits: new: expected Limits, got int"):
        set_limits(3)  # type: ignore[arg-type]
    for text in ("", "text", "text=", "text=-1", "text=1.5", "pixels=3", "text=1e99", "text=0"):
        assert "error: --limit: " in refused("--limit", text, "vocabulary")


def test_texts_have_a_limit(small, tmp_path) -> None:
    long = "a" * 20_001
    line = refused("generate", long, "--checkpoint", small, "--out", tmp_path)
    assert "error: PROMPTS: expected at most 20000 characters, got 20001; 'sora --limit text=20001 ...' raises the limit" in line
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a", "negative_prompt": long}]))
    line = refused("batch", tmp_path / "a.json", "--checkpoint", small, "--out", tmp_path)
    assert "error: batch: request 0: negative_prompt: expected at most 20000 characters" in line
    with pytest.raises(ValueError, match="Request: prompt: expected at most 20000 characters, got 20001"):
        Request(long, (1, 8, 8))
    with raised_limits(text=20_001):
        Request(long, (1, 8, 8))
    said = CliRunner().invoke(
        app, ["--limit", "text=3e4", "generate", long, "--checkpoint", str(small), "--out", str(tmp_path), "--steps", "1"]
    )
    assert said.exit_code == 0, said.output


def test_no_text_steers_the_terminal(small, tmp_path) -> None:
    assert visible("a\x1b]0;x\x07\u202eb\ud800\tc\n") == "a\\x1b]0;x\\x07\\u202eb\\ud800\tc\n"
    path = shutil.copytree(small, tmp_path / "evil") / "model_index.json"
    path.write_text(json.dumps({"_class_name": "\x1b[2J" + "x" * 10**6}))
    line = refused("info", "--checkpoint", tmp_path / "evil")
    assert "\x1b" not in line
    assert "\\x1b[2J" in line
    assert len(line) < 3000


@pytest.mark.parametrize("template", [TEMPLATES[1], "{{ 'a' * 10**10 }}", "{% include '/etc/passwd' %}"])
def test_a_chat_template_ends(template) -> None:
    """Whatever it says, and it runs nothing. The first one would go on for minutes."""
    with pytest.raises(TemplateRefused):
        render(template, [{"role": "user", "content": "a"}], {}, 10_000)


def test_chat_templates_see_what_they_see_in_transformers() -> None:
    template = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}\n  {{ bos_token }}{{ m | tojson }}\n{% endfor %}"
        "{% generation %}{{ add_generation_prompt }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": "é<"}, {"role": "user", "content": "b"}]
    text = render(template, messages, {"bos_token": "<s>", "add_generation_prompt": True}, 100)
    from test_pretrained_text import tokenizer

    reader = tokenizer()
    reader.add_special_tokens({"bos_token": "<s>"})
    theirs = reader.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == theirs


def test_tokenizers_may_not_blow_up_a_text(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    for name, rules in (("normalizer", [rule] * 3), ("decoder", [{**rule, "pattern": {"Regex": "a*"}, "content": "x" * 999}])):
        path.write_text(json.dumps({name: {"type": "Sequence", "normalizers": rules}}))
        with pytest.raises(
            ValueError, match=rf"owner: .*tokenizer\.json: {name}: expected rules that make a text at most 256 times"
        ):
            check_tokenizer(path, "owner")
    path.write_text(json.dumps({"post_processor": {"single": [{}] * 257}}))
    with pytest.raises(ValueError, match="single: expected at most 256 parts, got 257"):
        check_tokenizer(path, "owner")
    path.write_text(json.dumps({"normalizer": {"type": "Sequence", "normalizers": [rule] * 2}}))
    check_tokenizer(path, "owner")


def test_ids_without_a_vector_are_refused() -> None:
    from test_pretrained_text import tokenizer

    with pytest.raises(ValueError, match=r"owner: tokenizer: expected ids from 0 to 1, got \d"):
        tokenize(tokenizer(), ["a red circle"], 2, "owner", padding=True, return_tensors="pt")

    class PanicException(BaseException):
        """As of the tokenizers library, whose regular expressions give up in this way."""

    def panics(*_: object) -> None:
        raise PanicException("retry-limit-in-match over")

    with pytest.raises(ValueError, match="owner: tokenizer: expected one that can read the texts, got retry-limit"):
        tokenize(panics, ["a"], 2, "owner")


def test_names_that_are_too_long_are_named(small, tmp_path) -> None:
    name = "x" * 300 + ".mp4"
    line = refused("extend", name, "a", "--checkpoint", small, "--out", tmp_path)
    assert f"error: cannot read {name}: file name too long" in line
    assert "error: batch: expected a JSON file, got xxx" in refused("batch", name, "--checkpoint", small, "--out", tmp_path)


def test_a_vocabulary_that_is_no_text_is_named(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: expected text in UTF-8"):
        Vocabulary.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "got step -1"),
        ({"step": 2**60}, "got step 1152921504606846976"),
        ({"step": True}, "got step True"),
        ({"seconds": "x"}, "got seconds 'x'"),
        ({"seconds": float("nan")}, "got seconds nan"),
        ({"settings": [1]}, "got a config or settings that are no objects"),
    ],
)
def test_a_state_that_cannot_be_is_refused(change, message, tmp_path) -> None:
    from sora_model.training.resume import read_state

    state = {"step": 1, "seconds": 1.0, "config": {}, "settings": {}} | change
    save_file({"a": torch.zeros(1)}, tmp_path / "training.safetensors", {"state": json.dumps(state)})
    with pytest.raises(ValueError, match=f"expected the state of a run of this package, {message}"):
        read_state(tmp_path / "training.safetensors")


def test_moments_that_cannot_be_are_refused(small, tmp_path) -> None:
    run, options = tmp_path / "run", ["--start", str(small), "--size", "1x16x16", "--tokens", "32", "--steps"]
    said = CliRunner().invoke(app, ["train", str(run), *options, "1"])
    assert said.exit_code == 0, said.output
    path = run / "training.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = {"state": file.metadata()["state"]}  # without a checksum, which would say so first
    name = next(name for name in weights if name.startswith("optimizer.") and weights[name].ndim > 1)
    for value, message in (
        (weights[name].flatten()[:3], "expected floats"),
        (weights[name] * float("nan"), "expected finite numbers"),
    ):
        save_file({**weights, name: value.contiguous()}, path, metadata)
        line = refused("train", run, *options, "2", "--resume")
        assert f"{path}: {name}: {message}" in line


def test_schedulers_and_vaes_have_numbers_that_can_be(small, tmp_path) -> None:
    path = shutil.copytree(small, tmp_path / "a") / "scheduler" / "scheduler_config.json"
    for value in (2**40, 0, "x", 1.5):
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": value}))
        with pytest.raises(
            ValueError, match=r"scheduler_config\.json: num_train_timesteps: expected a whole number from 1 to 100000"
        ):
            SoraPipeline.from_pretrained(tmp_path / "a")


def test_empty_paths_are_refused() -> None:
    """They would be the present folder: every command reads its paths by `to_path`."""
    read_by = {}
    for one in app.registered_commands:
        assert one.callback is not None
        hints = get_type_hints(one.callback, include_extras=True)
        for parameter in inspect.signature(one.callback).parameters.values():
            found = parameter.annotation  # as text where the function itself is the command
            kind, *metadata = get_args(hints[parameter.name] if isinstance(found, str) else found) or [None]
            if Path in (kind, *get_args(kind)):
                read_by[one.callback.__name__, parameter.name] = metadata[0].parser
    assert len(read_by) > 20
    assert not [name for name, parser in read_by.items() if parser is not to_path]
    for words in (["export", "", "x"], ["export", "x", ""], ["scaling", ""]):
        assert "expected a path, got ''" in refused(*words)


def test_what_would_be_replaced_is_named_as_in_the_help(small, tmp_path) -> None:
    (tmp_path / "a").touch()
    assert "error: OUT: expected an empty folder or one with a checkpoint" in refused("export", small, tmp_path)
    line = refused("train-captioner", tmp_path / "run", "--checkpoint", tmp_path)
    assert "error: --checkpoint: expected an empty folder or one with a checkpoint" in line


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
