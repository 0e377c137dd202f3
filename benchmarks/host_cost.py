"""What one call costs the host, in microseconds: python -m benchmarks.host_cost [--triton] [--json FILE]

Inputs so small that the work itself is next to nothing. On a GPU the clock stops when the call returns, before the GPU is done, so
that the figure is Python to launch; on a CPU it includes the kernel, on one thread. Ours and torch's eager counterpart alternate;
the least of many rounds counts.

--triton measures Triton's share on a machine without a GPU: ops run on the Triton backend up to the driver, which does nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.bench_adaln import gated, gated_modulate, gated_norm, modulate
from benchmarks.bench_norm_rope import rms_rotate
from benchmarks.bench_rope import norm_rotate, rope_tables, rotate
from benchmarks.gpu import simulated
from benchmarks.race import DEVICE, ON_GPU, randn
from sora_kernels import backends
from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.layout import PackedLayout
from sora_kernels.norm_rope import apply_rope, norm_rope
from sora_kernels.patch_embed import patch_embed_3d, unpatchify_3d
from sora_kernels.rope import qk_norm_rope_3d, rope_3d

CALLS, ROUNDS = 50, 30


def calls() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """op -> (ours, torch eager), on one sample of 16 tokens."""
    layout = PackedLayout.from_grids([(1, 4, 4)], DEVICE)
    n, h, d, width = layout.num_tokens, 2, 32, 64
    x, y = randn(n, width, grad=True), randn(n, width, grad=True)
    shift, scale, gate = (randn(1, width, grad=True) for _ in range(3))
    q, k, v = (randn(n, h, d, grad=True) for _ in range(3))
    dense = [t.detach()[None].transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
    weights = [randn(d, grad=True) for _ in range(2)]
    cos, sin = rope_tables(layout, d)
    tables = cos[:, 0], sin[:, 0]
    cu, bounds = layout.cu_seqlens, (layout.cu_seqlens, layout.cu_seqlens, n, n)
    video, weight, bias = randn(4, 1, 8, 8), randn(width, 4, 1, 2, 2, grad=True), randn(width, grad=True)
    patches = randn(n, 16, grad=True)

    def whole(row: torch.Tensor) -> torch.Tensor:
        return row

    return {
        "layer_norm_modulate": (lambda: layer_norm_modulate(x, shift, scale, cu), lambda: modulate(x, shift, scale, whole)),
        "gate_residual": (lambda: gate_residual(y, x, gate, cu), lambda: gated(y, x, gate, whole)),
        "gate_residual_layer_norm_modulate": (
            lambda: gate_residual_layer_norm_modulate(y, x, gate, shift, scale, cu),
            lambda: gated_modulate(y, x, gate, shift, scale, whole),
        ),
        "norm_gate_residual": (
            lambda: norm_gate_residual(y, x, gate, cu, tanh=True, norm="rms"),
            lambda: gated_norm(y, x, gate, whole),
        ),
        "bias_gelu": (lambda: bias_gelu(x, bias), lambda: F.gelu(x + bias, approximate="tanh")),
        "rope_3d": (lambda: rope_3d(q, layout), lambda: rotate(q, cos, sin)),
        "qk_norm_rope_3d": (lambda: qk_norm_rope_3d(q, k, *weights, layout), lambda: norm_rotate(q, k, *weights, cos, sin)),
        "apply_rope": (lambda: apply_rope(q, *tables), lambda: rotate(q, cos, sin)),
        "norm_rope": (lambda: norm_rope(q, *tables, weight=weights[0]), lambda: rms_rotate(q, weights[0], cos=cos, sin=sin)),
        "attention": (lambda: flash_attn_varlen_func(q, k, v, *bounds), lambda: F.scaled_dot_product_attention(*dense)),
        "spatiotemporal_attention": (
            lambda: spatiotemporal_attention(q, k, v, layout, window=(1, 3, 3)),
            lambda: F.scaled_dot_product_attention(*dense),
        ),
        "patch_embed_3d": (
            lambda: patch_embed_3d([video], weight, bias, patch_size=(1, 2, 2))[0],
            lambda: F.conv3d(video[None], weight, bias, stride=(1, 2, 2)).flatten(2).mT,
        ),
        "unpatchify_3d": (
            lambda: unpatchify_3d(patches, layout, patch_size=(1, 2, 2)),
            lambda: patches.unflatten(0, (1, 4, 4)).unflatten(-1, (1, 2, 2, 4)).permute(6, 0, 3, 1, 4, 2, 5).reshape(4, 1, 8, 8),
        ),
    }


def differentiated(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function, then the backward of its outputs with cotangents made beforehand."""
    outputs = function()
    cotangents = [torch.ones_like(out) for out in as_list(outputs)]

    def both() -> None:
        torch.autograd.backward(as_list(function()), cotangents)

    return both


def as_list(outputs: Any) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def microseconds(functions: list[Callable[[], Any]]) -> list[float]:
    """The least time of one call of each, in alternation."""
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            best[i] = min(best[i], (time.perf_counter() - start) / CALLS * 1e6)
            if ON_GPU:
                torch.cuda.synchronize()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--triton", action="store_true", help="Triton's share, without a GPU")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if ON_GPU else "Triton without a GPU" if arguments.triton else "CPU, 1 thread"
    if arguments.triton:
        simulated.launch_only("sm90")
    rows = measure(device)
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def measure(device: str) -> list[dict[str, Any]]:
    """Prints a line for each op and returns the figures."""
    print(f"microseconds of one call, {device}, torch {torch.__version__}, float32")
    print(f"{'op':<36}{'backend':<10}{'forward':>10}{'torch':>10}{'fwd + bwd':>12}{'torch':>10}")
    rows = []
    for op, (ours, eager) in calls().items():
        with backends.record() as seen:
            ours()
        backend = seen[0][1]
        with torch.no_grad():
            forward = microseconds([ours, eager])
        both = microseconds([differentiated(ours), differentiated(eager)])
        rows.append({"op": op, "backend": backend, "forward": forward, "forward_backward": both})
        print(f"{op:<36}{backend:<10}{forward[0]:>10.1f}{forward[1]:>10.1f}{both[0]:>12.1f}{both[1]:>10.1f}", flush=True)
    return rows


if __name__ == "__main__":
    main()
