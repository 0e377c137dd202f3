"""torch.compile where sizes change: one graph, and none anew after the second batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels.adaln import layer_norm_modulate
from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.patch_embed import patch_embed_3d
from sora_kernels.rope import rope_3d
from sora_model.model.conditioning import PackedText
from sora_model.model.config import DiTConfig
from sora_model.model.dit import DiT


def check(function: Callable, batches: list[tuple], compiler: str = "aot_eager") -> None:
    """The third batch and those after it are computed by what the first two were compiled to, to the bits of eager code."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for i, batch in enumerate(batches):
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            results = flat(compiled(*batch))
        expected = flat(function(*batch))
        assert all(map(torch.equal, results, expected))
        leaves = [x for x in batch if isinstance(x, Tensor) and x.requires_grad]
        leaves += function.parameters() if isinstance(function, torch.nn.Module) else []
        if leaves:
            grads = (torch.autograd.grad(sum(y.sum() for y in outputs), leaves) for outputs in (results, expected))
            assert all(map(torch.equal, *grads))


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_layouts_inside() -> None:
    weight = torch.randn(16, 3, 1, 2, 2)

    def step(videos: list[Tensor]) -> Tensor:
        tokens, layout = patch_embed_3d(videos, weight, None, patch_size=(1, 2, 2))
        x = rope_3d(tokens.reshape(-1, 2, 8), layout)
        assert layout.max_seqlen <= layout.num_tokens
        return flash_attn_varlen_func(x, x, x, layout.cu_seqlens, layout.cu_seqlens)

    check(step, [([torch.randn(3, 2, 4 + 2 * i, 8), torch.randn(3, 1 + i, 8, 6 + 4 * i)],) for i in range(5)])


def test_layouts_outside() -> None:
    def step(x: Tensor, layout: PackedLayout) -> Tensor:
        y = spatiotemporal_attention(rope_3d(x, layout), x, x, layout, window=(1, 3, 3))
        rows = torch.ones(layout.num_frames, 16)
        return torch.cat(layout.unpack(layer_norm_modulate(y.flatten(1), rows, rows, layout.cu_frames)))

    layouts = [PackedLayout.from_grids([(2, 3 + i, 4), (3, 4, 5 + 2 * i)]) for i in range(5)]
    check(step, [(torch.randn(layout.num_tokens, 2, 8, requires_grad=True), layout) for layout in layouts])


def test_tables_are_those_of_eager_code() -> None:
    def tables(x: Tensor) -> list[Tensor]:
        n, m = x.shape
        spans = [[Span((2, n, m), origin=(1, -2, 0.5), step=(1, 4 / n, 4 / n)), Span.text(m)], [], [Span((0, n, 3))]]
        layout = PackedLayout(spans)
        names = ("cu_seqlens", "cu_spans", "cu_frames", "grid", "origin", "step")
        return [getattr(layout, name) for name in names]

    check(tables, [(torch.zeros(n, n + 2),) for n in (3, 4, 6, 9)])


DITS = {
    "plain": {},
    "text": {"text_dim": 16},
    "frames": {},
    "clean": {"prediction": "clean"},
    "xs": {"rope_size": 4, "absolute_positions": True, "modulation": "shared", "text_dim": 16},
}


@pytest.mark.parametrize("name", DITS)
def test_dit(name: str) -> None:
    options = DITS[name]
    dit = DiT(DiTConfig(in_channels=4, patch_size=(1, 2, 2), hidden_size=64, depth=2, num_heads=2, **options))
    batches: list[tuple] = []
    for i in range(5):
        latents = [torch.randn(4, 2, 4 + 4 * i, 8 + 2 * i), torch.randn(4, 3 + i, 8 + 4 * i, 12 + 2 * i)]
        timesteps = torch.rand(5 + i if name == "frames" else 2) * 1000
        boundaries = torch.tensor([0, 3 + i, 7 + i], dtype=torch.int32)
        text = (PackedText(torch.randn(7 + i, 16), boundaries, torch.randn(2, 16)),) if "text_dim" in options else ()
        batches.append((latents, timesteps, *text))
    check(dit, batches)
