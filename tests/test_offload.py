"""A pipeline whose parts come to the device in turn. Without a GPU the device is cpu:0, which is the CPU by another name."""

from pathlib import Path

import pytest
import torch
from test_pipeline_wan import PROMPTS, SHOWN, save
from torch import nn

from sora_model import SoraPipeline, image_to_video, text_to_video
from sora_model.pipeline.offload import put_in_turn

DEVICE = torch.device("cpu", 0)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Each move of a module: its class, and where to."""
    seen: list[tuple[str, str]] = []
    move = nn.Module.to

    def watched(module: nn.Module, *args, **options) -> nn.Module:
        seen.append((type(module).__name__, str(args[0])))
        return move(module, *args, **options)

    monkeypatch.setattr(nn.Module, "to", watched)
    return seen


def arrivals(moves: list[tuple[str, str]], parts: set[str]) -> list[str]:
    """The order in which parts come to the device; each time all others have left it."""
    there, order = set(), []
    for name, device in moves:
        if name in parts and device != str(DEVICE):
            there.discard(name)
        elif name in parts:
            there.add(name)
            order += [name] if order[-1:] != [name] else []
        assert len(there) <= 1, f"{there} at once"
    return order


@pytest.mark.parametrize("kind", ["ti2v", "experts"])
def test_one_part_at_a_time(kind: str, tmp_path: Path, moves: list[tuple[str, str]]) -> None:
    folder = save(kind, tmp_path)
    pipeline, plain = (SoraPipeline.from_pretrained(folder) for _ in range(2))
    request = text_to_video(PROMPTS[0], (5, 32, 32))
    if kind == "ti2v":
        request = image_to_video(PROMPTS[0], torch.zeros(3, 1, 32, 32), 5, pipeline.timing)
    put_in_turn(pipeline.parts, DEVICE)
    assert pipeline.device == DEVICE
    moves.clear()
    (video,) = pipeline(request, generator=0, **SHOWN)
    order = arrivals(moves, {"PretrainedEncoder", "DiT", "AutoencoderKLWan"})
    encoded = ["AutoencoderKLWan"] if kind == "ti2v" else []
    assert order == ["PretrainedEncoder", *encoded, "DiT", "AutoencoderKLWan"]
    (want,) = plain(request, generator=0, **SHOWN)
    torch.testing.assert_close(video, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"SoraPipeline\.to: expected a pipeline without offload, got one for cpu:0"):
        pipeline.to("cpu")
    assert pipeline.with_scheduler(pipeline.scheduler).device == DEVICE


def test_a_checkpoint_of_this_package(moves: list[tuple[str, str]]) -> None:
    pipeline = SoraPipeline.from_pretrained()
    put_in_turn(pipeline.parts, DEVICE)
    moves.clear()
    pipeline("a red circle", (5, 32, 32), generator=0, num_inference_steps=2)
    assert arrivals(moves, {"WordEncoder", "DiT", "AutoencoderKLCosmos"}) == ["WordEncoder", "DiT", "AutoencoderKLCosmos"]
    pipeline.caption([torch.zeros(3, 5, 32, 32)])


def test_it_takes_a_gpu() -> None:
    with pytest.raises(ValueError, match="from_pretrained: device: expected a GPU with offload, got cpu"):
        SoraPipeline.from_pretrained(offload=True)
