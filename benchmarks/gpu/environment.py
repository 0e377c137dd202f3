"""The first stage: what machine this is, and the compiled modules: python -m benchmarks.gpu.environment [PREPARED]

Modules come from the prepared folder if they were built from the same sources for this Python, or else from a build here. Kernels
that Triton compiled ahead come from it if it was the same Triton and for this GPU; they go where TRITON_CACHE_DIR says.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import prepared, rows, simulated

ROOT = Path(__file__).parents[2]


def printed(*command: str, seconds: float = 20.0) -> str:
    """What a program prints, on the log as well; nothing if it is not there or fails."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{command[0]}: {rows.one_line(error)}", flush=True)
        return ""
    print(text, flush=True)
    return text


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton"),
    }  # fmt: skip
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if shutil.which("nvidia-smi") else ""
    found["driver"] = driver.strip()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        for name in ("multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin"):
            found[name] = getattr(properties, name, None)  # not every torch tells all of them
    return found


def build() -> str:
    """Builds the modules in place, or finds them up to date; how that went."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    print(text, flush=True)
    if done.returncode == 0:
        without = next((line for line in text.splitlines() if "without the CUDA kernels" in line), "")
        return without or "built here"
    raise RuntimeError(f"the modules were not built: {prepared.first_error(text)}")


def main() -> None:
    simulated.install()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] else None
    rows.emit(machine=machine())
    steps = [("modules", lambda: prepared.place_modules(folder, ROOT)), ("kernels", lambda: prepared.place_kernels(folder))]
    for step, place in steps:
        try:
            reason = place() if folder else "no prepared folder"
            if reason is None:
                rows.emit(prepared=step, how="taken from the prepared folder")
            else:
                rows.emit(prepared=step, how=f"{reason}; {'compiled when first used' if step == 'kernels' else build()}")
        except (OSError, RuntimeError, ValueError) as error:
            rows.emit(error=rows.one_line(error), item=step)
    if not simulated.asked():
        printed(sys.executable, "-m", "sora_kernels.info")
    print(f"cache of compiled kernels: {os.environ.get('TRITON_CACHE_DIR', 'the default')}", flush=True)


if __name__ == "__main__":
    main()
