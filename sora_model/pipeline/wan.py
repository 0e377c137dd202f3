"""Folders of diffusers' Wan pipelines as the parts of a `SoraPipeline`: 2.1 and 2.2, text to video, image to video and TI2V."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from ..codec.image_encoder import ImageEncoder
from ..codec.vae import WEIGHTS, VideoVAE
from ..diffusion.schedulers import load_scheduler
from ..model.config import DiTConfig
from ..model.convert.wan import TEXT_LENGTH, load_wan, wan_config
from ..model.dit import DiT
from ..model.experts import Experts
from ..storage.weights import (
    built,
    built_without_memory,
    check_depth,
    check_shapes,
    open_tensors,
    place,
    read_json,
    read_shapes,
    weight_files,
)
from ..text.pretrained import PretrainedEncoder
from .keyframes import TrainedKeyframes
from .parts import Defaults, Outline, Parts, Weights, bytes_in, token_timing, token_unit

PIPELINES = "WanPipeline", "WanImageToVideoPipeline"
"""What model_index.json calls them. Both run the transformers that are taken here: those of TI2V are the same."""
DEFAULTS = Defaults(num_inference_steps=50, guidance_scale=5.0, guidance_from=0.0, fps=16)
TI2V_CHANNELS = 48
SIZES = {16: (81, 480, 832), 48: (121, 704, 1280)}
"""(T, H, W) by the channels of a latent: of the VAE of Wan 2.1, and of that of Wan 2.2 TI2V."""
DTYPES = torch.float32, torch.bfloat16, torch.float16
LEFT_OVER = "norm_added_q"
"""A weight of some checkpoints that has no use."""


def is_wan(folder: Path, owner: str) -> bool:
    """Whether a folder has one of PIPELINES in it; if not, it must be one of this package.

    Raises ValueError for a pipeline of another kind.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: expected a folder with {path.name}, got {folder}{_hint(folder)}")
    kind = read_json(path, owner).get("_class_name")
    if isinstance(kind, str) and kind not in ("SoraPipeline", *PIPELINES):
        expected = f"SoraPipeline, {' or '.join(PIPELINES)}"
        raise ValueError(f"{owner}: model_index.json: _class_name: expected {expected}, got {kind}")
    return kind in PIPELINES


def _hint(folder: Path) -> str:
    """What else a folder may be that is none of a pipeline."""
    if (folder.parent / "model_index.json").is_file():
        return f", a part of the pipeline {folder.parent}"
    if not folder.exists() and len(folder.parts) == 2:
        return f", which is not there (hf download {folder} --local-dir DIR gets it from the hub)"
    if any(folder.glob("*.pth")):
        return ", which has files of Wan's own code (take the repository whose name ends in -Diffusers)"
    return "" if folder.is_dir() else ", which is no folder"


def read_outline(folder: Path, owner: str) -> Outline:
    """What the configs of a Wan checkpoint say of it, for which no weights are read."""
    config = _dit_config(folder / "transformer", owner)
    _check_parts(folder, config, owner)
    compression = VideoVAE.read_compression(folder / "vae")
    unit, timing = token_unit(config.patch_size, compression), token_timing(config.patch_size, compression, causal=True)
    return Outline(
        size=SIZES.get(config.latent_channels, SIZES[16]),
        unit=unit,
        timing=timing,
        width=config.hidden_size,
        weights=_weights(folder, None),
        weights_bf16=_weights(folder, 2),
        vae="AutoencoderKLWan",
        defaults=_defaults(config, has_experts=_boundary(folder, owner) is not None),
        trained_keyframes=_trained_keyframes(folder, config, owner),
        enlarged=1.0,  # their attention takes minutes of a GPU
    )


def _defaults(config: DiTConfig, has_experts: bool) -> Defaults:
    """As in the configs of Wan's own code: of 2.2's A14B, guidance of high noise and of low noise; frames per second of TI2V."""
    if not has_experts:
        return DEFAULTS._replace(fps=24) if config.latent_channels == TI2V_CHANNELS else DEFAULTS
    high, low = (3.5, 3.5) if config.condition_channels else (4.0, 3.0)
    return DEFAULTS._replace(num_inference_steps=40, guidance_scale=high, guidance_scale_2=low)


def _weights(folder: Path, itemsize: int | None) -> Weights:
    """What the parts take, those of transformers and encoders with `itemsize` bytes each; VAEs are float32."""
    text, images, *transformers = (
        bytes_in(folder / part, itemsize) for part in ("text_encoder", "image_encoder", "transformer", "transformer_2")
    )
    return Weights(text + images, tuple(filter(None, transformers)), bytes_in(folder / "vae", 4))


def load_parts(folder: Path, owner: str, dtype: torch.dtype | None, device: torch.device | str) -> Parts:
    """The parts of a Wan checkpoint, whose weights are read one at a time.

    dtype: of transformers and text encoder, but for what diffusers keeps in float32, too; default: that of their files.

    Raises:
        ValueError: an option that is not supported, or weights that are missing, left over, of another shape or not finite.
        FileNotFoundError: a part that is not there.
    """
    _check_dtype(dtype, f"{owner}: dtype")
    boundary, second = _boundary(folder, owner), folder / "transformer_2"
    config = _dit_config(folder / "transformer", owner)
    _check_parts(folder, config, owner)
    scheduler = load_scheduler(folder / "scheduler", owner)
    # Transformers last: they take the longest, and the others need room for their weights twice.
    vae = VideoVAE.from_pretrained(folder / "vae")
    encoder = PretrainedEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer", dtype=dtype, longest=TEXT_LENGTH)
    images = None
    if config.image_dim is not None:
        images = ImageEncoder.from_pretrained(folder / "image_encoder", folder / "image_processor", dtype=dtype)
    dit: DiT | Experts = _transformer(folder / "transformer", owner, dtype, device)
    if boundary is not None and isinstance(dit, DiT):
        dit = Experts(dit, _transformer(second, owner, dtype, device), boundary * scheduler.config.num_train_timesteps)
    return Parts(
        dit=dit,
        text_encoder=encoder,
        scheduler=scheduler,
        codec=vae,
        size=SIZES.get(vae.channels, SIZES[16]),
        defaults=_defaults(config, has_experts=isinstance(dit, Experts)),
        trained_keyframes=_trained_keyframes(folder, config, owner),
        image_encoder=images,
    )


def _trained_keyframes(folder: Path, config: DiTConfig, owner: str) -> TrainedKeyframes:
    value = read_json(folder / "model_index.json", owner).get("expand_timesteps", False)
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: model_index.json: expand_timesteps: expected true or false, got {value!r}")
    if config.condition_channels:
        return TrainedKeyframes.FIRST_AND_LAST if config.image_positions else TrainedKeyframes.FIRST
    return TrainedKeyframes.ANY if value else TrainedKeyframes.NONE


def _transformer(folder: Path, owner: str, dtype: torch.dtype | None, device: torch.device | str) -> DiT:
    from diffusers import WanTransformer3DModel

    values, files = _config(folder, owner), weight_files(folder, WEIGHTS, owner)
    config = _dit_config(folder, owner)
    every = read_shapes(files, owner)
    shapes = {name: shape for name, shape in every.items() if LEFT_OVER not in name}
    if len(every) > 2 * len(shapes):  # there is one in a layer
        raise ValueError(f"{place(files, owner)}: expected fewer weights {LEFT_OVER} than others, got {len(every) - len(shapes)}")
    check_depth(values, shapes, f"{owner}: {folder / 'config.json'}")
    model = built_without_memory(WanTransformer3DModel.from_config, {"config": values}, shapes, owner, folder / "config.json")
    check_shapes(model, shapes, place(files, owner))
    read = open_tensors(files, owner)
    if dtype is None:
        dtype = read("proj_out.weight").dtype
        _check_dtype(dtype, place(files, owner))
    return load_wan(config, read, dtype, device)


def _check_dtype(dtype: torch.dtype | None, where: str) -> None:
    if dtype not in (None, *DTYPES):
        expected = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(f"{where}: expected {expected}, got {str(dtype).removeprefix('torch.')}")


def _boundary(folder: Path, owner: str) -> float | None:
    """Where the second of two experts begins, as a share of the timesteps; None for one transformer."""
    boundary, second = read_json(folder / "model_index.json", owner).get("boundary_ratio"), folder / "transformer_2"
    if (boundary is None) != (not second.is_dir()):
        got = "none" if boundary is None else f"{boundary} without that folder"
        raise ValueError(f"{owner}: model_index.json: boundary_ratio: expected one with a folder transformer_2, got {got}")
    if boundary is not None and not (isinstance(boundary, float) and 0 < boundary < 1):
        raise ValueError(f"{owner}: model_index.json: boundary_ratio: expected a number between 0 and 1, got {boundary!r}")
    return boundary


def _check_parts(folder: Path, config: DiTConfig, owner: str) -> None:
    """Raises FileNotFoundError for a part that is not there, before weights are read."""
    images = ("image_encoder/config.json", "image_processor/preprocessor_config.json") if config.image_dim else ()
    for path in ("scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json", *images):
        if not (folder / path).is_file():
            raise FileNotFoundError(f"{owner}: expected a folder with {path}, got {folder}")


def _dit_config(folder: Path, owner: str) -> DiTConfig:
    """config.json of a transformer, as that of a `DiT`."""
    return built(wan_config, {"values": _config(folder, owner), "owner": f"{owner}: {folder}"}, owner, folder / "config.json")


def _config(folder: Path, owner: str) -> dict[str, Any]:
    """config.json of a transformer, with diffusers' own values for what it does not say."""
    from diffusers import WanTransformer3DModel

    values = read_json(folder / "config.json", owner)
    if (kind := values.get("_class_name")) != "WanTransformer3DModel":
        raise ValueError(f"{owner}: {folder / 'config.json'}: _class_name: expected WanTransformer3DModel, got {kind}")
    parameters = inspect.signature(WanTransformer3DModel.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    return {**defaults, **{name: value for name, value in values.items() if name in defaults}}
