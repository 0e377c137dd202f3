"""Every op on a workload: what the report compiles and counts, and what a first check on a GPU runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from .attention import flash_attn_varlen_func, spatiotemporal_attention
from .bias_gelu import bias_gelu
from .layout import PackedLayout
from .patch_embed import patch_embed_3d, patchify_3d, unpatchify_3d
from .rope import qk_norm_rope_3d, rope_3d

TYPICAL = [(16, 16, 16), (4, 32, 32), (4, 24, 24), (1, 64, 64), (1, 40, 40)]


@dataclass
class Work:
    """One pass of one op.

    Args:
        function: of the inputs; what `run` calls, and differentiates in a backward by all inputs that require gradients.
    """

    op: str
    unit: str
    units: int
    gigabytes: float
    teraflops: float
    function: Callable[..., Any]
    inputs: Sequence[Tensor]
    backward: bool = False

    def run(self, make: Callable[[Tensor], Tensor] = torch.empty_like) -> list[Tensor]:
        """Outputs, and in a backward the gradients; cotangents are made like the outputs."""
        outputs = self.function(*self.inputs)
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        if not self.backward:
            return outputs
        wanted = [x for x in self.inputs if x.requires_grad]
        return outputs + list(torch.autograd.grad(outputs, wanted, [make(x) for x in outputs]))


def works(
    dtype: torch.dtype,
    head_dim: int,
    width: int = 3072,
    *,
    layout: PackedLayout | None = None,
    slack: int = 0,
    make: Callable[..., Tensor] = torch.empty,
) -> Iterator[Work]:
    """Each op forward, and its backward, on a packed batch of images and videos.

    Args:
        layout: of samples of one span each; default a typical batch.
        slack: tokens behind the last sample.
        make: as torch.empty, of a shape and a dtype.
    """
    layout = PackedLayout.from_grids(TYPICAL) if layout is None else layout
    n, heads, size = layout.num_tokens + slack, width // head_dim, torch.empty(0, dtype=dtype).element_size()
    tokens, cu, bounds = n * width * size, layout.cu_frames, (layout.cu_seqlens, layout.cu_seqlens)
    grids = [sample[0].grid for sample in layout.spans]
    channels, patch, window = 16, (1, 2, 2), (5, 9, 9)
    patches = n * channels * 4 * size

    def tensor(*shape: int) -> Tensor:
        return make(shape, dtype=dtype).requires_grad_()

    def passes(
        op: str, unit: str, units: int, forward: tuple, backward: tuple, inputs: Sequence[Tensor], run: Callable
    ) -> Iterator[Work]:
        """Forward and backward, each with its (bytes, FLOPs)."""
        yield Work(op, unit, units, forward[0] / 1e9, forward[1] / 1e12, run, inputs)
        yield Work(f"{op}, backward", unit, units, backward[0] / 1e9, backward[1] / 1e12, run, inputs, True)

    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm_modulate(x, shift, scale, cu)

    def gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return gate_residual(residual, x, gate, cu)

    def fused(r: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return gate_residual_layer_norm_modulate(r, x, gate, shift, scale, cu, weight=weight, bias=bias)

    x, y, *rows = *(tensor(n, width) for _ in range(2)), *(tensor(layout.num_frames, width) for _ in range(3))
    affine = [tensor(width), tensor(width)]
    yield from passes("layer_norm_modulate", "token", n, (2 * tokens, 0), (3 * tokens, 0), [x, *rows[:2]], modulate)
    yield from passes("gate_residual", "token", n, (3 * tokens, 0), (4 * tokens, 0), [y, x, rows[0]], gate)
    inputs = [y, x, *rows, *affine]
    yield from passes("gate_residual_layer_norm_modulate", "token", n, (4 * tokens, 0), (6 * tokens, 0), inputs, fused)

    hidden = tensor(n, 4 * width)
    yield from passes("bias_gelu", "token", n, (8 * tokens, 0), (12 * tokens, 0), [hidden, tensor(4 * width)], bias_gelu)

    def rotate(q: Tensor) -> Tensor:
        return rope_3d(q, layout)

    def norm_rotate(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
        return qk_norm_rope_3d(q, k, q_weight, k_weight, layout)

    q, k, v = (tensor(n, heads, head_dim) for _ in range(3))
    inputs = [q, k, tensor(head_dim), tensor(head_dim)]
    yield from passes("rope_3d", "token", n, (2 * tokens, 0), (2 * tokens, 0), [q], rotate)
    yield from passes("qk_norm_rope_3d", "token", n, (4 * tokens, 0), (6 * tokens, 0), inputs, norm_rotate)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, *bounds)

    def attend_near(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spatiotemporal_attention(q, k, v, layout, window=window)

    pairs = heads * sum(s * s for s in layout.seqlens)
    near = heads * sum(t * h * w * min(t, window[0]) * min(h, window[1]) * min(w, window[2]) for t, h, w in grids)
    for op, run, count in (("attention", attend, pairs), ("spatiotemporal_attention", attend_near, near)):
        cost = (4 * tokens, 4 * head_dim * count), (8 * tokens, 10 * head_dim * count)
        yield from passes(op, "query and key", count, *cost, [q, k, v], run)

    def embed(weight: Tensor, bias: Tensor, *videos: Tensor) -> Tensor:
        return patch_embed_3d(videos, weight, bias, patch_size=patch)[0]

    latents = [tensor(channels, t, 2 * h, 2 * w) for t, h, w in grids]
    product = 2 * n * channels * 4 * width
    cost = (patches + tokens, product), (2 * patches + tokens, 2 * product)
    yield from passes("patch_embed_3d", "token", n, *cost, [tensor(width, channels, *patch), tensor(width), *latents], embed)

    def cut(*videos: Tensor) -> Tensor:
        return patchify_3d(videos, patch_size=patch)[0]

    def join(rows: Tensor) -> list[Tensor]:
        return unpatchify_3d(rows, layout, patch_size=patch)

    yield Work("patchify_3d", "token", n, 2 * patches / 1e9, 0, cut, latents)
    yield Work("unpatchify_3d", "token", n, 2 * patches / 1e9, 0, join, [tensor(n, channels * 4)])
