"""What a command line may be given that somebody else wrote: batch files, prompts, actions and paths: `draw_call`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.media_files import encode, numbered
from tests.reliability.checkpoints import NUMBERS, OTHERS, Rng, pick

QUICK = ("--steps", "1")
PROMPTS: dict[str, str] = {
    "empty": "",
    "spaces": " \t\n\r\v\f ",
    "control": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "escapes": "\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[?1049h",
    "nul": "a\0b",
    "surrogate": "a \ud800 cat",
    "surrogates": "\udcff\udcfe",
    "bidi": "a \u202e\u2066 cat \u200f\u061c",
    "joined": "e" + "\u0301" * 10_000,
    "braces": "{0} {} {x!r} %s %(a)s ${HOME} $(true) `true` {{ 7 * 7 }}",
    "markup": "[red]a[/] [link=file:///etc/passwd]b[/link] [/nonsense] [",
    "path": "../../../../etc/passwd",
    "absolute": "/dev/stdout",
    "option": "--out=/",
    "long": "a cat " * 2**20,
    "long word": "a" * 10**7,
    "words": " ".join(f"w{i}" for i in range(5000)),
    "large": "\U0001f600" * 5000,
    "entities": "&amp;" * 1000 + "&#x0;&#xd800;",
    "null": "null",
    "number": "1e999",
}  # fmt: skip


class Call(NamedTuple):
    """A command. named: what the line of an error may name. tried: the argument that is tried, where it is one. may_end_well: False
    of what must be refused.
    """

    what: str
    words: list[str]
    named: list[str]
    tried: str | None = None
    may_end_well: bool = True


class Inputs(NamedTuple):
    """Sound files: a small checkpoint, a video and an image."""

    checkpoint: Path
    video: Path
    image: Path

    @classmethod
    def make(cls, folder: Path) -> Inputs:
        import torch
        from PIL import Image

        from sora_model import SoraPipeline
        from sora_model.text.words import WordEncoder

        torch.manual_seed(0)
        words = WordEncoder(dim=16, num_heads=2, buckets=32)
        pipeline = SoraPipeline.from_preset("tiny", patch=(1, 8, 8), text_encoder=words, size=(4, 16, 16))
        pipeline.save_pretrained(folder / "checkpoint")
        encode(folder / "a.mp4", numbered(4, 16, 16))
        Image.new("RGB", (16, 16), (0, 200, 0)).save(folder / "a.png")
        return cls(folder / "checkpoint", folder / "a.mp4", folder / "a.png")


def draw_call(inputs: Inputs, work: Path, rng: Rng) -> Call:
    ways = [_batch, _batch, _batch, _batch_text, _prompt, _prompt, _actions, _out, _out, _paths, _numbers]
    way: Callable[[Inputs, Path, Rng], Call] = pick(ways, rng)
    return way(inputs, work, rng)


def _with(inputs: Inputs) -> list[str]:
    """Options of whatever generates."""
    return [*QUICK, "--checkpoint", str(inputs.checkpoint)]


def _request(inputs: Inputs, rng: Rng) -> dict[str, Any]:
    """A sound one."""
    image, video = str(inputs.image), str(inputs.video)
    return dict(
        pick(
            [
                {"prompt": "a cat", "size": "2x16x16"},
                {"task": "text_to_image", "prompt": "a cat", "height": 16, "width": 16, "seed": 3},
                {"task": "animate", "prompt": "a cat", "image": image, "frames": 2},
                {"task": "restyle", "prompt": "a cat", "video": video, "strength": 0.5},
                {"task": "extend", "prompt": "a cat", "video": video, "frames": 2, "overlap": 1, "backward": True},
                {"task": "join", "prompt": "a cat", "first": video, "last": video, "frames": 2, "negative_prompt": "a dog"},
            ],
            rng,
        )
    )


def _file(work: Path, text: str | bytes) -> Path:
    path = work / "case" / "requests.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def _batched(inputs: Inputs, work: Path, text: str | bytes, what: str, may_end_well: bool = True) -> Call:
    path = _file(work, text)
    words = ["batch", str(path), *_with(inputs), "--out", str(work / "out")]
    return Call(f"batch: {what}", words, ["batch: request ", f"batch: {path}", f"cannot read {path}"], may_end_well=may_end_well)


def _batch(inputs: Inputs, work: Path, rng: Rng) -> Call:
    """A field of another kind, size or name."""
    request = _request(inputs, rng)
    names = [*request, "size", "task", "seed", "frames", "overlap", "unknown"]
    for _ in range(int(rng.integers(1, 3))):
        name = pick(names, rng)
        if rng.random() < 0.1:
            request.pop(name, None)
        elif name in ("prompt", "negative_prompt"):
            request[name] = pick([*PROMPTS.values(), *OTHERS], rng)
        elif name in ("image", "video", "first", "last"):
            request[name] = _path(inputs, work, rng)
        else:
            request[name] = pick([*NUMBERS, *OTHERS, "9" * 10**5, "2x16x16x16", "2**9x1x1", "1x16x10000000"], rng)
    requests = [request] * pick([1, 1, 2], rng)
    text = json.dumps(requests, ensure_ascii=bool(rng.integers(2)))
    return _batched(inputs, work, text, f"{str(request)[:300]}", "unknown" not in request)


def _batch_text(inputs: Inputs, work: Path, rng: Rng) -> Call:
    """What is no sound JSON, too large, or no list of requests."""
    good = json.dumps([_request(inputs, rng)])
    texts: dict[str, Callable[[], str | bytes]] = {
        "empty": lambda: "",
        "deep": lambda: "[" * 100_000,
        "deep objects": lambda: '[{"a":' * 100_000,
        "deep value": lambda: good[:-2] + ', "x": ' + "[" * 900 + "]" * 900 + "}]",
        "literal": lambda: good[:-2] + ', "seed": NaN}]',
        "infinite": lambda: good[:-2] + ', "strength": 1e999}]',
        "twice": lambda: good[:-2] + ', "prompt": "a", "prompt": "b"}]',
        "many names": lambda: "[{" + ", ".join(f'"k{i}": 1' for i in range(200_000)) + "}]",
        "many requests": lambda: json.dumps(json.loads(good) * 100_000),
        "huge": lambda: '["' + "a" * 2**28 + '"]',
        "long number": lambda: good[:-2] + ', "seed": ' + "9" * 10**6 + "}]",
        "utf-16": lambda: good.encode("utf-16"),
        "bytes": lambda: rng.bytes(1000),
        "cut": lambda: good[: int(rng.integers(len(good)))],
        "trailing": lambda: good + "]",
        "object": lambda: "{}",
        "strings": lambda: '["a"]',
        "none": lambda: "[]",
        "surrogate": lambda: good[:-2] + ', "negative_prompt": "\\ud800"}]',
    }
    name = pick(sorted(texts), rng)
    return _batched(inputs, work, texts[name](), name, may_end_well=False)


def _prompt(inputs: Inputs, work: Path, rng: Rng) -> Call:
    """Of any text, on the command line or in a batch file."""
    name = pick(sorted(PROMPTS), rng)
    text = PROMPTS[name]
    # What a process is started with has no NUL and is no more than 128 KiB a word: the others come by a batch file.
    if "\0" in text or len(text.encode(errors="surrogatepass")) >= 2**17 or rng.random() < 0.3:
        request = {"prompt": text, "size": "2x16x16"}
        if rng.random() < 0.3:
            request = {"prompt": "a", "negative_prompt": text, "size": "2x16x16"}
        return _batched(inputs, work, json.dumps([request]), f"prompt: {name}")
    command = pick(["generate", "generate", "loop", "long", "simulate", "negative"], rng)
    options = [*_with(inputs), "--out", str(work / "out")]
    words = {
        "generate": ["generate", *options, "--", text],
        "loop": ["loop", *options, "--", text],
        "long": ["long", "--seconds", "0.5", *options, "--", text, text],
        "simulate": ["simulate", f"--action={text}", *options, "--", text],
        "negative": ["generate", *options, f"--negative={text}", "a"],
    }[command]
    named = {"negative": ["--negative"], "simulate": ["PROMPT", "--action"]}.get(command, ["PROMPT"])
    return Call(f"{command}: {name}", words, named, text)


def _actions(inputs: Inputs, work: Path, rng: Rng) -> Call:
    texts = [PROMPTS[pick(sorted(PROMPTS), rng)][:100_000].replace("\0", "") for _ in range(2)]
    words = ["simulate", "a red circle moves up", *_with(inputs), "--out", str(work / "out")]
    return Call(f"actions: {texts!r:.200}", [*words, *[f"--action={text}" for text in texts]], ["--action"], texts[1])


def _path(inputs: Inputs, work: Path, rng: Rng) -> str:
    pipe = work / "case" / "pipe.mp4"
    if not pipe.exists():
        os.mkfifo(pipe)
    (work / "out" / "folder.mp4").mkdir(exist_ok=True)
    (work / "case" / "none.mp4").touch()
    loop = work / "case" / "loop.mp4"
    if not os.path.lexists(loop):
        loop.symlink_to(loop)
    options = [
        "/dev/zero", "/dev/stdin", "/dev/random", "/etc/passwd", "/proc/self/mem", "/proc/kcore", "", ".", "..", "a\0b.mp4",
        "x" * 300 + ".mp4", "/" + "d/" * 3000 + "x.mp4", "http://127.0.0.1:1/a.mp4", "file:///etc/passwd", "concat:/etc/passwd",
        "pipe:0", "tcp://127.0.0.1:1", "lavfi:testsrc", "-", "\ud800.mp4", "~/a.mp4", "$HOME/a.mp4", str(pipe),
        str(work / "out" / "folder.mp4"), str(work / "case" / "none.mp4"), str(loop), f"{inputs.video}/x", f"{inputs.video}\n",
        "subfile,,start,0,end,9,,:/etc/passwd", "data:video/mp4;base64,AAAA", "%d.png", "*.png",
    ]  # fmt: skip
    return str(pick(options, rng))


def _paths(inputs: Inputs, work: Path, rng: Rng) -> Call:
    """Of what is read."""
    # What a process is started with has no NUL, and of halves of characters those alone that stand for bytes.
    path = _path(inputs, work, rng).replace("\0", "").replace("\ud800", "\udcff")
    name = pick(["animate", "restyle", "extend", "join", "batch", "caption", "size", "data", "checkpoint", "chat", "export"], rng)
    made = [*_with(inputs), "--out", str(work / "out" / "made")]
    words, named = {
        "animate": (["animate", "--frames", "2", *made, "--", path, "a"], "IMAGE"),
        "restyle": (["restyle", *made, "--", path, "a"], "VIDEO"),
        "extend": (["extend", "--frames", "2", *made, "--", path, "a"], "VIDEO"),
        "join": (["join", *made, "--", str(inputs.video), path, "a"], "LAST"),
        "batch": (["batch", *made, "--", path], "REQUESTS"),
        "caption": (["caption", "--", path], "FILES"),
        "size": (["info", f"--size={path}", "--checkpoint", str(inputs.checkpoint)], "--size"),
        "data": (["recaption", "--", "." if path == ".." else path], "FOLDER"),  # which it writes to
        "checkpoint": (["info", f"--checkpoint={path}"], "--checkpoint"),
        "chat": (["expand", f"--chat-model={path}", "a"], "--chat-model"),
        "export": (["export", "--", path, str(work / "out" / "made")], "CHECKPOINT"),
    }[name]
    return Call(f"{name} {path!r:.100}", words, [*_called(named), "batch: ", "cannot read "], path)


def _called(argument: str) -> list[str]:
    """What errors call an argument or option: those of a command, of click, and of typer's own click."""
    return [argument, f"'{argument}'", f"'{argument.lower()}'"]


def _out(inputs: Inputs, work: Path, rng: Rng) -> Call:
    """Where files are to go. What climbs out of the present folder stays in that of the case."""
    (work / "out" / "file").touch()
    (work / "out" / "inner").mkdir()
    (work / "out" / "sheet" / "contact_sheet.png").mkdir(parents=True)
    (work / "out" / "link").symlink_to("/proc/self")
    (work / "out" / "dangling").symlink_to("nowhere/at/all")
    (work / "out" / "loop").symlink_to("loop")
    (work / "out" / "linked").mkdir()
    # What is written through a link goes where it leads to, which --overwrite may replace; so it has to lie here.
    (work / "out" / "linked" / "00-a-seed0.mp4").symlink_to(shutil.copy(inputs.image, work / "out" / "a.png"))
    closed = work / "out" / "closed"
    closed.mkdir(mode=0o500)
    base = str(work / "out")
    options = [
        f"{base}/inner/../made", f"{base}/run:1", f"{base}/file", f"{base}/file/sub", f"{base}/inner", f"{base}/sheet",
        f"{base}/link",
        f"{base}/dangling", f"{base}/loop", f"{base}/loop/x", f"{base}/linked", f"{base}/closed/x", "/dev/null", "/dev/full",
        "/dev/stdout", "/proc/self/x", "/sys/x", f"{base}/{'x' * 300}", f"{base}/" + "d/" * 3000, "", " ", f"{base}/ ",
        f"{base}/a\nb", f"{base}/\udcff", f"{base}/\u202e", f"{base}/-rf", f"{base}/%s{{}}", f"{base}/http:/x", f"{base}/[red]x",
    ]  # fmt: skip
    out = str(pick(options, rng))
    generate = ["generate", "a", *_with(inputs), f"--out={out}", "--size"]
    words, named = pick(
        [
            ([*generate, "2x16x16"], "--out"),
            ([*generate, "2x16x16", "--overwrite"], "--out"),
            ([*generate, "1x16x16", "../../x"], "--out"),
            (["export", "--", str(inputs.checkpoint), out], "OUT"),
            (["train", *QUICK, "--tokens", "64", "--size", "1x16x16", "--", out], "OUT"),
        ],
        rng,
    )
    return Call(f"out {out!r:.100} of {words[0]}", words, [*_called(named), "cannot write"], out)


def _numbers(inputs: Inputs, work: Path, rng: Rng) -> Call:
    """Of options."""
    value = str(pick([*NUMBERS, "nan", "inf", "-inf", "1e999", "", "x", "0x10", "1_000", "٣", "9" * 5000, "1x2", "9x9x9"], rng))
    option = pick(
        [
            "--steps", "--guidance", "--guidance-2", "--guidance-from", "--seed", "--fps", "--scale", "--step-cache",
            "--max-pixels",
            "--window", "--size", "--count", "--draft", "--device", "--scheduler", "--precision", "--format",
        ],
        rng,
    )  # fmt: skip
    words = ["generate", "a", *_with(inputs), "--size", "2x16x16", "--out", str(work / "out")]
    if option == "--steps" and value.lstrip("-").isdecimal() and len(value) < 4300 and int(value) > 100:  # longer ones are no int
        value = "0"  # what takes long is what was asked for
    return Call(f"{option}={value:.60}", [*words, f"{option}={value}"], [option, "not enough memory"], value)
