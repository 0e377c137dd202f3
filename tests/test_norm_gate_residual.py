"""A gated norm added to a residual, as Z-Image and Mochi have it behind attention and feed-forward layers."""

from functools import partial
from unittest import mock

import pytest
import torch
from contract import PackedContract
from test_adaln import CASES, LENGTHS, NORMS, SHAPES, SHARED_MEMORY, check, make_case, make_inputs, spread, used_tokens
from tolerance import LARGE_WIDTHS, Target, assert_bit_equal, assert_zero, check_large, check_rejected, large_lengths, run
from torch.nn.functional import layer_norm, pad, rms_norm

from sora_kernels import backends, norm_gate_residual

FUNCTION = "norm_gate_residual_forward"


def added(residual, normed, gate, cu_rows, tanh):
    """residual + gate * normed of the tokens inside the boundaries, and zeros behind them."""
    n = len(normed)
    if gate is not None:
        normed = spread(gate.tanh() if tanh else gate, cu_rows) * normed
    return pad((residual[:n] + normed).to(residual.dtype), (0, 0, 0, len(residual) - n))


def affine(x, weight, bias):
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def plain(residual, x, gate=None, cu_rows=None, tanh=False, norm="layer", weight=None, bias=None, eps=1e-6):
    """Eager PyTorch."""
    x = x[: used_tokens(x, cu_rows)]
    normed = (layer_norm if norm == "layer" else rms_norm)(x, x.shape[-1:], eps=eps)
    return added(residual, affine(normed, weight, bias), gate, cu_rows, tanh)


def exact(residual, x, gate=None, cu_rows=None, tanh=False, norm="layer", weight=None, bias=None, eps=1e-6):
    """The formula as it is written, for float64."""
    x = x[: used_tokens(x, cu_rows)]
    centred = x - x.sum(dim=-1, keepdim=True) / x.shape[-1] if norm == "layer" else x
    normed = centred / ((centred**2).sum(dim=-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    return added(residual, affine(normed, weight, bias), gate, cu_rows, tanh)


def functions(**options):
    return tuple(partial(function, **options) for function in (norm_gate_residual, plain, exact))


TOKENS = ["residual", "x"]


@pytest.mark.parametrize("options", [*CASES, SHARED_MEMORY])
def test_norm_gate_residual(target: Target, options: dict) -> None:
    check(target, functions(), TOKENS, ["gate"], **options)


@pytest.mark.parametrize("name", ["layer_affine", "rms", "rms_weight"])
def test_tanh(target: Target, name: str) -> None:
    check(target, functions(tanh=True), TOKENS, ["gate"], slack=3, **NORMS[name])


@pytest.mark.parametrize("name", NORMS)
def test_without_gate(target: Target, name: str) -> None:
    check(target, functions(), TOKENS, [], slack=3, **NORMS[name])


@pytest.mark.parametrize("shape", ["D37", "one_row", "long_rows", "very_wide"])
@pytest.mark.parametrize("name", ["layer_affine", "rms"])
def test_without_boundaries(target: Target, name: str, shape: str) -> None:
    check(target, functions(), TOKENS, [], bounded=False, **NORMS[name], **SHAPES[shape])


WIDE = {"gate": ["gate"], "affine": ["weight", "bias"], "residual": ["residual"], "all": ["residual", "gate", "weight", "bias"]}


@pytest.mark.parametrize("shape", ["D37", "slack", "long_rows", "very_wide"])
@pytest.mark.parametrize("wide", WIDE)
def test_float32_beside_x_of_2_bytes(target16: Target, wide: str, shape: str) -> None:
    options = {**SHAPES[shape], "weights": ("weight", "bias"), "wide": WIDE[wide]}
    check(target16, functions(), TOKENS, ["gate"], **options)


@pytest.mark.parametrize("tanh", [False, True], ids=["gate", "tanh"])
def test_nothing_is_rounded_to_x(target16: Target, tanh: bool) -> None:
    """Neither the norm nor the gate, where the residual is float32."""
    residual, x, gate, weight = make_inputs(target16, [*TOKENS, "gate", "weight"]).values()
    args = residual.float(), x, gate, target16.boundaries(*LENGTHS)
    out = norm_gate_residual(*args, tanh=tanh, norm="rms", weight=weight)
    right = exact(*(t.double() for t in args[:3]), args[3], tanh=tanh, norm="rms", weight=weight.double())
    torch.testing.assert_close(out.double(), right, rtol=0, atol=4e-6)


@pytest.mark.parametrize("tanh", [False, True], ids=["gate", "tanh"])
def test_small_gates_keep_their_digits(target: Target, tanh: bool) -> None:
    """A gate of 2**-12 of what it was gives 2**-12 of the update."""
    x, gate = target.randn(3, 64), (torch.randn(1, 64) / 64).to(target.device, target.dtype)
    small, cu, nothing = gate / 4096, target.boundaries(3), torch.zeros_like(x)
    large = norm_gate_residual(nothing, x, gate, cu) / 4096
    # float16 has no more digits below 2**-14
    tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-3}.get(target.dtype, 1e-6)
    found = norm_gate_residual(nothing, x, small, cu, tanh=tanh)
    torch.testing.assert_close(found, large, rtol=tolerance, atol=2.0**-20 if target.dtype == torch.float16 else 0)


def test_the_gradient_of_the_residual(target: Target) -> None:
    """A dense batch passes on what came; a packed one has zeros behind its last boundary."""
    residual, x, gate = target.randn(2, 6, 40), target.randn(2, 6, 40), target.randn(2, 40)
    cotangent = target.randn(12, 40)
    for packed in (False, True):
        inputs = [t.flatten(0, 1) if packed and t.ndim == 3 else t for t in (residual, x, gate)]
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = norm_gate_residual(*leaves, target.boundaries(5, 4) if packed else None)
        with mock.patch.object(backends, "call", wraps=backends.call) as call:
            (grad, *_) = torch.autograd.grad(out, leaves, cotangent.view_as(out))
        (passed,) = (each.kwargs for each in call.call_args_list)
        assert (passed["dresidual"] is not None) == packed
        used = 9 if packed else 12
        assert torch.equal(grad.reshape(12, 40)[:used], cotangent[:used])
        assert_zero(grad.reshape(12, 40)[used:])


@pytest.mark.parametrize("shape", [(3, 40), (3, 1, 40), (3, 2, 40), (3, 4, 40)], ids=["samples_2d", "samples", "frames", "tokens"])
def test_dense(target: Target, shape: tuple[int, ...]) -> None:
    """Rows of samples, frames and tokens have the bits of the packed call."""
    residual, x = target.randn(3, 4, 40), target.randn(3, 4, 40)
    gate, weight = target.randn(*shape), target.randn(40)
    rows = gate.reshape(-1, 40)
    cu = target.boundaries(*[12 // len(rows)] * len(rows))
    options = {"tanh": True, "norm": "rms", "weight": weight}
    dense = norm_gate_residual(residual, x, gate, **options)
    packed = norm_gate_residual(residual.flatten(0, 1), x.flatten(0, 1), rows, cu, **options)
    assert dense.shape == x.shape
    assert_bit_equal([dense.flatten(0, 1)], [packed])


def test_constant_rows(target: Target) -> None:
    """A row without variance leaves the residual as it is."""
    residual, gate = target.randn(5, 16), target.randn(1, 16)
    out = norm_gate_residual(residual, torch.full_like(residual, 3.0), gate, target.boundaries(5))
    assert torch.equal(out, residual)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (0, 3, 40)], ids=str)
def test_no_tokens(target: Target, shape: tuple[int, ...]) -> None:
    residual, x = (target.randn(*shape).requires_grad_() for _ in range(2))
    gate = target.randn(max(shape[0], 1) if len(shape) == 2 else shape[0], 40).requires_grad_()
    out = norm_gate_residual(residual, x, gate, target.boundaries(0) if len(shape) == 2 else None, tanh=True)
    out.sum().backward()
    assert out.shape == residual.grad.shape == x.grad.shape == shape
    assert_zero(gate.grad)


def gated(cu, residual, x, gate, weight, bias):
    return norm_gate_residual(residual, x, gate, cu, weight=weight, bias=bias)


def rms(cu, residual, x, gate, weight):
    return norm_gate_residual(residual, x, gate, cu, norm="rms", weight=weight)


def alone(cu, residual, x):
    return norm_gate_residual(residual, x, cu_rows=cu)


def unbounded(cu, residual, x, weight):
    return norm_gate_residual(residual, x, norm="rms", weight=weight)


NAME = "norm_gate_residual"
OPS = {
    "gated": partial(make_case, gated, NAME, [*TOKENS, "gate"], ["weight", "bias"]),
    "rms": partial(make_case, rms, NAME, [*TOKENS, "gate"], ["weight"]),
    "wide": partial(make_case, rms, NAME, [*TOKENS, "gate"], ["weight"], wide=["residual", "weight"]),
    "alone": partial(make_case, alone, NAME, TOKENS, []),
    "unbounded": partial(make_case, unbounded, NAME, TOKENS, ["weight"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", LARGE_WIDTHS)
@pytest.mark.parametrize("name", OPS)
def test_large(name: str, d: int, dtype: torch.dtype) -> None:
    check_large(OPS[name](Target("cpu", "cpu", dtype), lengths=large_lengths(d, dtype), d=d))


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_tanh(target32: Target, compiler: str) -> None:
    """One graph. The compiler's tanh may have other last bits than torch's."""
    inputs = make_inputs(target32, [*TOKENS, "gate", "weight"]).values()
    torch.compiler.reset()
    function = partial(norm_gate_residual, tanh=True, norm="rms")
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    cu = target32.boundaries(*LENGTHS)
    results = []
    for f in (compiled, function):
        results.append(run(lambda residual, x, gate, weight: f(residual, x, gate, cu, weight=weight), inputs))  # noqa: B023
    for got, expected in zip(*(outputs + gradients for outputs, gradients in results), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


X, R, CU = torch.zeros(6, 8), torch.zeros(2, 8), torch.tensor([0, 4, 6], dtype=torch.int32)
BAD = [
    ({"residual": X[1:]}, "residual: expected shape [6, 8], got [5, 8]"),
    ({"residual": X.half()}, "residual: expected dtype float32, got float16"),
    ({"residual": X.to("meta")}, "residual: expected a tensor on cpu, got one on meta"),
    ({"x": X[0]}, "x: expected shape [N, D] or [B, S, D], got [8]"),
    ({"gate": R[:1]}, "gate: expected shape [2, 8], got [1, 8]"),
    ({"gate": R.bfloat16()}, "gate: expected dtype float32, got bfloat16"),
    ({"gate": X[None], "x": X[None], "residual": X[None]}, "cu_rows: expected None with x [B, S, D], got a tensor"),
    ({"cu_rows": None}, "cu_rows: expected int32 boundaries [R+1] of the rows of gate, got None"),
    ({"cu_rows": CU + 1}, "cu_rows: expected a first entry of 0, got 1"),
    ({"cu_rows": CU * 2}, "cu_rows: expected a last entry of at most 6 ~, got 12"),
    ({"tanh": "yes"}, "tanh: expected a bool, got 'yes'"),
    ({"norm": "group"}, "norm: expected one of 'layer', 'rms', got 'group'"),
    ({"weight": R}, "weight: expected shape [8], got [2, 8]"),
    ({"norm": "rms", "bias": R[0]}, 'bias: expected None with norm="rms", got a tensor'),
    ({"eps": -1.0}, "eps: expected a number >= 0, got -1.0"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input(wrong: dict, message: str) -> None:
    check_rejected(norm_gate_residual, {"residual": X, "x": X, "gate": R, "cu_rows": CU, **wrong}, f"{NAME}: {message}")
