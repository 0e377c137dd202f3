"""Checkpoints that others made: nothing in them runs, nothing outside them is opened, and what is broken is named."""

import json
import os
import pickle
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import refused
from safetensors.torch import load_file, save_file

from sora_model import SoraPipeline
from sora_model.caption.captioner import Captioner, CaptionerConfig, train_tokenizer
from sora_model.codec.vae import WEIGHTS, VideoVAE
from sora_model.diffusion import schedulers
from sora_model.storage.files import save_whole
from sora_model.storage.weights import check_finite, open_tensors, read_tensors

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
    return refused("generate", "x", "--checkpoint", folder, "--out", folder.parent / "out")


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


def refuses_whole_numbers(path: Path, load: Callable[[], object], dtype: torch.dtype) -> None:
    """Quantized weights whose scales are elsewhere would be taken as they are."""
    before, tensors = path.read_bytes(), load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name].to(dtype)}, path)
    expected = rf"{re.escape(name)}: expected float32, or numbers of that kind, got {str(dtype).removeprefix('torch.')}"
    with pytest.raises(ValueError, match=expected):
        load()
    path.write_bytes(before)
    load()


@pytest.mark.parametrize("part", ["dit/model.safetensors", f"vae/{WEIGHTS}.safetensors"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint16])
def test_whole_numbers_are_no_weights(dtype: torch.dtype, part: str, folder) -> None:
    refuses_whole_numbers(folder / part, lambda: SoraPipeline.from_pretrained(folder), dtype)


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
