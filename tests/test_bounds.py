"""What a checkpoint may ask for by its configs and tokenizers: the rest is refused before it takes time or memory, with its file."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoForCausalLM

from sora_model.codec.vae import VideoVAE
from sora_model.storage.pretrained import open_pretrained
from sora_model.storage.weights import built_without_memory


@pytest.fixture(autouse=True)
def _quick():
    """Of a processor: the promise is 10 s for a whole command."""
    before = time.process_time()
    yield
    assert time.process_time() - before < 5


@pytest.fixture
def folder(tmp_path) -> Path:
    """A config that is to be written, beside one tensor under both names of weights."""
    for name in ("diffusion_pytorch_model", "model"):
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("AutoencoderKLWan", {"num_res_blocks": 10**6}),
        ("AutoencoderKLWan", {"dim_mult": [1] * 10**5, "temperal_downsample": [False] * 10**5}),
        (
            "AutoencoderKLHunyuanVideo",
            {"block_out_channels": [32] * 10**5, "down_block_types": ["HunyuanVideoDownBlock3D"] * 10**5},
        ),
        ("AutoencoderKLCogVideoX", {"block_out_channels": [32] * 10**5, "down_block_types": ["CogVideoXDownBlock3D"] * 10**5}),
        ("AutoencoderKLCosmos", {"encoder_block_out_channels": [32] * 10**5}),
    ],
)
def test_a_model_has_few_parts_for_each_tensor(kind, values, folder) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, **values}))
    for read in (VideoVAE.read_compression, VideoVAE.from_pretrained):
        with pytest.raises(ValueError, match=r"config\.json: "):
            read(folder)


def test_parts_are_counted_in_the_thread_that_builds(folder) -> None:
    def build() -> torch.nn.Module:
        other = threading.Thread(target=lambda: [torch.nn.Linear(1, 1) for _ in range(1000)])
        other.start()
        other.join()
        return torch.nn.Linear(1, 1)

    built_without_memory(build, {}, {"weight": (1, 1)}, "owner", "config.json")
    many = {"kind": lambda: torch.nn.ModuleList(torch.nn.ReLU() for _ in range(2000)), "config": {}, "shapes": {}}
    with pytest.raises(
        ValueError, match=r"owner: config\.json: expected a model for the 0 tensors beside it, got one of more than 1,000"
    ):
        built_without_memory(**many, owner="owner", file="config.json")
    assert len(many["kind"]()) == 2000  # outside, nobody counts


def test_buffers_are_bounded(folder) -> None:
    """GPT-Neo's layers have a mask each, of the square of the longest text, which no file has."""
    sizes = {"vocab_size": 8, "hidden_size": 2, "num_heads": 1, "num_layers": 1, "attention_types": [[["global"], 1]]}
    values = {**sizes, "bos_token_id": 0, "eos_token_id": 1}
    save_file({"weight": torch.zeros(500_000)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"config\.json: expected a model with buffers of at most 268,435,456 bytes, got 40,000,000,"
    ):
        open_pretrained(GPTNeoForCausalLM, {**values, "max_position_embeddings": 200_000}, folder, "owner")
    with pytest.raises(ValueError, match=r"config\.json: attention_types: expected at most"):
        open_pretrained(GPTNeoForCausalLM, {**values, "attention_types": [[["global"], 10**9]]}, folder, "owner")
