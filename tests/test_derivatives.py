"""Forward-mode derivatives and derivatives of gradients, of every op: right, or an error, and never zero in silence.

In float64 the oracle is finite differences (`gradcheck`, `gradgradcheck`). Kernels of less precision, which have no formulas of
their own for these, are held to the same derivatives in float64.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from sora_kernels import backends
from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from sora_kernels.attention import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention, spatiotemporal_attention
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.block_mask import BlockMask
from sora_kernels.block_sparse_attention import block_sparse_attention
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.norm_rope import apply_rope, norm_rope
from sora_kernels.patch_embed import patch_embed_3d, patchify_3d, unpatchify_3d
from sora_kernels.rope import qk_norm_rope_3d, rope_3d
from sora_kernels.token_blocks import TokenBlocks

LAYOUT = PackedLayout([[Span((1, 2, 2)), Span.text(1)], [], [Span((2, 1, 1))]])
MASK = BlockMask.sliding(TokenBlocks.tiles(LAYOUT, (1, 1, 2)), (1, 1, 1))
N = LAYOUT.num_tokens
CU = LAYOUT.cu_seqlens
HEADS, ROWS = (N, 2, 4), (CU.numel() - 1, 3)


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return flash_attn_func(q, k, v, causal=True, softcap=2.0, return_attn_probs=True)[:2]


# Function, and the shapes of what it is differentiated by.
CASES: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "flash_attn_func": (with_lse, [(1, 3, 2, 4), (1, 5, 1, 4), (1, 5, 1, 4)]),
    "flash_attn_varlen_func": (lambda q, k, v: flash_attn_varlen_func(q, k, v, CU, CU), [HEADS] * 3),
    "self": (lambda x: flash_attn_varlen_func(x, x, x, CU, CU), [HEADS]),
    "scaled_dot_product_attention": (scaled_dot_product_attention, [(1, 2, 3, 4)] * 3),
    "attn_mask": (scaled_dot_product_attention, [(1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 2, 4), (2, 1, 2)]),
    "spatiotemporal_attention": (lambda q, k, v: spatiotemporal_attention(q, k, v, LAYOUT, window=(1, 1, 2)), [HEADS] * 3),
    "block_sparse_attention": (
        lambda q, k, v: block_sparse_attention(q, k, v, MASK, return_lse=True),
        [HEADS] * 3,
    ),
    "rope_3d": (lambda x: rope_3d(x, LAYOUT, axes_dim=(0, 2, 2)), [HEADS]),
    "qk_norm_rope_3d": (lambda q, k, a, b: qk_norm_rope_3d(q, k, a, b, LAYOUT, axes_dim=(0, 2, 2)), [HEADS, HEADS, (4,), (4,)]),
    "apply_rope": (apply_rope, [HEADS, (N, 1), (N, 1)]),
    "apply_rope, tables of heads": (partial(apply_rope, interleaved=False), [(2, 3, 2, 4), (3, 2, 2), (3, 2, 2)]),
    "norm_rope": (lambda x, c, s, w: norm_rope(x, c, s, weight=w, across_heads=True), [HEADS, (N, 2), (N, 2), (8,)]),
    "norm_rope, LayerNorm": (
        lambda x, c, s, w, b: norm_rope(x, c, s, norm="layer", weight=w, bias=b),
        [(2, 3, 2, 4), (3, 1), (3, 1), (4,), (4,)],
    ),
    "norm_rope, norm alone": (lambda x, w: norm_rope(x, weight=w), [HEADS, (4,)]),
    "layer_norm_modulate": (
        lambda x, a, b, w, c: layer_norm_modulate(x, a, b, CU, weight=w, bias=c),
        [(N, 3), ROWS, ROWS, (3,), (3,)],
    ),
    "rms": (lambda x, a, b: layer_norm_modulate(x, a, b, CU, norm="rms"), [(N, 3), ROWS, ROWS]),
    "layer_norm": (lambda x, w, c: layer_norm_modulate(x, weight=w, bias=c), [(N, 3), (3,), (3,)]),
    "gate_residual": (lambda r, x, g: gate_residual(r, x, g, CU), [(N, 3), (N, 3), ROWS]),
    "gate_residual_layer_norm_modulate": (
        lambda r, x, g, a, b: gate_residual_layer_norm_modulate(r, x, g, a, b, CU),
        [(N, 3), (N, 3), ROWS, ROWS, ROWS],
    ),
    "without a gate": (
        lambda r, x, b: gate_residual_layer_norm_modulate(r, x, scale=b, cu_rows=CU),
        [(N, 3), (N, 3), ROWS],
    ),
    "residual": (gate_residual, [(N, 3), (N, 3)]),
    "norm_gate_residual": (
        lambda r, x, g, w, c: norm_gate_residual(r, x, g, CU, weight=w, bias=c),
        [(N, 3), (N, 3), ROWS, (3,), (3,)],
    ),
    "norm_gate_residual, dense": (
        lambda r, x, g, w: norm_gate_residual(r, x, g, tanh=True, norm="rms", weight=w),
        [(2, 4, 3), (2, 4, 3), (2, 2, 3), (3,)],
    ),
    "norm_gate_residual, no gate": (norm_gate_residual, [(N, 3), (N, 3)]),
    "bias_gelu": (bias_gelu, [(4, 3), (3,)]),
    "gelu": (bias_gelu, [(4, 3)]),
    "patch_embed_3d": (
        lambda x, y, w, b: patch_embed_3d([x, y], w, b, patch_size=(1, 1, 2))[0],
        [(2, 1, 2, 2), (2, 2, 1, 2), (3, 2, 1, 1, 2), (3,)],
    ),
    "patchify_3d": (lambda x: patchify_3d([x], patch_size=(1, 1, 2))[0], [(2, 1, 2, 2)]),
    "unpatchify_3d": (lambda x: unpatchify_3d(x, PackedLayout.from_grids([(1, 2, 1)]), patch_size=(1, 1, 2))[0], [(2, 4)]),
}


def inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def flat(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def penalty(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """The gradient of |gradient of a sum of squares|**2."""
    loss = sum(x.square().sum() for x in flat(function(*tensors)))
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in grads), tensors, allow_unused=True, materialize_grads=True))


def functional_penalty(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """The same by torch.func."""
    places = tuple(range(len(tensors)))

    def loss(*given: Tensor) -> Tensor:
        return sum(x.square().sum() for x in flat(function(*given)))

    def size(*given: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(loss, places)(*given))

    return list(torch.func.grad(size, places)(*(x.detach() for x in tensors)))


def tangents(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    given = tuple(x.detach() for x in tensors)
    return flat(torch.func.jvp(function, given, tuple(torch.cos(x) for x in given))[1])


def directional(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """Forward over reverse: how the gradient changes along a direction."""

    def loss(*given: Tensor) -> Tensor:
        return sum(x.square().sum() for x in flat(function(*given)))

    places = tuple(range(len(tensors)))
    return tangents(torch.func.grad(loss, places), tensors)


@pytest.mark.parametrize("name", CASES)
def test_against_finite_differences(name: str) -> None:
    function, shapes = CASES[name]
    tensors = inputs(shapes, torch.float64)
    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("derivative", [tangents, penalty, functional_penalty, directional])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_of_kernels(name: str, dtype: torch.dtype, derivative: Callable) -> None:
    function, shapes = CASES[name]
    tensors = inputs(shapes, dtype)
    actual = derivative(function, tensors)
    exact = derivative(function, [x.detach().double().requires_grad_() for x in tensors])
    for got, right in zip(actual, exact, strict=True):
        assert (got.double() - right).abs().max() <= (2e-4 if dtype == torch.float32 else 0.2) * max(1, right.abs().max())


def test_dual_tensors_keep_their_tangents() -> None:
    q, k, v = (x.detach() for x in inputs([HEADS] * 3, torch.float32))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.cos(q))
        tangent = torch.autograd.forward_ad.unpack_dual(flash_attn_varlen_func(dual, k, v, CU, CU)).tangent.clone()
    (expected,) = tangents(lambda q: flash_attn_varlen_func(q, k, v, CU, CU), [q])
    assert torch.equal(tangent, expected)
    assert tangent.any()


@pytest.mark.parametrize("name", CASES)
def test_of_what_was_traced(name: str) -> None:
    """Whose ops are torch.ops.sora_kernels.* themselves."""
    function, shapes = CASES[name]
    given = [x.detach() for x in inputs(shapes, torch.float32)]
    traced = make_fx(lambda *x: function(*x))(*given)  # no optional ones, which it would want
    for got, right in zip(tangents(traced, given), tangents(function, given), strict=True):
        assert torch.equal(got, right)
        assert got.any()


def test_of_what_was_compiled() -> None:
    function, shapes = CASES["flash_attn_varlen_func"]
    given = [x.detach() for x in inputs(shapes, torch.float32)]
    compiled = torch.compile(function, backend="aot_eager")
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, torch.cos(x)) for x in given]
        tangent = torch.autograd.forward_ad.unpack_dual(compiled(*duals)).tangent.clone()
    assert torch.equal(tangent, *tangents(function, given))


def test_ops_without_tangents_keep_their_backend() -> None:
    q, k, v = (x.detach() for x in inputs([HEADS] * 3, torch.float32))
    with torch.autograd.forward_ad.dual_level(), backends.record() as calls:
        flash_attn_varlen_func(q, k, v, CU, CU)
        flash_attn_varlen_func(torch.autograd.forward_ad.make_dual(q, q), k, v, CU, CU)
    usual = backends.candidates("attention_forward", "cpu", torch.float32)[0][0]
    assert [name for _, name in calls] == [backends.forced_backend() or usual, "reference"]


@pytest.mark.parametrize("derivative", [tangents, penalty])
@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "patch_embed_3d"])
def test_of_the_reference_are_not_in_the_dtype_of_autocast(name: str, derivative: Callable) -> None:
    """Inputs are; what is computed from them is float32, whose numbers float16 would not hold."""
    function, shapes = CASES[name]
    tensors = [(100 * x).detach().half().requires_grad_() for x in inputs(shapes, torch.float32)]
    expected = derivative(function, tensors)
    with torch.autocast("cpu", torch.float16):
        actual = derivative(function, tensors)
    for got, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, right, equal_nan=True)
