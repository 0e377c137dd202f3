"""Paths on the command line: what is wrong with one is said in a line that names its option, before any work."""

import errno
import inspect
import os
from pathlib import Path
from typing import get_args, get_type_hints
from unittest import mock

from command_line import refused

import sora_model.storage.documents
from sora_model.cli import app
from sora_model.cli.app import to_path


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


def test_names_that_are_too_long_are_named(small, tmp_path) -> None:
    name = "x" * 300 + ".mp4"
    line = refused("extend", name, "a", "--checkpoint", small, "--out", tmp_path)
    assert f"error: cannot read {name}: file name too long" in line
    assert "error: batch: expected a JSON file, got xxx" in refused("batch", name, "--checkpoint", small, "--out", tmp_path)
    assert "error: FOLDER: expected a folder of videos and images, got xxx" in refused("recaption", name)
    assert "error: --data: expected a folder of videos and images, got xxx" in refused("train", tmp_path / "run", "--data", name)
    assert "error: --chat-model: expected a folder, got xxx" in refused("generate", "a", "--chat-model", name, "--out", tmp_path)
    deep = f"{tmp_path}/" + "d/" * 3000  # each name of it is short
    for option, words in (("--out", ("generate", "a", "--checkpoint", small, "--out", deep)), ("OUT", ("train", deep))):
        assert f"error: {option}: expected a folder that can be written to, got {tmp_path}/d/d" in refused(*words)


def test_links_that_lead_to_themselves_are_named(small, tmp_path) -> None:
    """Path.resolve raises RuntimeError for them before Python 3.13."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert f"error: OUT: expected a place for new files, got one with {loop}" in refused("export", small, loop)
    assert "error: CHECKPOINT: expected a folder with model_index.json" in refused("export", loop, tmp_path / "made")
    for option in ("--start", "--vae", "--text-encoder"):
        line = refused("train", tmp_path / "run", option, loop)
        assert f"error: {option}: " in line
        assert "expected a folder with " in line


def test_a_batch_file_that_cannot_be_read_is_named(small, tmp_path, monkeypatch) -> None:
    (tmp_path / "a.json").write_text("[]")
    lost = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(sora_model.storage.documents, "read_bytes_file", mock.Mock(side_effect=lost))
    line = refused("batch", tmp_path / "a.json", "--checkpoint", small)
    assert f"error: batch: cannot read {tmp_path / 'a.json'}: Input/output error" in line


def test_a_batch_file_of_the_kernel_is_empty(small) -> None:
    line = refused("batch", "/proc/self/mem", "--checkpoint", small)
    assert "error: batch: /proc/self/mem: expected JSON, got Expecting value: line 1 column 1" in line


def test_a_folder_without_media_is_named(tmp_path) -> None:
    assert f"error: FOLDER: folder {tmp_path} must hold videos or images" in refused("recaption", tmp_path)
