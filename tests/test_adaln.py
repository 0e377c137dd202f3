"""adaLN: normalize and modulate, gate and add, and both at once."""

import inspect
import itertools
import re
from functools import partial
from unittest import mock

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


def used_tokens(x, cu_rows):
    return len(x) if cu_rows is None else int(cu_rows[-1])


def spread(rows, cu_rows):
    return rows[torch.arange(len(rows), device=rows.device).repeat_interleave(cu_rows.diff())]


def plain_modulate(x, shift=None, scale=None, cu_rows=None, norm="layer", weight=None, bias=None, eps=1e-6):
    """Eager PyTorch at x's dtype; beside float32 as models write it, whose results go back into that dtype."""
    d, n = x.shape[1], used_tokens(x, cu_rows)
    y = layer_norm(x[:n], (d,), eps=eps) if norm == "layer" else rms_norm(x[:n], (d,), eps=eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + spread(scale, cu_rows))
    y = y if shift is None else y + spread(shift, cu_rows)
    return pad(y.to(x.dtype), (0, 0, 0, len(x) - n))


def plain_gate(residual, x, gate=None, cu_rows=None):
    n = used_tokens(x, cu_rows)
    gated = x[:n] if gate is None else spread(gate, cu_rows) * x[:n]
    return pad((residual[:n] + gated).to(residual.dtype), (0, 0, 0, len(x) - n))


def plain_gate_modulate(residual, x, gate=None, shift=None, scale=None, cu_rows=None, **norm):
    added = plain_gate(residual, x, gate, cu_rows)
    return added, plain_modulate(added, shift, scale, cu_rows, **norm)


def exact_modulate(x, shift=None, scale=None, cu_rows=None, norm="layer", weight=None, bias=None, eps=1e-6):
    return reference.layer_norm_modulate(x, shift, scale, cu_rows, norm == "rms", weight, bias, eps)[0]


def exact_gate(residual, x, gate=None, cu_rows=None):
    return reference.gate_residual(residual, x, gate, cu_rows)


def exact_gate_modulate(
    residual, x, gate=None, shift=None, scale=None, cu_rows=None, norm="layer", weight=None, bias=None, eps=1e-6
):
    args = residual, x, gate, shift, scale, cu_rows, norm == "rms", weight, bias, eps
    return reference.gate_residual_layer_norm_modulate(*args)[:2]


MODULATION = ops.layer_norm_modulate, plain_modulate, exact_modulate
GATING = ops.gate_residual, plain_gate, exact_gate
BOTH = ops.gate_residual_layer_norm_modulate, plain_gate_modulate, exact_gate_modulate


def check(
    target: Target,
    functions: tuple,
    tokens: list[str],
    rows: list[str],
    lengths=LENGTHS,
    weights=(),
    bounded=True,
    wide=(),
    **options,
) -> None:
    """(op, plain, exact) on inputs of these names; the slack of all tokens is exactly 0. Not bounded: without cu_rows.

    wide: names of those in float32.
    """
    norm = {name: options.pop(name) for name in ("norm", "eps") if name in options}
    inputs = make_inputs(target, [*tokens, *rows, *weights], lengths, **options)
    inputs |= {name: inputs[name].float() for name in wide}
    norm["cu_rows"] = target.boundaries(*lengths) if bounded else None

    def bind(function):
        return lambda *args: function(**dict(zip(inputs, args, strict=True)), **norm)

    outputs, gradients = check_accuracy(*map(bind, functions), inputs)
    assert_zero(*(x[sum(lengths) :] for x in (*outputs, *gradients[: len(tokens)])))


def some_of(*names: str) -> list:
    """Every choice of these rows, all of them excepted: the other tests have those."""
    choices = [choice for count in range(len(names)) for choice in itertools.combinations(names, count)]
    return [pytest.param(list(choice), id="+".join(choice) or "none") for choice in choices]


@pytest.mark.parametrize("options", CASES)
def test_layer_norm_modulate(target: Target, options: dict) -> None:
    check(target, MODULATION, ["x"], ["shift", "scale"], **options)


@pytest.mark.parametrize("options", [*CASES, SHARED_MEMORY])
def test_gate_residual_layer_norm_modulate(target: Target, options: dict) -> None:
    check(target, BOTH, ["residual", "x"], ["gate", "shift", "scale"], **options)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "eps"])
def test_gate_residual(target: Target, shape: str) -> None:
    check(target, GATING, ["residual", "x"], ["gate"], **SHAPES[shape])


@pytest.mark.parametrize("norm", ["layer", "layer_affine", "rms_weight"])
@pytest.mark.parametrize("rows", some_of("shift", "scale"))
def test_modulate_without_rows(target: Target, rows: list[str], norm: str) -> None:
    check(target, MODULATION, ["x"], rows, d=40, slack=3, **NORMS[norm])


@pytest.mark.parametrize("norm", ["layer", "layer_affine", "rms_weight"])
@pytest.mark.parametrize("rows", some_of("gate", "shift", "scale"))
def test_gate_modulate_without_rows(target: Target, rows: list[str], norm: str) -> None:
    check(target, BOTH, ["residual", "x"], rows, d=40, slack=3, **NORMS[norm])


WIDE = {
    "gate": ("gate",),
    "rows": ("gate", "shift", "scale"),
    "affine": ("weight", "bias"),
    "parameters": ("gate", "shift", "scale", "weight", "bias"),
    "residual": ("residual",),
    "all": ("residual", "gate", "shift", "scale", "weight", "bias"),
}


@pytest.mark.parametrize("shape", ["D37", "slack", "long_rows", "very_wide"])
@pytest.mark.parametrize("wide", WIDE)
def test_float32_beside_x_of_2_bytes(target16: Target, wide: str, shape: str) -> None:
    """Rows, weight and bias, and the residual: what is float32 is read, added and differentiated as such."""
    options = {**SHAPES[shape], "weights": ("weight", "bias"), "wide": WIDE[wide]}
    check(target16, BOTH, ["residual", "x"], ["gate", "shift", "scale"], **options)


@pytest.mark.parametrize("wide", ["shift", "scale", "weight"])
def test_modulate_by_float32(target16: Target, wide: str) -> None:
    check(target16, MODULATION, ["x"], ["shift", "scale"], weights=("weight",), wide=[wide], slack=3)


@pytest.mark.parametrize("rows", [["gate"], []], ids=["gate", "none"])
@pytest.mark.parametrize("wide", [["residual"], ["gate"]], ids=["residual", "gate"])
def test_gate_beside_float32(target16: Target, wide: list[str], rows: list[str]) -> None:
    wide = [name for name in wide if name in [*rows, "residual"]]
    check(target16, GATING, ["residual", "x"], rows, wide=wide, slack=3)


def test_float32_is_not_rounded_to_x(target16: Target) -> None:
    """2**-12 beside 1 is nothing in 2 bytes."""
    one = torch.ones(1, 40, device=target16.device)
    small, x, cu = 2.0**-12 * one, one.to(target16.dtype), target16.boundaries(1)
    y = ops.gate_residual(one, x, small, cu)
    assert y.dtype == torch.float32
    assert torch.equal(y, one + small)
    shifted = ops.layer_norm_modulate(x, -one, 0 * one, cu, weight=one[0], bias=(one + small)[0])  # the norm is 0
    assert torch.equal(shifted, small.to(x.dtype))


def test_residual_without_gate(target: Target) -> None:
    check(target, GATING, ["residual", "x"], [], slack=3)


@pytest.mark.parametrize("shape", ["D37", "one_row", "long_rows", "very_wide"])
@pytest.mark.parametrize("norm", ["layer", "layer_affine", "layer_bias", "rms", "rms_weight"])
def test_without_boundaries(target: Target, norm: str, shape: str) -> None:
    """LayerNorm and RMSNorm of all tokens, alone and of a sum."""
    check(target, MODULATION, ["x"], [], bounded=False, **NORMS[norm], **SHAPES[shape])
    check(target, BOTH, ["residual", "x"], [], bounded=False, **NORMS[norm], **SHAPES[shape])
    check(target, GATING, ["residual", "x"], [], bounded=False, **SHAPES[shape])


@pytest.mark.parametrize("rows", some_of("gate", "shift", "scale"))
def test_only_what_is_wanted_is_computed(target: Target, rows: list[str]) -> None:
    """A backend is given no output for what is absent, nor the x that only a gate multiplies; autograd saves and returns none."""
    inputs = {name: x.requires_grad_() for name, x in make_inputs(target, ["residual", "x", *rows]).items()}
    outputs = ops.gate_residual_layer_norm_modulate(**inputs, cu_rows=target.boundaries(*LENGTHS))
    assert ("gate" in rows) == any(
        x is not None and x.data_ptr() == inputs["x"].data_ptr() for x in outputs[0].grad_fn.saved_tensors
    )
    with mock.patch.object(backends, "call", wraps=backends.call) as call:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    (passed,) = (each.kwargs for each in call.call_args_list)
    optional = {"dx": "gate", "dgate": "gate", "x": "gate", "dshift": "shift", "dscale": "scale", "dweight": "w", "dbias": "b"}
    for output, row in optional.items():
        assert (passed[output] is not None) == (row in rows), output
    assert all(x.grad is not None for x in inputs.values())


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


def make_case(op, operator: str, names: list[str], weights: list[str], target: Target, lengths=LENGTHS, d=72, wide=()) -> Case:
    inputs = make_inputs(target, names + weights, lengths, d=d)
    inputs |= {name: inputs[name].float() for name in wide if target.dtype.itemsize == 2}
    shared = [inputs.pop(name) for name in weights]
    cu = target.boundaries(*lengths)
    parts = [
        (target.boundaries(n), [x[r : r + 1] if name in ROWS else x[cu[r] : cu[r + 1]] for name, x in inputs.items()])
        for r, n in enumerate(lengths)
    ]
    return Case.of_samples(op, cu, parts, {f"{operator}_forward", f"{operator}_backward"}, *shared)


MODULATE, GATE = ["x", "shift", "scale"], ["residual", "x", "gate"]


def norm_alone(cu, x, weight, bias):
    return ops.layer_norm_modulate(x, weight=weight, bias=bias)


def scale_alone(cu, residual, x, scale, weight, bias):
    return ops.gate_residual_layer_norm_modulate(residual, x, scale=scale, cu_rows=cu, weight=weight, bias=bias)


def shift_gate(cu, residual, x, gate, shift):
    return ops.gate_residual_layer_norm_modulate(residual, x, gate, shift, None, cu, norm="rms")


def add(cu, residual, x):
    return ops.gate_residual(residual, x, cu_rows=cu)


BOTH_NAME = "gate_residual_layer_norm_modulate"
OPS = {
    "modulate": partial(make_case, modulate, "layer_norm_modulate", MODULATE, ["weight", "bias"]),
    "modulate_rms": partial(make_case, modulate_rms, "layer_norm_modulate", MODULATE, []),
    "gate": partial(make_case, gate_add, "gate_residual", GATE, []),
    "both": partial(make_case, gate_modulate, BOTH_NAME, [*GATE, "shift", "scale"], ["weight"]),
    "wide": partial(make_case, gate_modulate, BOTH_NAME, [*GATE, "shift", "scale"], ["weight"], wide=["residual", *ROWS]),
    "norm": partial(make_case, norm_alone, "layer_norm_modulate", ["x"], ["weight", "bias"]),
    "scale": partial(make_case, scale_alone, BOTH_NAME, ["residual", "x", "scale"], ["weight", "bias"]),
    "shift_gate": partial(make_case, shift_gate, BOTH_NAME, [*GATE, "shift"], []),
    "add": partial(make_case, add, "gate_residual", ["residual", "x"], []),
}

X, R, CU = torch.zeros(6, 8), torch.zeros(2, 8), torch.tensor([0, 4, 6], dtype=torch.int32)
GOOD = {
    "layer_norm_modulate": {"x": X, "shift": R, "scale": R, "cu_rows": CU},
    "gate_residual": {"residual": X, "x": X, "gate": R, "cu_rows": CU},
}
GOOD["gate_residual_layer_norm_modulate"] = GOOD["layer_norm_modulate"] | GOOD["gate_residual"]
EVERYWHERE = [
    ({"cu_rows": None}, "cu_rows: expected int32 boundaries [R+1] of the rows of ~, got None"),
    ({"x": 1}, "x: expected a torch.Tensor, got int"),
    ({"x": X.int()}, "x: expected dtype float32 or ~, got int32"),
    ({"x": X[0]}, "x: expected shape [N, D] or [B, S, D], got [8]"),
    ({"cu_rows": [0, 4, 6]}, "cu_rows: expected a torch.Tensor, got list"),
    ({"cu_rows": CU.long()}, "cu_rows: expected dtype int32, got int64"),
    ({"cu_rows": CU[:0]}, "cu_rows: expected at least one entry~, got none"),
    ({"cu_rows": CU + 1}, "cu_rows: expected a first entry of 0, got 1"),
    ({"cu_rows": CU * 2}, "cu_rows: expected a last entry of at most 6~, got 12"),
    ({"cu_rows": CU[[0, 2, 1]]}, "cu_rows: expected entries that never fall, got 6 then 4~"),
]
BAD = {
    "layer_norm_modulate": [
        ({"cu_rows": None, "shift": None}, "cu_rows: expected int32 boundaries [R+1] of the rows of ~, got None"),
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
    """The compiled functions may lack rows, the norm's weight and bias and the gradients of those, and no other tensor."""
    mean = torch.zeros(6)
    others = {"cu_rows": CU, "rms": False, "eps": 1e-6, "mean": mean, "rstd": mean + 1}
    others |= dict.fromkeys(["weight", "bias", "dweight", "dbias"])
    names = inspect.signature(getattr(reference, name)).parameters
    good = {key: others[key] if key in others else (R if key.removeprefix("d") in ROWS else X).clone() for key in names}
    function = getattr(backends.BACKENDS["cpu"].load(), name)
    function(*good.values())
    for key, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        without = {**good, key: None}.values()
        if key.removeprefix("d") in ("shift", "scale") or (key == "gate" and name.endswith("_forward")):
            function(*without)
        else:
            with pytest.raises(ValueError, match=r"sora_kernels\._cpu: "):
                function(*without)
    if "dgate" in good:  # what belongs to the gate goes together
        function(*{**good, **dict.fromkeys(["x", "gate", "dx", "dgate"])}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", LARGE_WIDTHS)
@pytest.mark.parametrize("name", OPS)
def test_large(name: str, d: int, dtype: torch.dtype) -> None:
    check_large(OPS[name](Target("cpu", "cpu", dtype), lengths=large_lengths(d, dtype), d=d))


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""
