"""What a block of attention takes on an H100, on paper: `python -m benchmarks.gpu_model [--head-dim 64]`.

Counts the instructions of the shortest loop that has products and exponentials, in the compiled code of the kernels for Hopper and
of the Triton kernels at their default blocks, bfloat16, without a mask. Cycles are those of a multiprocessor, for 128 queries and
128 keys:

    matrix unit      its products at 2048 multiply-adds a cycle
    all instructions of all warps that multiply, each issued by one of four schedulers
    exponentials     16 a cycle
    nothing overlaps the matrix unit, and then the larger one of the two others
    all overlaps     the largest of the three

Where a kernel lies between them depends on what its warps wait for, which only a GPU tells.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from benchmarks.gpu_report import cuobjdump
from benchmarks.launches import Compiled, compilations
from sora_kernels import backends
from sora_kernels.triton import attention, hopper

ADDRESSED = r"/\*([0-9a-f]{4,})\*/\s+(.*?);"  # address and instruction
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}  # of queries x keys x channels
BLOCK = 128  # queries and keys
WARPS = 8  # that multiply: two groups of 4, in all kernels here
MULTIPLY_ADDS, EXPONENTIALS, SCHEDULERS = 2048, 16, 4  # a cycle, of a multiprocessor


class Loop(NamedTuple):
    """Instructions of one warp in a loop; multiply-adds are those of its group of 4 warps."""

    instructions: int
    exponentials: int
    multiply_adds: int


class Cycles(NamedTuple):
    matrix: float
    instructions: float
    exponentials: float

    @property
    def apart(self) -> float:
        return self.matrix + max(self.instructions, self.exponentials)

    @property
    def overlapped(self) -> float:
        return max(self)


def loops(binary: Path) -> Iterator[Loop]:
    """Those that multiply and take exponentials."""
    code = [(int(address, 16), text) for address, text in re.findall(ADDRESSED, cuobjdump("-sass", binary))]
    for last, (address, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump is None or int(jump[1], 16) >= address:
            continue
        body = [text for start, text in code[:last] if start >= int(jump[1], 16)]
        shapes = [re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", text) for text in body]
        multiply_adds = sum(int(m) * int(n) * int(k) for m, n, k in (shape.groups() for shape in shapes if shape))
        exponentials = sum("MUFU.EX2" in text for text in body)
        if multiply_adds and exponentials:
            yield Loop(len(body) + 1, exponentials, multiply_adds)


def cycles(compiled: Compiled, head_dim: int) -> Cycles:
    """Of a kernel for Hopper or a Triton kernel of attention, for a block."""
    binary = next(Path(path) for name, path in compiled.files.items() if name.endswith(".cubin"))
    loop = min(loops(binary), key=lambda loop: loop.instructions)
    groups = WARPS // 4
    work = PRODUCTS[compiled.name.rpartition(".")[2].removesuffix("_kernel")] * BLOCK * BLOCK * head_dim
    steps = work / (loop.multiply_adds * groups)
    issued = loop.instructions * WARPS / SCHEDULERS
    return Cycles(work / MULTIPLY_ADDS, steps * issued, steps * loop.exponentials * WARPS * 32 / EXPONENTIALS)


def launch(backend: ModuleType, head_dim: int) -> None:
    q, k, v = (torch.empty(1000, 4, head_dim, dtype=torch.bfloat16) for _ in range(3))
    cu, lse = torch.tensor([0, 600, 1000], dtype=torch.int32), torch.empty(4, 1000)
    shared = {"q": q, "k": k, "v": v, "cu_q": cu, "cu_k": cu, "bias": None, "alibi": None, "scale": head_dim**-0.5}
    shared |= {"left": attention.UNBOUNDED, "right": attention.UNBOUNDED, "softcap": 0.0}
    shared |= {"out": torch.empty_like(q), "statistics": torch.empty(2, *lse.shape)}
    backend.attention_forward(**shared, lse=lse)
    grads = {name: torch.empty_like(q) for name in ("dout", "dq", "dk", "dv")}
    backend.attention_backward(**shared, dlse=None, **grads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128, choices=[64, 128])
    head_dim = parser.parse_args().head_dim
    if backends.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set; an interpreted kernel cannot be compiled")
    print("| kernel | backend | matrix unit | all instructions | exponentials | nothing overlaps | all overlaps |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, backend in (("hopper", hopper), ("triton", attention)):
        with compilations("sm90") as found:
            launch(backend, head_dim)
        for compiled in found:
            kernel = compiled.name.rpartition(".")[2].removesuffix("_kernel")
            if kernel in PRODUCTS:
                counts = cycles(compiled, head_dim)
                cells = " | ".join(f"{number:.0f}" for number in (*counts, counts.apart, counts.overlapped))
                print(f"| {kernel}, {head_dim} | `{name}` | {cells} |")


if __name__ == "__main__":
    main()
