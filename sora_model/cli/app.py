"""What all commands share: the app, the options, errors of one line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.logging import RichHandler

from ..config import Size
from ..terminal import denoising, write_files

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline import SoraPipeline
    from ..request import Request

# torch and diffusers take seconds to import, so commands import them: --help and a wrong option answer at once.

app = typer.Typer(
    help="Train packed video diffusion transformers, and generate, extend, join and caption videos of any size with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)


class Precision(str, Enum):
    no = "no"
    bf16 = "bf16"


class Format(str, Enum):
    mp4 = "mp4"
    gif = "gif"


@dataclass(frozen=True)
class Call:
    """The options that all tasks share."""

    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint. Default: the one that comes with the package.")
    ] = None
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("outputs")
    negative: Annotated[str, typer.Option(help="What not to show.")] = ""
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30
    scheduler: Annotated[
        str | None, typer.Option(help="euler, heun, unipc or dpm++, for a flow-matching model. Default: the checkpoint's.")
    ] = None
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 3.0
    seed: Annotated[int, typer.Option(help="Of everything random; several videos count up from it.")] = 0
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second.")] = 8.0
    scale: Annotated[int, typer.Option(min=1, help="Whole factor by which pixels are enlarged in the files.")] = 1
    format: Annotated[Format, typer.Option(help="Of videos; images are PNG.")] = Format.mp4
    precision: Annotated[Precision, typer.Option(help="bf16: the transformer computes in bfloat16.")] = Precision.no
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"

    def pipeline(self) -> SoraPipeline:
        pipeline = load_pipeline(self.checkpoint, self.device)
        if self.scheduler is not None:
            from ..schedulers import flow_scheduler

            pipeline = pipeline.with_scheduler(flow_scheduler(self.scheduler, like=pipeline.scheduler))
        return pipeline

    @property
    def sampling(self) -> dict[str, Any]:
        """What the pipeline's call takes of them."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "precision": self.precision.value}

    @property
    def several(self) -> dict[str, Any]:
        """What tasks of several passes take of them."""
        return {"negative_prompt": self.negative, "seed": self.seed, **self.sampling}

    def generate(self, pipeline: SoraPipeline, requests: list[Request]) -> None:
        """Runs requests in one packed batch and writes what comes back."""
        with denoising(console, self.steps) as advance:
            videos = pipeline(requests, generator=self.seed, callback=lambda *_: advance(1), **self.sampling)
        self.write(videos, [request.prompt for request in requests])

    def write(self, videos: list[Tensor], prompts: list[str]) -> None:
        """One file each and a contact sheet; says where."""
        for path in write_files(videos, prompts, self.out, self.fps, self.scale, self.format.value):
            say(str(path))


def task(function: Callable[..., None]) -> Callable[..., None]:
    """Makes a function with a last argument `call` a command that has the options of `Call` after its own."""
    hints = get_type_hints(function, include_extras=True)
    shared = get_type_hints(Call, include_extras=True)
    own = [p.replace(annotation=hints[name]) for name, p in inspect.signature(function).parameters.items() if name != "call"]
    more = [
        inspect.Parameter(f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=f.default, annotation=shared[f.name])
        for f in fields(Call)
    ]

    @functools.wraps(function)
    def command(**options: Any) -> None:
        with one_line_errors():
            call = Call(**{f.name: options.pop(f.name) for f in fields(Call)})
            function(**options, call=call)

    command.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *more)}
    return app.command()(command)


@app.callback()
def main() -> None:
    logging.getLogger("sora_model").handlers = [RichHandler(console=errors, show_path=False, show_time=False)]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one clear line and exit code 2 for what a user can mend."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        errors.print("[bold red]error:[/]", end=" ")
        errors.print(str(error), highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(2) from None


def say(text: str) -> None:
    """Prints a line as it is: paths, prompts and captions are no markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def parse_size(text: str) -> Size:
    """'8x32x48' -> (8, 32, 48)."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"expected TxHxW, such as 8x32x48, got {text!r}")
    t, h, w = (int(n) for n in match.groups())
    return t, h, w


def load_pipeline(checkpoint: Path | None, device: str) -> SoraPipeline:
    """The pipeline of a folder, or the one that comes with the package."""
    from ..pipeline import EMBEDDED, SoraPipeline

    return SoraPipeline.from_pretrained(checkpoint or EMBEDDED, device=known_device(device))


def known_device(device: str) -> str:
    """The name of a device that is there."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, as this torch sees no GPU, got 'cuda'")
    return device


def read_clip(path: Path, max_frames: int | None = None) -> Tensor:
    """A video or image file as [3, T, H, W] in [-1, 1]."""
    from ..data import read_video

    return read_video(path, max_frames=max_frames, normalize=True)[0]
