"""Checkpoints to attack and the ways to do it: `make_originals`, `damage`.

Each original is a folder of tiny models. Damage is one change of one file, or a file more, that a number draws.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the helpers of tests, which import each other by their names

from tests.reliability.greedy import ASKED, asked
from tests.reliability.media import mutated
from tests.reliability.templates import TEMPLATES

Rng = np.random.Generator
DEEP = 100_000
NUMBERS = (2**40, 2**31, 2**63, 10**400, 10**9, -1, 0, 1, 0.5, -(2**40), 1e308, -0.0)
OTHERS = (
    "",
    "x",
    "2",
    "../../etc/passwd",
    "\0",
    "\ud800",
    None,
    True,
    [],
    {},
    [2**40] * 3,
    [[[[]]]],
    {"a": 1},
    "a" * 10**6,
    [1] * 10**5,
)
LITERALS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000)
CODE = "import os\nos.mkdir({marker!r})\nclass Evil:\n    pass\n"


class Original(NamedTuple):
    """A sound folder. name: of its kind. command: of `sora`, with {folder} and {out}; option: what its errors may name."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    option: str


def make_originals(folder: Path) -> list[Original]:
    """Pipelines of this package and of diffusers, a chat model, a run to resume, VAEs and text encoders to train with."""
    from test_chat import words as chat_words
    from test_pipeline_wan import save as save_wan
    from test_pretrained_text import MODELS, tokenizer
    from test_weights import module
    from transformers import LlamaConfig, LlamaForCausalLM

    from sora_model import SoraPipeline
    from sora_model.text.pretrained import PretrainedEncoder
    from sora_model.text.words import WordEncoder

    torch.manual_seed(0)
    words = WordEncoder(dim=16, num_heads=2, buckets=32)
    words.vocabulary.learn(["a red circle"])
    own = SoraPipeline.from_preset("tiny", patch=(1, 2, 2), codec=module("vae", 0), text_encoder=words, size=(1, 16, 16))
    own.replaced(captioner=_captioner()).save_pretrained(folder / "own")
    t5 = PretrainedEncoder(MODELS["t5"](), tokenizer())
    t5.save_pretrained(folder / "encoder")
    SoraPipeline.from_preset("tiny", patch=(1, 8, 8), text_encoder=t5, size=(1, 16, 16)).save_pretrained(folder / "t5")
    save_wan("t2v", folder / "wan")
    chat = chat_words()
    config = {"vocab_size": len(chat), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**config, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    model.lm_head.weight.data[:7] = 0  # it answers with words, not with special tokens
    model.save_pretrained(folder / "chat")
    chat.save_pretrained(folder / "chat")
    _trained(folder / "run")
    made = ("--steps", "1", "--out", "{out}/made")
    small = ("--steps", "2", "--tokens", "64", "--size", "1x16x16")
    generate = ("generate", "a red circle", *made, "--checkpoint", "{folder}")
    image = folder / "image.png"
    _picture(image)
    return [
        Original("own", folder / "own", (generate, ("info", "--checkpoint", "{folder}")), "--checkpoint"),
        Original("own", folder / "own", (("caption", str(image), "--checkpoint", "{folder}"),), "--checkpoint"),
        Original("own", folder / "own", (("expand", "a cat", "--checkpoint", "{folder}"),), "--checkpoint"),
        Original("own", folder / "own", (("export", "{folder}", "{out}/exported"),), "CHECKPOINT"),
        Original("t5", folder / "t5", (generate,), "--checkpoint"),
        Original("wan", folder / "wan", (("info", "--checkpoint", "{folder}"), (*generate, "--size", "1x16x16")), "--checkpoint"),
        Original("chat", folder / "chat", (("expand", "a red", "--chat-model", "{folder}"),), "--chat-model"),
        Original("run", folder / "run", (("train", "{folder}", "--resume", "--data", "world:simple", *small),), "--resume"),
        Original("encoder", folder / "encoder", (("train", "{out}/run", "--text-encoder", "{folder}", *small),), "--text-encoder"),
        Original("vae", folder / "own" / "vae", (("train", "{out}/run", "--vae", "{folder}", *small),), "--vae"),
        Original("start", folder / "own", (("train", "{out}/run", "--start", "{folder}", *small),), "--start"),
    ]


def _captioner() -> Any:
    from sora_model.caption.captioner import Captioner, CaptionerConfig, train_tokenizer

    sizes = {"in_channels": 4, "hidden_size": 16, "num_heads": 2, "depth": 1, "decoder_depth": 1, "vocabulary": 280, "longest": 16}
    return Captioner(CaptionerConfig(**sizes), train_tokenizer(["a red circle"], 280))


def _picture(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 0, 0)).save(path)


def _trained(folder: Path) -> None:
    from typer.testing import CliRunner

    from sora_model.cli import app

    said = CliRunner().invoke(app, ["train", str(folder), "--steps", "1", "--tokens", "64", "--size", "1x16x16", "--model", "tiny"])
    assert said.exit_code == 0, said.output


def damage(folder: Path, rng: Rng) -> str:
    """Changes something in a copy of an original and says what."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".csv",) and "tfevents" not in path.name
    )
    path = files[int(rng.integers(len(files)))]
    ways: list[Callable[[Path, Rng], str]] = [_bytes, _linked]
    if path.suffix == ".json":
        ways += [_value, _value, _value, _value, _key, _text, _text]
    if path.name in ASKED:
        ways += [asked, asked, asked]
    if path.suffix == ".safetensors":
        ways += [_header, _header, _header, _length, _weights, _weights, _pickled, _sharded]
    if path.suffix == ".jinja":
        ways = [_template]
    if path.name == "model_index.json":
        ways += [_foreign]
    way = ways[int(rng.integers(len(ways)))]
    return f"{path.relative_to(folder)}: {way(path, rng)}"


def pick(options: Any, rng: Rng) -> Any:
    return options[int(rng.integers(len(options)))]


def _bytes(path: Path, rng: Rng) -> str:
    path.write_bytes(mutated(path.read_bytes() or b"\0", rng))
    return "damaged bytes"


def _linked(path: Path, rng: Rng) -> str:
    """A link out of the folder, or something that is no file."""
    path.unlink()
    where = pick(["/etc/passwd", "/dev/zero", "/dev/stdin", "/nowhere", path.name, "a folder", "a pipe"], rng)
    if where == "a folder":
        path.mkdir()
    elif where == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(where)
    return f"leads to {where}"


def _places(values: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    found, left = [], [values]
    while left:
        one = left.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        found += [(one, key) for key in list(keys)[:200]]
        left += [one[key] for key in list(keys)[:200]]
    return found


def _value(path: Path, rng: Rng) -> str:
    values = json.loads(path.read_text())
    places = _places(values)
    if not places:
        return "nothing"
    container, key = pick(places, rng)
    container[key] = pick(NUMBERS if rng.random() < 0.6 else OTHERS, rng)
    path.write_text(json.dumps(values))
    return f"{key}: {container[key]!r:.60}"


def _key(path: Path, rng: Rng) -> str:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        return _bytes(path, rng)
    code = str(path.with_name("evil.py"))
    path.with_name("evil.py").write_text(CODE.format(marker=str(path.with_name("ran"))))
    added = {
        "auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"},
        "trust_remote_code": True,
        "_class_name": pick(["Evil", "DiffusionPipeline", "os.system", ["evil", "Evil"], "UNet2DModel"], rng),
        "_name_or_path": "http://127.0.0.1:1/x",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "attn_implementation": "kernels-community/evil",
        "_attn_implementation": "evil/evil:f",
        "tokenizer_class": pick(["Evil", "PreTrainedTokenizer", "BertTokenizer"], rng),
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "/etc/passwd",
        "torch_dtype": pick(["float8_e4m3fn", "evil", 3], rng),
        "architectures": ["Evil"],
        "custom_pipeline": code,
        "model_max_length": pick(NUMBERS, rng),
        "depth": pick(NUMBERS, rng),
        "chat_template": pick(TEMPLATES, rng),
        "unknown": "x",
        "": "",
    }
    if rng.random() < 0.3 and values:
        name = pick(sorted(values), rng)
        del values[name]
        path.write_text(json.dumps(values))
        return f"without {name}"
    name = pick(sorted(added), rng)
    path.write_text(json.dumps({**values, name: added[name]}))
    return f"{name} added: {added[name]!r:.60}"


def _text(path: Path, rng: Rng) -> str:
    """What no writer of JSON writes."""
    text, values = path.read_text(), json.loads(path.read_text())
    what = pick(["literal", "deep", "deep value", "twice", "empty", "list", "utf-16", "huge", "many", "surrogate"], rng)
    if what == "literal":
        places = _places(values)
        container, key = pick(places, rng) if places else ({}, "x")
        container[key] = "@@@"
        text = json.dumps(values).replace('"@@@"', pick(LITERALS, rng))
    elif what == "deep":
        text = pick(['{"a":', "["], rng) * DEEP
    elif what == "deep value":
        depth = pick([60, 900, DEEP], rng)
        text = text.rstrip()[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    elif what == "twice" and isinstance(values, dict) and values:
        name = pick(sorted(values), rng)
        text = text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(pick(NUMBERS, rng))}}}"
    elif what == "huge":
        text = text.rstrip()[:-1] + ', "huge": "' + "a" * 2**28 + '"}'
    elif what == "many":
        text = text.rstrip()[:-1] + "".join(f', "k{i}": {i}' for i in range(10**6)) + "}"
    elif what == "surrogate":
        text = text.rstrip()[:-1] + ', "\\ud800": "\\udfff"}'
    path.write_bytes({"empty": b"", "list": b"[1, 2]", "utf-16": text.encode("utf-16")}.get(what, text.encode()))
    return what


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: str, data: bytes) -> bytes:
    text = header.encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _length(path: Path, rng: Rng) -> str:
    """Another length of the header."""
    length = pick([2**60, 2**63, 2**64 - 1, 0, 1, 7, 100_000_000, 100_000_001, 2**31], rng)
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    if length in (100_000_000, 2**31) and rng.random() < 0.5:  # as long as it says
        os.truncate(path, length + 16)
    return f"header of {length} bytes"


def _header(path: Path, rng: Rng) -> str:
    """A header that lies."""
    header, data = _split(path)
    names = sorted(name for name in header if name != "__metadata__")
    name = pick(names, rng)
    entry = header[name]
    what = pick(["dtype", "shape", "offsets", "overlap", "rename", "drop", "add", "metadata", "many", "deep", "twice", "gap"], rng)
    if what == "dtype":
        entry["dtype"] = pick(["F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64", "X", 3, None, "U64"], rng)
    elif what == "shape":
        entry["shape"] = pick([[], [2**40], [2**32, 2**32], [-1], [0], [2**63], ["x"], 3, [1] * 10**5, [1.5]], rng)
    elif what == "offsets":
        entry["data_offsets"] = pick([[0, 2**60], [2**63, 2**64], [-1, 4], [4, 0], [0, 0], ["x", 1], [], [0, 2**64 - 1]], rng)
    elif what == "overlap":
        entry["data_offsets"] = header[pick(names, rng)]["data_offsets"]
    elif what == "rename":
        header[pick(["x", "", "../x", "\0", "a" * 10**6, "__class__"], rng)] = header.pop(name)
    elif what == "drop":
        del header[name]
    elif what == "add":
        header["another"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif what == "metadata":
        header["__metadata__"] = pick(
            [{"state": "x"}, {"state": "{}"}, {"a": 1}, [], "x", {"format": "tf"}, {"state": "[" * DEEP}], rng
        )
    elif what == "many":
        header |= {f"n{i}": {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2} for i in range(10**6)}
    text = json.dumps(header)
    if what == "deep":
        text = '{"a":' * DEEP
    elif what == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    elif what == "gap":
        text += " " * int(rng.integers(1, 9))
    path.write_bytes(_joined(text, data))
    return f"header: {what} of {name}: {entry!r:.80}"


def _weights(path: Path, rng: Rng) -> str:
    """Sound files of other weights."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    weights = {name: value.clone() for name, value in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = pick(sorted(weights), rng)
    what = pick(["nan", "inf", "double", "half", "integers", "empty", "flat", "missing", "huge", "state", "scalar"], rng)
    value = weights[name]
    if what in ("nan", "inf") and value.is_floating_point() and value.numel():
        value.view(-1)[-1] = float(what)
    elif what in ("double", "half", "integers"):
        weights[name] = value.to({"double": torch.float64, "half": torch.float16, "integers": torch.int32}[what])
    elif what == "empty":
        weights[name] = value.new_zeros(0)
    elif what == "flat":
        weights[name] = value.reshape(-1)
    elif what == "missing":
        del weights[name]
    elif what == "scalar":
        weights[name] = value.new_zeros(())
    elif what == "huge" and value.is_floating_point():
        weights[name] = torch.full_like(value, torch.finfo(value.dtype).max)
    elif what == "state" and metadata and "state" in metadata:
        state = json.loads(metadata["state"])
        container, key = pick(_places(state), rng)
        container[key] = pick([*NUMBERS, *OTHERS], rng)
        metadata["state"] = json.dumps(state)
        what = f"state: {key}: {container[key]!r:.60}"
    if metadata and rng.random() < 0.5:  # what is behind it is looked at, too
        metadata.pop("checksum", None)
    save_file(weights, path, metadata)
    return f"weights: {what}, {name}"


class Evil:
    """What a pickle runs when it is read."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


def _pickled(path: Path, rng: Rng) -> str:
    """Pickles instead of the weights, or beside them."""
    data = pickle.dumps({"weight": Evil(str(path.with_name("ran")))})
    names = ["pytorch_model.bin", "model.pt", "model.pkl", "diffusion_pytorch_model.bin", "model.ckpt", "model.pth"]
    if rng.random() < 0.3:
        path.write_bytes(data)
        return "is a pickle"
    for name in names:
        path.with_name(name).write_bytes(data)
    if rng.random() < 0.7:
        path.unlink()
        return "pickles instead"
    return "pickles beside"


def _sharded(path: Path, rng: Rng) -> str:
    """An index that names other files."""
    header, _ = _split(path)
    outside = path.parent.parent / "outside.safetensors"
    shutil.copy(path, outside)
    where = pick(
        ["../outside.safetensors", str(outside), "outside.bin", "", ".", 3, None, "nowhere.safetensors", "a\0b.safetensors"], rng
    )
    index = {"weight_map": {name: where for name in header if name != "__metadata__"}}
    path.unlink()
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    return f"shards in {where!r}"


def _template(path: Path, rng: Rng) -> str:
    template = pick(TEMPLATES, rng)
    path.write_text(template)
    return f"template {template:.80}"


def _foreign(path: Path, rng: Rng) -> str:
    """A pipeline of diffusers that brings its code along."""
    path.with_name("evil.py").write_text(CODE.format(marker=str(path.with_name("ran"))))
    kind = pick([["evil", "Evil"], "DiffusionPipeline", "StableDiffusionPipeline", "evil.Evil"], rng)
    path.write_text(json.dumps({"_class_name": kind, "scheduler": ["evil", "Evil"], "text_encoder": ["evil", "Evil"]}))
    return f"pipeline {kind}"
