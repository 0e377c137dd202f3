"""The first stage: what machine this is, and the compiled modules: python -m benchmarks.gpu.environment [PREPARED]

Modules come from the prepared folder if they were built from the same sources for this Python, or else from a build here. Kernels
that Triton compiled ahead come from it if it was the same Triton and for this GPU; they go where TRITON_CACHE_DIR says.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import prepared, rows, simulated, simulated_gpu
from sora_kernels.info import version

ROOT = Path(__file__).parents[2]
TAKEN = "taken from the prepared folder"
PACKAGES = ("triton", "einops", "numpy", "pytest", "pybind11", "ninja")


def printed(*command: str, seconds: float = 20.0) -> str:
    """What a program prints, on the log as well; nothing if it is not there or fails."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{command[0]}: {rows.one_line(error)}", flush=True)
        return ""
    print(text, flush=True)
    return text


def machine(_: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {package: version(package) for package in PACKAGES}
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if shutil.which("nvidia-smi") else ""
    found["driver"] = driver.strip()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        for name in ("multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin"):
            found[name] = getattr(properties, name, None)  # not every torch tells all of them
    return {"machine": found}


def why_not(place: Callable[[], str | None]) -> str | None:
    """Why nothing was taken from the prepared folder, faults of the folder included."""
    try:
        return place()
    except Exception as error:
        traceback.print_exc()
        return rows.one_line(error)


def kernels(folder: Path | None) -> dict[str, Any]:
    reason = why_not(lambda: prepared.place_kernels(folder)) if folder else "no prepared folder"
    return {"prepared": "kernels", "how": f"{reason}; compiled when first used" if reason else TAKEN}


def modules(folder: Path | None) -> dict[str, Any]:
    reason = why_not(lambda: prepared.place_modules(folder, ROOT)) if folder else "no prepared folder"
    return {"prepared": "modules", "how": f"{reason}; {prepared.build(ROOT, os.environ)}" if reason else TAKEN}


def main() -> None:
    simulated.install()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] else None
    for name, step in (("machine", machine), ("kernels", kernels), ("modules", modules)):
        try:
            rows.emit(**step(folder))
        except Exception as error:  # whatever it is, the next step may do
            traceback.print_exc()
            rows.emit(error=rows.one_line(error), item=name)
    if not simulated_gpu():
        printed(sys.executable, "-m", "sora_kernels.info")
    print(f"cache of compiled kernels: {os.environ.get('TRITON_CACHE_DIR', 'the default')}", flush=True)


if __name__ == "__main__":
    main()
