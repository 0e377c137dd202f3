"""hopper.py's and hopper_backward.py's kernels, compiled for sm90 in typical launches; run as a program where Triton does not
interpret.

Prints JSON: {"kernel, launch": the kernel's resources, exponentials in it, and how many of them run while products are in flight}.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a program, from anywhere

from benchmarks.gpu_report import SASS, cuobjdump, measured
from benchmarks.launches import Compiled, compilations
from sora_kernels.triton import hopper
from sora_kernels.triton.attention import UNBOUNDED

LAUNCHES = {
    "64 channels": (64, False, True),
    "64 channels, causal": (64, True, True),
    "128 channels": (128, False, True),
    "128 channels, causal": (128, True, True),
    "128 channels, dense": (128, False, False),
}


def launch(d: int, causal: bool, packed: bool) -> None:
    """Two samples, with two query heads to a key head. The causal ones have a gradient of lse."""
    shape = (1000,) if packed else (2, 500)
    q, k, v = (torch.empty(*shape, heads, d, dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu = torch.tensor([0, 600, 1000], dtype=torch.int32) if packed else None
    lse = torch.empty((4, 1000) if packed else (2, 4, 500))
    shared = {"q": q, "k": k, "v": v, "cu_q": cu, "cu_k": cu, "bias": None, "alibi": None, "scale": d**-0.5}
    shared |= {"left": UNBOUNDED, "right": 0 if causal else UNBOUNDED, "softcap": 0.0}
    shared |= {"out": torch.empty_like(q), "statistics": torch.empty(2, *lse.shape)}
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for name, arguments in {
        "attention_forward": {"lse": lse},
        "attention_backward": {"dout": torch.empty_like(q), "dlse": lse if causal else None, "dq": dq, "dk": dk, "dv": dv},
    }.items():
        reason = hopper.refuses(name, shared | arguments)
        if reason is not None:
            raise RuntimeError(reason)
        getattr(hopper, name)(**shared, **arguments)


def exponentials(compiled: Compiled) -> tuple[int, int]:
    """(all of them, those between the start of a product and the wait for it)."""
    binary = next(Path(path) for name, path in compiled.files.items() if name.endswith(".cubin"))
    total = overlapped = in_flight = 0
    for instruction in re.findall(SASS, cuobjdump("-sass", binary)):
        if "HGMMA" in instruction and "gsb0" in instruction:
            in_flight += 1
        elif "WARPGROUP.DEPBAR" in instruction:
            in_flight = int(instruction.split()[-1], 16)
        elif "MUFU.EX2" in instruction:
            total += 1
            overlapped += in_flight > 0
    return total, overlapped


def main() -> None:
    rows = {}
    for name, arguments in LAUNCHES.items():
        with compilations("sm90") as found:
            launch(*arguments)
        for compiled in (one for one in found if one.name.startswith("hopper")):
            total, overlapped = exponentials(compiled)
            row = {**asdict(measured(compiled, "sm90")), "exponentials": total, "overlapped": overlapped}
            rows[f"{compiled.name.rpartition('.')[2]}, {name}"] = row
    print(json.dumps(rows, default=str))


if __name__ == "__main__":
    main()
