"""What all tasks share: their options, the inputs they read, the run of the pipeline, the files they write: `Call`, `task`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..limits import MOST_DENOISING_STEPS, check_limit
from .app import Loaded, Precision, check_folder, command, console, known_device, logger, parse_size, read_clip, say
from .files import NAMES, write_files
from .terminal import sampled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..model.step_cache import StepCache
    from ..pipeline.parts import Outline
    from ..pipeline.pipeline import SoraPipeline
    from ..pipeline.request import Request
    from ..sizes import Size

CODED = 22.0  # dB: what a VAE gives back with less has lost its shapes
UNTRAINED = "; --allow-untrained does it anyway"
SIDE = 16384  # pixels along a side of the largest frame that H.264 has


class Format(str, Enum):
    mp4 = "mp4"
    gif = "gif"


@dataclass(frozen=True)
class Call(Loaded):
    """The options that all tasks share. What can be refused is refused before the checkpoint's weights are read."""

    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("outputs")
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Number files from 00 again and replace those there, but never an input.")
    ] = False
    negative: Annotated[str, typer.Option(help="What not to show.")] = ""
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_DENOISING_STEPS, help="Denoising steps. Default: the checkpoint's.")
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(help="euler, heun, unipc or dpm++, for a flow-matching model. Default: the checkpoint's.")
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance, up to 1000; 1 is none. Default: the checkpoint's, see 'sora info'."),
    ] = None
    guidance_2: Annotated[
        float | None,
        typer.Option(help="Of the expert for low noise. Default: --guidance, or the checkpoint's own."),
    ] = None
    guidance_from: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Noise level, from 0 to 1, below which there is no guidance. Default: the checkpoint's."),
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=2**63, help="Of everything random; several videos count up from it.")] = 0
    fps: Annotated[
        float | None,
        typer.Option(min=0.1, help="Frames per second. Default: the input's, or the checkpoint's."),
    ] = None
    scale: Annotated[int, typer.Option(min=1, help="Whole factor by which pixels are enlarged in the files.")] = 1
    format: Annotated[Format, typer.Option(help="Of videos; images are PNG.")] = Format.mp4
    precision: Annotated[
        Precision, typer.Option(help="bf16: the transformer computes in bfloat16; weights of Wan are read as such.")
    ] = Precision.no
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep text encoder, transformer and VAE on the CPU; each comes to --device in turn.")
    ] = False
    window: Annotated[
        str | None,
        typer.Option(help="TxHxW tokens that a token sees around it, such as 5x9x9: faster, and not what the model has learned."),
    ] = None
    step_cache: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.99, help="Leave out most of the transformer where its first block changes less than this share: try 0.1."
        ),
    ] = None
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Also do tasks that the checkpoint's transformer was not trained for.")
    ] = False
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Larger frames of files are scaled down to so many pixels. Default: as many as suit the checkpoint.",
        ),
    ] = None
    inputs: list[tuple[Path, Any]] = field(default_factory=list, init=False)  # the files read, with their clips
    kept: list[Path] = field(default_factory=list, init=False)  # other files that are never replaced
    unknown_words: set[str] = field(default_factory=set, init=False)  # those that `check_words` has named

    def __post_init__(self) -> None:
        check_folder(self.out)
        for path in self.out.glob("*"):
            if path.is_dir() and NAMES.fullmatch(path.name):
                raise ValueError(
                    f"--out: expected a folder for files, got one with the folder {path}, which has the name of a file"
                )
        for option, value in (("--guidance", self.guidance), ("--guidance-2", self.guidance_2)):
            if value is not None and abs(value) > 1000:
                raise ValueError(f"{option}: expected at most 1000, got {value:g}")
        if self.negative and self.is_unguided:
            raise ValueError(f"--negative: expected none with --guidance 1, which has no use for it, got {self.negative!r}")
        if self.guidance_from is not None and self.is_unguided:
            raise ValueError(f"--guidance-from: expected none with --guidance 1, got {self.guidance_from:g}")
        self.rate(1.0)  # --fps, before the checkpoint is looked at
        device, _ = known_device(self.device), self.tokens_seen
        if self.offload and device == "cpu":
            raise ValueError("--offload: expected a GPU as --device, to which parts come in turn, got cpu")
        from ..diffusion.schedulers import FLOW

        if self.scheduler not in (None, *FLOW):
            raise ValueError(f"--scheduler: expected one of {', '.join(FLOW)}, got {self.scheduler!r}")

    def read(
        self, path: Path, max_frames: int | None = None, size: tuple[int, int] | None = None, because: str = ""
    ) -> tuple[Tensor, float]:
        """`read_clip`, that says so where it scales: what is made has the size of what was read.

        size: (H, W) to bring frames to; because: why, where it was not asked for.
        """
        from ..data import probe
        from ..pipeline.clips import fitted

        _, height, width = self.outline.size
        limit = self.max_pixels or int(self.outline.enlarged * max(height * width, size[0] * size[1] if size else 0))
        clip, rate = read_clip(path, max_frames, limit)
        native = tuple(probe(path)[1:])
        if size is not None:
            what = f"{path}: with frames of {size[0]}x{size[1]}"
            if max(size) > SIDE:
                raise ValueError(f"{what}: expected at most {SIDE} pixels along a side")
            check_limit("clip_pixels", clip.shape[1] * size[0] * size[1], what, "pixels")
            clip = fitted(clip, *size)
        after = tuple(clip.shape[2:])
        if because and native != after:
            logger.warning("%s: frames of %s are resized to %s%s", path, _pixels(native), _pixels(after), because)
        elif native != after and size is None:
            text = "%s: frames of %s are scaled down to %s, --max-pixels takes more"
            logger.warning(text, path, _pixels(native), _pixels(after))
        self.inputs.append((path, clip))
        return clip, rate

    def read_joined(
        self, first: Path, last: Path, size: tuple[int, int] | None = None, frames: int | None = None
    ) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
        """Two files whose frames have one size: the first one's, if none is asked for."""
        start = self.read(first, frames, size)
        height, width = start[0].shape[2:]
        return start, self.read(last, frames, (height, width), "" if size else f", as {first} has them")

    def pipeline(self, *, captioner: bool = False) -> SoraPipeline:
        from ..pipeline.keyframes import TrainedKeyframes

        pipeline = super().pipeline(captioner=captioner)
        if self.allow_untrained:
            pipeline = pipeline.replaced(trained_keyframes=TrainedKeyframes.ANY)
        if self.scheduler is not None:
            from ..diffusion.schedulers import flow_scheduler

            pipeline = pipeline.with_scheduler(flow_scheduler(self.scheduler, like=pipeline.scheduler))
        for path, clip in self.inputs:
            _warn_of_vae(pipeline, path, clip)
        return pipeline

    @property
    def dtype(self) -> torch.dtype | None:
        import torch

        return torch.bfloat16 if self.precision is Precision.bf16 and self.outline.weights_bf16 is not None else None

    @property
    def sampling(self) -> dict[str, Any]:
        """What the pipeline's call takes of them."""
        defaults = self.outline.defaults
        two = len(self.outline.weights.transformers) > 1
        if self.guidance_2 is not None and not two:
            raise ValueError(f"--guidance-2: expected none for a checkpoint with one transformer, got {self.guidance_2:g}")
        second = defaults.guidance_scale_2 if self.guidance_2 is None and self.guidance is None else self.guidance_2
        return {
            "num_inference_steps": defaults.num_inference_steps if self.steps is None else self.steps,
            "guidance_scale": defaults.guidance_scale if self.guidance is None else self.guidance,
            "guidance_scale_2": second,
            "guidance_from": defaults.guidance_from if self.guidance_from is None else self.guidance_from,
            "precision": self.precision.value,
            "window": self.tokens_seen,
            "step_cache": self.cache,
        }

    @property
    def is_unguided(self) -> bool:
        return self.guidance == 1 and self.guidance_2 in (None, 1)

    @property
    def tokens_seen(self) -> Size | None:
        """--window as a call of the pipeline takes it."""
        return None if self.window is None else parse_size(self.window, "--window", "5x9x9")

    @functools.cached_property
    def cache(self) -> StepCache | None:
        """Of all passes of the command."""
        from ..model.step_cache import StepCache

        return None if self.step_cache is None else StepCache(self.step_cache)

    @property
    def num_steps(self) -> int:
        return self.sampling["num_inference_steps"]

    @property
    def several(self) -> dict[str, Any]:
        """What tasks of several passes take of them."""
        return {"negative_prompt": self.negative, "seed": self.seed, **self.sampling}

    def rate(self, input_fps: float = 0.0) -> float:
        """Frames per second of a file, by those of its input, 0 for none. Raises ValueError for what a format does not have."""
        from ..data.writing import LOWEST_FPS, highest_fps

        rate, highest = self.fps or input_fps or self.outline.defaults.fps, highest_fps(f".{self.format.value}")
        if rate > highest:
            raise ValueError(f"--fps: expected at most {highest} for {self.format.value}, got {rate:g}")
        if rate < LOWEST_FPS:
            raise ValueError(f"--fps: expected at least {LOWEST_FPS}, got {rate:g}")
        return rate

    def announce(self, outline: Outline, sizes: Sequence[Size], option: str = "--size", *, made: Sequence[Size] = ()) -> None:
        """Says what is to be made and what memory it takes, before the weights are read; refuses what cannot be held or written.

        sizes: of what is packed into one pass. made: of the files, where those are larger. option: what the sizes come from.
        """
        from .estimate import How, check_memory, check_pixels, check_written, memory, tokens, written

        if self.max_pixels is not None and not self.inputs:
            raise ValueError(f"--max-pixels: expected none where no file is read, got {self.max_pixels}")
        check_pixels(option, [*(made or sizes)], self.device)
        side = max(max(size[1:]) for size in sizes)
        if self.scale * side > SIDE:
            which = "--scale" if side <= SIDE else option
            raise ValueError(f"{which}: expected frames of at most {SIDE} pixels along a side, got {self.scale * side}")
        how = How(self.precision is Precision.bf16, self.offload)
        check_memory(option, outline, sizes, made, how, self.device)
        needed = memory(outline, sizes, made, how)
        for_files = written(outline, made or sizes, how, self.scale, self.format.value, self.device)
        check_written("--scale" if self.scale > 1 else option, for_files)
        if self.device == "cpu":
            needed = max(needed, for_files)
        count = f"{len(sizes)} videos" if len(sizes) > 1 else "1 video"
        shapes = ", ".join(dict.fromkeys("x".join(map(str, size)) for size in made or sizes))
        say(
            f"{count} of {shapes}, seed {self.seed}: {tokens(outline, sizes):,} tokens at once, "
            f"about {needed / 1e9:.1f} GB of memory"
        )

    def check_keyframes(self, requests: Sequence[Request]) -> None:
        """Raises ValueError for keyframes that a checkpoint was not trained with, before its weights are read."""
        from ..pipeline.keyframes import check_condition, check_keyframes, check_whole_frames

        trained, timing = self.outline.trained_keyframes, self.outline.timing
        has_none = trained.as_condition and not all(request.keyframes for request in requests)
        with self._untrained("; 'sora animate' takes an image" if has_none else UNTRAINED, possible=not has_none):
            check_keyframes(trained, requests, "--checkpoint")
        for request in requests:
            (check_condition if trained.as_condition else check_whole_frames)(timing, request)

    def check_any_keyframes(self) -> None:
        """Raises ValueError for a checkpoint that was not trained with any keyframes, before its weights are read."""
        from ..pipeline.keyframes import check_any_keyframes

        trained = self.outline.trained_keyframes
        possible = not trained.as_condition  # with a condition there is none to begin with
        with self._untrained(UNTRAINED if possible else "", possible=possible):
            check_any_keyframes(trained, "--checkpoint")

    @contextlib.contextmanager
    def _untrained(self, hint: str, possible: bool) -> Iterator[None]:
        """Within it an error of what a checkpoint was not trained with is a warning, if that was asked for and is possible."""
        try:
            yield
        except ValueError as error:
            if not possible or not self.allow_untrained:
                raise ValueError(f"{error}{hint}") from None
            logger.warning("the transformer was not trained with these frames given: what it makes of them may fail")

    def check_words(self, pipeline: SoraPipeline, prompts: Sequence[str]) -> None:
        """Names the words of prompts that the text encoder has not learned, each once: what they show is left to chance."""
        vocabulary = getattr(pipeline.text_encoder, "vocabulary", None)
        unknown = vocabulary.unknown([*prompts, self.negative]) if vocabulary else []
        unknown = [word for word in unknown if word not in self.unknown_words]
        self.unknown_words.update(unknown)
        if unknown:
            logger.warning("words that the checkpoint has not learned: %s; 'sora vocabulary' lists what it has", ", ".join(unknown))

    def run(
        self,
        requests: list[Request],
        option: str,
        rates: Sequence[float] = (),
        by_video: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> None:
        """Opens the pipeline for requests and generates; see `announce` and `generate`."""
        self.check_keyframes(requests)
        made = [request.stitched_size for request in requests]
        for input_fps in rates:
            self.rate(input_fps)
        self.announce(self.outline, [request.size for request in requests], option, made=made)
        pipeline = self.pipeline()
        self.check_words(pipeline, [text for request in requests for text in (request.prompt, request.negative_prompt)])
        self.generate(pipeline, requests, rates, by_video, **settings)

    def generate(
        self,
        pipeline: SoraPipeline,
        requests: list[Request],
        rates: Sequence[float] = (),
        by_video: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> None:
        """Runs requests in one packed batch and writes the videos. rates: of the inputs, see `rate`. by_video: see `write`."""
        videos = sampled(pipeline, requests, self.seed, console, **self.sampling)
        seeds = [self.seed + i if request.seed is None else request.seed for i, request in enumerate(requests)]
        self.write(videos, [request.prompt for request in requests], rates, seeds, by_video, **settings)

    def write(
        self,
        videos: list[Tensor],
        prompts: list[str],
        rates: Sequence[float] = (),
        seeds: Sequence[int] = (),
        by_video: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> None:
        """One file each and a contact sheet, which carry what they were made with; says where and of which seed.

        by_video: settings of each video, which come before those of all, `settings` and the command's options.

        Raises ValueError for a video with NaN, before any file.
        """
        for prompt, video in zip(prompts, videos, strict=True):
            if video.isnan().any():
                reason = "its weights, --guidance or --precision lead beyond all numbers"
                raise ValueError(f"--checkpoint: {self.folder}: got NaN in the video of {prompt!r}; {reason}")
        fps = [self.rate(input_fps) for input_fps in rates or [0.0] * len(videos)]
        seeds = seeds or [self.seed + i for i in range(len(videos))]
        common = {
            "steps": self.num_steps,
            "guidance": self.sampling["guidance_scale"],
            "guidance_2": self.sampling["guidance_scale_2"],
            "guidance_from": self.sampling["guidance_from"],
            "precision": self.precision.value,
            "window": self.window,
            "step_cache": self.step_cache,
            "scheduler": self.scheduler,
            "checkpoint": self.checkpoint,
            "negative": self.negative,
            **settings,
        }
        *paths, sheet = write_files(
            videos, prompts, self.out, fps, self.scale, self.format.value, seeds=seeds,
            settings=[_recorded({**common, **one}) for one in by_video or [{}] * len(videos)],
            overwrite=self.overwrite, inputs=[*self.kept, *(path for path, _ in self.inputs)],
        )  # fmt: skip
        for path, seed in zip(paths, seeds, strict=True):
            say(f"{path} (seed {seed})")
        say(str(sheet))
        if self.cache is not None:
            say(self.cache.report())


task = command(Call)


def _recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as files carry them, without those that are not set; 0 and false are."""
    present = {name: value for name, value in settings.items() if value is not None and value != ""}
    return {name: value if isinstance(value, int | float | list) else str(value) for name, value in present.items()}


def _pixels(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _warn_of_vae(pipeline: SoraPipeline, path: Path, clip: Tensor) -> None:
    """Says so in one line if the VAE cannot code what was read: what is made of it will look no better."""
    from ..codec.codec import psnr

    ratio = psnr(pipeline.coded(clip[:, :1]), clip[:, :1])
    if ratio < CODED:
        logger.warning("%s: the checkpoint's VAE gives back its first frame with a PSNR of %.1f dB: expect it blurred", path, ratio)
