"""Builds the compiled backends with ninja: no torch is needed, so the build works in isolation and serves every torch version.

Environment: CXX names the compiler, MAX_JOBS limits parallel compilations.
"""

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU = ROOT / "csrc" / "cpu"

# No -ffast-math: its start-up code would change the float mode of the whole process, and NaNs must stay NaNs.
FLAGS = "-std=c++17 -O3 -g0 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra"

# Each tier compiles the same sources: name, vector width in bytes, flags. bindings.cpp picks one at import.
TIERS = [("baseline", 16, "")]
if platform.machine() in ("x86_64", "AMD64"):
    TIERS += [("avx2", 32, "-march=x86-64-v3"), ("avx512", 64, "-march=x86-64-v4")]
KERNELS = ["attention", "rope", "adaln", "patch_embed"]


def ninja_file(output: Path, objects: Path) -> str:
    """The build graph of module _cpu: bindings once, every kernel source once per tier."""
    import pybind11

    includes = " ".join(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"]))
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        "rule compile",
        f"  command = $cxx {FLAGS} {includes} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        # Moved into place whole: overwriting a library that a running process has mapped would crash that process.
        "  command = $cxx -shared -fopenmp -s $in -o $out.new && mv $out.new $out",
        "  description = link $out",
    ]
    built = []

    def compile_(source: Path, name: str, flags: str = "") -> None:
        built.append(f"{objects / name}.o")
        lines.extend([f"build {built[-1]}: compile {source}", f"  flags = {flags}"])

    for tier, width, flags in reversed(TIERS):
        for kernel in KERNELS:
            compile_(CPU / f"{kernel}.cpp", f"{kernel}.{tier}", f"-DSORA_TIER={tier} -DSORA_VECTOR_BYTES={width} {flags}")
    compile_(CPU / "bindings.cpp", "bindings")
    return "\n".join([*lines, f"build {output}: link {' '.join(built)}", f"default {output}", ""])


class NinjaBuild(build_ext):
    """setuptools' build_ext with ninja doing the work."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        objects = (Path(self.build_temp) / "cpu").resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(output, objects))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        try:
            subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", objects, *jobs], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"sora_kernels: compiling _cpu failed (ninja exit status {error.returncode}); the first error is above")


sources = sorted(str(path.relative_to(ROOT)) for path in CPU.glob("*.cpp"))
depends = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
setup(ext_modules=[Extension("sora_kernels._cpu", sources, depends=depends)], cmdclass={"build_ext": NinjaBuild})
