"""Launches that the report's workload does not have, compiled for sm90; run as a program where Triton does not interpret.

Prints JSON: {"variants": {name: [kernels]}, "versions": {kernel: how many of it a few batches of any size need}}.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a program, from anywhere

from benchmarks.gpu_report import measured
from benchmarks.launches import Compiled, compilations
from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from sora_kernels.attention import flash_attn_varlen_func, scaled_dot_product_attention, spatiotemporal_attention
from sora_kernels.int8_attention import int8_attention
from sora_kernels.layout import PackedLayout
from sora_kernels.norm_rope import norm_rope
from sora_kernels.patch_embed import patch_embed_3d
from sora_kernels.rope import qk_norm_rope_3d


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def qkv(n: int, heads: int = 8, d: int = 128, key_heads: int = 8) -> list[Tensor]:
    return [empty(n, heads, d), empty(n, key_heads, d), empty(n, key_heads, d)]


def cu(*boundaries: int) -> Tensor:
    return torch.tensor(boundaries, dtype=torch.int32)


def packed(tensors: list[Tensor], **options: Any) -> Callable:
    bounds = cu(0, 1024, len(tensors[0]))
    return lambda: flash_attn_varlen_func(*tensors, bounds, bounds, **options)


def variants() -> dict[str, tuple[Callable, list[Tensor]]]:
    """name -> (forward, its inputs)."""
    plain, small, masked, grouped = qkv(4096), qkv(4096, d=64), qkv(4096, d=72), qkv(4096, key_heads=2)
    one = qkv(1, 1, 128, 1)
    row, affine = [empty(64, 256), empty(64, 256), *(empty(1, 256) for _ in range(3))], [empty(256), empty(256)]
    wide = [empty(2048, 1536, dtype=torch.float32), empty(2048, 1536), *(empty(2, 1536, dtype=torch.float32) for _ in range(3))]
    one_channel = [empty(64, 1), empty(64, 1), *(empty(1, 1) for _ in range(3))]
    layout, single = PackedLayout.from_grids([(4, 16, 16), (1, 1, 1)]), PackedLayout.from_grids([(1, 1, 1)])
    heads = [*qkv(1, 1, 64, 1)[:2], empty(64), empty(64)]
    patches = [empty(1, 1, 2, 2), empty(16, 1, 1, 2, 2)]
    slopes, mask = torch.empty(8), torch.empty(1024, 1024)
    dense = [empty(2, 8, 1024, 128) for _ in range(3)]
    dense_rows = [x.transpose(1, 2) for x in dense]
    rotated = [empty(2048, 24, 128), empty(128), empty(128), empty(24 * 128)]
    of_heads = [torch.empty(2048, 24, 64) for _ in range(2)]
    of_all, of_one = ([torch.empty(n, pairs) for _ in range(2)] for n, pairs in ((2048, 48), (1, 32)))
    windowed = [x[: layout.num_tokens] for x in plain]
    return {
        "64 channels": (packed(small), small),
        "causal": (packed(plain, causal=True), plain),
        "window": (packed(plain, window_size=(512, 512)), plain),
        "grouped": (packed(grouped), grouped),
        "72 channels": (packed(masked), masked),
        "softcap and ALiBi": (packed(plain, softcap=20.0, alibi_slopes=slopes), plain),
        "dense with a mask": (lambda: scaled_dot_product_attention(*dense, attn_mask=mask), dense),
        "int8 with a mask": (lambda: int8_attention(*(x.detach() for x in dense_rows), attn_mask=mask), []),
        "one token, attention": (lambda: flash_attn_varlen_func(*one, cu(0, 1), cu(0, 1)), one),
        "one token, window": (lambda: spatiotemporal_attention(*one, single, window=(1, 1, 1)), one),
        "causal window": (
            lambda: spatiotemporal_attention(*windowed, layout, window=(3, 9, 9), causal=(True, False, False)),
            windowed,
        ),
        "one row, adaLN": (
            lambda: gate_residual_layer_norm_modulate(*row, cu(0, 64), weight=affine[0], bias=affine[1]),
            row + affine,
        ),
        "float32 beside x, adaLN": (lambda: gate_residual_layer_norm_modulate(*wide, cu(0, 1000, 2048)), wide),
        "one channel, adaLN": (lambda: gate_residual_layer_norm_modulate(*one_channel, cu(0, 64)), one_channel),
        "norm alone": (lambda: layer_norm_modulate(row[0], weight=affine[0], bias=affine[1]), [row[0], *affine]),
        "scale, no gate": (
            lambda: gate_residual_layer_norm_modulate(*row[:2], scale=row[4], cu_rows=cu(0, 64)),
            [*row[:2], row[4]],
        ),
        "no gate": (lambda: gate_residual(*row[:2]), row[:2]),
        "gated norm": (lambda: norm_gate_residual(*row[:3], cu(0, 64), weight=affine[0], bias=affine[1]), row[:3] + affine),
        "float32 beside x, gated norm": (lambda: norm_gate_residual(*wide[:3], cu(0, 1000, 2048), norm="rms"), wide[:3]),
        "one channel, gated norm": (lambda: norm_gate_residual(*one_channel[:3], cu(0, 64)), one_channel[:3]),
        "gated norm without gate": (lambda: norm_gate_residual(*row[:2], norm="rms"), row[:2]),
        "one token, RoPE": (lambda: qk_norm_rope_3d(*heads, single), heads),
        "tables of heads": (lambda: norm_rope(rotated[0], *of_heads, weight=rotated[1]), rotated[:2]),
        "tables of heads, across heads": (
            lambda: norm_rope(rotated[0], *of_heads, weight=rotated[3], across_heads=True, interleaved=False),
            [rotated[0], rotated[3]],
        ),
        "LayerNorm, a part rotated": (
            lambda: norm_rope(rotated[0], *of_all, norm="layer", weight=rotated[1], bias=rotated[2], interleaved=False),
            rotated[:3],
        ),
        "heads of a LayerNorm": (lambda: norm_rope(rotated[0], norm="layer"), rotated[:1]),
        "one token, tables": (lambda: norm_rope(heads[0], *of_one), heads[:1]),
        "one patch": (lambda: patch_embed_3d([patches[0]], patches[1], None, patch_size=(1, 2, 2))[0], patches),
    }


def run(forward: Callable, inputs: list[Tensor]) -> None:
    """A forward and, if there are inputs that need gradients, its backward."""
    outputs = forward()
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if inputs:
        torch.autograd.grad(outputs, inputs, [torch.empty_like(out) for out in outputs])


def compiled(forward: Callable, inputs: list[Tensor]) -> list[Compiled]:
    with compilations("sm90") as found:
        run(forward, inputs)
    return found


def versions() -> dict[str, int]:
    """Kernel -> versions that batches of any number and sizes of videos need; of a patch embedding, three videos of any sizes."""
    draw = random.Random(0)
    weight = empty(64, 16, 1, 2, 2)
    with compilations("sm90") as found:
        for _ in range(20):
            layout = PackedLayout.from_grids([[draw.randint(1, 12) for _ in range(3)] for _ in range(draw.randint(1, 20))])
            tensors, bounds = qkv(layout.num_tokens), layout.cu_seqlens
            run(lambda: flash_attn_varlen_func(*tensors, bounds, bounds), tensors)  # noqa: B023
            run(lambda: spatiotemporal_attention(*tensors, layout, window=(3, 5, 5)), tensors)  # noqa: B023
            videos = [empty(16, *(2 * draw.randint(1, 12) for _ in range(3))) for _ in range(3)]
            run(lambda: patch_embed_3d(videos, weight, None, patch_size=(1, 2, 2))[0], [weight, *videos])  # noqa: B023
    return Counter(kernel.name for kernel in found)


def main() -> None:
    kernels = {
        name: [asdict(measured(kernel, "sm90")) for kernel in compiled(forward, inputs)]
        for name, (forward, inputs) in variants().items()
    }
    print(json.dumps({"variants": kernels, "versions": versions()}, default=str))


if __name__ == "__main__":
    main()
