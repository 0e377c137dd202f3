"""What a pipeline is made of: `Parts`, and untrained ones from a preset."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from ..caption.captioner import Captioner
from ..codec.codec import Codec, PixelCodec
from ..codec.image_encoder import ImageEncoder
from ..model.conditioning import TextEncoder
from ..model.config import DiTConfig
from ..model.dit import DiT
from ..model.experts import Experts
from ..sizes import Size, Timing, whole_size
from ..storage.weights import read_shapes
from ..text.words import WordEncoder
from .keyframes import TrainedKeyframes

EMBEDDED = Path(__file__).parent.parent / "pretrained"  # the checkpoint that comes with the package
SIZE: Size = (6, 24, 24)


class Defaults(NamedTuple):
    """Of a call: what a checkpoint's makers recommend. See `SoraPipeline.__call__`; fps: frames per second of what is made."""

    num_inference_steps: int = 30
    guidance_scale: float = 3.0
    guidance_from: float = 0.6
    guidance_scale_2: float | None = None
    fps: float = 8.0


class Parts(NamedTuple):
    """The arguments of `SoraPipeline`."""

    dit: DiT | Experts
    text_encoder: TextEncoder
    scheduler: Any
    codec: Codec
    captioner: Captioner | None = None
    size: Size = SIZE
    defaults: Defaults = Defaults()
    trained_keyframes: TrainedKeyframes = TrainedKeyframes.ANY
    image_encoder: ImageEncoder | None = None


class Weights(NamedTuple):
    """Bytes of weights in memory: of the encoders of text and images, of each transformer, of VAE and captioner."""

    encoders: float
    transformers: tuple[float, ...]
    others: float


class Outline(NamedTuple):
    """What a checkpoint's configs and the headers of its files say of it, for which no weights are read.

    size: of a request without one. unit: pixels along T, H and W per token. timing: pixel frames per token frame. width: D.
    weights: in memory. weights_bf16: those with bf16 precision, None where that leaves them as they are. vae: class of the VAE;
    None if latents are pixels. defaults: of a call. trained_keyframes: see `SoraPipeline`. enlarged: times the pixels of `size`
    that frames of files may have, unless more are asked for.
    """

    size: Size
    unit: Size
    timing: Timing
    width: int
    weights: Weights
    weights_bf16: Weights | None = None
    vae: str | None = None
    defaults: Defaults = Defaults()
    trained_keyframes: TrainedKeyframes = TrainedKeyframes.ANY
    enlarged: float = 4.0

    def padded(self, size: Size) -> Size:
        """The next size of whole tokens."""
        return whole_size(size, self.unit, self.timing)


def bytes_in(folder: Path, itemsize: int | None = None) -> int:
    """Of the weights in a folder's files, but for those of a variant such as fp16; itemsize: of each, in place of their own."""
    files = sorted(path for path in folder.glob("*.safetensors") if "." not in path.stem and path.is_file())
    if itemsize is None:
        return sum(path.stat().st_size for path in files)
    return itemsize * sum(map(math.prod, read_shapes(files, "bytes_in").values()))


def token_unit(patch: Size, compression: Size) -> Size:
    """Pixels along T, H and W per token."""
    (pt, ph, pw), (ct, ch, cw) = patch, compression
    return pt * ct, ph * ch, pw * cw


def token_timing(patch: Size, compression: Size, causal: bool) -> Timing:
    """Pixel frames per token frame."""
    stride = patch[0] * compression[0]
    return Timing(1 + stride - compression[0] if causal else stride, stride)


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
