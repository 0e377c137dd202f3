"""Text encoders that others made: nothing in them runs, nothing outside them is opened, and what is broken is named."""

import json
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrained_text import MODELS, tokenizer
from test_weights import HUGE, RUNS_CODE, Evil, change, memory, refuses_whole_numbers, weights_of

from sora_model.text.pretrained import PretrainedEncoder, load_text_encoder, load_tokenizer


@pytest.fixture
def encoder(tmp_path, request) -> Path:
    """A text encoder of transformers."""
    torch.manual_seed(0)
    PretrainedEncoder(MODELS[getattr(request, "param", "t5")](), tokenizer()).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_pickles_of_a_text_encoder_are_not_read(encoder, tmp_path) -> None:
    marker = tmp_path / "executed"
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors, got .*bin: pickles are not read"):
        load_text_encoder(encoder)
    assert not marker.exists()


@pytest.mark.parametrize("encoder", ["t5", "umt5", "clip"], indirect=True)
def test_code_and_places_that_a_config_names_are_left_alone(encoder, tmp_path) -> None:
    """Code of the folder or of the hub, adapters of another folder, files that lie elsewhere: what is read is what is there."""
    before = load_text_encoder(encoder)(["a red circle moves right", ""])
    marker, other = tmp_path / "executed", tmp_path / "other"
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (encoder / name).write_text(RUNS_CODE.format(marker=str(marker)))
    shutil.copytree(encoder, other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] = dict(zip(words["model"]["vocab"], [*range(1, 8), 0], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(words))
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "modeling_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", None]}
    elsewhere: dict = {name: str(other / "tokenizer.json") for name in ("tokenizer_file", "vocab_file", "special_tokens_map_file")}
    change(
        encoder / "config.json",
        auto_map=auto, attn_implementation="evil/kernels", _attn_implementation="evil/kernels", _name_or_path=str(other),
    )  # fmt: skip
    change(
        encoder / "tokenizer_config.json", auto_map=auto, _name_or_path=str(other), fast_tokenizer_files=["../other/tokenizer.json"]
    )
    change(encoder / "tokenizer_config.json", **elsewhere)
    adapter = {"base_model_name_or_path": str(other), "peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}
    (encoder / "adapter_config.json").write_text(json.dumps(adapter))
    after = load_text_encoder(encoder)(["a red circle moves right", ""])
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.cu_seqlens, after.cu_seqlens)
    assert not marker.exists()


def test_quantized_weights_are_refused(encoder) -> None:
    """They would be taken for numbers."""
    change(encoder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match=r"config\.json: quantization_config: expected weights that are not quantized"):
        load_text_encoder(encoder)


@pytest.mark.parametrize("encoder", ["clip", "t5"], indirect=True)
def test_whole_numbers_are_no_weights_under_published_names(encoder) -> None:
    """transformers changes them when it reads a file. Positions may be whole numbers: those of CLIP lie in published files."""
    path, tensors = encoder / "model.safetensors", load_file(encoder / "model.safetensors")
    if "shared.weight" in tensors:
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    else:
        tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(6)[None]
    save_file(tensors, path, {"format": "pt"})
    load_text_encoder(encoder)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path, {"format": "pt"})
    expected = rf"model\.safetensors: {re.escape(name)}: expected float32, or numbers of that kind, got int8"
    with pytest.raises(ValueError, match=expected):
        load_text_encoder(encoder)


def test_a_chat_template_of_a_text_encoder_is_left_out(encoder, tmp_path) -> None:
    """Where it is none, the tokenizer could be read and not be saved."""
    change(encoder / "tokenizer_config.json", chat_template=[{"name": "../../outside", "template": 5}])
    load_text_encoder(encoder).save_pretrained(tmp_path / "again")
    assert torch.equal(load_text_encoder(tmp_path / "again")(["a"]).tokens, load_text_encoder(encoder)(["a"]).tokens)


def test_a_text_encoder_marks_the_end_of_a_text(encoder) -> None:
    """The null text of guidance would have no token, and the mean of none is NaN."""
    path = encoder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    with pytest.raises(ValueError, match="tokenizer: expected one that marks the end of a text"):
        load_text_encoder(encoder)


def test_names_of_weights_steer_no_terminal(encoder, capfd) -> None:
    weights = weights_of(encoder / "model.safetensors")
    save_file({**weights, "\x1b]0;evil\x07\nerror: x": torch.zeros(1)}, encoder / "model.safetensors", {"format": "pt"})
    load_text_encoder(encoder)
    shown = capfd.readouterr()
    assert "\x1b]0;evil" not in shown.out + shown.err


def test_a_tokenizer_is_one_of_a_list(encoder, tmp_path) -> None:
    change(encoder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with pytest.raises(ValueError, match=r"expected tokenizer_class out of T5Tokenizer, .*, got EvilTokenizer"):
        load_text_encoder(encoder)
    change(encoder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (encoder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"encoder: expected a tokenizer, got"):
        load_text_encoder(encoder)
    (encoder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"encoder: expected a tokenizer, got"):
        load_tokenizer(encoder, "test")


def test_shards_lie_in_their_folder(encoder, tmp_path) -> None:
    whole = load_text_encoder(encoder)(["a red circle"])
    weights = weights_of(encoder / "model.safetensors")
    (encoder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = sorted(weights)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, encoder / file)
    index = encoder / "model.safetensors.index.json"

    def write(**places: str) -> None:
        index.write_text(json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part} | places}))

    write()
    assert torch.equal(load_text_encoder(encoder)(["a red circle"]).tokens, whole.tokens)
    for place in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "https://evil.example/x.safetensors",
        "x.bin",
        5,
    ):
        write(**{names[0]: place})
        with pytest.raises(ValueError, match=r"weight_map: expected names of safetensors files in this folder, got"):
            load_text_encoder(encoder)
    write(**{names[0]: "three.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"weight_map: expected .*three\.safetensors, which is not there"):
        load_text_encoder(encoder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map: expected names of tensors and their files, got None"):
        load_text_encoder(encoder)


def test_a_text_encoder_that_is_no_numbers_is_named(encoder) -> None:
    weights = weights_of(encoder / "model.safetensors")
    weights["shared.weight"][3, 3] = float("nan")
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: shared\.weight: expected finite numbers, got NaN"):
        load_text_encoder(encoder)


def test_weights_that_a_text_encoder_misses_are_named(encoder) -> None:
    """They were made up, with a warning."""
    weights = weights_of(encoder / "model.safetensors")
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
    weights["decoder.unused"] = torch.zeros(2000)  # a whole T5 has weights that the encoder does not need
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected the weights encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight, which are not"
    ):
        load_text_encoder(encoder)


@pytest.mark.parametrize("value", HUGE[:2])
@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        ("t5", "num_layers"),
        ("t5", "vocab_size"),
        ("t5", "d_ff"),
        ("clip", "num_hidden_layers"),
        ("clip", "max_position_embeddings"),
    ],
    indirect=["encoder"],
)
def test_a_text_encoder_may_not_ask_for_more_than_its_weights(encoder, name, value) -> None:
    load_text_encoder(encoder)
    before = memory()
    change(encoder / "config.json", **{name: value})
    with pytest.raises(ValueError, match=r"config\.json: .*expected .*at most"):
        load_text_encoder(encoder)
    assert memory() - before < 100e6


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint16])
def test_whole_numbers_are_no_weights(dtype: torch.dtype, encoder) -> None:
    refuses_whole_numbers(encoder / "model.safetensors", lambda: load_text_encoder(encoder), dtype)


def test_a_tensor_of_no_shape_is_named(encoder) -> None:
    path = encoder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    text = json.dumps({**header, "left over": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [end, end]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected safetensors, got "):
        load_text_encoder(encoder)
