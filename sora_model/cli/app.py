"""What all commands share: the app, the options, errors of one line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from rich.console import Console
from typer.models import ArgumentInfo

from ..limits import MOST, Limits, check_text, hint, limits, set_limits
from ..missing import not_installed
from ..sizes import Size
from .text import is_utf8, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..pipeline.parts import Outline
    from ..pipeline.pipeline import SoraPipeline

# torch and diffusers take seconds to import, so commands import them: --help and a wrong option answer at once.

app = typer.Typer(
    help="Train packed video diffusion transformers, and generate, extend, join and caption videos of any size with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ChatModel = Annotated[
    Path | None, typer.Option(help="Folder of a chat model of transformers that makes prompts long, in place of the captioner.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
MAX_PIXELS = 2**16  # of frames that are read to be captioned
LARGEST = 1e30  # of numbers that are not whole; float32 holds little more
LIMITS = {name.replace("_", "-"): name for name in Limits._fields}
LINE = 2000  # characters of an error, in which there may be a value of a file
# What torch says where it gets no memory, on the CPU and on GPUs, and where a size does not even fit a number.
NO_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|not enough memory|out of memory|too many elements"
    "|Storage size calculation overflowed|numel: integer multiplication overflow",
    re.IGNORECASE,
)
logger = logging.getLogger(__name__)
console = Console()
errors = Console(stderr=True)


class Precision(str, Enum):
    no = "no"
    bf16 = "bf16"


@dataclass(frozen=True)
class Loaded:
    """The options of every command that uses a checkpoint."""

    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint. Default: the one that comes with the package.")
    ] = None
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"

    @property
    def folder(self) -> Path:
        """Of the checkpoint, after a write that was killed has been ended."""
        from ..pipeline.parts import EMBEDDED
        from ..storage.files import settle

        folder = self.checkpoint or EMBEDDED
        settle(folder)
        return folder

    @functools.cached_property
    def outline(self) -> Outline:
        """What the checkpoint's configs say: enough to refuse what it cannot do before its weights are read."""
        from ..pipeline.checkpoint import read_outline

        with naming("--checkpoint"):
            return read_outline(self.folder)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the transformer's weights, where a command says so."""
        return None

    offload = False  # a field of commands that generate

    def pipeline(self, *, captioner: bool = False) -> SoraPipeline:
        """The pipeline; captioner: it must have one, which is looked for before weights are read."""
        from ..pipeline.pipeline import SoraPipeline

        device, folder = known_device(self.device), self.folder
        if captioner:
            self.check_captioner()
        with naming("--checkpoint"):
            return SoraPipeline.from_pretrained(folder, device=device, dtype=self.dtype, offload=self.offload)

    def check_captioner(self, hint: str = "") -> None:
        """Raises ValueError for a checkpoint without a captioner."""
        from ..pipeline.checkpoint import has_captioner

        if not has_captioner(self.folder, "--checkpoint"):
            got = f"one without: {self.folder}{hint}"
            raise ValueError(f"--checkpoint: captioner: expected a checkpoint with a captioner, got {got}")


def command(
    options: type, name: str | None = None, help: str | None = None, epilog: str | None = None, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command whose options are its arguments and the fields of a dataclass, its last argument.

    Typer reads options off a function's signature and has no way to share some among commands, so the function
    that typer sees has a signature of both.

    options: a dataclass like `Call`. name, help: of the command; default: the function's. epilog: below its help. defaults: other
    ones for fields of `options`.
    """
    shared = {field.name: defaults.pop(field.name, field.default) for field in fields(options) if field.init}
    if defaults:
        raise TypeError(f"command: {options.__name__} has no {', '.join(defaults)}")

    def make(function: Callable[..., None]) -> Callable[..., None]:
        hints = {**get_type_hints(options, include_extras=True), **get_type_hints(function, include_extras=True)}
        *arguments, last = inspect.signature(function).parameters.values()
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [one.replace(annotation=hints[one.name]) for one in arguments]
        parameters += [inspect.Parameter(key, kind, default=shared[key], annotation=hints[key]) for key in shared]
        for one in parameters:
            _read_paths(one.annotation)
        words = {one.name: _word(one) for one in parameters}

        @functools.wraps(function)
        def run(**values: Any) -> None:
            with one_line_errors(words):
                check_values(values, words)
                chosen = options(**{key: values.pop(key) for key in shared})
                function(**values, **{last.name: chosen})

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return app.command(name, help=help, epilog=epilog)(run)

    return make


def _read_paths(annotation: Any) -> None:
    """Has an option or argument of paths read by `to_path`."""
    kind, *metadata = get_args(annotation)
    if kind is Path or Path in get_args(kind):
        for one in metadata:
            one.parser = to_path


def _word(parameter: inspect.Parameter) -> str:
    """What the help calls a parameter: --max-pixels, or VIDEO for an argument."""
    argument = any(isinstance(one, ArgumentInfo) for one in getattr(parameter.annotation, "__metadata__", ()))
    return parameter.name.upper() if argument else f"--{parameter.name.replace('_', '-')}"


class OneLine(logging.Handler):
    """Each warning as one line, which a terminal may wrap but nothing else does."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone is no reason to stop
            errors.print(f"[yellow]{record.levelname.lower()}:[/]", end=" ")
            errors.print(one_line(record.getMessage()), highlight=False, soft_wrap=True, markup=False)


def _read_limits(texts: Sequence[str]) -> Limits:
    """NAME=NUMBER each, where a number may be written as 1e8; the others are as always."""
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in LIMITS:
            raise ValueError(f"--limit: expected NAME=NUMBER, NAME out of {', '.join(LIMITS)}, got {text!r}")
        if not re.fullmatch(r"[0-9]{1,18}(e[0-9]{1,2})?", number):
            raise ValueError(f"--limit: {name}: expected a whole number, such as 20000 or 1e8, got {number!r}")
        digits, _, zeros = number.partition("e")
        value = int(digits) * 10 ** int(zeros or 0)
        if not 1 <= value <= MOST:
            raise ValueError(f"--limit: {name}: expected a number from 1 to 2**62, got {number}")
        found[LIMITS[name]] = value
    return Limits(**found)


def _show_version(wanted: bool) -> None:
    if wanted:
        from sora_kernels import __version__

        say(f"sora {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help=f"NAME=NUMBER, before the command: the most that a file of others may ask for. NUMBER may be 1e8; NAME is one of"
            f" {', '.join(LIMITS)}. Repeat for several."
        ),
    ] = None,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # letters that a terminal lacks are no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        set_limits(_read_limits(limit or []))
    except ValueError as error:
        fail(str(error))
    logging.getLogger("sora_model").handlers = [OneLine()]


@contextlib.contextmanager
def one_line_errors(words: Mapping[str, str] | None = None) -> Iterator[None]:
    """Ends the command with one clear line and exit code 2 for what a user can mend.

    words: what the command calls its parameters. Where an error names a function or class and one of them, as in
    "Request: strength: expected", the line begins with that word alone.
    """
    try:
        _check_settings()
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sora_"):
            raise
        fail(not_installed(error.name))
    except (ValueError, OSError, FloatingPointError) as error:
        owner = re.match(r"[\w.]+: (\w+): (?=expected )", str(error))
        word = (words or {}).get(owner[1]) if owner else None
        fail(f"{word}: {str(error)[owner.end() :]}" if owner and word else str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"not enough memory for videos of this size and number: {(str(error) or 'MemoryError').splitlines()[0]}")


def _check_settings() -> None:
    """Raises ValueError for a variable SORA_KERNELS_... with a wrong value, before any work. Imports only if there is one."""
    if any(name.startswith("SORA_KERNELS_") for name in os.environ):
        from sora_kernels import cached_bytes, forced_backend

        forced_backend()
        cached_bytes()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory; torch has no class of its own for a CPU's."""
    return isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def fail(line: str, status: int = 2) -> NoReturn:
    """Ends the command with an error of one line."""
    line = one_line(line)  # libraries have errors of several
    line = line if len(line) <= LINE else f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
    with contextlib.suppress(OSError):  # the terminal may be gone
        errors.print("[bold red]error:[/]", end=" ")
        errors.print(line, highlight=False, soft_wrap=True, markup=False)
    raise typer.Exit(status) from None


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Errors of what an option names begin with it instead of with a function or class."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = re.sub(r"^[A-Za-z_][\w.]*: ", "", str(error))
        raise ValueError(text if text.startswith(option) else f"{option}: {text}") from None


def expanded(folder: Path, prompts: Sequence[str], device: str) -> list[str]:
    """Detailed prompts by a chat model, which is gone from memory afterwards."""
    from ..caption.chat import ChatExpander

    with naming("--chat-model"):
        return ChatExpander.from_pretrained(folder, device=known_device(device)).expand(prompts)


def say(text: str) -> None:
    """Prints a line as it is: paths, prompts and captions are no markup."""
    console.print(one_line(text), highlight=False, soft_wrap=True, markup=False)


def parse_size(text: str, option: str = "--size", example: str = "8x32x48") -> Size:
    """'8x32x48' -> (8, 32, 48)."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise ValueError(f"{option}: expected TxHxW, such as {example}, got {text!r}")
    t, h, w = (int(n) for n in match.groups())
    if min(t, h, w) < 1:
        raise ValueError(f"{option}: expected (T, H, W), each at least 1, got {(t, h, w)}")
    return t, h, w


def check_values(values: Mapping[str, Any], words: Mapping[str, str]) -> None:
    """Raises ValueError for numbers that are no finite ones or beyond all use, which every range lets through, and for text that
    is not UTF-8. words: what the command calls its parameters.
    """
    for name, value in values.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, float) and not abs(one) <= LARGEST:
                expected = f"a number of at most {LARGEST:g}" if math.isfinite(one) else "a finite number"
                raise ValueError(f"{words[name]}: expected {expected}, got {one:g}")
            if isinstance(one, str):
                if not is_utf8(one):
                    raise ValueError(f"{words[name]}: expected text in UTF-8, got {one!r}")
                check_text(one, words[name])


def to_path(text: str | Path) -> Path:
    """A path of the command line. An empty one, of a variable that is not set say, would be the present folder."""
    if text == "":
        raise typer.BadParameter("expected a path, got ''")
    return Path(text)


to_path.__name__ = "path"  # as the help calls what it makes


def known_device(device: str) -> str:
    """The name of a device that is there."""
    import torch

    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", device)
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
        for name in path.absolute().relative_to(there.absolute()).parts or (".",):
            with contextlib.suppress(FileNotFoundError):
                (there / name).lstat()  # names that are too long, folders that may not be entered
        with contextlib.suppress(FileNotFoundError):
            (path / ("x" * 255)).lstat()  # paths that are too long, with the name of a file
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{option}: expected a folder that can be written to, got {path}: {error.strerror}") from None


def check_new(path: Path, overwrite: bool, option: str = "--out") -> None:
    """Before the work is done: nothing is there that would be replaced without having been asked for."""
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{option}: expected a place for new files, got one with {path}; --overwrite replaces it")


def check_media(path: Path, option: str) -> None:
    """Before the work is done: there is a folder to look for videos and images in."""
    if not os.path.isdir(path):  # Path.is_dir fails for a name that is too long
        there = "which is a file" if os.path.exists(path) else "there is no such folder"
        raise ValueError(f"{option}: expected a folder of videos and images, got {path} ({there})")


def check_file(path: Path, suffix: str, option: str = "--out") -> None:
    """Before the work is done: a file of that kind can be written there."""
    if path.suffix != suffix:
        raise ValueError(f"{option}: expected a file that ends in {suffix}, got {path}")
    if os.path.isdir(path):
        raise ValueError(f"{option}: expected a file, got the folder {path}")
    check_folder(path.parent, option)


def read_clip(path: Path, max_frames: int | None = None, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, float]:
    """A video or image file as [3, T, H, W] in [-1, 1], and its frames per second; an image has 0. Larger frames are scaled."""
    from ..data import probe, read_video
    from ..data.media import scaled_size

    frames, height, width = probe(path)
    frames, (height, width) = min(frames, max_frames or frames), scaled_size(height, width, max_pixels)
    most = limits().clip_pixels
    if frames * height * width > most:
        raise ValueError(
            f"{path}: expected at most {most // (height * width)} frames of {height}x{width}, got {frames}; "
            f"cut it, or take a smaller --max-pixels; {hint('clip_pixels', frames * height * width)}"
        )
    return read_video(path, max_frames=max_frames, max_pixels=max_pixels, normalize=True)
