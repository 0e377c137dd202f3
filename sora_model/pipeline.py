"""From prompts and sizes to videos, in the manner of diffusers."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conditioning import TextEncoder
from .config import DiTConfig, Size
from .diffusion import Callback, guided, initial_noise, prediction_type, sample
from .dit import TIMESTEPS, DiT
from .text import WordEncoder
from .vae import Codec, PixelCodec


class SoraPipeline:
    """Text to video, image to video, extension and joining, many prompts of different sizes in one packed batch.

    >>> pipeline = SoraPipeline.from_pretrained("runs/shapes")
    >>> videos = pipeline(["a red circle moves right", "a blue square"], [(8, 32, 48), (1, 32, 32)], seeds=0)
    >>> [tuple(video.shape) for video in videos]
    [(3, 8, 32, 48), (3, 1, 32, 32)]
    >>> longer = pipeline(["a red circle moves right"], [(12, 32, 48)], given=[{0: videos[0][:, -4:]}])      # goes on from there

    Args:
        dit: with a text_dim, the text encoder's.
        text_encoder: captions -> PackedText.
        scheduler: any of diffusers' whose kind of prediction the model was trained for.
        codec: pixels <-> latents; default: latents are pixels.
    """

    def __init__(self, dit: DiT, text_encoder: TextEncoder, scheduler: Any, codec: Codec | None = None) -> None:
        self.dit, self.text_encoder, self.scheduler = dit, text_encoder, scheduler
        self.codec: Codec = PixelCodec() if codec is None else codec
        for what, wanted, got in (
            ("text_dim", text_encoder.dim, dit.config.text_dim),
            ("in_channels", self.codec.channels, dit.config.in_channels),
        ):
            if wanted != got:
                raise ValueError(f"SoraPipeline: dit.config.{what}: expected {wanted}, got {got}")
        kind, timesteps = prediction_type(scheduler), scheduler.config.num_train_timesteps
        if dit.config.prediction == "clean" and (kind, timesteps) != ("flow_prediction", TIMESTEPS):
            raise ValueError(
                f"SoraPipeline: scheduler: expected flow matching with {TIMESTEPS} timesteps, as dit.config.prediction is 'clean', "
                f"got {type(scheduler).__name__} of {kind} with {timesteps}"
            )

    @property
    def unit(self) -> Size:
        """Pixels along T, H and W per token; every size must be a multiple."""
        pt, ph, pw = self.dit.config.patch_size
        ct, ch, cw = self.codec.compression
        return pt * ct, ph * ch, pw * cw

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Size],
        *,
        given: Sequence[Mapping[int, Tensor] | None] | None = None,
        negative_prompts: Sequence[str] | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        seeds: int | Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> list[Tensor]:
        """Generates one video per prompt.

        Args:
            prompts: B captions.
            sizes: (T, H, W) in pixels of each.
            given: for each video, {first frame: clip [3, t, H, W]} to keep, or None: {0: image} animates an image, {0: start}
                extends a video, {0: start, -4: end} joins two (the end has 4 frames), {-4: end} leads up to one.
            negative_prompts: what guidance leads away from; default: empty captions.
            num_inference_steps: steps of the scheduler.
            guidance_scale: of classifier-free guidance; 1 is none.
            seeds: one per video, or one number: video i has seed + i. None is random. A video depends on its own seed alone.
            callback: called after each step with (step, timestep, latents).

        Returns:
            B videos [3, T, H, W] in [-1, 1].

        Raises:
            ValueError: numbers of prompts, sizes, ... that differ; a size or a given clip that does not fit whole patches.
        """
        samples = len(prompts)
        if seeds is None:
            seeds = int(torch.randint(2**31, ()))
        seeds = [seeds + i for i in range(samples)] if isinstance(seeds, int) else seeds
        for name, values in (("sizes", sizes), ("given", given), ("negative_prompts", negative_prompts), ("seeds", seeds)):
            if values is not None and len(values) != samples:
                raise ValueError(f"SoraPipeline: {name}: expected {samples}, one per prompt, got {len(values)}")
        device = self.dit.final.weight.device
        noise, generators = initial_noise([self._latent_shape(size) for size in sizes], seeds)
        noise = [x.to(device) for x in noise]
        kept = None
        if given is not None:
            kept = [self._place(clips or {}, size, x) for clips, size, x in zip(given, sizes, noise, strict=True)]
        text = self.text_encoder(list(prompts))
        null_text = self.text_encoder(list(negative_prompts or [""] * samples)) if guidance_scale != 1 else None
        latents = sample(
            guided(self.dit, text=text, null_text=null_text, guidance_scale=guidance_scale),
            self.scheduler,
            noise,
            num_inference_steps=num_inference_steps,
            given=kept,
            patch_frames=self.dit.config.patch_size[0],
            generators=generators,
            callback=callback,
        )
        return self.codec.decode(latents)

    def _latent_shape(self, size: Size) -> tuple[int, ...]:
        """[C, T, H, W] of the latent of a video of `size`."""
        if len(size) != 3 or any(n < 1 or n % u for n, u in zip(size, self.unit, strict=True)):
            made_of = f"patch_size {self.dit.config.patch_size} at compression {self.codec.compression}"
            raise ValueError(f"SoraPipeline: sizes: expected (T, H, W) divisible by {self.unit} ({made_of}), got {size}")
        return self.codec.channels, *(n // c for n, c in zip(size, self.codec.compression, strict=True))

    def _place(self, clips: Mapping[int, Tensor], size: Size, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mask [T] and latent of the frames that are given."""
        clean, mask = torch.zeros_like(like), torch.zeros(like.shape[1], dtype=torch.bool)
        frames, stride = size[0], self.codec.compression[0]
        for at, clip in clips.items():
            start = at + frames if at < 0 else at
            if clip.ndim != 4 or tuple(clip.shape[2:]) != tuple(size[1:]) or not 0 <= start <= frames - clip.shape[1]:
                raise ValueError(
                    f"SoraPipeline: given: expected clips [3, t, {size[1]}, {size[2]}] within {frames} frames, "
                    f"got {list(clip.shape)} at frame {at}"
                )
            if start % stride or clip.shape[1] % stride:
                raise ValueError(
                    f"SoraPipeline: given: expected multiples of {stride} frames (the codec's), got {clip.shape[1]} at {at}"
                )
            (latent,) = self.codec.encode([clip.to(like)])
            place = slice(start // stride, start // stride + latent.shape[1])
            clean[:, place], mask[place] = latent, True
        return mask, clean

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json, model.safetensors and the scheduler's config, complete or not at all.

        Everything is written to a folder next to `directory` first and then renamed. Only a `WordEncoder` can be saved so far.
        """
        if not isinstance(self.text_encoder, WordEncoder):
            kind = type(self.text_encoder).__name__
            raise TypeError(f"SoraPipeline.save_pretrained: text_encoder: expected a WordEncoder, got {kind}")
        target = Path(directory).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            weights = {f"dit.{name}": value for name, value in self.dit.state_dict().items()}
            weights |= {f"text_encoder.{name}": value for name, value in self.text_encoder.state_dict().items()}
            save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
            config = {"dit": self.dit.config.to_dict(), "text_encoder": self.text_encoder.config}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            self.scheduler.save_pretrained(folder / "scheduler")
            folder.chmod(0o755)  # mkdtemp's folders are private
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
                target.rename(old / target.name)
                folder.rename(target)
                shutil.rmtree(old)
            else:
                folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def from_preset(
        cls,
        model: str,
        *,
        patch: Size,
        prediction: str = "flow",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> SoraPipeline:
        """An untrained pipeline on pixels.

        >>> SoraPipeline.from_preset("tiny", patch=(1, 8, 8)).unit
        (1, 8, 8)

        Args:
            model: see `DiTConfig.preset`.
            patch: (pt, ph, pw) in pixels.
            prediction: "flow" matching, or DDPM's "epsilon" or "v".
            seed: of the weights.
            device: to put it on.
        """
        if prediction not in ("flow", "epsilon", "v"):
            raise ValueError(f"SoraPipeline.from_preset: prediction: expected flow, epsilon or v, got {prediction!r}")
        torch.manual_seed(seed)
        encoder = WordEncoder(dim=128)
        # Pixels in large patches: what the network can tell easily is the clean video, not the noise in it.
        output = "clean" if prediction == "flow" else "direct"
        config = DiTConfig.preset(model, patch=patch, in_channels=3, text_dim=encoder.dim, prediction=output)
        scheduler: Any
        if prediction == "flow":
            # Neighbouring pixels tell the same, so what a video shows is decided at high noise: Esser et al. (2024) shift by 3.
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            # Pixels are clipped to [-1, 1] while sampling; the zero-SNR end makes sampling start from what training saw.
            scheduler = diffusers.DDIMScheduler(
                prediction_type="v_prediction" if prediction == "v" else "epsilon",
                rescale_betas_zero_snr=prediction == "v",
                beta_schedule="squaredcos_cap_v2",
                timestep_spacing="trailing",
                clip_sample=True,
            )
        return cls(DiT(config).to(device), encoder.to(device), scheduler)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", codec: Codec | None = None
    ) -> SoraPipeline:
        """Reads what `save_pretrained` wrote."""
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"SoraPipeline.from_pretrained: expected a folder with config.json, got {folder}")
        config = json.loads((folder / "config.json").read_text())
        dit, text_encoder = DiT(DiTConfig.from_dict(config["dit"])), WordEncoder(**config["text_encoder"])
        weights = load_file(folder / "model.safetensors")
        for prefix, module in (("dit.", dit), ("text_encoder.", text_encoder)):
            state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            # assign: weights keep the dtype they were saved in.
            module.load_state_dict(state, assign=True)
            module.to(device).eval()
        name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
        scheduler = getattr(diffusers, name).from_pretrained(folder / "scheduler")
        return cls(dit, text_encoder, scheduler, codec)
