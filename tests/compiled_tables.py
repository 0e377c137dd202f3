"""Attention at every head dim and size of dtype that the tables of configs.py have, compiled for one of them; run as a program
where Triton does not interpret: `python compiled_tables.py sm90`.

Prints JSON: a list of the kernels, each with its `head_dim` and `dtype`; for NVIDIA's float32 also in TF32, whose operands take
more shared memory. Patch embedding is among them, head dim 0, with patches that make its blocks the largest.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a program, from anywhere

from benchmarks.gpu_report import measured, triton_kernels
from benchmarks.launches import compilations
from sora_kernels.patch_embed import patch_embed_3d
from sora_kernels.triton.configs import CONFIGS


def attention(arch: str) -> list[dict[str, Any]]:
    rows = []
    for head_dim, itemsize in sorted({key for tables in CONFIGS.values() for key in tables[arch]}):
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        precisions = ["ieee"]
        if itemsize == 4 and arch.startswith("sm"):  # without TF32 they take no more shared memory: one head dim is enough
            precisions = ["ieee", "tf32"] if head_dim == 64 else ["tf32"]
        for precision in precisions:
            torch.backends.cuda.matmul.fp32_precision = precision
            for kernels in triton_kernels(dtype, head_dim, arch, "attention", disassemble=False).values():
                rows += [{"head_dim": head_dim, "dtype": str(dtype), **asdict(kernel)} for kernel in kernels]
    return rows


def patch_embedding(arch: str) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        videos = [torch.empty(16, 1, 64, 64, dtype=dtype)]
        weight = torch.empty(1152, 16, 1, 8, 8, dtype=dtype)
        with compilations(arch) as compiled:
            patch_embed_3d(videos, weight, None, patch_size=(1, 8, 8))
        rows += [{"head_dim": 0, "dtype": str(dtype), **asdict(measured(kernel, arch, disassemble=False))} for kernel in compiled]
    return rows


if __name__ == "__main__":
    print(json.dumps(attention(sys.argv[1]) + patch_embedding(sys.argv[1]), default=str))
