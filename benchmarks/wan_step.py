"""One step of the whole Wan 2.1 1.3B, random weights: python -m benchmarks.wan_step [--layers 30] [--dtype bfloat16]

A video of 9 frames of 480 x 832 and an image of 480 x 480, with prompts of 60 and 25 tokens. The DiT of sora_model takes both
packed; diffusers' transformer, as it is and patched by `apply`, takes one after the other. Each runs in a process of its own, by
turns, for its time and its peak of memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SIZES = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096}
GRIDS, TEXTS, PADDED = [(3, 60, 104), (1, 60, 60)], [60, 25], 512
WAYS = "sora_model", "diffusers", "diffusers patched"


def step(way: str, layers: int, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = WanTransformer3DModel(**SIZES, num_layers=layers).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    latents = [torch.randn(16, *grid).to(dtype) for grid in GRIDS]
    text, times = [torch.randn(n, 4096).to(dtype) for n in TEXTS], torch.tensor([500.0, 500.0])
    if way == "sora_model":
        from sora_model.model.conditioning import PackedText
        from sora_model.model.convert.wan import load_wan, wan_config

        weights: dict[str, Any] = model.state_dict()
        config = wan_config(model.config, "wan_step")
        del model
        dit = load_wan(config, weights.pop)  # each weight goes as its copy comes
        bounds = torch.tensor([0, *TEXTS]).cumsum(0).int()
        packed = PackedText(torch.cat(text), bounds, torch.zeros(len(text), 4096, dtype=dtype))
        return lambda: dit(latents, times, packed)
    if way == "diffusers patched":
        from sora_kernels.integrations.diffusers import apply

        apply(model)
    padded = [torch.nn.functional.pad(c, (0, 0, 0, PADDED - len(c))) for c in text]
    samples = list(zip(latents, times, padded, strict=True))
    return lambda: [model(x[None], t[None], c[None], return_dict=False)[0][0] for x, t, c in samples]


@torch.no_grad()
def measure(way: str, layers: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    run = step(way, layers, dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = run()
        times.append(time.perf_counter() - start)
    assert all(out.isfinite().all() for out in outputs)
    return {"seconds": min(times), "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2, help="by turns")
    parser.add_argument("--one", choices=WAYS, help="measure this one, here, and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.layers, getattr(torch, options.dtype), repeats=2)))
        return
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.wan_step", "--one", way, "--layers", str(options.layers)]
            out = subprocess.run([*command, "--dtype", options.dtype], check=True, capture_output=True, text=True).stdout
            print(f"{way:20}", json.loads(out.splitlines()[-1]), flush=True)


if __name__ == "__main__":
    main()
