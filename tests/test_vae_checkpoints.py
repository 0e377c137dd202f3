"""Checkpoints of VAEs: sizes and statistics that are not what they say are refused, and all that can code is taken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from test_vae import WAN, cosmos, ltx, ltx2, wan

from sora_model.codec.vae import VideoVAE


def saved_as(model: Any, folder: Path, **values: object) -> None:
    """Its checkpoint, whose config says other values."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cosmos_of_wavelets():
    return diffusers.AutoencoderKLCosmos.from_config({**cosmos().config, "patch_type": "haar"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale_factor_spatial", 64),
        ("spatial_compression_ratio", 128),
        ("scale_factor_temporal", 8),
        ("in_channels", 4),
        ("out_channels", 4),
    ],
)
def test_sizes_are_those_that_the_config_says(name: str, value: int, tmp_path: Path) -> None:
    """diffusers keeps entries that its models do not have, and those of the sizes are believed."""
    model = wan()
    if name.endswith("channels"):
        model = diffusers.AutoencoderKLWan(**{**WAN, name: value})
    saved_as(model, tmp_path, **{name: value})
    with pytest.raises(ValueError, match=r"config\.json: expected a VAE that makes .*, got "):
        VideoVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("latents_mean", [], r"latents_mean or shift_factor: expected 4 numbers, or as many for each frame, got shape \[0\]"),
        ("latents_std", [], r"latents_std or scaling_factor: expected 4 numbers, .*, got shape \[0\]"),
        ("latents_std", [1.0] * 5, r"latents_std or scaling_factor: expected 4 numbers, .*, got shape \[5\]"),
        ("latents_std", [[1.0] * 4], r"latents_std or scaling_factor: expected 4 numbers, .*, got shape \[1, 4\]"),
        ("latents_std", [1.0, 1.0, 0.0, 1.0], "latents_std or scaling_factor: expected finite numbers above 0, got 0"),
        ("latents_std", [1e-320] * 4, "latents_std or scaling_factor: expected finite numbers above 0, got 0"),
        ("latents_std", [-1.0] * 4, "latents_std or scaling_factor: expected finite numbers above 0, got -1"),
        ("latents_mean", [1e300] * 4, "latents_mean or shift_factor: expected finite numbers, got inf"),
    ],
)
def test_statistics_that_latents_cannot_have(name: str, value: list, message: str, tmp_path: Path) -> None:
    saved_as(cosmos(), tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json: VideoVAE: model: {message}"):
        VideoVAE.from_pretrained(tmp_path)


def test_a_tile_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ltx(patch_size=3).save_pretrained(tmp_path)
    monkeypatch.setattr("sora_model.codec.vae.open_module", lambda *_: pytest.fail("read"))
    for read in (VideoVAE.from_pretrained, VideoVAE.read_compression):
        with pytest.raises(ValueError, match=r"config\.json: VideoVAE: tile: expected a multiple of 24 from 128 on, got 512"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("make", "options", "compression"),
    [
        (cosmos_of_wavelets, {}, (4, 8, 8)),
        (lambda: ltx2("reflect"), {}, (8, 32, 32)),
        (lambda: ltx(patch_size=3), {"tile": 384}, (8, 24, 24)),
    ],
    ids=["haar", "reflect", "a tile"],
)
def test_a_look_passes_what_can_be_coded(make: Callable[[], Any], options: dict, compression: tuple, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    vae = VideoVAE.from_pretrained(tmp_path, **options)
    assert vae.compression == VideoVAE.read_compression(tmp_path, **options) == compression
    side = 2 * compression[1]
    video = torch.zeros(3, 1 + compression[0], side, side)
    assert vae.decode(vae.encode([video]))[0].shape == video.shape
