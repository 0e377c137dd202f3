"""The CUDA kernels as a Python module that runs them on CPU tensors, thread by thread, and watches every memory access.

>>> from simt.build import load
>>> load().layer_norm_modulate_forward(x, shift, scale, cu_rows, False, None, None, 1e-6, out, mean, rstd)

The .cu files are compiled as C++ against the headers in include/, together with simt.cpp. A kernel that reads or writes outside
its tensors, reads what was never written, deadlocks or races raises RuntimeError, and so does a call that leaves part of an
output unwritten.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import inspect
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sora_kernels.signatures import SIGNATURES, Signature

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simt"
# Every access becomes a call, those to local and to global variables of known size excepted. Vectors are not taken apart (sra), so
# that a load of 16 bytes stays one, which must be aligned.
WATCH = (
    "-fsanitize=kernel-address --param asan-instrumentation-with-call-threshold=0 --param asan-stack=0 --param asan-globals=0 "
    "-fno-tree-sra -fno-strict-aliasing"
)
# -g1 gives reports their lines; native instructions make fmaf one of them.
FLAGS = f"-std=c++17 -O1 -g1 -fPIC -Wno-unknown-pragmas -Wno-attributes {'-march=native' if platform.machine() == 'x86_64' else ''}"
# See workspace.cpp.
WRAPPED = ("_ZN4sora4cuda8allocateERKNS_6TensorEl", "_ZN4sora4cuda7releaseEPv")


COMPILER = os.environ.get("SIMT_CXX", "g++")


def compiler() -> str:
    """The path of g++, without which there is no harness."""
    path = shutil.which(COMPILER)
    if path is None:
        raise RuntimeError("the SIMT harness needs g++ (clang lacks one of the flags it is built with)")
    return path


def ninja_file(name: str, sources: Sequence[Path], output: Path) -> str:
    """The build graph of a module made of kernels, bindings and the harness."""
    import pybind11

    includes = " ".join(f"-I{path}" for path in (HERE / "include", pybind11.get_include(), sysconfig.get_paths()["include"]))
    lines = [
        "rule compile",
        f"  command = {compiler()} {FLAGS} {includes} -DSORA_DEVICE_TYPE=1 '-DSORA_CUDA_ARCHS=\"simt\"' $flags "
        "-MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -shared {' '.join(f'-Wl,--wrap={symbol}' for symbol in WRAPPED)} $in -o $out.new -ldl "
        "&& mv $out.new $out",
    ]
    objects = []
    for source in (*sources, HERE / "simt.cpp"):
        objects.append(f"{output.parent / name}.{source.name}.o")
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {WATCH if source.suffix == '.cu' else '-O3'}"]
    return "\n".join([*lines, f"build {output}: link {' '.join(objects)}", f"default {output}", ""])


def build(name: str, sources: Sequence[Path]) -> Path:
    """Compiles what changed; RuntimeError with the compiler's words if it fails."""
    import ninja

    BUILD.mkdir(parents=True, exist_ok=True)
    output = BUILD / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    graph = BUILD / f"{name}.ninja"
    text = ninja_file(name, sources, output)
    with (BUILD / "lock").open("w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not graph.exists() or graph.read_text() != text:
            graph.write_text(text)
        command = [Path(ninja.BIN_DIR) / "ninja", "-f", graph]
        result = subprocess.run(command, cwd=BUILD, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the SIMT harness could not be built:\n{result.stdout}")
    return output


def load_extension(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is no Python extension")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load() -> ModuleType:
    """The module `_cuda` on the harness: its functions, watched."""
    path = build("_cuda", [*sorted(CUDA.glob("*.cu")), CUDA / "bindings.cpp", HERE / "workspace.cpp"])
    extension, watched = load_extension("_cuda", path), Watched(path)
    module = ModuleType("simt")
    for name, function in inspect.getmembers(extension, callable):
        if name in SIGNATURES:
            function = watched.function(function, SIGNATURES[name])
        setattr(module, name, function)
    return module


def tensors(value: Any) -> Iterator[Tensor]:
    """Those that have memory here. Others are for the bindings to refuse."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided and value.is_cpu and value.data_ptr():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


class Watched:
    """The harness inside a built module: it learns of each call's tensors and turns addresses in its reports into lines."""

    lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.simt_written.restype = ctypes.c_bool

    def function(self, function: Callable, signature: Signature) -> Callable:
        """`function` with every access to its arguments checked."""

        @functools.wraps(function)
        def call(*args: Any, **arguments: Any) -> None:
            named = {**dict(zip(signature.arguments, args, strict=False)), **arguments}
            with self.lock:
                try:
                    for name, argument in named.items():
                        for tensor in tensors(argument):
                            self.library.simt_add(*self.describe(tensor), ctypes.c_bool(name in signature.outputs))
                    function(*args, **arguments)
                    for name in signature.outputs:
                        for tensor in tensors(named.get(name)):
                            if not self.library.simt_written(*self.describe(tensor)):
                                raise RuntimeError(f"{function.__name__}: {name} {list(tensor.shape)} is not wholly written")
                except RuntimeError as error:
                    raise RuntimeError(self.readable(str(error))) from None
                finally:
                    self.library.simt_clear()

        return call

    @staticmethod
    def describe(x: Tensor) -> tuple:
        x = x[tuple(slice(0, 1 if stride == 0 else None) for stride in x.stride())]  # one element again and again: huge axes, too
        numbers = ctypes.c_int64 * x.ndim
        return ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.element_size()), x.ndim, numbers(*x.shape), numbers(*x.stride())

    def readable(self, report: str) -> str:
        return re.sub(r"\{(0x[0-9a-f]+)\}", lambda match: self.place(match[1]), report)

    def place(self, address: str) -> str:
        """Function and line of an address in the library, or the address if there is no addr2line."""
        if shutil.which("addr2line") is None:
            return address
        command = ["addr2line", "-f", "-C", "-s", "-e", str(self.path), address]
        function, line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return f"{function.replace('(anonymous namespace)::', '').partition('(')[0].removeprefix('void ')} ({line})"
