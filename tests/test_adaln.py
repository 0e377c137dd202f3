"""adaLN: normalize and modulate, gate and add, and both at once."""

import inspect
import re
from functools import partial

import pytest
import torch
from contract import PackedContract
from tolerance import (
    LARGE_WIDTHS,
    Case,
    Target,
    assert_bit_equal,
    assert_zero,
    check_accuracy,
    check_large,
    check_rejected,
    large_lengths,
)
from torch import Tensor
from torch.nn.functional import layer_norm, pad, rms_norm

from sora_kernels import adaln as ops
from sora_kernels import backends
from sora_kernels.reference import adaln as reference

FUNCTION = "layer_norm_modulate_forward"
LENGTHS = (37, 1, 0, 12, 0)
ROWS = {"shift", "scale", "gate"}  # of [R, D]; everything else but weight and bias is [N, D]

NORMS = {
    "layer": {},
    "layer_weight": {"weights": ("weight",)},
    "layer_affine": {"weights": ("weight", "bias")},
    "layer_bias": {"weights": ("bias",)},
    "rms": {"norm": "rms"},
    "rms_weight": {"norm": "rms", "weights": ("weight",)},
}
SHAPES = {
    **{f"D{d}": {"d": d} for d in (3, 8, 37, 130, 1152)},
    "slack": {"slack": 7},
    "tokens": {"lengths": (1,) * 40},
    "one_row": {"lengths": (199,)},
    "long_rows": {"lengths": (3, 1100), "d": 8},  # of more partial sums than a block adds
    "very_wide": {"lengths": (1,), "d": 10248},  # too long a row for the registers of a block
    "nothing": {"lengths": (0, 0), "slack": 3},
    "no_rows": {"lengths": (), "slack": 3},
    "eps": {"eps": 0.1},
    "far_from_zero": {"offset": 30.0},
    "small": {"spread": 1e-3},
    "large": {"spread": 100.0},
}
CASES = [
    *(pytest.param({**norm, "slack": 3}, id=name) for name, norm in NORMS.items()),
    *(pytest.param({**NORMS["layer_affine"], **shape}, id=name) for name, shape in SHAPES.items()),
    *(pytest.param({**NORMS["rms_weight"], **SHAPES[name]}, id=f"rms_{name}") for name in ("D37", "slack", "eps")),
]
SHARED_MEMORY = pytest.param({"lengths": (1,), "d": 4104}, id="shared_memory")  # the backward takes more than 48 KB of it


def make_inputs(target: Target, names: list[str], lengths=LENGTHS, d=64, slack=0, spread=1.0, offset=0.0) -> dict[str, Tensor]:
    """Tensors by name; the slack rows of those with a row per token are NaN."""
    inputs = {}
    for name in names:
        if name in ("weight", "bias"):
            inputs[name] = target.randn(d, scale=0.3) + (name == "weight")
        elif name in ROWS:
            inputs[name] = target.randn(len(lengths), d)
        else:
            inputs[name] = target.randn(sum(lengths) + slack, d, scale=spread) + offset
            inputs[name][sum(lengths) :] = torch.nan
    return inputs


def plain_modulate(x, shift, scale, cu, norm="layer", weight=None, bias=None, eps=1e-6):
    """Eager PyTorch at x's dtype."""
    d, n = x.shape[1], int(cu[-1])
    rows = torch.arange(len(scale), device=x.device).repeat_interleave(cu.diff())
    y = layer_norm(x[:n], (d,), eps=eps) if norm == "layer" else rms_norm(x[:n], (d,), eps=eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return pad(y * (1 + scale[rows]) + shift[rows], (0, 0, 0, len(x) - n))


def plain_gate(residual, x, gate, cu):
    n, rows = int(cu[-1]), torch.arange(len(gate), device=x.device).repeat_interleave(cu.diff())
    return pad(residual[:n] + gate[rows] * x[:n], (0, 0, 0, len(x) - n))


def plain_gate_modulate(residual, x, gate, shift, scale, cu, **norm):
    added = plain_gate(residual, x, gate, cu)
    return added, plain_modulate(added, shift, scale, cu, **norm)


def exact_modulate(x, shift, scale, cu, norm="layer", weight=None, bias=None, eps=1e-6):
    return reference.layer_norm_modulate(x, shift, scale, cu, norm == "rms", weight, bias, eps)[0]


def exact_gate_modulate(residual, x, gate, shift, scale, cu, norm="layer", weight=None, bias=None, eps=1e-6):
    args = residual, x, gate, shift, scale, cu, norm == "rms", weight, bias, eps
    return reference.gate_residual_layer_norm_modulate(*args)[:2]


def check(target: Target, functions: tuple, tokens: list[str], rows: list[str], lengths=LENGTHS, weights=(), **options) -> None:
    """(op, plain, exact) on inputs in the order in which they are named; the slack of all tokens is exactly 0."""
    cu = target.boundaries(*lengths)
    norm = {name: options.pop(name) for name in ("norm", "eps") if name in options}
    inputs = make_inputs(target, [*tokens, *rows, *weights], lengths, **options)
    positional = len(tokens) + len(rows)

    def bind(function):
        return lambda *args: function(*args[:positional], cu, **dict(zip(weights, args[positional:], strict=True)), **norm)

    outputs, gradients = check_accuracy(*map(bind, functions), inputs)
    assert_zero(*(x[sum(lengths) :] for x in (*outputs, *gradients[: len(tokens)])))


@pytest.mark.parametrize("options", CASES)
def test_layer_norm_modulate(target: Target, options: dict) -> None:
    check(target, (ops.layer_norm_modulate, plain_modulate, exact_modulate), ["x"], ["shift", "scale"], **options)


@pytest.mark.parametrize("options", [*CASES, SHARED_MEMORY])
def test_gate_residual_layer_norm_modulate(target: Target, options: dict) -> None:
    functions = ops.gate_residual_layer_norm_modulate, plain_gate_modulate, exact_gate_modulate
    check(target, functions, ["residual", "x"], ["gate", "shift", "scale"], **options)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "eps"])
def test_gate_residual(target: Target, shape: str) -> None:
    check(target, (ops.gate_residual, plain_gate, reference.gate_residual), ["residual", "x"], ["gate"], **SHAPES[shape])


@pytest.mark.parametrize("width", [72, 1152, 3000])
def test_rows_of_one_value_are_zero(target: Target, width: int) -> None:
    """However large it is: their mean is that very value."""
    values = torch.tensor([1000.7, -300.3, 10.1, 3e4 + 0.3, 0.1])
    x = values[:, None].expand(-1, width).to(target.device, target.dtype)
    nothing = torch.zeros(1, width).to(x)
    assert_zero(ops.layer_norm_modulate(x, nothing, nothing, target.boundaries(len(values))))


@pytest.mark.parametrize("name", NORMS)
def test_fused_equals_one_after_the_other(target: Target, name: str) -> None:
    """The norm is taken of the residual as stored, so fusing changes no bit of the forward."""
    options = dict(NORMS[name])
    weights = options.pop("weights", ())
    inputs = make_inputs(target, ["residual", "x", "gate", "shift", "scale", *weights], slack=2)
    residual, x, gate, shift, scale, *affine = inputs.values()
    cu, options = target.boundaries(*LENGTHS), {**options, **dict(zip(weights, affine, strict=True))}
    fused = ops.gate_residual_layer_norm_modulate(residual, x, gate, shift, scale, cu, **options)
    added = ops.gate_residual(residual, x, gate, cu)
    assert_bit_equal(fused, [added, ops.layer_norm_modulate(added, shift, scale, cu, **options)])


def test_constant_rows(target: Target) -> None:
    """A row without variance gives the shift, not NaN."""
    x, (shift, scale) = torch.full_like(target.randn(5, 16), 3.0), target.randn(2, 1, 16)
    y = ops.layer_norm_modulate(x, shift, scale, target.boundaries(5))
    assert torch.equal(y, shift.expand(5, 16))


def test_no_tokens(target: Target) -> None:
    """Not even the strides of a tensor without elements matter."""
    x, shift, scale = (x.requires_grad_() for x in (target.randn(0, 128)[:, ::2], target.randn(1, 64), target.randn(1, 64)))
    y = ops.layer_norm_modulate(x, shift, scale, target.boundaries(0))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)
    assert_zero(shift.grad, scale.grad)


def modulate(cu, x, shift, scale, weight, bias):
    return ops.layer_norm_modulate(x, shift, scale, cu, weight=weight, bias=bias)


def modulate_rms(cu, x, shift, scale):
    return ops.layer_norm_modulate(x, shift, scale, cu, norm="rms")


def gate_add(cu, residual, x, gate):
    return ops.gate_residual(residual, x, gate, cu)


def gate_modulate(cu, residual, x, gate, shift, scale, weight):
    return ops.gate_residual_layer_norm_modulate(residual, x, gate, shift, scale, cu, weight=weight)


def make_case(op, operator: str, names: list[str], weights: list[str], target: Target, lengths=LENGTHS, d=72) -> Case:
    inputs = make_inputs(target, names + weights, lengths, d=d)
    shared = [inputs.pop(name) for name in weights]
    cu = target.boundaries(*lengths)
    parts = [
        (target.boundaries(n), [x[r : r + 1] if name in ROWS else x[cu[r] : cu[r + 1]] for name, x in inputs.items()])
        for r, n in enumerate(lengths)
    ]
    return Case.of_samples(op, cu, parts, {f"{operator}_forward", f"{operator}_backward"}, *shared)


MODULATE, GATE = ["x", "shift", "scale"], ["residual", "x", "gate"]
OPS = {
    "modulate": partial(make_case, modulate, "layer_norm_modulate", MODULATE, ["weight", "bias"]),
    "modulate_rms": partial(make_case, modulate_rms, "layer_norm_modulate", MODULATE, []),
    "gate": partial(make_case, gate_add, "gate_residual", GATE, []),
    "both": partial(make_case, gate_modulate, "gate_residual_layer_norm_modulate", [*GATE, "shift", "scale"], ["weight"]),
}

X, R, CU = torch.zeros(6, 8), torch.zeros(2, 8), torch.tensor([0, 4, 6], dtype=torch.int32)
GOOD = {
    "layer_norm_modulate": {"x": X, "shift": R, "scale": R, "cu_seqlens": CU},
    "gate_residual": {"residual": X, "x": X, "gate": R, "cu_seqlens": CU},
}
GOOD["gate_residual_layer_norm_modulate"] = GOOD["layer_norm_modulate"] | GOOD["gate_residual"]
EVERYWHERE = [
    ({"x": 1}, "x: expected a torch.Tensor, got int"),
    ({"x": X.int()}, "x: expected dtype float32 or ~, got int32"),
    ({"x": X[0]}, "x: expected shape [N, D], got [8]"),
    ({"cu_seqlens": [0, 4, 6]}, "cu_seqlens: expected a torch.Tensor, got list"),
    ({"cu_seqlens": CU.long()}, "cu_seqlens: expected dtype int32, got int64"),
    ({"cu_seqlens": CU[:0]}, "cu_seqlens: expected at least one entry~, got none"),
    ({"cu_seqlens": CU + 1}, "cu_seqlens: expected a first entry of 0, got 1"),
    ({"cu_seqlens": CU * 2}, "cu_seqlens: expected a last entry of at most 6~, got 12"),
    ({"cu_seqlens": CU[[0, 2, 1]]}, "cu_seqlens: expected entries that never fall, got 6 then 4~"),
]
BAD = {
    "layer_norm_modulate": [
        ({"shift": R[:1]}, "shift: expected shape [2, 8], got [1, 8]"),
        ({"scale": X}, "scale: expected shape [2, 8], got [6, 8]"),
        ({"scale": R.half()}, "scale: expected dtype float32, got float16"),
        ({"norm": "group"}, "norm: expected one of 'layer', 'rms', got 'group'"),
        ({"weight": R}, "weight: expected shape [8], got [2, 8]"),
        ({"bias": R[0].double()}, "bias: expected dtype float32, got float64"),
        ({"norm": "rms", "bias": R[0]}, 'bias: expected None with norm="rms", got a tensor'),
    ],
    "gate_residual": [
        ({"gate": R[:, :4]}, "gate: expected shape [2, 8], got [2, 4]"),
        ({"residual": X[1:]}, "residual: expected shape [6, 8], got [5, 8]"),
        ({"residual": X.half()}, "residual: expected dtype float32, got float16"),
    ],
}
BAD["gate_residual_layer_norm_modulate"] = BAD["layer_norm_modulate"] + BAD["gate_residual"]


@pytest.mark.parametrize(("name", "wrong", "message"), [(name, *row) for name, rows in BAD.items() for row in EVERYWHERE + rows])
def test_bad_input(name: str, wrong: dict, message: str) -> None:
    check_rejected(getattr(ops, name), {**GOOD[name], **wrong}, f"{name}: {message}")


@pytest.mark.parametrize("name", [name for name in backends.FUNCTIONS if re.match("layer_norm|gate_residual", name)])
def test_missing_tensor(name: str) -> None:
    """The compiled functions may lack the norm's weight and bias and their gradients, and no other tensor."""
    mean = torch.zeros(6)
    others = {"cu_seqlens": CU, "rms": False, "eps": 1e-6, "mean": mean, "rstd": mean + 1}
    others |= dict.fromkeys(["weight", "bias", "dweight", "dbias"])
    names = inspect.signature(getattr(reference, name)).parameters
    good = {key: others[key] if key in others else (R if key.removeprefix("d") in ROWS else X).clone() for key in names}
    function = getattr(backends.BACKENDS["cpu"].load(), name)
    function(*good.values())
    for key, value in good.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=r"sora_kernels\._cpu: "):
                function(*{**good, key: None}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", LARGE_WIDTHS)
@pytest.mark.parametrize("name", OPS)
def test_large(name: str, d: int, dtype: torch.dtype) -> None:
    check_large(OPS[name](Target("cpu", "cpu", dtype), lengths=large_lengths(d, dtype), d=d))


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""
