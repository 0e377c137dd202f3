"""What the GPU kernels need, on paper: `python -m benchmarks.gpu_report [--arch sm90 ...] [--head-dim 64] [--dtype float16]`.

Runs every op on a typical workload, records Triton's launches instead of making them, and compiles the kernels for each
architecture. The compiled code has registers, spills, shared memory and tensor-core instructions. Module _cuda, which is compiled
already, is read in the same way. The table of work has the bytes that must move, with each input read once and each output written
once, and the FLOPs. It also has the time that these need at the rates of each GPU's data sheet.
No kernel runs: it is a plan, not a measurement.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.launches import ARCHS, Compiled, compilations
from benchmarks.works import Work, works
from sora_kernels import backends

# bfloat16 TFLOP/s without sparsity and TB/s of the vendors' data sheets (SXM parts).
GPUS = {"A100": (312, 2.04), "H100": (989, 3.35), "H200": (989, 4.8), "B200": (2250, 8.0), "MI300X": (1307, 5.3)}
TENSOR_CORE = r"wgmma\.mma_async|tcgen05\.mma\.|\bmma\.sync|v_mfma_\w+|v_wmma_\w+"
SASS = r"/\*[0-9a-f]{4,}\*/\s+(.*?);"  # an instruction behind its address
GCN = r"^\t(?:v|s|ds|buffer|global|flat|scratch)_.*$"


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    arch: str
    warps: int
    registers: int  # per thread
    spilled: int  # bytes of stack or registers that went to memory
    shared: int  # bytes per block
    tensor_core: dict[str, int]  # matrix instructions in the code, by name
    waits: int = 0  # for sm90's asynchronous matrix unit: as many as instructions if the compiler had to serialise them
    instructions: int = 0  # in all, of Triton's kernels
    constants: dict[str, Any] = field(default_factory=dict)


def microseconds(work: Work, gpu: str) -> float:
    """What a GPU needs for it at the rates of its data sheet."""
    teraflops, terabytes = GPUS[gpu]
    return max(work.teraflops / teraflops * 1e6, work.gigabytes / terabytes * 1e3)


def measured(compiled: Compiled, arch: str, disassemble: bool = True) -> Kernel:
    """What a kernel that Triton compiled needs.

    Args:
        disassemble: whether NVIDIA's binary code is read, too; without it `waits` and `instructions` are 0.
    """
    files = {Path(name).suffix: Path(path) for name, path in compiled.files.items()}
    code = files[".ptx" if ".ptx" in files else ".amdgcn"].read_text()
    found = re.findall(TENSOR_CORE, code)
    matrix = {word.rstrip("."): found.count(word) for word in sorted(set(found))}
    if ".cubin" in files:
        (usage,) = resource_usage(files[".cubin"]).values()
        registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]
        instructions, waits = sass(files[".cubin"]) if disassemble else (0, 0)
    else:
        registers, spilled = amd_metadata(code, "vgpr_count"), 4 * amd_metadata(code, "vgpr_spill_count")
        instructions, waits = len(re.findall(GCN, code, re.MULTILINE)), 0
    shared, warps = compiled.metadata["shared"], compiled.metadata["num_warps"]
    return Kernel(
        compiled.name, arch, warps, registers, spilled, shared, matrix, waits if matrix else 0, instructions, compiled.constants
    )  # fmt: skip


@functools.cache  # disassembling takes half as long as compiling, and a backward has its forward's kernels
def sass(binary: Path) -> tuple[int, int]:
    """How many instructions a cubin has, and how many of them wait for sm90's matrix unit."""
    instructions = re.findall(SASS, cuobjdump("-sass", binary))
    return len(instructions), sum("WARPGROUP.DEPBAR" in instruction for instruction in instructions)


def amd_metadata(code: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", code)
    if found is None:
        raise ValueError(f"gpu_report: expected {key} in the kernel's metadata, got none")
    return int(found[1])


def cuobjdump(option: str, binary: Path) -> str:
    """What the cuobjdump that Triton carries prints."""
    from triton import knobs

    return subprocess.run([knobs.nvidia.cuobjdump.path, option, binary], capture_output=True, text=True, check=True).stdout


def resource_usage(binary: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, arch) -> REG, STACK, SHARED, LOCAL ... of a cubin or a library."""
    usage, arch = {}, ""
    for line in cuobjdump("-res-usage", binary).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (.+?):?$", line):
            name = found[1]
        elif "REG:" in line:
            usage[name, arch] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return usage


def triton_kernels(
    dtype: torch.dtype, head_dim: int, arch: str, word: str = "", disassemble: bool = True
) -> dict[str, list[Kernel]]:
    """The Triton kernels of every work whose name has this word in it, by op, compiled for an architecture."""
    result: dict[str, list[Kernel]] = {}
    known: list[Kernel] = []  # a backward repeats its forward
    for work in works(dtype, head_dim):
        if word not in work.op:
            continue
        with compilations(arch) as compiled:
            work.run()
        result[work.op] = []
        for kernel in (measured(one, arch, disassemble) for one in compiled):
            if kernel not in known:
                known.append(kernel)
                result[work.op].append(kernel)
    return result


def cuda_kernels() -> list[Kernel]:
    """The kernels of module _cuda, by name and architecture: the most that any of its instantiations needs."""
    try:
        binary = Path(backends.BACKENDS["cuda"].load().__file__ or "")
    except ImportError:
        return []
    worst: dict[tuple[str, str], Kernel] = {}
    for (mangled, arch), usage in resource_usage(binary).items():
        name = f"_cuda.{function_name(mangled)}"
        kernel = worst.setdefault((name, arch), Kernel(name, arch, 0, 0, 0, 0, {}))
        kernel.registers = max(kernel.registers, usage["REG"])
        kernel.spilled = max(kernel.spilled, usage["STACK"] + usage["LOCAL"])
        kernel.shared = max(kernel.shared, usage["SHARED"])
    return [worst[key] for key in sorted(worst)]


def function_name(mangled: str) -> str:
    """The last of the names in _ZN<length><name><length><name>..."""
    name, rest = mangled, mangled.removeprefix("_ZN")
    while length := re.match(r"\d+", rest):
        begin, end = length.end(), length.end() + int(length[0])
        name, rest = rest[begin:end], rest[end:]
    return name


def render(found: Iterable[Work], title: str, kernels: dict[str, dict[str, list[Kernel]]], cuda: list[Kernel]) -> str:
    """The report as Markdown: the work, then the kernels."""
    import triton

    lines = ["# GPU kernels on paper", "", (__doc__ or "").split("\n\n")[1].strip(), ""]
    lines += [f"Compiled by Triton {triton.__version__}; another version's registers and spills differ.", ""]
    lines += [f"| {title} | bytes per unit | FLOPs per unit | {' | '.join(f'{gpu}, µs' for gpu in GPUS)} |"]
    lines += ["|---|---:|---:|" + "---:|" * len(GPUS)]
    for work in found:
        each = work.gigabytes * 1e9 / work.units
        per_unit = f"{each:,.{0 if each >= 100 else 2}f} per {work.unit} | {work.teraflops * 1e12 / work.units:,.0f}"
        lines.append(f"| {work.op} | {per_unit} | {' | '.join(f'{microseconds(work, gpu):.1f}' for gpu in GPUS)} |")
    lines += ["", "| kernel | architecture | warps | registers | spilled | shared, of limit | tensor-core instructions |"]
    lines += ["|---|---|---:|---:|---:|---:|---|"]
    for op in next(iter(kernels.values())):
        rows = [kernel for by_op in kernels.values() for kernel in by_op[op]]
        for kernel in sorted(rows, key=lambda kernel: kernel.name):
            matrix = ", ".join(f"{count} {name}" for name, count in kernel.tensor_core.items())
            matrix += f", {kernel.waits} waits" if kernel.waits else ""
            shared = f"{kernel.shared / 1024:.1f} / {ARCHS[kernel.arch][1]} KiB"
            cells = f"{kernel.warps} | {kernel.registers} | {kernel.spilled} | {shared} | {matrix}"
            lines.append(f"| {kernel.name} ({op}) | {kernel.arch} | {cells} |")
    for kernel in cuda:
        lines.append(f"| {kernel.name} | {kernel.arch} | | {kernel.registers} | {kernel.spilled} | {kernel.shared} B static | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="compile for this one; default all")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head in attention and RoPE; default 128")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="default bfloat16")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    arguments = parser.parse_args()
    if backends.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set; an interpreted kernel cannot be compiled")
    archs, dtype = arguments.arch or list(ARCHS), getattr(torch, arguments.dtype)
    compiled = functools.partial(triton_kernels, dtype, arguments.head_dim)
    # A process for each: compilers do not share an interpreter well.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        kernels = dict(zip(archs, pool.map(compiled, archs), strict=True))
    cuda = cuda_kernels()
    title = f"{arguments.dtype}, {arguments.head_dim} channels a head"
    print(render(works(dtype, arguments.head_dim), title, kernels, cuda))
    if arguments.json:
        rows = [{"op": op, **asdict(kernel)} for by_op in kernels.values() for op, found in by_op.items() for kernel in found]
        rows += [{"op": "", **asdict(kernel)} for kernel in cuda]
        arguments.json.write_text(json.dumps(rows, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
