"""Parts of a pipeline from and to the folder of a checkpoint: `load_parts`, `save_parts`, `read_outline`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..caption.captioner import Captioner
from ..codec.codec import PixelCodec
from ..codec.vae import VideoVAE
from ..diffusion.schedulers import load_scheduler
from ..model.config import DiTConfig
from ..model.dit import DiT
from ..model.experts import Experts
from ..storage.files import save_module, settle, whole_folder
from ..storage.weights import built, check_defaults, open_module, read_index, read_json
from ..text.pretrained import load_text_encoder
from . import wan
from .keyframes import TrainedKeyframes, known_keyframes
from .parts import Defaults, Outline, Parts, Weights, bytes_in, token_timing, token_unit


def read_outline(directory: str | Path) -> Outline:
    """Raises as `SoraPipeline.from_pretrained` does, but for weights."""
    folder, owner = Path(directory), "read_outline"
    if wan.is_wan(folder, owner):
        return wan.read_outline(folder, owner)
    index = read_index(folder, owner)
    path = folder / "dit" / "config.json"
    config: Any = built(DiTConfig.from_dict, {"values": read_json(path, owner)}, owner, path)
    compression = VideoVAE.read_compression(folder / "vae") if index["vae"] else PixelCodec.compression
    # Read as float32, whatever the files have.
    text, dit, vae, captioner = (bytes_in(folder / part, 4) for part in ("text_encoder", "dit", "vae", "captioner"))
    timing = token_timing(config.patch_size, compression, causal=index["vae"])
    unit, defaults = token_unit(config.patch_size, compression), Defaults(**index["defaults"])
    weights = Weights(text, (dit,), vae + captioner)
    kind = read_json(folder / "vae" / "config.json", owner)["_class_name"] if index["vae"] else None
    return Outline(
        size=tuple(index["size"]),
        unit=unit,
        timing=timing,
        width=config.hidden_size,
        weights=weights,
        vae=kind,
        defaults=defaults,
        trained_keyframes=known_keyframes(index["trained_keyframes"]),
    )


def has_captioner(directory: str | Path, owner: str) -> bool:
    """Whether a checkpoint has a captioner, by its model_index.json alone."""
    folder = Path(directory)
    return not wan.is_wan(folder, owner) and read_index(folder, owner)["captioner"]


def load_parts(directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Parts:
    """The parts of a checkpoint; see `SoraPipeline.from_pretrained`. Only a large transformer is read straight to the device."""
    folder, owner = Path(directory), "SoraPipeline.from_pretrained"
    settle(folder)
    if wan.is_wan(folder, owner):
        return wan.load_parts(folder, owner, dtype, device)
    index = read_index(folder, owner)
    config = read_json(folder / "dit" / "config.json", owner)
    dit = open_module(lambda: DiT(DiTConfig.from_dict(config)), config, folder / "dit", owner)
    scheduler = load_scheduler(folder / "scheduler", owner)
    codec = VideoVAE.from_pretrained(folder / "vae") if index["vae"] else PixelCodec()
    captioner = Captioner.from_pretrained(folder / "captioner") if index["captioner"] else None
    text_encoder = load_text_encoder(folder / "text_encoder")
    return Parts(
        dit=dit.to(dtype),
        text_encoder=text_encoder,
        scheduler=scheduler,
        codec=codec,
        captioner=captioner,
        size=tuple(index["size"]),
        defaults=Defaults(**index["defaults"]),
        trained_keyframes=known_keyframes(index["trained_keyframes"]),
    )


def save_parts(parts: Parts, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes model_index.json and a folder for each part, all or nothing; see `SoraPipeline.save_pretrained`."""
    codec, captioner = parts.codec, parts.captioner
    if isinstance(parts.dit, Experts):
        expected = "one transformer (to_diffusers_wan converts each of two)"
        raise ValueError(f"SoraPipeline.save_pretrained: dit: expected {expected}, got Experts")
    if not isinstance(codec, PixelCodec | VideoVAE):
        raise TypeError(f"SoraPipeline.save_pretrained: codec: expected a PixelCodec or a VideoVAE, got {type(codec).__name__}")
    if parts.image_encoder is not None:
        expected = "None (to_diffusers_wan converts the transformer)"
        raise ValueError(f"SoraPipeline.save_pretrained: image_encoder: expected {expected}, got ImageEncoder")
    defaults = {name: value for name, value in parts.defaults._asdict().items() if value is not None}
    check_defaults(defaults, "SoraPipeline.save_pretrained: defaults")
    with whole_folder(directory) as folder:
        save_module(parts.dit, parts.dit.config.to_dict(), folder / "dit", dtype)
        parts.text_encoder.save_pretrained(folder / "text_encoder", dtype=dtype)
        parts.scheduler.save_pretrained(folder / "scheduler")
        if isinstance(codec, VideoVAE):
            codec.save_pretrained(folder / "vae", dtype=dtype)
        if captioner is not None:
            captioner.save_pretrained(folder / "captioner", dtype=dtype)
        present = {"vae": isinstance(codec, VideoVAE), "captioner": captioner is not None}
        index: dict[str, Any] = {"_class_name": "SoraPipeline", "size": list(parts.size), **present}
        if parts.defaults != Defaults():
            index["defaults"] = defaults
        if parts.trained_keyframes is not TrainedKeyframes.ANY:
            index["trained_keyframes"] = parts.trained_keyframes.value
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
