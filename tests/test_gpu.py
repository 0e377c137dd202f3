"""What only a GPU can show: nothing waits for it, calls are captured in a CUDA graph, and they run on the caller's stream."""

import contextlib
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sora_kernels import backends
from sora_kernels.adaln import gate_residual_layer_norm_modulate, layer_norm_modulate
from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.backends import use_backend
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.integrations.key_mask import pack_keys, packed_keys
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.patch_embed import patch_embed_3d, unpatchify_3d
from sora_kernels.rope import qk_norm_rope_3d, rope_3d

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SPANS = [[Span((4, 5, 6))], [Span.text(7), Span((1, 9, 8))], [], [Span((2, 2, 2))]]


def block(layout: PackedLayout, theta: float = 10000.0) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Every op once, as in a transformer's block, and its inputs, on the layout's device."""
    device, h, d, patch = layout.device, 4, 64, (1, 2, 2)
    shapes = [[n * p for n, p in zip(sample[0].grid, patch, strict=True)] for sample in layout.spans if len(sample) == 1]
    inputs = [torch.randn(16, *shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    single = PackedLayout([sample for sample in layout.spans if len(sample) == 1], device)
    weight, bias = torch.randn(h * d, 16, *patch, device=device).bfloat16(), torch.randn(h * d, device=device).bfloat16()
    rows = torch.randn(single.num_frames, 3, h * d, device=device).bfloat16()
    scales = torch.randn(2, d, device=device).bfloat16()

    def run(weight: Tensor, rows: Tensor, scales: Tensor, *videos: Tensor) -> Tensor:
        x, _ = patch_embed_3d(videos, weight, bias, patch_size=patch)
        shift, scale, gate = rows.unbind(1)
        y = layer_norm_modulate(x, shift, scale, single.cu_frames)
        q = rope_3d(y.unflatten(-1, (h, d)), single, theta=theta)
        q, k = qk_norm_rope_3d(q, q, *scales.unbind(0), single, theta=theta)
        out = flash_attn_varlen_func(q, k, q, single.cu_seqlens, single.cu_seqlens)
        out = spatiotemporal_attention(out, k, q, single, window=(1, 3, 3))
        out = bias_gelu(out.flatten(1), bias)
        x, y = gate_residual_layer_norm_modulate(x, out, gate, shift, scale, single.cu_frames)
        return torch.cat([video.flatten() for video in unpatchify_3d(x + y, single, patch_size=patch)])

    return run, [x.requires_grad_() for x in (weight, rows, scales, *inputs)]


def step(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = run(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.fixture(params=["default", "triton"])
def every_op(request) -> tuple[Callable[..., Tensor], list[Tensor]]:
    torch.manual_seed(0)
    made = block(PackedLayout.from_spans(SPANS, "cuda"))
    if request.param == "default":
        step(*made)  # compiled and loaded
        yield made
    else:
        with use_backend("triton"):
            step(*made)
            yield made


@pytest.mark.skipif(os.environ.get("SORA_KERNELS_CUDA") == "0", reason="the CUDA kernels are not built")
def test_every_gpu_backend_is_there() -> None:
    """One that cannot be loaded would only make its tests vanish."""
    compiled = backends.BACKENDS["cuda"].load()
    for function in backends.FUNCTIONS:
        reasons = dict(backends.candidates(function, "cuda", torch.bfloat16))
        assert reasons["triton"] is None, function
        assert reasons["cuda"] is None or not hasattr(compiled, function), function


def test_nothing_waits_for_the_gpu(every_op) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*every_op)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph(every_op) -> None:
    """Replayed on new inputs, a graph gives what calls give, forward and backward."""
    run, inputs = every_op
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(run, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(run, inputs)
    with torch.no_grad():
        for x in inputs:
            x.normal_()
    graph.replay()
    for got, expected in zip(results, step(run, inputs), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["default", "triton"])
def test_first_call_in_a_graph(backend: str) -> None:
    """What calls with new arguments need, they make without the host's memory, and they keep nothing that only the graph computes:
    the same call outside is right before the graph has run.
    """
    layout = PackedLayout.from_spans(SPANS, "cuda")
    x = torch.randn(layout.num_tokens, 2, 64, device="cuda")
    with use_backend("reference"):
        exact = rope_3d(x, layout, theta=777.0)
    with use_backend("triton") if backend == "triton" else contextlib.nullcontext():
        rope_3d(x, layout)
        step(*block(layout))  # all is compiled and loaded
        run, inputs = block(layout, theta=777.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [rope_3d(x, layout, theta=777.0), *step(run, inputs)]
        outside = [rope_3d(x, layout, theta=777.0), *step(run, inputs)]
        graph.replay()
    torch.testing.assert_close(outside[0], exact)
    for got, right in zip(captured, outside, strict=True):
        assert torch.equal(got, right)


def test_a_mask_in_a_graph() -> None:
    """A replay packs the keys of what the mask is by then, even if the mask was packed before the capture."""
    mask = torch.rand(3, 50, device="cuda") > 0.5
    packed_keys("test", mask, *mask.shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = packed_keys("test", mask, *mask.shape)
    mask.logical_not_()
    graph.replay()
    for got, right in zip(captured, pack_keys(mask), strict=True):
        assert torch.equal(got, right)


def test_on_the_callers_stream(every_op) -> None:
    """Work queued behind a long wait on another stream sees what that stream writes."""
    run, inputs = every_op
    expected = step(run, [x.detach().mul(2).requires_grad_() for x in inputs])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        later = [torch.zeros_like(x) for x in inputs]
        torch.cuda._sleep(50_000_000)
        for x, y in zip(later, inputs, strict=True):
            x.copy_(y.detach().mul(2))
        results = step(run, [x.requires_grad_() for x in later])
    torch.cuda.current_stream().wait_stream(side)
    for got, right in zip(results, expected, strict=True):
        assert torch.equal(got, right)


def test_offsets_past_2_to_the_31() -> None:
    """Rows of a view whose offsets do not fit in 32 bits."""
    tokens, heads, d = 13_000, 56, 128
    wide = torch.empty(tokens, 8 * 3 * heads * d, device="cuda", dtype=torch.bfloat16)  # 2.2e9 elements
    q, k, v = wide.unflatten(1, (24, heads, d))[:, -3:].unbind(1)
    for x in (q, k, v):
        x.normal_()
    cu = torch.tensor([0, tokens - 70, tokens], device="cuda", dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, cu, cu)
    assert torch.equal(out, flash_attn_varlen_func(*(x.contiguous() for x in (q, k, v)), cu, cu))
    stride = wide.numel() // 64 // 16 * 16
    far = wide.view(-1).as_strided((64, heads, d), (stride, d, 1)).normal_()  # within one block of rows
    bounds = torch.tensor([0, 64], device="cuda", dtype=torch.int32)
    near = far.contiguous()
    assert torch.equal(
        flash_attn_varlen_func(far, far, far, bounds, bounds), flash_attn_varlen_func(near, near, near, bounds, bounds)
    )
    layout = PackedLayout.from_grids([(13, 10, 100)], "cuda")
    assert torch.equal(rope_3d(q, layout), rope_3d(q.contiguous(), layout))
    row = torch.randn(2, 1, heads * d, device="cuda").bfloat16()
    x, bounds = wide[:, -heads * d :], layout.cu_seqlens
    assert torch.equal(layer_norm_modulate(x, *row, bounds), layer_norm_modulate(x.contiguous(), *row, bounds))
