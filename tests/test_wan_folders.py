"""Folders of Wan pipelines: what is said of them, and which are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import sora
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_pipeline_wan import SHOWN, save

from sora_model import SoraPipeline
from sora_model.pipeline.checkpoint import read_outline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp("wan")) for kind in ("t2v", "experts", "ti2v")}


def changed(folder: Path, target: Path, change) -> Path:
    shutil.copytree(folder, target)
    change(target)
    return target


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_a_weight(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["blocks.1.attn1.to_q.weight"]
    save_file(weights, path)


def test_weights_that_are_left_over_are_few(folders: dict[str, Path], tmp_path: Path) -> None:
    """A file is opened for each weight, and its whole header read."""

    def many(target: Path) -> None:
        path = target / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file({**load_file(path), **{f"norm_added_q{i}": torch.zeros(0) for i in range(1000)}}, path)

    folder = changed(folders["t2v"], tmp_path / "many", many)
    with pytest.raises(ValueError, match="expected fewer weights norm_added_q than others, got 1000"):
        SoraPipeline.from_pretrained(folder)


def test_folders_of_other_kinds(folders: dict[str, Path], tmp_path: Path) -> None:
    """What a user may take for a pipeline's folder."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model.pth").touch()
    for folder, expected in (
        (folders["t2v"] / "transformer", f", a part of the pipeline {folders['t2v']}"),
        (Path("Wan-AI/Wan2.1"), r", which is not there \(hf download Wan-AI/Wan2.1 --local-dir DIR"),
        (tmp_path / "own", r", which has files of Wan's own code \(take the repository whose name ends in -Diffusers\)"),
        (tmp_path / "none", ", which is no folder"),
    ):
        with pytest.raises(FileNotFoundError, match=f"expected a folder with model_index.json, got {folder}{expected}"):
            read_outline(folder)
    for part in ("tokenizer", "scheduler"):
        folder = changed(folders["t2v"], tmp_path / part, lambda target, part=part: shutil.rmtree(target / part))
        with pytest.raises(FileNotFoundError, match=f"expected a folder with {part}/"):
            read_outline(folder)
    folder = changed(folders["t2v"], tmp_path / "variant", lambda _: None)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert read_outline(folder).weights == read_outline(folders["t2v"]).weights


def test_info(folders: dict[str, Path]) -> None:
    """What a checkpoint is and can do, and why not the rest, of each kind."""
    t2v, experts, ti2v = (sora("info", "--checkpoint", folders[kind]) for kind in ("t2v", "experts", "ti2v"))
    assert "a WanPipeline" in t2v
    assert "umt5; " in t2v
    assert "1 + 4 n frames, height 16 n, width 16 n" in t2v
    assert "81x480x832 at 16 frames per second, 50 steps, guidance 5 at all steps" in t2v
    assert "40 steps, guidance 4, of the expert for low noise 3 at all steps" in experts
    assert "tasks          generate, restyle, batch\n" in t2v
    assert (
        "animate, extend, join, loop, long, simulate: of keyframes it takes none, as this transformer was trained with one" in t2v
    )
    assert (t2v.count("million weights"), experts.count("million weights")) == (1, 2)
    assert "tasks          generate, restyle, animate, extend, join, loop, long, simulate, batch\n" in ti2v
    assert "height 32 n" in ti2v
    assert "caption, recaption: it has no captioner" in ti2v
    assert "expand: it has no captioner; --chat-model does it" in ti2v
    assert "for 5x32x32, which is 2 tokens" in sora("info", "--checkpoint", folders["ti2v"], "--size", "5x32x32")
    own = sora("info")
    assert "51 words learned with it" in own
    assert "simulate, batch, caption, recaption, expand" in own
    assert "--size: expected TxHxW, such as 8x32x48, got '5'" in sora("info", "--size", "5", code=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
            "_class_name: expected Sora.*, got FluxPipeline",
        ),
        (lambda f: edit(f / "model_index.json", boundary_ratio=0.9), "boundary_ratio: expected one with a folder transformer_2"),
        (lambda f: edit(f / "transformer" / "config.json", added_kv_proj_dim=32), "added_kv_proj_dim: expected 32, .*, got 32"),
        (lambda f: edit(f / "transformer" / "config.json", num_layers=3), r"blocks\.2\..*: expected shape .*, got None"),
        (lambda f: edit(f / "transformer" / "config.json", _class_name="Other"), "expected WanTransformer3DModel, got Other"),
        (lambda f: edit(f / "transformer" / "config.json", patch_size=None), "config.json: .*"),
        (lambda f: edit(f / "model_index.json", expand_timesteps="false"), "expand_timesteps: expected true or false, got 'false'"),
        (without_a_weight, r"blocks\.1\.attn1\.to_q\.weight: expected shape \(32, 32\), got None"),
    ],
)
def test_folders_that_are_refused(folders: dict[str, Path], tmp_path: Path, change, message: str) -> None:
    folder = changed(folders["t2v"], tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        SoraPipeline.from_pretrained(folder)


def test_sharded_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["t2v"], tmp_path / "sharded", lambda _: None)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    model = WanTransformer3DModel.from_pretrained(folders["t2v"] / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    got, want = (SoraPipeline.from_pretrained(f).dit.state_dict() for f in (folder, folders["t2v"]))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    next((folder / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"weight_map: expected .*, which is not there"):
        SoraPipeline.from_pretrained(folder)


def test_saved_as_this_packages_own(folders: dict[str, Path], tmp_path: Path) -> None:
    """One transformer is, with all that a call needs; two are refused."""
    pipeline = SoraPipeline.from_pretrained(folders["t2v"])
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = SoraPipeline.from_pretrained(tmp_path / "saved")
    assert (loaded.defaults, loaded.trained_keyframes, loaded.size) == (pipeline.defaults, "none", pipeline.size)
    outlines = [read_outline(f)._replace(weights=None, weights_bf16=None, enlarged=1) for f in (tmp_path / "saved", folders["t2v"])]
    assert outlines[0] == outlines[1]
    prompt = "a " * 600
    got, want = (p(prompt, (1, 32, 32), generator=0, output_type="latent", **SHOWN) for p in (loaded, pipeline))
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r"save_pretrained: dit: expected one transformer .*, got Experts"):
        SoraPipeline.from_pretrained(folders["experts"]).save_pretrained(tmp_path / "experts")
