"""What all commands share: the app, the options, errors of one line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.logging import RichHandler

from ..sizes import Size
from .terminal import denoising, write_files

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline.pipeline import SoraPipeline
    from ..pipeline.request import Request

# torch and diffusers take seconds to import, so commands import them: --help and a wrong option answer at once.

app = typer.Typer(
    help="Train packed video diffusion transformers, and generate, extend, join and caption videos of any size with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
MAX_PIXELS = 2**16  # of frames that commands read from files, unless they are told otherwise
CLIP_PIXELS = 2**28  # of all frames read from one file, which are held at once: 4 GB
logger = logging.getLogger(__name__)
console = Console()
errors = Console(stderr=True)


class Precision(str, Enum):
    no = "no"
    bf16 = "bf16"


class Format(str, Enum):
    mp4 = "mp4"
    gif = "gif"


@dataclass(frozen=True)
class Loaded:
    """The options of every command that uses a checkpoint."""

    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint. Default: the one that comes with the package.")
    ] = None
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"

    def pipeline(self, *, captioner: bool = False) -> SoraPipeline:
        """The pipeline; captioner: one without a captioner is an error, before its weights are read."""
        from ..pipeline.parts import EMBEDDED
        from ..pipeline.pipeline import SoraPipeline
        from ..storage.files import settle
        from ..storage.weights import read_index

        device, folder = known_device(self.device), self.checkpoint or EMBEDDED
        settle(folder)
        if captioner and not read_index(folder, "--checkpoint")["captioner"]:
            raise ValueError(f"captioner: expected a checkpoint with a captioner, got one without: {folder}")
        return SoraPipeline.from_pretrained(folder, device=device)


@dataclass(frozen=True)
class Call(Loaded):
    """The options that all tasks share."""

    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("outputs")
    negative: Annotated[str, typer.Option(help="What not to show.")] = ""
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30
    scheduler: Annotated[
        str | None, typer.Option(help="euler, heun, unipc or dpm++, for a flow-matching model. Default: the checkpoint's.")
    ] = None
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 3.0
    guidance_from: Annotated[
        float, typer.Option(min=0, max=1, help="Noise level, from 0 to 1, below which there is no guidance.")
    ] = 0.6
    seed: Annotated[int, typer.Option(min=0, max=2**63, help="Of everything random; several videos count up from it.")] = 0
    fps: Annotated[float | None, typer.Option(min=0.1, help="Frames per second. Default: those of the input, or 8.")] = None
    scale: Annotated[int, typer.Option(min=1, help="Whole factor by which pixels are enlarged in the files.")] = 1
    format: Annotated[Format, typer.Option(help="Of videos; images are PNG.")] = Format.mp4
    precision: Annotated[Precision, typer.Option(help="bf16: the transformer computes in bfloat16.")] = Precision.no
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Larger frames of files that are read are scaled down to so many pixels.")
    ] = MAX_PIXELS

    def read(self, path: Path, max_frames: int | None = None) -> tuple[Tensor, float]:
        """`read_clip`, that says so where it scales down: what is made has the size of what was read."""
        clip, rate = read_clip(path, max_frames, self.max_pixels)
        from ..data import probe

        before, after = ("x".join(map(str, size)) for size in (probe(path)[1:], clip.shape[2:]))
        if before != after:
            logger.warning("%s: frames of %s are scaled down to %s, --max-pixels takes more", path, before, after)
        return clip, rate

    def __post_init__(self) -> None:
        check_folder(self.out)
        for path in self.out.glob("*"):
            if path.is_dir() and re.fullmatch(r"(\d{2,}-.*|contact_sheet)\.(mp4|gif|png)", path.name):
                raise ValueError(
                    f"--out: expected a folder for files, got one with the folder {path}, which has the name of a file"
                )
        if self.negative and self.guidance == 1:
            raise ValueError(f"--negative: expected none with --guidance 1, which has no use for it, got {self.negative!r}")

    def pipeline(self, *, captioner: bool = False) -> SoraPipeline:
        from ..diffusion.schedulers import FLOW

        if self.scheduler not in (None, *FLOW):
            raise ValueError(f"--scheduler: expected one of {', '.join(FLOW)}, got {self.scheduler!r}")
        pipeline = super().pipeline(captioner=captioner)
        if self.scheduler is not None:
            from ..diffusion.schedulers import flow_scheduler

            pipeline = pipeline.with_scheduler(flow_scheduler(self.scheduler, like=pipeline.scheduler))
        return pipeline

    @property
    def sampling(self) -> dict[str, Any]:
        """What the pipeline's call takes of them."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "guidance_from": self.guidance_from,
            "precision": self.precision.value,
        }

    @property
    def several(self) -> dict[str, Any]:
        """What tasks of several passes take of them."""
        return {"negative_prompt": self.negative, "seed": self.seed, **self.sampling}

    def rate(self, own: float = 0.0) -> float:
        """Frames per second of a file whose input had `own`; 0 if it had none."""
        return self.fps or own or 8.0

    def generate(self, pipeline: SoraPipeline, requests: list[Request], rates: Sequence[float] = ()) -> None:
        """Runs requests in one packed batch and writes what comes back; rates: of the inputs, see `rate`."""
        with denoising(console, self.steps) as advance:
            videos = pipeline(requests, generator=self.seed, callback=lambda *_: advance(1), **self.sampling)
        self.write(videos, [request.prompt for request in requests], rates)

    def write(self, videos: list[Tensor], prompts: list[str], rates: Sequence[float] = ()) -> None:
        """One file each and a contact sheet; says where."""
        fps = [self.rate(own) for own in rates or [0.0] * len(videos)]
        for path in write_files(videos, prompts, self.out, fps, self.scale, self.format.value):
            say(str(path))


def command(options: type, name: str | None = None, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function with a last argument that is an `options` a command that has its fields as options, after its own.

    options: a dataclass like `Call`. name: of the command; default: the function's. defaults: other ones for fields of `options`.
    """

    unknown = set(defaults) - {field.name for field in fields(options)}
    if unknown:
        raise TypeError(f"command: {options.__name__} has no {', '.join(unknown)}")

    def make(function: Callable[..., None]) -> Callable[..., None]:
        hints, shared = (get_type_hints(one, include_extras=True) for one in (function, options))
        *own, last = inspect.signature(function).parameters.values()
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        for field in fields(options):
            default, hint = defaults.get(field.name, field.default), shared[field.name]
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hint))

        @functools.wraps(function)
        def run(**given: Any) -> None:
            with one_line_errors():
                check_finite(given)
                chosen = options(**{field.name: given.pop(field.name) for field in fields(options)})
                function(**given, **{last.name: chosen})

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return app.command(name)(run)

    return make


task = command(Call)


@app.callback()
def main() -> None:
    logging.getLogger("sora_model").handlers = [RichHandler(console=errors, show_path=False, show_time=False)]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one clear line and exit code 2 for what a user can mend."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        errors.print("[bold red]error:[/]", end=" ")
        errors.print(str(error), highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(2) from None


def say(text: str) -> None:
    """Prints a line as it is: paths, prompts and captions are no markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def parse_size(text: str, option: str = "--size") -> Size:
    """'8x32x48' -> (8, 32, 48)."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise ValueError(f"{option}: expected TxHxW, such as 8x32x48, got {text!r}")
    t, h, w = (int(n) for n in match.groups())
    if min(t, h, w) < 1:
        raise ValueError(f"{option}: expected (T, H, W), each at least 1, got {(t, h, w)}")
    return t, h, w


def check_finite(given: dict[str, Any]) -> None:
    """Raises ValueError for options that are NaN or infinite, which every range lets through."""
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')}: expected a finite number, got {value}")


def known_device(device: str) -> str:
    """The name of a device that is there."""
    import torch

    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    count = torch.cuda.device_count()
    if device != "cpu" and int(match[1] or 0) >= count:
        raise ValueError(f"--device: expected one of the {count} GPUs that this torch sees or cpu, got {device!r}")
    return device


def check_folder(path: Path, option: str = "--out") -> None:
    """Before the work is done: files can go there. Leaves no trace."""
    there = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not there.is_dir():
        raise ValueError(f"{option}: expected a folder, got the file {there}")
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # names that are too long, folders that may not be entered
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{option}: expected a folder that can be written to, got {path}: {error.strerror}") from None


def check_media(path: Path, option: str) -> None:
    """Before the work is done: there is a folder to look for videos and images in."""
    if not path.is_dir():
        there = "which is a file" if path.exists() else "there is no such folder"
        raise ValueError(f"{option}: expected a folder of videos and images, got {path} ({there})")


def check_file(path: Path, suffix: str, option: str = "--out") -> None:
    """Before the work is done: a file of that kind can be written there."""
    if path.suffix != suffix:
        raise ValueError(f"{option}: expected a file that ends in {suffix}, got {path}")
    if path.is_dir():
        raise ValueError(f"{option}: expected a file, got the folder {path}")
    check_folder(path.parent, option)


def read_clip(path: Path, max_frames: int | None = None, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, float]:
    """A video or image file as [3, T, H, W] in [-1, 1], and its frames per second; an image has 0. Larger frames are scaled."""
    from ..data import probe, read_video
    from ..data.media import scaled_size

    frames, height, width = probe(path)
    frames, (height, width) = min(frames, max_frames or frames), scaled_size(height, width, max_pixels)
    if frames * height * width > CLIP_PIXELS:
        raise ValueError(
            f"{path}: expected at most {CLIP_PIXELS // (height * width)} frames of {height}x{width}, got {frames}; "
            "cut it, or take a smaller --max-pixels"
        )
    return read_video(path, max_frames=max_frames, max_pixels=max_pixels, normalize=True)
