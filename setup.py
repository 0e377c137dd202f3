"""Builds the compiled backends with ninja: no torch is needed, so the build works in isolation and serves every torch version.

`_cpu` is always built. `_cuda` is built where there is an nvcc, with or without a GPU.

Environment:
    CXX                        the C++ compiler
    MAX_JOBS                   limits parallel compilations
    SORA_KERNELS_CUDA          1 demands `_cuda`, 0 leaves it out; by default it is built if an nvcc is found
    SORA_KERNELS_SANITIZE      1 or address builds `_cpu` with AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`;
                               thread builds it with ThreadSanitizer, for `make races`
    SORA_KERNELS_CUDA_ARCHS    GPU architectures such as "80;90a"; by default those of the GPUs present, or else 80;90a
    CUDA_HOME, CUDA_PATH       where the CUDA toolkit is; by default that of the nvcc on the PATH, or else /usr/local/cuda
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU, CUDA = ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"

# No -ffast-math: its start-up code would change the float mode of the whole process, and NaNs must stay NaNs.
CPU_FLAGS = "-std=c++17 -O3 -g0 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra"
# Lines in reports, and no more time than needed: vptr would look into pybind11. What `address` reports ends the process.
_REPORTED = "-O1 -g1 -fno-omit-frame-pointer"
_ADDRESS = f"{_REPORTED} -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
SANITIZE_FLAGS = {"1": _ADDRESS, "address": _ADDRESS, "thread": f"{_REPORTED} -fsanitize=thread"}
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"

# Each tier compiles the same sources: name, vector width in bytes, flags, sources. bindings.cpp picks one at import.
ATTENTION = [
    name + direction
    for name in ("attention", "spatiotemporal_attention", "block_sparse_attention")
    for direction in ("", "_backward")
]
PRODUCTS = [*ATTENTION, "patch_embed"]
KERNELS = [*PRODUCTS, "rope", "norm_rope", "adaln", "bias_gelu", "limits"]
TIERS = [("baseline", 16, "", KERNELS)]
if platform.machine() in ("x86_64", "AMD64"):
    TIERS += [("avx2", 32, "-march=x86-64-v3", KERNELS), ("avx512", 64, "-march=x86-64-v4", KERNELS)]
    TIERS += [("avx512bf16", 64, "-march=x86-64-v4 -mavx512bf16", KERNELS)]
    TIERS += [("amx", 64, "-march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16 -DSORA_TILES", PRODUCTS)]

MINIMUM_NVCC = (12, 0)
DEFAULT_ARCHS = ["80", "90a"]


class Graph:
    """A ninja file that compiles sources into objects and links them into a module."""

    def __init__(self, output: Path, objects: Path, compiler: str, link: str) -> None:
        import pybind11

        self.output, self.objects, self.built = output, objects, list[str]()
        # A copy: the headers of an isolated build vanish with it, and ninja compiles again where one is gone or its path is new.
        self.pybind11 = objects.parent / f"pybind11-{pybind11.__version__}"
        self.lines = [
            "rule compile",
            f"  command = {compiler} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            # Moved into place whole: overwriting a library that a running process has mapped would crash that process.
            f"  command = {link} $in -o $out.new && mv $out.new $out",
            "  description = link $out",
        ]

    def add(self, source: Path, name: str, flags: str = "") -> None:
        self.built.append(f"{self.objects / name}.o")
        self.lines += [f"build {self.built[-1]}: compile {source}", f"  flags = {flags}"]

    def add_bindings(self, source: Path) -> None:
        """The only source that knows Python."""
        self.add(source, "bindings", f"-I{self.pybind11} -I{sysconfig.get_paths()['include']}")

    def copy_headers(self) -> None:
        import pybind11

        if not self.pybind11.exists():
            part = self.pybind11.with_name(f"{self.pybind11.name}.{os.getpid()}")
            shutil.copytree(pybind11.get_include(), part)
            part.rename(self.pybind11)

    def text(self) -> str:
        target = [f"build {self.output}: link {' '.join(self.built)}", f"default {self.output}"]
        return "\n".join([*self.lines, *target, ""])


def cpu_graph(output: Path, objects: Path) -> Graph:
    """Module _cpu: bindings once, every kernel source once per tier."""
    cxx = os.environ.get("CXX", "c++")
    sanitize = os.environ.get("SORA_KERNELS_SANITIZE", "")
    if sanitize not in ("", "0", *SANITIZE_FLAGS):
        sys.exit(f"SORA_KERNELS_SANITIZE: expected one of 0, {', '.join(SANITIZE_FLAGS)}, got {sanitize!r}")
    extra = SANITIZE_FLAGS.get(sanitize, "")
    link = extra or "-s"
    graph = Graph(output, objects, f"{cxx} {CPU_FLAGS} {extra}", f"{cxx} -shared -fopenmp {link}")
    for tier, width, flags, kernels in reversed(TIERS):
        for kernel in kernels:
            graph.add(CPU / f"{kernel}.cpp", f"{kernel}.{tier}", f"-DSORA_TIER={tier} -DSORA_VECTOR_BYTES={width} {flags}")
    graph.add_bindings(CPU / "bindings.cpp")
    return graph


def cuda_graph(output: Path, objects: Path, nvcc: Path) -> Graph:
    """Module _cuda: kernels for every architecture, with the CUDA runtime linked in."""
    archs = architectures(nvcc)
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # and instructions from which drivers compile for newer GPUs; those of an architecture with a letter run on it alone
    newest = max(int(re.sub(r"\D", "", arch)) for arch in archs)
    codes.append(f"-gencode arch=compute_{newest},code=compute_{newest}")
    host = f"{nvcc} -ccbin {os.environ['CXX']}" if "CXX" in os.environ else str(nvcc)
    graph = Graph(output, objects, f"{host} {NVCC_FLAGS}", f"{host} -shared -cudart static -Xlinker -s")
    for source in sorted(CUDA.glob("*.cu")):
        graph.add(source, source.stem, f"{' '.join(codes)} '-DSORA_CUDA_ARCHS=\"{';'.join(archs)}\"'")
    graph.add_bindings(CUDA / "bindings.cpp")
    return graph


def find_nvcc() -> Path | None:
    """The nvcc to build `_cuda` with; None, after a line that says why, if it is to be left out."""
    wanted = os.environ.get("SORA_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"SORA_KERNELS_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [*homes, *([Path(on_path).resolve()] if on_path else []), Path("/usr/local/cuda/bin/nvcc")]
    nvcc = next((path for path in candidates if path.is_file()), None)
    if nvcc is None:
        return without_cuda("no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda", wanted)
    release = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    )
    if release is None or (int(release[1]), int(release[2])) < MINIMUM_NVCC:
        found = f"is version {release[1]}.{release[2]}" if release else "does not tell its version"
        return without_cuda(f"{nvcc} {found}, and {MINIMUM_NVCC[0]}.{MINIMUM_NVCC[1]} or newer is needed", wanted)
    if not architectures(nvcc):
        return without_cuda(f"{nvcc} no longer compiles for this machine's GPUs ({', '.join(present_architectures())})", wanted)
    return nvcc


def without_cuda(reason: str, wanted: str) -> None:
    if wanted == "1":
        sys.exit(f"sora_kernels: SORA_KERNELS_CUDA=1, but {reason}")
    print(f"sora_kernels: without the CUDA kernels: {reason}", file=sys.stderr)


def architectures(nvcc: Path) -> list[str]:
    """GPU architectures to compile for, such as 80 and 90a; none if this nvcc is too new for the GPUs present."""
    text = os.environ.get("SORA_KERNELS_CUDA_ARCHS")
    if not text:
        return known_to(nvcc, present_architectures()) if present_architectures() else DEFAULT_ARCHS
    archs = list(dict.fromkeys(text.replace(".", "").replace(";", " ").replace(",", " ").split()))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            sys.exit(f"SORA_KERNELS_CUDA_ARCHS: expected architectures such as 80;90a, got {text!r}")
    return archs


@functools.cache
def present_architectures() -> list[str]:
    """Those of the GPUs in this machine."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return list(dict.fromkeys(text.replace(".", "").split()))


def known_to(nvcc: Path, present: list[str]) -> list[str]:
    """For each GPU the newest architecture up to its own that this nvcc knows; nothing for a GPU that it no longer knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = [int(number) for number in re.findall(r"compute_(\d+)", listed)]
    if not known:
        return present
    return list(dict.fromkeys(str(max(k for k in known if k <= int(arch))) for arch in present if int(arch) >= min(known)))


class NinjaBuild(build_ext):
    """setuptools' build_ext with ninja doing the work."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # setuptools would build in a folder that it then removes; --inplace builds in this one
            usual = Distribution().get_command_obj("build")
            usual.ensure_finalized()
            self.build_temp = str(ROOT / usual.build_temp)

    def build_extension(self, ext: Extension) -> None:
        import ninja

        name = ext.name.rpartition("_")[2]
        objects = (Path(self.build_temp) / name).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        graph = cpu_graph(output, objects) if NVCC is None or name == "cpu" else cuda_graph(output, objects, NVCC)
        graph.copy_headers()
        (objects / "build.ninja").write_text(graph.text())
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        try:
            subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", objects, *jobs], check=True)
        except subprocess.CalledProcessError as error:
            hint = "; SORA_KERNELS_CUDA=0 leaves the CUDA kernels out" if name == "cuda" else ""
            sys.exit(
                f"sora_kernels: compiling _{name} failed (ninja exit status {error.returncode}); the first error is above{hint}"
            )


NVCC = find_nvcc()
depends = [
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cuh", ".cu", ".cpp")
]
modules = [Extension("sora_kernels._cpu", sorted(str(path.relative_to(ROOT)) for path in CPU.glob("*.cpp")), depends=depends)]
if NVCC is not None:
    modules.append(Extension("sora_kernels._cuda", [str((CUDA / "bindings.cpp").relative_to(ROOT))], depends=depends))
setup(ext_modules=modules, cmdclass={"build_ext": NinjaBuild})
