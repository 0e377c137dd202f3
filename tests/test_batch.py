"""`sora batch`: the fields of its requests, what is refused, and what its files say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import refused, sora

from sora_model import SoraPipeline
from sora_model.cli import call
from sora_model.cli.app import read_clip
from sora_model.cli.requests import ALIASES, COMMON, TASKS
from sora_model.data import read_comment, write_video

ROOT = Path(__file__).parent.parent


def extend(more: str) -> str:
    return f'[{{"task": "extend", "prompt": "x", "video": "a.mp4", {more}}}]'


def restyle(strength: str) -> str:
    return f'[{{"task": "video_to_video", "prompt": "x", "video": "a.mp4", "strength": {strength}}}]'


COUNT = "a whole number of at least 1"


SIZE = "TxHxW, such as 8x32x48, or [T, H, W], each at least 1"


SHARE = "a number above 0 and up to 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (extend('"frames": 2, "backward": "false"'), 'request 0: backward: expected true or false, got "false"'),
        (extend('"frames": 2, "backward": 0'), "request 0: backward: expected true or false, got 0"),
        ('[{"prompt": "x"}, {"task": ["extend"], "prompt": "x"}]', "request 1: task: expected one of text_to_video, "),
        ('[{"task": null, "prompt": "x"}]', "request 0: task: expected one of text_to_video, "),
        (extend('"frames": "8"'), f'request 0: frames: expected {COUNT}, got "8"'),
        (extend('"frames": true'), f"request 0: frames: expected {COUNT}, got true"),
        (extend('"frames": 2.0'), f"request 0: frames: expected {COUNT}, got 2.0"),
        (extend('"frames": 1099511627776'), "request 0: expected videos that the memory of "),
        (extend('"frames": 0'), f"request 0: frames: expected {COUNT}, got 0"),
        (extend('"frames": 2, "overlap": -1'), "request 0: overlap: expected a whole number of at least 0, got -1"),
        (extend('"overlap": 1'), f"request 0: frames: expected {COUNT} for extend, got none"),
        (extend('"frames": 2, "video": "none.mp4"'), "expected JSON, got video twice in one object"),
        (extend('"frames": 2').replace("a.mp4", "none.mp4"), "request 0: video: "),
        (extend('"frames": 2').replace("a.mp4", r"a\u0000.mp4"), "request 0: video: cannot read "),
        (extend('"frames": 2').replace('"a.mp4"', '["a.mp4"]'), 'request 0: video: expected the name of a file, got ["a.mp4"]'),
        (restyle('"0.5"'), f'request 0: strength: expected {SHARE}, got "0.5"'),
        (restyle("1.5"), f"request 0: strength: expected {SHARE}, got 1.5"),
        (restyle("true"), f"request 0: strength: expected {SHARE}, got true"),
        (restyle("NaN"), "expected JSON, got NaN, which is no number of JSON"),
        (restyle("-Infinity"), "expected JSON, got -Infinity, which is no number of JSON"),
        ('[{"prompt": 5}]', "request 0: prompt: expected text, got 5"),
        ("[{}]", "request 0: prompt: expected text for text_to_video, got none"),
        ('[{"prompt": "x", "sise": 1}]', "request 0: expected negative_prompt, prompt, seed, size for text_to_video, got sise"),
        ('[{"prompt": "x", "size": [1, 8, 8.0]}]', f"request 0: size: expected {SIZE}, got [1, 8, 8.0]"),
        ('[{"prompt": "x", "size": "1x8"}]', "request 0: size: expected TxHxW, such as 8x32x48, got '1x8'"),
        ('[{"prompt": "x", "seed": 1e999}]', "expected JSON, got 1e999, which is too large a number"),
        ('[{"prompt": "x", "seed": 99999999999999999999}]', "request 0: seed: expected a whole number from 0 to "),
        ('[{"prompt": "x", "negative_prompt": null}]', "request 0: negative_prompt: expected text, got null"),
        ("[]", "expected a list of objects with a task each"),
        ("5", "expected a list of objects with a task each"),
        ("[5]", "expected a list of objects with a task each"),
        (json.dumps([{"prompt": "x"}] * 1025), "expected at most 1024 requests, got 1025; 'sora --limit requests=1025 COMMAND"),
        ("[" * 100_000, "expected JSON, got"),
        ("", "expected JSON, got"),
    ],
)
def test_requests_are_checked_field_by_field(text, message, media, unloaded) -> None:
    path = media / "requests.json"
    path.write_text(text)
    assert f"error: batch: {message if message.startswith('request') else f'{path}: {message}'}" in refused(
        "batch", path, "--out", media / "new"
    )


def test_requests_are_read_as_utf_8(media, tmp_path) -> None:
    """With or without a mark of it, whatever the locale says."""
    path = tmp_path / "requests.json"
    code = "import sys, pathlib\nfrom sora_model.cli.requests import read_requests\n"
    code += "print(ascii(read_requests(pathlib.Path(sys.argv[1]), '', print)[0].fields['prompt']))"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text('[{"prompt": "ein Kätzchen"}]', encoding=encoding)
        environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout == ascii("ein Kätzchen") + "\n", done.stderr
    path.write_bytes('[{"prompt": "ein Kätzchen"}]'.encode("latin-1"))
    assert "expected JSON, got 'utf-8' codec can't decode" in refused("batch", path, "--out", media / "new")


def test_a_negative_prompt_needs_guidance(small, media, tmp_path) -> None:
    path = media / "requests.json"
    path.write_text('[{"prompt": "x"}, {"prompt": "x", "negative_prompt": "y"}]')
    text = refused("batch", path, "--guidance", 1, "--out", tmp_path / "out", "--checkpoint", small)
    assert "batch: request 1: negative_prompt: expected none with --guidance 1, which has no use for it" in text
    pipeline = SoraPipeline.from_pretrained(small)
    from sora_model.pipeline.request import text_to_video

    request = text_to_video("x", (2, 16, 16), negative_prompt="y")
    with pytest.raises(ValueError, match="negative_prompt: expected none with guidance_scale 1, which has no use for it, got 'y'"):
        pipeline([request], guidance_scale=1, num_inference_steps=1)
    pipeline([request], guidance_scale=2, num_inference_steps=1)


def test_the_help_of_batch_names_every_field() -> None:
    said = sora("batch", "--help")
    for name in [*TASKS, *ALIASES, *COMMON, *(field for fields in TASKS.values() for field in fields)]:
        assert f" {name}" in said, name
    assert "a whole number of at least 1" in said


def test_requests_have_the_names_of_commands(small, media, tmp_path) -> None:
    wanted = [
        {"task": "generate", "prompt": "a", "size": "2x16x16"},
        {"task": "animate", "prompt": "b", "image": str(media / "large.png"), "frames": 3, "seed": 9},
        {"task": "restyle", "prompt": "c", "video": str(media / "a.mp4")},
    ]
    (tmp_path / "requests.json").write_text(json.dumps(wanted))
    sora("batch", tmp_path / "requests.json", "--checkpoint", small, "--steps", 1, "--out", tmp_path / "out")
    made = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert made == ["00-a-seed0.mp4", "01-b-seed9.mp4", "02-c-seed2.mp4"]
    assert [json.loads(read_comment(tmp_path / "out" / name))["seed"] for name in made] == [0, 9, 2]


def test_each_file_of_a_batch_says_what_its_request_was(small, media, tmp_path) -> None:
    wanted = [
        {"prompt": "a", "size": "2x16x16", "negative_prompt": "b"},
        {"task": "restyle", "prompt": "c", "video": str(media / "a.mp4"), "strength": 0.5},
        {"task": "extend", "prompt": "d", "video": str(media / "a.mp4"), "frames": 2, "overlap": 0},
        {"task": "join", "prompt": "e", "first": "a.mp4", "last": str(media / "a.mp4"), "frames": 2},
    ]
    write_video(tmp_path / "a.mp4", torch.zeros(3, 4, 16, 16))
    (tmp_path / "requests.json").write_text(json.dumps(wanted))
    options = ["--checkpoint", small, "--steps", 1, "--out", tmp_path / "out", "--negative", "z"]
    sora("batch", tmp_path / "requests.json", *options)
    comments = [json.loads(read_comment(path)) for path in sorted((tmp_path / "out").glob("*.mp4"))]
    clip = {"negative": "z", "video": str(media / "a.mp4")}
    passage = {"first": str(tmp_path / "a.mp4"), "last": str(media / "a.mp4"), "overlap": 1, "frames": 2}
    expected = [
        {"task": "text_to_video", "negative": "b", "size": "2x16x16"},
        {"task": "video_to_video", **clip, "strength": 0.5},
        {"task": "extend", **clip, "frames": 2, "overlap": 0, "backward": False},
        {"task": "join", "negative": "z", **passage},
    ]
    for comment, settings in zip(comments, expected, strict=True):
        assert {name: comment[name] for name in settings} == settings
        assert comment["command"] == "batch"
    assert not {"strength", "overlap", "video"} & set(comments[0])


def test_a_file_that_many_requests_name_is_read_once(small, media, tmp_path, monkeypatch) -> None:
    read = []
    monkeypatch.setattr(call, "read_clip", lambda path, *rest: read.append(path) or read_clip(path, *rest))
    (tmp_path / "link.mp4").symlink_to(media / "a.mp4")
    names = [media / "a.mp4", media / "b.mp4", media / ".." / media.name / "a.mp4", "link.mp4", media / "b.mp4"]
    wanted = [{"task": "restyle", "prompt": "x", "video": str(name), "strength": 0.5} for name in names]
    (tmp_path / "requests.json").write_text(json.dumps(wanted))
    options = ["batch", tmp_path / "requests.json", "--checkpoint", small, "--steps", 1, "--out", tmp_path / "out"]
    sora("--limit", "clip-pixels=2560", *options)
    assert read == names[:2]
    said = sora("--limit", "clip-pixels=2559", *options, code=2)
    assert "error: batch: request 1: video: with the files before it: expected at most 2559 pixels, got 2560; " in said


def test_all_texts_of_a_batch_have_a_limit(unloaded, tmp_path) -> None:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([{"prompt": "x" * 7}, {"prompt": "x", "negative_prompt": "y" * 2}]))
    said = sora("--limit", "batch-text=9", "batch", path, "--out", tmp_path / "out", code=2)
    assert f"error: batch: {path}: prompts: expected at most 9 characters, got 10; 'sora --limit batch-text=10 " in said


def test_a_request_that_joins_other_speeds_is_named(media, unloaded, tmp_path) -> None:
    join = {"task": "join", "prompt": "", "first": str(media / "a.mp4"), "last": str(media / "fast.mp4"), "frames": 4}
    (tmp_path / "requests.json").write_text(json.dumps([{"prompt": "x"}, join]))
    said = sora("batch", tmp_path / "requests.json", "--out", tmp_path / "out", code=2)
    assert "error: batch: request 1: last: expected the frames per second of first, got 8 and 60; --fps sets one for both" in said
