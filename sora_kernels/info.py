"""What runs here: versions, processor, threads, GPUs and the backends of every op (`python -m sora_kernels.info`)."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from typing import Any

import torch

try:
    from . import __version__, backends, flash, memory
except ValueError as wrong:  # a setting, which is read where it is imported
    if __name__ != "__main__":
        raise
    print(f"error: {wrong}", file=sys.stderr)
    sys.exit(2)

_PACKAGES = ("torch", "triton", "flash-attn", "einops", "numpy", "diffusers", "transformers")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_lines() -> list[str]:
    try:
        _cpu: Any = backends.BACKENDS["cpu"].load()
    except ImportError as error:
        return [f"module _cpu: cannot be imported: {error}"]
    tiers = ", ".join(name if supported else f"{name} (not supported here)" for name, supported in _cpu.isa_tiers())
    forced = os.environ.get("SORA_KERNELS_ISA")
    how = f"forced by SORA_KERNELS_ISA={forced}" if forced else "best supported"
    return [
        f"instruction set: {_cpu.isa()} ({how}; built: {tiers})",
        f"threads: {_cpu.num_threads()} (torch: {torch.get_num_threads()}; set with torch.set_num_threads)",
        f"memory kept for large outputs: at most {memory.cache_limit() >> 20} MiB (SORA_KERNELS_CACHE_MB)",
    ]


def _gpu_lines() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPUs: none"]
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"GPU {i}: {p.name}, compute capability {p.major}.{p.minor}" for i, p in enumerate(names)]


def _op_lines(
    device: str, functions: Iterable[str] = backends.FUNCTIONS, dtype: torch.dtype = torch.float32, preference: str | None = None
) -> list[str]:
    """A line per function, then the reasons that the lines refer to by number."""
    lines: list[str] = []
    reasons: list[str] = []
    for function in functions:
        parts = []
        for name, reason in backends.candidates(function, device, dtype, preference=preference):
            if reason is not None:
                reason = f"{name} {reason}".replace(f"has no {function}", "does not have this function")
                if reason not in reasons:
                    reasons.append(reason)
                name = f"not {name} ({reasons.index(reason) + 1})"
            elif (width := backends.BACKENDS[name].max_width.get(function)) is not None:
                name = f"{name} (last axis to {width})"
            parts.append(name)
        lines.append(f"  {function:<44}{' -> '.join(parts)}")
    return lines + [f"  ({i}) {reason}" for i, reason in enumerate(reasons, 1)]


def report() -> str:
    """The text that `python -m sora_kernels.info` prints."""
    lines = [f"sora_kernels {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    lines.append(", ".join(f"{package} {version(package)}" for package in _PACKAGES))
    lines += _cpu_lines() + _gpu_lines()
    forced = os.environ.get("SORA_KERNELS_BACKEND")
    lines.append(f"backend: forced by SORA_KERNELS_BACKEND={forced}" if forced else "backend: the first in each list that can run")
    lines.append(f"preferred: {backends.preferred()} (sora_kernels.prefer)")
    for device in ("cpu", "cuda"):
        absent = " (this machine has none)" if device == "cuda" and not torch.cuda.is_available() else ""
        lines += ["", f"backends for {device} tensors{absent}, in the order in which they are asked:", *_op_lines(device)]
    gpu = "the GPU" if torch.cuda.is_available() else "a Hopper GPU"
    lines += ["", f"after sora_kernels.prefer('fastest'), for 16-bit tensors on {gpu}, where each may still refuse a call:"]
    lines += _op_lines("cuda", flash.FUNCTIONS, torch.bfloat16, "fastest")
    lines += ["", "float64 is served by the reference everywhere."]
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m sora_kernels.info", description=__doc__).parse_args()
    try:
        print(report())
    except ValueError as error:  # a setting that is wrong
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
