"""Checkpoints that others made: nothing in them runs, nothing outside them is opened, and what is broken is named."""

import json
import os
import pickle
import re
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrained_text import MODELS, tokenizer
from typer.testing import CliRunner

from sora_model import SoraPipeline
from sora_model.caption.captioner import Captioner, CaptionerConfig, train_tokenizer
from sora_model.cli import app
from sora_model.codec.vae import WEIGHTS, VideoVAE
from sora_model.diffusion import schedulers
from sora_model.storage.files import save_whole
from sora_model.storage.weights import check_finite, open_tensors, read_tensors
from sora_model.text.pretrained import PretrainedEncoder, load_text_encoder, load_tokenizer

RUNS_CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass EvilPipeline:\n    pass\nclass Evil:\n    pass\n"


def module(kind: str, seed: int):
    """A part that is saved as a folder; the seed says its weights."""
    torch.manual_seed(seed)
    if kind == "vae":
        return VideoVAE.small(latent_channels=4, channels=(8, 8, 8))
    config = CaptionerConfig(in_channels=3, hidden_size=16, num_heads=2, depth=1, decoder_depth=1, vocabulary=280)
    return Captioner(config, train_tokenizer(["a red circle"], 280))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline with all its parts, all of them small: a VAE, words, a captioner."""
    torch.manual_seed(0)
    pipeline = SoraPipeline.from_preset("tiny", patch=(1, 2, 2), codec=module("vae", 0), size=(1, 16, 16))
    pipeline.replaced(captioner=module("captioner", 0)).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def encoder(tmp_path, request) -> Path:
    """A text encoder of transformers."""
    torch.manual_seed(0)
    PretrainedEncoder(MODELS[getattr(request, "param", "t5")](), tokenizer()).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Copies: what was read may lie in the file itself, which is written over here."""
    return {name: value.clone() for name, value in load_file(path).items()}


class Evil:
    """What a pickle runs when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def opened(folder: Path) -> str:
    """What the command line says of a checkpoint that it cannot open."""
    result = CliRunner().invoke(app, ["generate", "x", "--checkpoint", str(folder), "--out", str(folder.parent / "out")])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output.replace("\n", "")


@pytest.mark.parametrize(
    "name", ["DiffusionPipeline", "AutoPipelineForText2Image", "FluxPipeline", "UNet2DModel", "utils", None, 5, ["x"]]
)
def test_a_scheduler_is_one_of_a_list(name, folder, tmp_path) -> None:
    marker = tmp_path / "executed"
    (folder / "scheduler" / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "EvilPipeline"]}))
    for place in (folder, folder / "scheduler"):
        (place / "evil.py").write_text(RUNS_CODE.format(marker=str(marker)))
    change(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    text = opened(folder)
    assert f"scheduler_config.json: expected _class_name out of {', '.join(schedulers.CLASSES)}, got" in text
    assert not marker.exists()


def test_a_pipeline_of_others_is_not_opened(folder, tmp_path) -> None:
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(RUNS_CODE.format(marker=str(marker)))
    change(folder / "model_index.json", _class_name=["evil", "EvilPipeline"])
    assert "model_index.json: expected a pipeline of this package" in opened(folder)
    change(folder / "model_index.json", _class_name="SoraPipeline", size=[1, "16", 16])
    assert "model_index.json: size: expected [T, H, W], each at least 1, got [1, '16', 16]" in opened(folder)
    change(folder / "model_index.json", size=[1, 16, 16], vae="../../vae")
    assert "model_index.json: vae: expected true or false, got '../../vae'" in opened(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", schedulers.CLASSES)
def test_every_scheduler_of_the_list_comes_back_and_samples(name, folder) -> None:
    import diffusers

    pipeline = SoraPipeline.from_pretrained(folder)
    flow = dict(schedulers.FLOW.values()).get(name)
    kind = getattr(diffusers, name)(**(flow or {}))
    if flow is None:  # of noise and not of flow: such a model predicts something else
        config = {**pipeline.dit.config.to_dict(), "prediction": "direct"}
        pipeline = pipeline.replaced(dit=type(pipeline.dit)(pipeline.dit.config.from_dict(config)))
    pipeline.replaced(scheduler=kind).save_pretrained(folder)
    again = SoraPipeline.from_pretrained(folder)
    assert type(again.scheduler) is getattr(diffusers, name)
    assert again.scheduler.to_json_string() == kind.to_json_string()
    (video,) = again("a red circle", (1, 16, 16), num_inference_steps=2, generator=0)
    assert video.isfinite().all()


@pytest.mark.parametrize(("part", "file"), [("dit", "model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_pickles_are_not_read(part, file, folder, tmp_path) -> None:
    """Neither as a .bin beside the config nor under the name of safetensors."""
    marker, weights = tmp_path / "executed", folder / part / f"{file}.safetensors"
    weights.unlink()
    for name in (f"{file}.bin", "pytorch_model.bin", f"{file}.pt"):
        (folder / part / name).write_bytes(pickle.dumps(Evil(marker)))
    assert f"expected a folder with {file}.safetensors, got {folder / part} with " in (said := opened(folder))
    assert ": pickles are not read" in said
    weights.write_bytes(pickle.dumps(Evil(marker)))
    assert "expected safetensors, got" in opened(folder)
    assert not marker.exists()


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint16])
def test_whole_numbers_are_no_weights(dtype: torch.dtype, encoder, folder) -> None:
    """Of any part: quantized weights whose scales are elsewhere would be taken as they are."""
    places = {
        encoder / "model.safetensors": lambda: load_text_encoder(encoder),
        **{
            folder / part: lambda: SoraPipeline.from_pretrained(folder)
            for part in ("dit/model.safetensors", f"vae/{WEIGHTS}.safetensors")
        },
    }
    for path, load in places.items():
        before, tensors = path.read_bytes(), load_file(path)
        name = max(tensors, key=lambda name: tensors[name].numel())
        save_file({**tensors, name: tensors[name].to(dtype)}, path)
        expected = rf"{re.escape(name)}: expected float32, or numbers of that kind, got {str(dtype).removeprefix('torch.')}"
        with pytest.raises(ValueError, match=expected):
            load()
        path.write_bytes(before)
        load()


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


def test_a_header_that_is_read_for_each_tensor_is_bounded(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path, {"about": "x" * 2**21})
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a header of at most 1049600 bytes for 1 tensors, got"):
        open_tensors([path], "owner")


def test_what_float16_does_not_hold_is_not_saved(folder, tmp_path) -> None:
    """It would become infinity, which no checkpoint is opened with."""
    path = folder / "dit" / "model.safetensors"
    weights = weights_of(path)
    name = min(name for name, value in weights.items() if value.is_floating_point())
    weights[name].view(-1)[0] = 1e5
    save_file(weights, path)
    with pytest.raises(ValueError, match=f"DiT: {name}: expected finite numbers, got infinity"):
        SoraPipeline.from_pretrained(folder).save_pretrained(tmp_path / "half", dtype=torch.float16)


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


def test_a_folder_of_links_is_opened(folder, tmp_path) -> None:
    """As the cache of a hub has them: the user's own links are no names in a config."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = tmp_path / "blobs" / path.relative_to(folder).as_posix().replace("/", "-")
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(blob)
    SoraPipeline.from_pretrained(folder)


PARTS = [("dit", "model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model"), ("captioner", "model")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("part", "file"), PARTS)
def test_weights_that_are_no_numbers_are_named(part, file, value, folder) -> None:
    path = folder / part / f"{file}.safetensors"
    weights = weights_of(path)
    name = sorted(weights)[-1]
    weights[name].flatten()[-1:].fill_(value)
    save_file(weights, path)
    text = opened(folder)
    assert f"{path}: {name}: expected finite numbers, got {'NaN' if value != value else 'infinity'}" in text


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_kind_of_weight_is_looked_at(dtype) -> None:
    good = torch.tensor([0.5, -2.0, torch.finfo(dtype).max], dtype=torch.float64).to(dtype)
    check_finite(good, "x")
    check_finite(good[:0], "x")
    check_finite(torch.tensor([1, 2]), "x")
    broken = good.clone()
    broken[1] = float("nan")
    with pytest.raises(ValueError, match="x: expected finite numbers, got NaN"):
        check_finite(broken, "x")


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("F4", 4, "weight: expected real numbers of 8 bits or more, got float4"),
        ("C64", 64, "weight: expected real numbers of 8 bits or more, got complex64"),
        ("F6_E2M3", 6, "expected safetensors, got "),
    ],
)
def test_kinds_of_numbers_that_no_model_has_are_refused(name, length, message, tmp_path) -> None:
    header = json.dumps({"weight": {"dtype": name, "shape": [8], "data_offsets": [0, length]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(length))
    for read in (lambda: read_tensors([path], "owner"), lambda: open_tensors([path], "owner")("weight")):
        with pytest.raises(ValueError, match=rf"^owner: .*model\.safetensors: {message}"):
            read()


def test_a_text_encoder_that_is_no_numbers_is_named(encoder) -> None:
    weights = weights_of(encoder / "model.safetensors")
    weights["shared.weight"][3, 3] = float("nan")
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: shared\.weight: expected finite numbers, got NaN"):
        load_text_encoder(encoder)


@pytest.mark.parametrize(("part", "file"), PARTS)
def test_weights_that_are_missing_or_left_over_are_named(part, file, folder) -> None:
    path = folder / part / f"{file}.safetensors"
    weights = weights_of(path)
    name = sorted(weights)[-1]
    kept = weights.pop(name)
    save_file(weights, path)
    assert f"{path}: {name}: expected shape {tuple(kept.shape)}, got None" in opened(folder)
    save_file({**weights, name: kept, "extra": torch.zeros(2)}, path)
    assert f"{path}: extra: expected shape None, got (2,)" in opened(folder)


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


HUGE = [2**40, 2**20, 1e18]


def memory() -> int:
    """The most that the process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("dit", "depth"), ("dit", "hidden_size"), ("dit", "text_dim"), ("dit", "num_classes"), ("dit", "mlp_ratio"),
        ("text_encoder", "depth"), ("text_encoder", "buckets"), ("text_encoder", "dim"),
        ("captioner", "decoder_depth"), ("captioner", "longest"), ("captioner", "vocabulary"), ("captioner", "hidden_size"),
        ("vae", "num_layers"), ("vae", "latent_channels"), ("vae", "encoder_block_out_channels"),
    ],
)  # fmt: skip
def test_a_config_may_not_ask_for_more_than_its_weights(part, name, value, folder) -> None:
    SoraPipeline.from_pretrained(folder)
    before = memory()
    change(folder / part / "config.json", **{name: [value] * 3 if name.endswith("channels") and "_out_" in name else value})
    assert "error: " in opened(folder)
    assert memory() - before < 100e6


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


@pytest.mark.parametrize("kind", ["vae", "captioner"])
def test_parts_alone_are_opened_by_the_same_door(kind, tmp_path) -> None:
    save_whole(module(kind, 0), tmp_path / kind)
    reader = {"vae": VideoVAE, "captioner": Captioner}[kind]
    reader.from_pretrained(tmp_path / kind)
    (tmp_path / kind / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: expected an object, got list"):
        reader.from_pretrained(tmp_path / kind)
    (tmp_path / kind / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: expected JSON, got"):
        reader.from_pretrained(tmp_path / kind)
