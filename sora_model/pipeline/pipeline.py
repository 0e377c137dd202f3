"""From requests to videos, in the manner of diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..caption.captioner import Captioner
from ..codec.codec import Codec, PixelCodec, latent_size
from ..codec.image_encoder import ImageEncoder
from ..diffusion.guidance import guided
from ..diffusion.noise import prediction_type
from ..diffusion.sampling import Callback, sample
from ..model.block import Window
from ..model.conditioning import TextEncoder
from ..model.dit import TIMESTEPS, DiT
from ..model.experts import Experts
from ..model.step_cache import StepCache, fresh
from ..sizes import Size, Timing, whole_size
from .checkpoint import load_parts, save_parts
from .clips import converted, pad
from .inputs import Seeds, as_generators, as_requests, check_options
from .keyframes import (
    Encoded,
    TrainedKeyframes,
    check_any_keyframes,
    check_condition,
    check_keyframes,
    clean_frames,
    condition,
    init_latent,
    known_keyframes,
    shown_images,
)
from .offload import execution_device, is_offloaded, put_in_turn
from .parts import EMBEDDED, SIZE, Defaults, Parts, preset_parts, token_timing, token_unit
from .request import Request

Progress = Callable[[str, int, int], None]


class SoraPipeline:
    """Many requests, of different tasks and sizes, in one packed batch.

    >>> from sora_model import SoraPipeline, extend
    >>> pipeline = SoraPipeline.from_pretrained()
    >>> videos = pipeline(["a red circle moves right", "a blue square"], [(13, 48, 80), (1, 64, 64)], generator=0)
    >>> [tuple(video.shape) for video in videos]
    [(3, 13, 48, 80), (3, 1, 64, 64)]
    >>> (longer,) = pipeline([extend("a red circle moves up", videos[0], 8, pipeline.timing)])            # [3, 21, 48, 80]

    Args:
        dit: with a text_dim, the text encoder's; or two of them, as `Experts`.
        text_encoder: captions -> PackedText.
        scheduler: any of diffusers' whose kind of prediction the model was trained for.
        codec: pixels <-> latents; default: latents are pixels.
        captioner: latents -> captions, short prompts -> long ones; may be None.
        size: (T, H, W) of a request without one.
        defaults: of a call.
        trained_keyframes: which keyframes the transformer was trained with, one of `TrainedKeyframes`; others are refused.
        image_encoder: CLIP, for a transformer with an image_dim.
    """

    def __init__(
        self,
        dit: DiT | Experts,
        text_encoder: TextEncoder,
        scheduler: Any,
        codec: Codec | None = None,
        captioner: Captioner | None = None,
        *,
        size: Size = SIZE,
        defaults: Defaults = Defaults(),  # noqa: B008
        trained_keyframes: TrainedKeyframes | str = TrainedKeyframes.ANY,
        image_encoder: ImageEncoder | None = None,
    ) -> None:
        self.dit: Any = dit
        self.text_encoder, self.scheduler, self.size = text_encoder, scheduler, size
        self.defaults, self.trained_keyframes, self.image_encoder = defaults, known_keyframes(trained_keyframes), image_encoder
        self.codec: Codec = PixelCodec() if codec is None else codec
        self.captioner = captioner
        # What a condition has of a latent position: whether each of its frames is given, and the latent of those that are.
        of_condition = self.codec.compression[0] + self.codec.channels if dit.config.condition_channels else 0
        for what, expected, actual in (
            ("text_dim", text_encoder.dim, dit.config.text_dim),
            ("condition_channels", of_condition, dit.config.condition_channels),
            ("in_channels", self.codec.channels + of_condition, dit.config.in_channels),
            ("image_dim", None if image_encoder is None else image_encoder.dim, dit.config.image_dim),
        ):
            if expected != actual:
                raise ValueError(f"SoraPipeline: dit.config.{what}: expected {expected}, got {actual}")
        kind, timesteps = prediction_type(scheduler), scheduler.config.num_train_timesteps
        if isinstance(dit, Experts) and timesteps != TIMESTEPS:
            raise ValueError(f"SoraPipeline: scheduler: expected one of {TIMESTEPS} timesteps with Experts, got {timesteps}")
        if dit.config.prediction == "clean" and (kind, timesteps) != ("flow_prediction", TIMESTEPS):
            raise ValueError(
                f"SoraPipeline: scheduler: expected flow matching with {TIMESTEPS} timesteps, as dit.config.prediction is 'clean', "
                f"got {type(scheduler).__name__} of {kind} with {timesteps}"
            )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> SoraPipeline:
        """Reads what `save_pretrained` wrote, or one of diffusers' Wan pipelines: text to video, image to video and TI2V.

        A write that was killed is completed or undone first (`settle`).

        Args:
            directory: of the checkpoint; default: the one that comes with the package, of a world of moving shapes.
            dtype: of the transformer's weights, and of Wan's text encoder; default: float32, or that of Wan's files. What Wan
                computes in float32 is that in any case.
            offload: keep the encoders of text and images, transformers and VAE on the CPU, from where each comes to the device when
                it is used.

        Raises:
            FileNotFoundError: a folder without a pipeline in it. ValueError: files that are broken or do not fit together.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"SoraPipeline.from_pretrained: dtype: expected a torch.dtype of floats, got {dtype!r}")
        wanted, folder = torch.device(device), EMBEDDED if directory is None else directory
        if not offload:
            return cls._of(load_parts(folder, dtype, wanted)).eval().to(wanted)
        if wanted.type == "cpu":
            raise ValueError(f"SoraPipeline.from_pretrained: device: expected a GPU with offload, got {device}")
        pipeline = cls._of(load_parts(folder, dtype)).eval()
        put_in_turn(pipeline.parts, wanted)
        return pipeline

    @classmethod
    def from_preset(
        cls,
        model: str,
        *,
        patch: Size,
        codec: Codec | None = None,
        text_encoder: TextEncoder | None = None,
        prediction: str = "flow",
        size: Size = SIZE,
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
        options: dict[str, Any] = {"codec": codec, "text_encoder": text_encoder, "prediction": prediction}
        return cls._of(preset_parts(model, patch=patch, size=size, seed=seed, **options)).to(device)

    @classmethod
    def _of(cls, parts: Parts) -> SoraPipeline:
        return cls(**parts._asdict())

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes model_index.json and a folder for each part, all or nothing.

        dtype: of the weights in the files; default: what they are.
        """
        save_parts(self.parts, directory, dtype)

    @property
    def parts(self) -> Parts:
        return Parts(*(getattr(self, name) for name in Parts._fields))

    def replaced(self, **parts: Any) -> SoraPipeline:
        """A pipeline with other parts, named as the arguments are; it shares the rest."""
        return self._of(self.parts._replace(**parts))

    def with_scheduler(self, scheduler: Any) -> SoraPipeline:
        """The same pipeline, sharing everything else, with another scheduler; it must want the same kind of prediction."""
        kinds = prediction_type(self.scheduler), prediction_type(scheduler)
        if kinds[0] != kinds[1]:
            raise ValueError(f"SoraPipeline.with_scheduler: scheduler: expected one of {kinds[0]}, got {kinds[1]}")
        return self.replaced(scheduler=scheduler)

    @property
    def unit(self) -> Size:
        """Pixels along T, H and W per token."""
        return token_unit(self.dit.config.patch_size, self.codec.compression)

    @property
    def timing(self) -> Timing:
        """Pixel frames per token frame."""
        return token_timing(self.dit.config.patch_size, self.codec.compression, self.codec.causal)

    @property
    def device(self) -> torch.device:
        """Where the transformer computes."""
        return execution_device(self.dit)

    @torch.no_grad()
    def __call__(
        self,
        requests: str | Request | Sequence[str | Request],
        size: Size | Sequence[Size] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_from: float | None = None,
        guidance_scale_2: float | None = None,
        window: Window | None = None,
        step_cache: StepCache | float | None = None,
        generator: Seeds = None,
        callback: Callback | None = None,
        output_type: str = "pt",
        precision: str = "no",
        progress: Progress | None = None,
    ) -> list[Any]:
        """Generates one video per request.

        A size may be any: the next larger one of whole tokens is generated, and the surplus is cut off below, to the right and at
        the end.

        Args:
            requests: B of them, or one; a string is a prompt of text to video.
            size: (T, H, W) in pixels of the strings, one for all or one each; default: the pipeline's. Requests have their own.
            num_inference_steps: steps of the scheduler. Default of this and the next two: `defaults` of the pipeline.
            guidance_scale: of classifier-free guidance; 1 is none.
            guidance_from: where guidance ends, as a share of the scheduler's timesteps: 0 guides every step. See `guided`.
            guidance_scale_2: with `Experts`, that of the one for low noise; default: guidance_scale, if that is given.
            window: how many tokens a token sees along T, H and W, which is faster and not what the model was trained for; default:
                all of its video.
            step_cache: leaves out most blocks where a step is like the one before: a `StepCache`, or its threshold; default: all
                run.
            generator: a seed or a torch.Generator on the host for each request that has no seed, or one seed: request i has
                that + i; or one Generator for all. None is random. A video depends on its own seed alone.
            callback: called after each step with (step, timestep, latents).
            output_type: "pt": [3, T, H, W] in [-1, 1]; "np": float32 [T, H, W, 3] in [0, 1]; "pil": a list of T images; "latent":
                [C, T', H', W'] before decoding.
            precision: "no", or "bf16": a transformer of float32 weights computes in bfloat16; latents and VAE stay in float32.
            progress: called with ("encoding" or "decoding", done, all) after each tile that the VAE has coded, in pixels.

        Returns:
            B videos.

        Raises:
            TypeError: requests, sizes or seeds of another type. ValueError: numbers of requests, sizes and seeds that differ;
                keyframes that the transformer was not trained with, or that are not whole token frames.
        """
        defaults = self.defaults
        if guidance_scale is None:
            guidance_scale_2 = defaults.guidance_scale_2 if guidance_scale_2 is None else guidance_scale_2
            guidance_scale = defaults.guidance_scale
        num_inference_steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_from = defaults.guidance_from if guidance_from is None else guidance_from
        check_options(num_inference_steps, guidance_from, output_type, precision, window, step_cache)
        asked = as_requests(requests, size, self.size)
        if guidance_scale_2 is not None and not isinstance(self.dit, Experts):
            raise ValueError(f"SoraPipeline: guidance_scale_2: expected None for one transformer, got {guidance_scale_2}")
        is_guided = guidance_scale != 1 or guidance_scale_2 not in (None, 1)
        self._check(asked, is_guided)
        cache = StepCache(step_cache) if isinstance(step_cache, int | float) else step_cache
        generators = as_generators(generator, asked)
        padded = [self._padded(request.size) for request in asked]
        shapes = [(self.codec.channels, *latent_size(self.codec, size)) for size in padded]
        noise = [torch.randn(shape, generator=g).to(self.device) for shape, g in zip(shapes, generators, strict=True)]
        text = self.text_encoder([request.prompt for request in asked])
        null_text = self.text_encoder([request.negative_prompt for request in asked]) if is_guided else None
        encoded = self._encoded(asked, padded, **_watched(progress, "encoding"))
        denoise = guided(
            self.dit,
            text=text,
            null_text=null_text,
            frame_steps=[request.frame_step for request in asked],
            conditions=encoded.conditions,
            image_tokens=encoded.image_tokens,
            guidance_scale=guidance_scale,
            guidance_from=guidance_from * self.scheduler.config.num_train_timesteps,
            guidance_scale_2=guidance_scale_2,
            window=window,
            cache=cache,
        )
        autocast = precision == "bf16" and self.dit.final.weight.dtype == torch.float32
        # Autocast would keep copies on the GPU of weights that have left it.
        options: dict[str, Any] = {"enabled": autocast, "cache_enabled": not is_offloaded(self.dit)}
        with torch.autocast(self.device.type, torch.bfloat16, **options), fresh(cache):
            latents = sample(
                denoise,
                self.scheduler,
                noise,
                num_inference_steps=num_inference_steps,
                clean=encoded.clean,
                init=encoded.init,
                patch_frames=self.dit.config.patch_size[0],
                generators=generators,
                callback=callback,
            )
        if output_type == "latent":
            return latents
        videos = []
        for request, video in zip(asked, self.codec.decode(latents, **_watched(progress, "decoding")), strict=True):
            frames, height, width = request.size
            videos.append(request.finish(video[:, :frames, :height, :width]))
        return [converted(video, output_type) for video in videos]

    def caption(self, videos: Sequence[Tensor], *, detailed: bool = True) -> list[str]:
        """What the captioner sees in videos [3, T, H, W] of any sizes."""
        padded = []
        for video in videos:
            frames, height, width = video.shape[1:]
            padded.append(pad(video, self._padded((frames, height, width))))
        return self._captioner().caption(self.codec.encode(padded), detailed=detailed)

    @torch.no_grad()
    def coded(self, video: Tensor) -> Tensor:
        """A video [3, T, H, W] as the codec gives it back, on the host."""
        frames, height, width = video.shape[1:]
        padded = pad(video.to(self.device), self._padded((frames, height, width)))
        (back,) = self.codec.decode(self.codec.encode([padded]))
        return back[:, :frames, :height, :width].cpu()

    def expand(self, prompts: Sequence[str]) -> list[str]:
        """A long and detailed prompt for each short one."""
        return self._captioner().expand(prompts)

    def _captioner(self) -> Captioner:
        if self.captioner is None:
            raise ValueError("SoraPipeline: captioner: expected a checkpoint with a captioner, got one without")
        return self.captioner

    def _check(self, requests: Sequence[Request], is_guided: bool) -> None:
        """Raises ValueError for what this pipeline cannot do, and for what would have no effect."""
        unused = next((request.negative_prompt for request in requests if request.negative_prompt), "")
        if unused and not is_guided:
            raise ValueError(
                f"SoraPipeline: negative_prompt: expected none with guidance_scale 1, which has no use for it, got {unused!r}"
            )
        check_keyframes(self.trained_keyframes, requests)
        for request in requests if self.dit.config.condition_channels else ():
            check_condition(self.timing, request)
        steps = [request.frame_step for request in requests]
        if self.codec.compression[0] > 1 and any(step != 1 for step in steps):
            raise ValueError(f"SoraPipeline: frame_step: expected 1, as the VAE compresses time, got {steps}")

    def check_any_keyframes(self) -> None:
        """Raises ValueError for a transformer that was not trained with any keyframes, as tasks that go on again and again need."""
        check_any_keyframes(self.trained_keyframes)

    def _padded(self, size: Size) -> Size:
        return whole_size(size, self.unit, self.timing)

    def _encoded(self, requests: Sequence[Request], padded: Sequence[Size], **watched: Any) -> Encoded:
        """What the transformer sees of the videos of requests, on the device."""
        codec, device, both = self.codec, self.device, list(zip(requests, padded, strict=True))
        init = [init_latent(codec, request, size, device, **watched) for request, size in both]
        if not self.dit.config.condition_channels:
            clean = [clean_frames(codec, self.timing, request, size, device, **watched) for request, size in both]
            return Encoded(init, clean if any(frames.mask.any() for frames in clean) else None)
        conditions = [condition(codec, request, size, device, **watched) for request, size in both]
        if self.image_encoder is None:
            return Encoded(init, None, conditions)
        count = 1 if self.dit.config.image_positions is None else 2
        return Encoded(init, None, conditions, [self.image_encoder(shown_images(request, count)) for request in requests])

    def eval(self) -> SoraPipeline:
        """Everything in evaluation mode, in place."""
        for part in self._modules():
            part.eval()
        return self

    def to(self, device: torch.device | str) -> SoraPipeline:
        """Everything moved to a device, in place; what is offloaded stays."""
        if is_offloaded(self.dit):
            raise ValueError(f"SoraPipeline.to: expected a pipeline without offload, got one for {self.device}")
        for part in self._modules():
            part.to(device)
        return self

    def _modules(self) -> list[torch.nn.Module]:
        return [part for part in self.parts if isinstance(part, torch.nn.Module)]


def _watched(progress: Progress | None, what: str) -> dict[str, Any]:
    """The arguments of a codec that is watched; one that nobody watches need not know of it."""
    return {} if progress is None else {"progress": functools.partial(progress, what)}
