"""Opening what others may have written: configs and weights from a local folder.

Weights are read from safetensors files of that folder alone, which cannot run code, by names that stay inside it. Their headers, a
few kilobytes, say what a config may ask for before any memory is taken. Weights that are not finite are an error.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from ..limits import MOST_DENOISING_STEPS, check_limit
from .documents import read_json_for

Module = TypeVar("Module", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]
DEEP = re.compile("depth|layer|blocks|attention_types")  # in the names of a config's numbers that say how deep a model is
# Modules, parameters and buffers of a model, which take 0.1 ms each even without memory: at most so many for each tensor beside the
# config, and PARTS_MORE, but never more than PARTS. Models of diffusers and transformers have up to 5 for each.
PARTS_EACH, PARTS_MORE, PARTS = 8, 1000, 2**15
# What a checkpoint may recommend for a call whose user says nothing.
DEFAULTS = {
    "num_inference_steps": (1, MOST_DENOISING_STEPS),
    "guidance_scale": (0, 1000),
    "guidance_from": (0, 1),
    "fps": (0.01, 1000),
}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
HEADER, HEADER_EACH = 2**20, 2**10  # bytes of a header that is read for each tensor: what it says of the whole, and of a tensor
BUFFER_BYTES = 2**28  # of buffers, which no file need have; masks of GPT-Neo's layers take 2**27


def read_json(path: Path, owner: str, *, constants: bool = False) -> dict[str, Any]:
    """An object in a JSON file of a checkpoint; `owner` is named in the error if it is not there or broken.

    constants: see `read_json_file`.
    """
    if not os.path.isfile(path):  # Path.is_file fails for a name that is too long
        raise FileNotFoundError(f"{owner}: expected a folder with {path.name}, got {path.parent}")
    values = read_json_for(owner, path, constants=constants)
    if not isinstance(values, dict):
        raise ValueError(f"{owner}: {path}: expected an object, got {type(values).__name__}")
    return values


def read_index(folder: Path, owner: str) -> dict[str, Any]:
    """What model_index.json says there is in a checkpoint: "size", and whether there is a "vae" and a "captioner".

    It may have "defaults" of a call and "trained_keyframes", which are {} and "any" if it has none.
    """
    index = read_json(folder / "model_index.json", owner)
    kind, known = index.get("_class_name"), {"_class_name", "size", "vae", "captioner", "defaults", "trained_keyframes"}
    if isinstance(kind, str) and kind != "SoraPipeline":
        raise ValueError(f"{owner}: model_index.json: _class_name: expected SoraPipeline, got {kind}")
    index = {"defaults": {}, "trained_keyframes": "any", **index}
    if set(index) != known or kind != "SoraPipeline":
        got = sorted(set(index) - {"defaults", "trained_keyframes"})
        raise ValueError(f"{owner}: model_index.json: expected a pipeline of this package, got {got}")
    size = index["size"]
    if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int and n >= 1 for n in size):
        raise ValueError(f"{owner}: model_index.json: size: expected [T, H, W], each at least 1, got {size!r}")
    check_defaults(index["defaults"], f"{owner}: model_index.json: defaults")
    for part in ("vae", "captioner"):
        if not isinstance(index[part], bool):
            raise ValueError(f"{owner}: model_index.json: {part}: expected true or false, got {index[part]!r}")
    return index


def check_defaults(defaults: Any, where: str) -> None:
    """Raises ValueError, which begins with `where`, for what a checkpoint cannot recommend."""
    if not isinstance(defaults, dict) or not all(k in DEFAULTS and type(v) in (int, float) for k, v in defaults.items()):
        raise ValueError(f"{where}: expected numbers for {', '.join(sorted(DEFAULTS))}, got {defaults!r}")
    for name, value in defaults.items():
        low, high = DEFAULTS[name]
        if not low <= value <= high or (name == "num_inference_steps" and type(value) is not int):
            kind = "a whole number" if name == "num_inference_steps" else "a number"
            raise ValueError(f"{where}: {name}: expected {kind} from {low} to {high}, got {value!r}")


def built(kind: Callable[..., Any], config: dict[str, Any], owner: str, file: str | Path) -> Any:
    """kind(**config); keys and values that it does not take are an error that says so. file: that has them."""
    try:
        return kind(**config)
    except MemoryError:
        raise
    except Exception as error:  # libraries have kinds of their own
        text = str(error) or type(error).__name__
        raise ValueError(text if text.startswith(owner) else f"{owner}: {file}: {text}") from None


def built_without_memory(kind: Callable[..., Any], config: dict[str, Any], shapes: Shapes, owner: str, file: str | Path) -> Any:
    """kind(**config), a module on the device "meta": what `built` would make, in sizes alone.

    shapes: of the tensors beside the config. Raises as `built` does, and ValueError for a module of far more parts than there are
    tensors, whatever in its config asks for them, or of larger buffers.
    """
    where = f"{owner}: {file}"
    most = min(PARTS_EACH * len(shapes) + PARTS_MORE, PARTS)
    with torch.device("meta"), _counting(most, f"{where}: expected a model for the {len(shapes)} tensors beside it"):
        module = built(kind, config, owner, file)
    # Not by a model's own `to`, which may warn. Copies of tensors that were made before, as of wavelets, lie where these do.
    nn.Module.to(module, "meta")
    # Some keep tables without registering them.
    plain = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    size = sum(value.numel() * value.element_size() for value in (*module.buffers(), *plain))
    allowed = max(BUFFER_BYTES, 4 * sum(math.prod(shape) for shape in shapes.values()))
    if size > allowed:
        raise ValueError(f"{where}: expected a model with buffers of at most {allowed:,} bytes, got {size:,}")
    return module


@contextlib.contextmanager
def _counting(most: int, where: str) -> Iterator[None]:
    """Within it, this thread may build at most so many modules, parameters and buffers. where: how the error begins."""
    count, builder = 0, threading.get_ident()

    def look(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == builder  # the hooks are those of the whole process
        if count > most:
            raise ValueError(f"{where}, got one of more than {most:,} modules, parameters and buffers")

    with contextlib.ExitStack() as hooks:
        for register in (
            registration.register_module_module_registration_hook,
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
        ):
            hooks.callback(register(look).remove)
        yield


def open_module(build: Callable[[], Module], config: Mapping[str, Any], folder: Path, owner: str, stem: str = "model") -> Module:
    """build() with the weights of a folder, in the dtype that it builds them in.

    Args:
        build: makes the module that `config` describes.
        stem: of the weights' files, `stem`.safetensors or shards with an index.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a broken file; weights that are missing, left over, of another shape or not finite; a config that asks for more.
    """
    files = weight_files(folder, stem, owner)
    shapes, where, path = read_shapes(files, owner), place(files, owner), folder / "config.json"
    check_depth(config, shapes, f"{owner}: {path}")
    check_shapes(built_without_memory(build, {}, shapes, owner, path), shapes, where)
    module = build()
    load_distinct(module, read_tensors(files, owner), where)
    return module


def weight_files(folder: Path, stem: str, owner: str) -> list[Path]:
    """`stem`.safetensors of a folder, or the files that `stem`.safetensors.index.json names, all in that folder."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        if not whole.is_file():
            pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
            only = f" with {pickles[0]}: pickles are not read" if pickles else ""
            raise FileNotFoundError(f"{owner}: expected a folder with {whole.name}, got {folder}{only}")
        return [whole]
    places = read_json(index, owner).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{owner}: {index}: weight_map: expected names of tensors and their files, got {places!r}")
    for name in places.values():
        if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{owner}: {index}: weight_map: expected names of safetensors files in this folder, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{owner}: {index}: weight_map: expected {folder / name}, which is not there")
    return [folder / name for name in sorted(set(places.values()))]


def place(files: Sequence[Path], owner: str) -> str:
    """How an error about weights of these files begins: with the file, or with the folder of several."""
    return f"{owner}: {files[0] if len(files) == 1 else files[0].parent}"


def check_header(path: Path, owner: str) -> int:
    """Bytes of a safetensors file's header, which has its tensors' names. Raises ValueError where they are over limit or file."""
    if not path.is_file():
        raise ValueError(f"{owner}: {path}: expected a file of safetensors, got something else")  # a pipe would be waited for
    with path.open("rb") as file:
        first, size = file.read(8), os.fstat(file.fileno()).st_size
    if len(first) < 8:
        return 0  # safetensors says so
    (header,) = struct.unpack("<Q", first)
    if header > size:  # of something else; to raise the limit would not help
        raise ValueError(f"{owner}: {path}: expected safetensors, got {size} bytes that begin as a header of {header} would")
    check_limit("header_bytes", header, f"{owner}: {path}: header of safetensors", "bytes")
    return int(header)


def read_shapes(files: Sequence[Path], owner: str) -> Shapes:
    """The shapes of all tensors in safetensors files, from their headers."""
    shapes: Shapes = {}
    for path in files:
        with opened(path, owner) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return shapes


@contextlib.contextmanager
def opened(path: Path, owner: str) -> Iterator[Any]:
    """A safetensors file, whose tensors are read within this.

    Raises ValueError for another file, and for one that is larger than memory: it cannot be mapped.
    """
    check_header(path, owner)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, TypeError) as error:  # torch's, of a shape that no tensor has
        raise ValueError(f"{owner}: {path}: expected safetensors, got {error}") from None
    except RuntimeError as error:
        raise ValueError(f"{owner}: {path}: expected a file that this machine can map, got {error}") from None


def read_tensors(files: Sequence[Path], owner: str) -> dict[str, Tensor]:
    """All tensors in safetensors files; one that is not finite is an error, which costs 0.05 s per GB."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with opened(path, owner) as file:
            read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, value in read.items():
            check_finite(value, f"{owner}: {path}: {name}")
        tensors |= read
    return tensors


def open_tensors(files: Sequence[Path], owner: str) -> Callable[[str], Tensor]:
    """Opens weights of safetensors files one at a time, by name, for the caller to copy; numbers that are not finite are an error.

    They lie in the file's pages. A file is opened for each tensor, as what was read of an open one stays in memory.
    """
    homes: dict[str, Path] = {}
    for path in files:
        with opened(path, owner) as file:
            names = list(file.keys())
        if (header := check_header(path, owner)) > HEADER + HEADER_EACH * len(names):
            expected = f"a header of at most {HEADER + HEADER_EACH * len(names)} bytes for {len(names)} tensors"
            raise ValueError(f"{owner}: {path}: expected {expected}, got {header}")  # it is read for each
        homes |= dict.fromkeys(names, path)

    def read(name: str) -> Tensor:
        with opened(homes[name], owner) as file:
            value = file.get_tensor(name)
        check_finite(value, f"{owner}: {homes[name]}: {name}")
        check_kind(value, torch.float32, f"{owner}: {homes[name]}: {name}")
        return value

    return read


def check_kind(value: Tensor, dtype: torch.dtype, where: str) -> None:
    """Raises ValueError for whole numbers where floats of `dtype` belong, such as quantized weights without their scales."""
    if value.is_floating_point() != dtype.is_floating_point:
        expected, got = (str(one).removeprefix("torch.") for one in (dtype, value.dtype))
        raise ValueError(f"{where}: expected {expected}, or numbers of that kind, got {got}")


def check_finite(value: Tensor, where: str) -> None:
    """Raises ValueError for NaN and infinity, and for kinds of numbers that no model has, where torch could not tell."""
    if value.is_complex() or value.dtype is torch.float4_e2m1fn_x2:
        raise ValueError(f"{where}: expected real numbers of 8 bits or more, got {str(value.dtype).removeprefix('torch.')}")
    if not value.is_floating_point() or not value.numel():
        return
    # One pass without a mask in memory, which NaN passes through. Types of 8 bits have no such function.
    ends = torch.stack((value if value.element_size() > 1 else value.float()).aminmax())
    if not ends.isfinite().all():
        raise ValueError(f"{where}: expected finite numbers, got {'NaN' if ends.isnan().any() else 'infinity'}")


def check_depth(config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """Raises ValueError for more layers than there are weights, of which a class of config may make a list before any is built."""
    for name, value in config.items():
        left = [value]
        while left:
            one = left.pop()
            if isinstance(one, Mapping):
                check_depth(one, shapes, where)
            elif isinstance(one, list):
                left += one
            elif DEEP.search(name) and isinstance(one, int | float) and one > len(shapes):
                expected = f"at most {len(shapes)}, the number of tensors beside it"
                raise ValueError(f"{where}: {name}: expected {expected}, got {one:.40g}")


def check_shapes(module: nn.Module, shapes: Shapes, where: str) -> None:
    """Raises ValueError for weights that are missing, left over or of another shape."""
    expected = {name: tuple(value.shape) for name, value in distinct_state(module).items()}
    for name in {**expected, **shapes}:
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"{where}: {name}: expected shape {expected.get(name)}, got {shapes.get(name)}")


def load_distinct(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Takes what `distinct_state` gave into a module.

    Raises ValueError for weights that are missing, left over, of another shape, or whole numbers instead of floats.
    """
    check_shapes(module, {name: tuple(value.shape) for name, value in weights.items()}, where)
    for name, own in distinct_state(module).items():
        check_kind(weights[name], own.dtype, f"{where}: {name}")
    module.load_state_dict(weights, strict=False)


def distinct_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without second names of one tensor (tied embeddings)."""
    state = module.state_dict(keep_vars=True)
    names = {id(value): name for name, value in reversed(state.items())}
    return {name: value.detach() for name, value in state.items() if names[id(value)] == name}
