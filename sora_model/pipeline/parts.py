"""What a pipeline is made of: `Parts`, untrained from a preset, or from and to the folder of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from ..caption.captioner import Captioner
from ..codec.codec import Codec, PixelCodec
from ..codec.vae import VideoVAE
from ..diffusion.schedulers import load_scheduler
from ..model.conditioning import TextEncoder
from ..model.config import DiTConfig
from ..model.dit import DiT
from ..sizes import Size, Timing, whole_size
from ..storage.files import save_module, settle, whole_folder
from ..storage.weights import built, open_module, read_index, read_json
from ..text.pretrained import load_text_encoder
from ..text.words import WordEncoder

EMBEDDED = Path(__file__).parent.parent / "pretrained"  # the checkpoint that comes with the package
SIZE: Size = (6, 24, 24)


class Parts(NamedTuple):
    """The arguments of `SoraPipeline`."""

    dit: DiT
    text_encoder: TextEncoder
    scheduler: Any
    codec: Codec
    captioner: Captioner | None = None
    size: Size = SIZE


class Outline(NamedTuple):
    """What a checkpoint's configs say of it, for which no weights are read.

    size: of a request without one. unit: pixels along T, H and W per token. timing: pixel frames per token frame. width: D.
    weights: bytes in its files.
    """

    size: Size
    unit: Size
    timing: Timing
    width: int
    weights: int

    def padded(self, size: Size) -> Size:
        """The next size of whole tokens."""
        return whole_size(size, self.unit, self.timing)


def token_unit(patch: Size, compression: Size) -> Size:
    """Pixels along T, H and W per token."""
    (pt, ph, pw), (ct, ch, cw) = patch, compression
    return pt * ct, ph * ch, pw * cw


def token_timing(patch: Size, compression: Size, causal: bool) -> Timing:
    """Pixel frames per token frame."""
    stride = patch[0] * compression[0]
    return Timing(1 + stride - compression[0] if causal else stride, stride)


def read_outline(directory: str | Path) -> Outline:
    """Raises as `SoraPipeline.from_pretrained` does, but for weights."""
    folder, owner = Path(directory), "read_outline"
    index = read_index(folder, owner)
    config: Any = built(DiTConfig.from_dict, {"values": read_json(folder / "dit" / "config.json", owner)}, owner)
    compression = VideoVAE.read_compression(folder / "vae") if index["vae"] else PixelCodec.compression
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    timing = token_timing(config.patch_size, compression, causal=index["vae"])
    return Outline(tuple(index["size"]), token_unit(config.patch_size, compression), timing, config.hidden_size, weights)


def preset_parts(
    model: str,
    *,
    patch: Size,
    codec: Codec | None = None,
    text_encoder: TextEncoder | None = None,
    prediction: str = "flow",
    size: Size = SIZE,
    seed: int = 0,
) -> Parts:
    """Untrained parts; see `SoraPipeline.from_preset`."""
    if prediction not in ("flow", "epsilon", "v"):
        raise ValueError(f"SoraPipeline.from_preset: prediction: expected flow, epsilon or v, got {prediction!r}")
    codec = PixelCodec() if codec is None else codec
    # With large patches of pixels the network learns the clean video more easily than the noise in it.
    output = "clean" if prediction == "flow" else "direct"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: TextEncoder = WordEncoder(dim=128, buckets=2048) if text_encoder is None else text_encoder
        changes: dict[str, Any] = {"in_channels": codec.channels, "text_dim": encoder.dim, "prediction": output}
        dit = DiT(DiTConfig.preset(model, patch=patch, **changes))
    return Parts(dit, encoder, _scheduler(prediction, clip=isinstance(codec, PixelCodec)), codec, None, size)


def _scheduler(prediction: str, *, clip: bool) -> Any:
    if prediction == "flow":
        # Neighbouring pixels are alike, so what a video shows is decided at high noise: Esser et al. (2024) shift by 3.
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    # The zero-SNR end makes sampling start from what training saw.
    return diffusers.DDIMScheduler(
        prediction_type="v_prediction" if prediction == "v" else "epsilon",
        rescale_betas_zero_snr=prediction == "v",
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
        clip_sample=clip,  # pixels lie in [-1, 1]
    )


def load_parts(directory: str | Path) -> Parts:
    """The parts of a checkpoint; see `SoraPipeline.from_pretrained`."""
    folder, owner = Path(directory), "SoraPipeline.from_pretrained"
    settle(folder)
    index = read_index(folder, owner)
    config = read_json(folder / "dit" / "config.json", owner)
    dit = open_module(lambda: DiT(DiTConfig.from_dict(config)), config, folder / "dit", owner)
    scheduler = load_scheduler(folder / "scheduler", owner)
    codec = VideoVAE.from_pretrained(folder / "vae") if index["vae"] else PixelCodec()
    captioner = Captioner.from_pretrained(folder / "captioner") if index["captioner"] else None
    text_encoder = load_text_encoder(folder / "text_encoder")
    return Parts(dit, text_encoder, scheduler, codec, captioner, tuple(index["size"]))


def save_parts(parts: Parts, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes model_index.json and a folder for each part, all or nothing; see `SoraPipeline.save_pretrained`."""
    codec, captioner = parts.codec, parts.captioner
    if not isinstance(codec, PixelCodec | VideoVAE):
        raise TypeError(f"SoraPipeline.save_pretrained: codec: expected a PixelCodec or a VideoVAE, got {type(codec).__name__}")
    with whole_folder(directory) as folder:
        save_module(parts.dit, parts.dit.config.to_dict(), folder / "dit", dtype)
        parts.text_encoder.save_pretrained(folder / "text_encoder", dtype=dtype)
        parts.scheduler.save_pretrained(folder / "scheduler")
        if isinstance(codec, VideoVAE):
            codec.save_pretrained(folder / "vae", dtype=dtype)
        if captioner is not None:
            captioner.save_pretrained(folder / "captioner", dtype=dtype)
        present = {"vae": isinstance(codec, VideoVAE), "captioner": captioner is not None}
        index = {"_class_name": "SoraPipeline", "size": list(parts.size), **present}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
