"""A GPU that is not there: torch.cuda and Triton's driver in CPU tensors, for rehearsals and for compiling ahead of time.

A process in which SIMULATED_GPU names an architecture ("sm90") and that calls `install()` first sees one GPU. Tensors asked for on
"cuda" lie on the CPU. A Triton kernel goes the real way, through Triton's binder, compiler, cache and launcher, to a driver library
that only writes launches down (libcuda.c); what it should have written is then computed by the package's CPU kernels, and so is all
that module _cuda does. Results are right, times mean nothing.

What it cannot show: what a kernel computes (Triton's interpreter and tests/simt do), and CUDA graphs.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from benchmarks.gpu import GPUS, NAME, SIMULATED, simulated_gpu
from benchmarks.launches import run_on_triton
from sora_kernels import backends

_installed = False


def install() -> None:
    """Makes the GPU that the environment asks for; nothing if it asks for none."""
    global _installed
    arch = simulated_gpu()
    if arch is None or _installed:
        return
    if arch not in GPUS:
        sys.exit(f"{SIMULATED}: expected one of {', '.join(GPUS)}, got {arch!r}")
    if torch.cuda.is_available():
        sys.exit(f"{SIMULATED}={arch}, but there is a GPU, which CUDA_VISIBLE_DEVICES= hides")
    _installed = True
    _set_torch_cuda(arch)
    _set_triton_driver(arch)
    _set_backends()
    OnCPU().__enter__()


def launch_only(arch: str) -> None:
    """Ops on CPU tensors launch Triton's kernels for this GPU up to the driver, and compute nothing: what a call costs the host."""
    _set_triton_driver(arch)
    run_on_triton()


class OnCPU(TorchFunctionMode):
    """Whatever is asked for on a GPU is made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.device:  # a name alone
            return function(*args, **kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if any(_is_cuda(x) for x in args):
            args = tuple(torch.device("cpu") if _is_cuda(x) else x for x in args)
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


def _is_cuda(x: Any) -> bool:
    return (isinstance(x, str) and x.partition(":")[0] == "cuda") or (isinstance(x, torch.device) and x.type == "cuda")


class Event:
    """An event of the host's clock."""

    def __init__(self, **_: Any) -> None:
        self.seconds = 0.0

    def record(self, *_: Any) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds, never none."""
        return max(1e3 * (end.seconds - self.seconds), 1e-6)


class Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _set_torch_cuda(arch: str) -> None:
    multiprocessors, per_block, per_multiprocessor = GPUS[arch]
    major, minor = divmod(int(arch.removeprefix("sm")), 10)
    properties = SimpleNamespace(
        name=NAME, major=major, minor=minor, multi_processor_count=multiprocessors, total_memory=80 << 30, L2_cache_size=50 << 20,
        shared_memory_per_block_optin=per_block, shared_memory_per_multiprocessor=per_multiprocessor, warp_size=32, gcnArchName="",
    )  # fmt: skip
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (major, minor),
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
    }
    for name in ("synchronize", "empty_cache", "_sleep", "set_device", "set_sync_debug_mode", "_lazy_init", "init"):
        stand_ins[name] = lambda *_, **__: None  # one for each: Dynamo has a table of torch's functions, without duplicates
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    for name in ("start", "stop"):
        setattr(torch.cuda.profiler, name, lambda: None)


def _set_triton_driver(arch: str) -> None:
    """Triton's own driver for NVIDIA, on the library that records."""
    folder = driver_library()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["RECORDED_GPU"] = " ".join(map(str, GPUS[arch]))
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda *_: 0
            self.set_current_device = lambda *_: None
            self.get_device_capability = lambda *_: torch.cuda.get_device_capability()

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", int(arch.removeprefix("sm")), 32)

    driver.set_active(Driver())

    from sora_kernels.triton import configs, spatiotemporal_attention

    configs._forced = arch  # the tensors are a CPU's, for which there is no table
    spatiotemporal_attention.num_multiprocessors = lambda device: GPUS[arch][0]


@functools.cache
def driver_library() -> Path:
    """The folder with the library that records as libcuda.so.1, compiled where it is not yet: one for each source of it."""
    import triton.backends.nvidia

    source = Path(__file__).with_name("libcuda.c")
    folder = source.parents[2] / "build" / f"libcuda-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    if not (folder / "libcuda.so.1").exists():
        folder.mkdir(parents=True, exist_ok=True)
        include = Path(triton.backends.nvidia.__path__[0]) / "include"
        part = folder / f"libcuda.{os.getpid()}"
        compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*compiler, source, "-o", part], check=True)
        part.rename(folder / "libcuda.so.1")
    return folder


@dataclasses.dataclass(frozen=True)
class Simulated(backends.Backend):
    """A GPU's backend on CPU tensors."""

    stand_in: ModuleType = dataclasses.field(default_factory=lambda: ModuleType("none"))

    def load(self) -> ModuleType:
        return self.stand_in


def _launched_and_computed(launch: Callable[..., None], compute: Callable[..., None], **arguments: Any) -> None:
    launch(**arguments)
    compute(*arguments.values())  # it is compiled


def _set_backends() -> None:
    """Triton's functions launch their kernels and compute on the CPU; those of module _cuda, where it is built, only compute.

    What the CPU has no kernel of, the reference computes.
    """
    cpu, reference = (backends.BACKENDS[name].load() for name in ("cpu", "reference"))
    for name in ("triton", "cuda"):
        backend = backends.BACKENDS[name]
        try:
            module = backend.load()
        except ImportError:
            continue
        stand_in = ModuleType(name)
        for function in backends.FUNCTIONS:
            if hasattr(module, function):
                launch, compute = getattr(module, function), getattr(cpu, function, None) or getattr(reference, function)
                both = functools.partial(_launched_and_computed, launch, compute)
                setattr(stand_in, function, compute if name == "cuda" else both)
        devices = ("cuda", "cpu")
        backends.BACKENDS[name] = Simulated(name, backend.module, devices, backend.dtypes, backend.max_width, stand_in)
    backends.ORDER["cpu"] = backends.ORDER["cuda"]
