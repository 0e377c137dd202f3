"""From requests to videos, in the manner of diffusers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .captioner import Captioner
from .checkpoint import save_module, settle, whole_folder
from .conditioning import TextEncoder
from .config import DiTConfig, Size
from .diffusion import Callback, guided, prediction_type, sample
from .dit import TIMESTEPS, DiT
from .pretrained_text import load_text_encoder
from .request import Request, Timing
from .schedulers import load_scheduler
from .text import WordEncoder
from .vae import Codec, PixelCodec, VideoVAE, held, latent_frames, latent_size
from .weights import open_module, read_index, read_json

Seeds = int | torch.Generator | Sequence[int | torch.Generator] | None
EMBEDDED = Path(__file__).parent / "pretrained"  # the checkpoint that comes with the package
OUTPUTS = ("pt", "np", "pil", "latent")


class SoraPipeline:
    """Many requests, of different tasks and sizes, in one packed batch.

    >>> pipeline = SoraPipeline.from_pretrained("runs/shapes")
    >>> videos = pipeline(["a red circle moves right", "a blue square"], [(13, 48, 80), (1, 64, 64)], generator=0)
    >>> [tuple(video.shape) for video in videos]
    [(3, 13, 48, 80), (3, 1, 64, 64)]
    >>> (longer,) = pipeline([extend("a red circle moves up", videos[0], 8, pipeline.timing)])            # [3, 21, 48, 80]

    Args:
        dit: with a text_dim, the text encoder's.
        text_encoder: captions -> PackedText.
        scheduler: any of diffusers' whose kind of prediction the model was trained for.
        codec: pixels <-> latents; default: latents are pixels.
        captioner: latents -> captions, short prompts -> long ones; may be None.
        size: (T, H, W) of a request that says none.
    """

    def __init__(
        self,
        dit: DiT,
        text_encoder: TextEncoder,
        scheduler: Any,
        codec: Codec | None = None,
        captioner: Captioner | None = None,
        *,
        size: Size = (6, 24, 24),
    ) -> None:
        self.dit, self.text_encoder, self.scheduler, self.size = dit, text_encoder, scheduler, size
        self.codec: Codec = PixelCodec() if codec is None else codec
        self.captioner = captioner
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

    def replaced(self, **parts: Any) -> SoraPipeline:
        """A pipeline with other parts, named as the arguments are; it shares the rest."""
        own = {name: getattr(self, name) for name in ("dit", "text_encoder", "scheduler", "codec", "captioner", "size")}
        return SoraPipeline(**{**own, **parts})

    def with_scheduler(self, scheduler: Any) -> SoraPipeline:
        """The same pipeline, sharing everything else, with another scheduler; it must want the same kind of prediction."""
        kinds = prediction_type(self.scheduler), prediction_type(scheduler)
        if kinds[0] != kinds[1]:
            raise ValueError(f"SoraPipeline.with_scheduler: scheduler: expected one of {kinds[0]}, got {kinds[1]}")
        return self.replaced(scheduler=scheduler)

    @property
    def unit(self) -> Size:
        """Pixels along T, H and W per token."""
        pt, ph, pw = self.dit.config.patch_size
        ct, ch, cw = self.codec.compression
        return pt * ct, ph * ch, pw * cw

    @property
    def timing(self) -> Timing:
        """Pixel frames per token frame."""
        grain = self.unit[0]
        return Timing(1 + grain - self.codec.compression[0] if self.codec.causal else grain, grain)

    @torch.no_grad()
    def __call__(
        self,
        requests: str | Request | Sequence[str | Request],
        size: Size | Sequence[Size] | None = None,
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 3.0,
        guidance_from: float = 0.6,
        generator: Seeds = None,
        callback: Callback | None = None,
        output_type: str = "pt",
        precision: str = "no",
    ) -> list[Any]:
        """Generates one video per request.

        A size may be any: what is made is the next larger one of whole tokens, and what is over is cut off below, to the right and
        at the end.

        Args:
            requests: B of them, or one; a string is a prompt of text to video.
            size: (T, H, W) in pixels of the strings, one for all or one each; default: the pipeline's. Requests have their own.
            num_inference_steps: steps of the scheduler.
            guidance_scale: of classifier-free guidance; 1 is none.
            guidance_from: where guidance ends, as a share of the scheduler's timesteps: 0 guides every step. See `guided`.
            generator: a seed or a torch.Generator on the host for each request that has no seed, or one seed: request i has
                that + i; or one Generator for all. None is random. A video depends on its own seed alone.
            callback: called after each step with (step, timestep, latents).
            output_type: "pt": [3, T, H, W] in [-1, 1]; "np": float32 [T, H, W, 3] in [0, 1]; "pil": a list of T images; "latent":
                [C, T', H', W'] as the model made it.
            precision: "no", or "bf16": the transformer computes in bfloat16, latents and VAE stay in float32.

        Returns:
            B videos.

        Raises:
            ValueError: numbers of requests, sizes and seeds that differ; given frames that are not whole token frames.
        """
        if precision not in ("no", "bf16"):
            raise ValueError(f"SoraPipeline: precision: expected 'no' or 'bf16', got {precision!r}")
        if num_inference_steps < 1:
            raise ValueError(f"SoraPipeline: num_inference_steps: expected at least 1, got {num_inference_steps}")
        if not 0 <= guidance_from <= 1:
            raise ValueError(f"SoraPipeline: guidance_from: expected a number from 0 to 1, got {guidance_from}")
        if output_type not in OUTPUTS:
            raise ValueError(f"SoraPipeline: output_type: expected one of {', '.join(OUTPUTS)}, got {output_type!r}")
        wanted = self._requests([requests] if isinstance(requests, str | Request) else list(requests), size)
        unused = next((request.negative_prompt for request in wanted if request.negative_prompt), "")
        if guidance_scale == 1 and unused:
            raise ValueError(
                f"SoraPipeline: negative_prompt: expected none with guidance_scale 1, which has no use for it, got {unused!r}"
            )
        shapes = [self._latent_shape(request) for request in wanted]
        generators = self._generators(generator, wanted)
        device = self.dit.final.weight.device
        noise = [torch.randn(shape, generator=g).to(device) for shape, g in zip(shapes, generators, strict=True)]
        kept = [self._given(request, x) for request, x in zip(wanted, noise, strict=True)]
        begin = [self._begin(request, x) for request, x in zip(wanted, noise, strict=True)]
        steps = [request.frame_step for request in wanted]
        if self.codec.compression[0] > 1 and any(step != 1 for step in steps):
            raise ValueError(f"SoraPipeline: frame_step: expected 1, as the VAE compresses time, got {steps}")
        text = self.text_encoder([request.prompt for request in wanted])
        null_text = self.text_encoder([request.negative_prompt for request in wanted]) if guidance_scale != 1 else None
        guidance = {"guidance_scale": guidance_scale, "guidance_from": guidance_from * self.scheduler.config.num_train_timesteps}
        denoise = guided(self.dit, text=text, null_text=null_text, frame_steps=steps, **guidance)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            latents = sample(
                denoise,
                self.scheduler,
                noise,
                num_inference_steps=num_inference_steps,
                given=kept if any(mask.any() for mask, _ in kept) else None,
                begin=begin,
                patch_frames=self.dit.config.patch_size[0],
                generators=generators,
                callback=callback,
            )
        if output_type == "latent":
            return latents
        videos = []
        for request, video in zip(wanted, self.codec.decode(latents), strict=True):
            frames, height, width = request.size
            videos.append(request.finish(video[:, :frames, :height, :width]))
        return [_converted(video, output_type) for video in videos]

    def caption(self, videos: Sequence[Tensor], *, detailed: bool = True) -> list[str]:
        """What the captioner sees in videos [3, T, H, W] of any sizes."""
        padded = []
        for video in videos:
            frames, height, width = video.shape[1:]
            padded.append(_pad(video, self._padded((frames, height, width))))
        return self._captioner().caption(self.codec.encode(padded), detailed=detailed)

    def expand(self, prompts: Sequence[str]) -> list[str]:
        """A long and detailed prompt for each short one."""
        return self._captioner().expand(prompts)

    def _captioner(self) -> Captioner:
        if self.captioner is None:
            raise ValueError("SoraPipeline: captioner: expected a checkpoint with a captioner, got one without")
        return self.captioner

    def _requests(self, requests: list[str | Request], size: Size | Sequence[Size] | None) -> list[Request]:
        if not requests:
            raise ValueError("SoraPipeline: requests: expected at least one, got none")
        for request in requests:
            if not isinstance(request, str | Request):
                raise TypeError(f"SoraPipeline: requests: expected prompts and Requests, got {request!r}")
        sizes: list[Any] = [self.size if size is None else size] * len(requests)
        if size is not None and isinstance(size[0], Sequence):
            if len(size) != len(requests):
                raise ValueError(f"SoraPipeline: size: expected one (T, H, W) or {len(requests)}, one per request, got {len(size)}")
            sizes = list(size)
        for one in sizes:
            if isinstance(one, str):
                raise TypeError(f"SoraPipeline: size: expected (T, H, W), got {one!r}")
        pairs = zip(requests, sizes, strict=True)
        return [Request(request, tuple(one)) if isinstance(request, str) else request for request, one in pairs]

    def _generators(self, generator: Seeds, requests: list[Request]) -> list[torch.Generator]:
        """One per request, on the host: a sample starts from the same noise on every device, alone or packed with others."""
        sources: list[Any]
        if generator is None:
            generator = int(torch.randint(2**31, ()))
        if isinstance(generator, Integral) and not isinstance(generator, bool):
            sources = [int(generator) + i for i in range(len(requests))]
        elif isinstance(generator, torch.Generator):
            sources = [generator] * len(requests)
        elif isinstance(generator, Sequence) and all(isinstance(one, Integral | torch.Generator) for one in generator):
            sources = list(generator)
        else:
            raise TypeError(f"SoraPipeline: generator: expected a seed or a torch.Generator, or one per request, got {generator!r}")
        if len(sources) != len(requests):
            raise ValueError(f"SoraPipeline: generator: expected {len(requests)}, one per request, got {len(sources)}")
        drawn: list[Any] = [
            source if request.seed is None else request.seed for source, request in zip(sources, requests, strict=True)
        ]
        return [torch.Generator().manual_seed(int(one)) if isinstance(one, Integral) else one for one in drawn]

    def _padded(self, size: Size) -> Size:
        """The next size of whole tokens."""
        _, uh, uw = self.unit
        return self.timing.whole(size[0]), -(-size[1] // uh) * uh, -(-size[2] // uw) * uw

    def _latent_shape(self, request: Request) -> tuple[int, ...]:
        return self.codec.channels, *latent_size(self.codec, self._padded(request.size))

    def _begin(self, request: Request, like: Tensor) -> tuple[Tensor, float] | None:
        if request.begin is None:
            return None
        (latent,) = self.codec.encode([_pad(request.begin.to(like), self._padded(request.size))])
        return latent, request.strength

    def _given(self, request: Request, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mask [T'] and latent of the frames that are given."""
        padded = self._padded(request.size)
        video, known = torch.zeros(3, *padded, device=like.device), torch.zeros(padded[0], dtype=torch.bool)
        for at, clip in request.given.items():
            start = at + request.size[0] if at < 0 else at
            place = slice(start, start + clip.shape[1])
            video[:, place], known[place] = _pad(clip.to(video), (clip.shape[1], *padded[1:])), True
        mask = latent_frames(self.codec, known)
        if not known.any():
            return mask, torch.zeros_like(like)
        lead, grain = self.timing
        tokens = torch.cat([known[:lead].all()[None], known[lead:].unflatten(0, (-1, grain)).all(1)])
        if not torch.equal(torch.cat([tokens[:1].repeat(lead), tokens[1:].repeat_interleave(grain)]), known):
            lengths = {at: clip.shape[1] for at, clip in request.given.items()}
            raise ValueError(
                f"SoraPipeline: given: expected whole token frames, the first {lead} and then {grain} at a time, "
                f"got clips of frames {lengths} in {padded[0]}"
            )
        (latent,) = self.codec.encode([held(video, known)])
        return mask, latent

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes model_index.json and a folder for each part, all or nothing.

        dtype: of the weights in the files; default: what they are.
        """
        if not isinstance(self.codec, PixelCodec | VideoVAE):
            kind = type(self.codec).__name__
            raise TypeError(f"SoraPipeline.save_pretrained: codec: expected a PixelCodec or a VideoVAE, got {kind}")
        with whole_folder(directory) as folder:
            save_module(self.dit, self.dit.config.to_dict(), folder / "dit", dtype)
            self.text_encoder.save_pretrained(folder / "text_encoder", dtype=dtype)
            self.scheduler.save_pretrained(folder / "scheduler")
            if isinstance(self.codec, VideoVAE):
                self.codec.save_pretrained(folder / "vae", dtype=dtype)
            if self.captioner is not None:
                self.captioner.save_pretrained(folder / "captioner", dtype=dtype)
            parts = {"vae": isinstance(self.codec, VideoVAE), "captioner": self.captioner is not None}
            index = {"_class_name": "SoraPipeline", "size": list(self.size), **parts}
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_preset(
        cls,
        model: str,
        *,
        patch: Size,
        codec: Codec | None = None,
        text_encoder: TextEncoder | None = None,
        prediction: str = "flow",
        size: Size = (6, 24, 24),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> SoraPipeline:
        """An untrained pipeline.

        >>> SoraPipeline.from_preset("tiny", patch=(1, 8, 8)).unit
        (1, 8, 8)

        Args:
            model: see `DiTConfig.preset`.
            patch: (pt, ph, pw) in latent positions, which are pixels without a codec.
            codec: pixels <-> latents.
            text_encoder: default: a `WordEncoder`, trained with the model.
            prediction: "flow" matching, or DDPM's "epsilon" or "v".
            size: see `SoraPipeline`.
            seed: of the weights.
            device: to put everything on.
        """
        if prediction not in ("flow", "epsilon", "v"):
            raise ValueError(f"SoraPipeline.from_preset: prediction: expected flow, epsilon or v, got {prediction!r}")
        codec = PixelCodec() if codec is None else codec
        # Large patches of pixels: what the network can tell easily is the clean video, not the noise in it.
        output = "clean" if prediction == "flow" else "direct"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder: TextEncoder = WordEncoder(dim=128, buckets=2048) if text_encoder is None else text_encoder
            changes: dict[str, Any] = {"in_channels": codec.channels, "text_dim": encoder.dim, "prediction": output}
            dit = DiT(DiTConfig.preset(model, patch=patch, **changes))
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
                clip_sample=isinstance(codec, PixelCodec),
            )
        return cls(dit, encoder, scheduler, codec, size=size).to(device)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: torch.device | str = "cpu") -> SoraPipeline:
        """Reads what `save_pretrained` wrote, in float32; a write that was killed is first ended (`settle`).

        Raises:
            FileNotFoundError: a folder without a pipeline in it. ValueError: files that are broken or do not fit together.
        """
        folder, owner = Path(directory), "SoraPipeline.from_pretrained"
        settle(folder)
        index = read_index(folder, owner)
        config = read_json(folder / "dit" / "config.json", owner)
        dit = open_module(lambda: DiT(DiTConfig.from_dict(config)), config, folder / "dit", owner)
        scheduler = load_scheduler(folder / "scheduler", owner)
        codec = VideoVAE.from_pretrained(folder / "vae") if index["vae"] else None
        captioner = Captioner.from_pretrained(folder / "captioner") if index["captioner"] else None
        text_encoder = load_text_encoder(folder / "text_encoder")
        return cls(dit, text_encoder, scheduler, codec, captioner, size=tuple(index["size"])).eval().to(device)

    def eval(self) -> SoraPipeline:
        """Everything in evaluation mode, in place."""
        for part in self._modules():
            part.eval()
        return self

    def to(self, device: torch.device | str) -> SoraPipeline:
        """Everything moved to a device, in place."""
        for part in self._modules():
            part.to(device)
        return self

    def _modules(self) -> list[torch.nn.Module]:
        return [part for part in (self.dit, self.text_encoder, self.codec, self.captioner) if isinstance(part, torch.nn.Module)]


def _pad(video: Tensor, size: Size) -> Tensor:
    """A video [3, T, H, W] made larger below, to the right and at the end, by repeating its border."""
    (t, h, w), (frames, height, width) = video.shape[1:], size
    return F.pad(video[None], (0, width - w, 0, height - h, 0, frames - t), mode="replicate")[0]


def _converted(video: Tensor, output_type: str) -> Any:
    """[3, T, H, W] in [-1, 1] as "pt", "np" or "pil"."""
    if output_type == "pt":
        return video
    frames = ((video + 1) / 2).permute(1, 2, 3, 0).float().cpu().numpy()
    if output_type == "np":
        return frames
    return [Image.fromarray(frame) for frame in (frames * 255).round().astype(np.uint8)]
