"""diffusers' causal video VAEs as a codec: `VideoVAE`.

A causal video VAE codes the first frame alone and then `ct` frames at a time, so an image is a video of one frame, and a video of
T' latent frames has 1 + ct (T' - 1) frames. Latents of a start do not change when the video goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..sizes import Size
from ..storage.files import settle
from ..storage.weights import built, built_without_memory, check_depth, open_module, read_json, read_shapes, weight_files
from .codec import Progress, latent_size
from .tiles import AT_ONCE, OVERLAP, TILE, Watch, by_size, ramp, tile_starts

# Causal video VAEs of diffusers. Each is used as it is; what differs is where its config says how much it compresses. The norms of
# CogVideoX's and HunyuanVideo's run over a whole clip, so latents of a start change a little when the clip goes on.
CLASSES = (
    "AutoencoderKLCogVideoX",
    "AutoencoderKLCosmos",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi",
    "AutoencoderKLWan",
)
WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls the file
COMPRESSION = 128  # the most along an axis
DECODE_SEED = 2**40  # of noise before decoding, which no request starts from by accident


class VideoVAE(nn.Module):
    """One of diffusers' causal video VAEs as a `Codec`; see `CLASSES`.

    >>> from sora_model.pipeline.parts import EMBEDDED
    >>> vae = VideoVAE.from_pretrained(EMBEDDED / "vae")
    >>> [tuple(x.shape) for x in vae.encode([torch.zeros(3, 13, 48, 80), torch.zeros(3, 1, 64, 64)])]
    [(16, 4, 6, 10), (16, 1, 8, 8)]

    Frames larger than a tile of 512 x 512 pixels are coded tile by tile, overlapping by 64, and blended, so that memory does
    not grow with the frame. Latents are the posterior's mean, normalised by the checkpoint's own mean and deviation.

    Args:
        model: the VAE of diffusers.
        tile: side of a tile in pixels; a multiple of the spatial compression.
        decode_timestep, decode_noise_scale: of LTX's decoders that take noise off, from 0.9.1 on: the timestep, and the share of
            noise that a latent gets before; default: 0.05 and 0.025. The noise is the same for every latent of a size. They are
            not saved.
    """

    channels: int
    compression: tuple[int, int, int]
    causal: bool
    mean: Tensor
    std: Tensor

    def __init__(
        self, model: Any, *, tile: int = TILE, decode_timestep: float | None = None, decode_noise_scale: float | None = None
    ) -> None:
        super().__init__()
        config: Any = model.config
        name = type(model).__name__
        if name not in CLASSES:
            raise ValueError(f"VideoVAE: model: expected one of {', '.join(CLASSES)}, got {name}")
        self.model: Any = model
        self.tile, self.causal = tile, True
        ct, ch = _compression(model)
        self.compression = (ct, ch, ch)
        if tile % ch or tile < 2 * OVERLAP:
            raise ValueError(f"VideoVAE: tile: expected a multiple of {ch} from {2 * OVERLAP} on, got {tile}")
        self.takes_time = bool(config.get("timestep_conditioning"))
        for option, value in (("decode_timestep", decode_timestep), ("decode_noise_scale", decode_noise_scale)):
            if value is not None and not (self.takes_time and 0 <= value <= 1):
                expected = "a number from 0 to 1" if self.takes_time else "None for a decoder that takes no noise off"
                raise ValueError(f"VideoVAE: {option}: expected {expected}, got {value}")
        self.decode_timestep = 0.05 if decode_timestep is None else decode_timestep
        self.decode_noise_scale = (0.025 if decode_noise_scale is None else decode_noise_scale) if self.takes_time else 0.0
        self.channels = config.get("z_dim") or config["latent_channels"]
        mean, std = _statistics(model, self.channels)
        self.register_buffer("mean", mean.view(self.channels, -1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(self.channels, -1, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> VideoVAE:
        """Reads a checkpoint of diffusers from a local folder, in float32; a write that was killed is first ended (`settle`).

        options: see `VideoVAE`.

        Raises:
            FileNotFoundError: no config.json or no safetensors there.
            ValueError: a class that is not in `CLASSES`; weights that are broken, missing, left over or not finite.
        """
        folder, owner = Path(folder), "VideoVAE.from_pretrained"
        settle(folder)
        kind, config = _read_kind(folder, owner)
        cls.read_compression(folder, owner, options.get("tile", TILE))
        model = open_module(lambda: kind.from_config(config), config, folder, owner, WEIGHTS)
        model.eval()
        try:
            return cls(model, **options)
        except (TypeError, RuntimeError, KeyError, ZeroDivisionError, OverflowError) as error:  # of numbers in the config
            raise ValueError(f"{owner}: {folder / 'config.json'}: {error}") from None

    @staticmethod
    def read_compression(folder: str | Path, owner: str = "VideoVAE.read_compression", tile: int = TILE) -> Size:
        """`compression` of a checkpoint, for which no weights are read.

        Raises as `from_pretrained` does with this `tile`. owner: for errors.
        """
        folder = Path(folder)
        kind, config = _read_kind(folder, owner)
        shapes, path = read_shapes(weight_files(folder, WEIGHTS, owner), owner), folder / "config.json"
        check_depth(config, shapes, f"{owner}: {path}")
        model = built_without_memory(kind.from_config, {"config": config}, shapes, owner, path)
        vae: VideoVAE = built(lambda: VideoVAE(model.eval(), tile=tile), {}, owner, path)
        _check_sizes(vae, f"{owner}: {path}")
        return vae.compression

    @classmethod
    def small(
        cls,
        *,
        latent_channels: int = 16,
        channels: tuple[int, ...] | None = None,
        temporal: int = 4,
        spatial: int = 8,
    ) -> VideoVAE:
        """An untrained VAE that a CPU can train: Cosmos' (NVIDIA, 2025), whose convolutions work on 4x4x4 patches.

        2.7 million weights as it is. channels: widths from the patches inwards; default: 64, and 96 for all others.
        """
        import diffusers

        for name, value, known in (("temporal", temporal, (4, 8)), ("spatial", spatial, (8, 16))):
            if value not in known:
                raise ValueError(f"VideoVAE.small: {name}: expected {known[0]} or {known[1]}, got {value}")
        # The last two levels never halve anything, and the decoder doubles time from its second level on.
        levels = 4 if temporal == 8 or spatial == 16 else 3
        channels = (64, *[96] * (levels - 1)) if channels is None else channels
        if len(channels) < levels:
            raise ValueError(f"VideoVAE.small: channels: expected {levels} widths or more for this compression, got {channels}")
        model = diffusers.AutoencoderKLCosmos(
            latent_channels=latent_channels,
            encoder_block_out_channels=channels,
            decode_block_out_channels=channels,
            attention_resolutions=(),
            num_layers=1,
            patch_size=4,
            patch_type="rearrange",
            spatial_compression_ratio=spatial,
            temporal_compression_ratio=temporal,
            latents_mean=[0.0] * latent_channels,
            latents_std=[1.0] * latent_channels,
        )
        return cls(model)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes the checkpoint as diffusers does, in `dtype` if one is given."""
        # Not by the model's own `to`, which warns of modules that should stay in float32 even where it has none.
        model = self.model if dtype is None else nn.Module.to(copy.deepcopy(self.model), dtype)
        model.save_pretrained(folder)

    def normalize_latents(self, mean: Tensor, std: Tensor) -> None:
        """Sets the latents' mean and standard deviation [C] where the model keeps them; HunyuanVideo's has one scale for all."""
        model, buffers = self.model, dict(self.model.named_buffers())
        if "latents_std" in buffers:  # LTX
            buffers["latents_mean"].copy_(mean)
            buffers["latents_std"].copy_(std * model.config.scaling_factor)
        elif "latents_std" in model.config:
            model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        else:
            model.register_to_config(scaling_factor=float((mean.square() + std.square()).mean().rsqrt()))
        mean, std = _statistics(model, self.channels)
        self.mean, self.std = (x.view(self.channels, -1, 1, 1).to(self.mean) for x in (mean, std))

    @torch.no_grad()
    def encode(self, videos: Sequence[Tensor], *, progress: Progress | None = None) -> list[Tensor]:
        for video in videos:
            latent_size(self, _size(video))
        watch = Watch(videos, self.tile, OVERLAP, progress)

        def encode(batch: Tensor) -> Tensor:
            latents = self._tiled(batch.to(self.mean), self.raw_latents, self.compression[1], 1, watch)
            return (latents - self._of_frames(self.mean, latents)) / self._of_frames(self.std, latents)

        return by_size(videos, encode, AT_ONCE)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor], *, progress: Progress | None = None) -> list[Tensor]:
        ct, ch, cw = self.compression
        watch = Watch(latents, self.tile // ch, OVERLAP // ch, progress)

        def decode(batch: Tensor) -> Tensor:
            batch = batch * self._of_frames(self.std, batch) + self._of_frames(self.mean, batch)
            if self.decode_noise_scale:
                noise = torch.randn(batch.shape[1:], generator=torch.Generator().manual_seed(DECODE_SEED)).to(batch)
                batch = torch.lerp(batch, noise.expand_as(batch), self.decode_noise_scale)
            return self._tiled(batch, self.from_raw, 1, ch, watch).clamp(-1, 1)

        return by_size(latents, decode, AT_ONCE * self.channels // (3 * ct * ch * cw))

    def _of_frames(self, statistic: Tensor, latents: Tensor) -> Tensor:
        """A statistic [C, 1 or F, 1, 1] for latents [B, C, T', H', W']; NVIDIA's Cosmos has one per frame, the last for more."""
        frames = torch.arange(latents.shape[2], device=statistic.device).clamp(max=statistic.shape[1] - 1)
        return statistic[:, frames]

    def raw_latents(self, videos: Tensor) -> Tensor:
        """Latents [B, C, T', H', W'] of videos of one size, not normalised, whole."""
        return torch.cat([self.model.encode(part).latent_dist.mode() for part in self._parts(videos)])

    def from_raw(self, latents: Tensor) -> Tensor:
        """Videos [B, 3, T, H, W] of latents of one size that are not normalised, whole."""
        frames = 1 + self.compression[0] * (latents.shape[2] - 1)
        if type(self.model).__name__ == "AutoencoderKLCogVideoX" and latents.shape[2] % 2 == 0:
            # It decodes two latent frames at a time, and an even number of them to too many frames.
            latents = torch.cat([latents, latents[:, :, -1:]], dim=2)
        video = torch.cat([self._decode(part)[:, :, :frames] for part in self._parts(latents)])
        if video.shape[2] != frames:
            expected = f"a model that decodes {latents.shape[2]} latent frames to {frames}, by its config"
            raise ValueError(f"VideoVAE: {type(self.model).__name__}: expected {expected}, got {video.shape[2]}")
        return video

    def _decode(self, part: Tensor) -> Tensor:
        if not self.takes_time:
            return self.model.decode(part).sample
        times = part.new_full((len(part),), self.decode_timestep)
        with torch.random.fork_rng([part.device] if part.is_cuda else []):  # blocks of LTX's decoder may draw noise
            generator = torch.cuda.default_generators[part.device.index] if part.is_cuda else torch.default_generator
            generator.manual_seed(0)  # torch.manual_seed would be that of all GPUs
            return self.model.decode(part, times).sample

    def _parts(self, batch: Tensor) -> Sequence[Tensor]:
        """What the model takes at once: diffusers' HunyuanVideo-1.5 fails on more than one sample in the mask of its attention."""
        return batch.split(1) if type(self.model).__name__ == "AutoencoderKLHunyuanVideo15" else [batch]

    def _tiled(self, x: Tensor, code: Callable[[Tensor], Tensor], down: int, up: int, watch: Watch) -> Tensor:
        """code(x) of [B, C, T, H, W], a tile of H and W at a time where they are larger; sizes change by up / down."""
        scale = self.compression[1] // down  # pixels per position of x
        tile, overlap = self.tile // scale, OVERLAP // scale
        height, width = x.shape[3:]
        if height <= tile and width <= tile:
            coded = code(x)
            watch(x)
            return coded
        total = weights = torch.zeros(())
        for top in tile_starts(height, tile, overlap):
            for left in tile_starts(width, tile, overlap):
                piece = x[..., top : top + tile, left : left + tile]
                part = code(piece)
                watch(piece)
                if total.ndim == 0:
                    total = part.new_zeros(*part.shape[:3], height * up // down, width * up // down)
                    weights = part.new_zeros(total.shape[3:])
                y, h = top * up // down, part.shape[3]
                z, w = left * up // down, part.shape[4]
                weight = (ramp(h, overlap * up // down)[:, None] * ramp(w, overlap * up // down)).to(part)
                total[..., y : y + h, z : z + w] += part * weight
                weights[y : y + h, z : z + w] += weight
        return total.div_(weights)


def _read_kind(folder: Path, owner: str) -> tuple[Any, dict[str, Any]]:
    """The class that a checkpoint's config names, one of `CLASSES`, and the config."""
    import diffusers

    config = read_json(folder / "config.json", owner)
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{owner}: {folder / 'config.json'}: expected _class_name out of {', '.join(CLASSES)}, got {name}")
    return getattr(diffusers, name), config


def _compression(model: Any) -> tuple[int, int]:
    """Frames and pixels along a side per latent position."""
    config = model.config
    ct = config.get("temporal_compression_ratio") or config.get("scale_factor_temporal")
    ch = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    ct = ct or getattr(model, "temporal_compression_ratio", None)
    ch = ch or getattr(model, "spatial_compression_ratio", None)
    if ch is None:  # CogVideoX says it by its blocks
        ch = 2 ** (len(config["block_out_channels"]) - 1)
    for name, value in (("temporal", ct), ("spatial", ch)):
        if type(value) is not int or not 1 <= value <= COMPRESSION:
            raise ValueError(f"VideoVAE: model: expected a {name} compression from 1 to {COMPRESSION}, got {value!r}")
    return ct, ch  # type: ignore[return-value]


def _check_sizes(vae: VideoVAE, where: str) -> None:
    """Raises ValueError where latents and videos have other sizes than the config says, of an image or of a short clip.

    vae: on the device "meta", where nothing is computed. Two latent positions a side, as padding by reflection takes them.
    """
    ct, side, _ = vae.compression
    for frames, latents in ((1, 1), (1 + ct, 2)):
        video, latent = (1, 3, frames, 2 * side, 2 * side), (1, vae.channels, latents, 2, 2)
        for made, given, code in ((latent, video, vae.raw_latents), (video, latent, vae.from_raw)):
            expected = f"{where}: expected a VAE that makes {list(made[1:])} of {list(given[1:])}"
            try:
                got = code(torch.zeros(given, device="meta")).shape
            except Exception as error:  # of any kind, as numbers in the config are not the model's
                raise ValueError(f"{expected}, got {str(error) or type(error).__name__}") from None
            if got != made:
                raise ValueError(f"{expected}, got {list(got[1:])}")


def _statistics(model: Any, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents [C], or [C * F] where frames have their own, as the checkpoint has them."""
    mean, std = _told_statistics(model, channels)
    for name, x in (("latents_mean or shift_factor", mean), ("latents_std or scaling_factor", std)):
        if x.ndim != 1 or not x.numel() or x.numel() % channels:
            got = f"shape {list(x.shape)}"
            raise ValueError(f"VideoVAE: model: {name}: expected {channels} numbers, or as many for each frame, got {got}")
        wrong = x[~x.isfinite() | ((x <= 0) & (x is std))] if not x.is_meta else x[:0]
        if wrong.numel():
            expected = "finite numbers above 0" if x is std else "finite numbers"
            raise ValueError(f"VideoVAE: model: {name}: expected {expected}, got {wrong[0].item():.3g}")
    return mean, std


def _told_statistics(model: Any, channels: int) -> tuple[Tensor, Tensor]:
    """By the config, or else by buffers, or by one number for all channels."""
    config = model.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return torch.tensor(config["latents_mean"]).float(), torch.tensor(config["latents_std"]).float()
    buffers = dict(model.named_buffers())
    if "latents_mean" in buffers:  # LTX
        return buffers["latents_mean"].float().clone(), buffers["latents_std"].float().clone() / config["scaling_factor"]
    shift = config.get("shift_factor") or 0.0
    return torch.full((channels,), float(shift)), torch.full((channels,), 1 / float(config.get("scaling_factor") or 1.0))


def _size(video: Tensor) -> Size:
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"VideoVAE: videos: expected [3, T, H, W], got {list(video.shape)}")
    frames, height, width = video.shape[1:]
    return frames, height, width
