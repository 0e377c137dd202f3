"""float32 rows, weights and residuals beside bfloat16 and float16 x: whoever differentiates, against float64.

What is stored in float32 is as exact as float32, and each gradient has its input's dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from tolerance import Target, largest, random_cotangents
from torch import Tensor

from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from sora_kernels.layout import PackedLayout
from sora_kernels.reference import adaln as reference
from sora_kernels.reference.rope import norm_rope, rotary_angles
from sora_kernels.rope import default_axes_dim, qk_norm_rope_3d

FUNCTION = "layer_norm_modulate_forward"
LENGTHS, D = (5, 0, 2), 24
LAYOUT = PackedLayout.from_grids([(1, 2, 2), (2, 1, 2)])  # of 8 tokens, where rows have 7
SHAPES = {"x": (8, D), "residual": (8, D), "q": (8, 3, 8), "k": (8, 1, 8), "q_weight": (8,), "k_weight": (8,)}
SHAPES |= dict.fromkeys(("shift", "scale", "gate"), (3, D)) | dict.fromkeys(("weight", "bias"), (D,))
# What one rounding costs, of the largest element; those of float32 are of sums.
EXACT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2e-6}


def qk_norm_rope(cu_rows: Tensor, **arguments: Tensor) -> tuple[Tensor, Tensor]:
    return qk_norm_rope_3d(**arguments, layout=LAYOUT.to(cu_rows.device))


def exact_modulate(cu_rows, x, shift=None, scale=None, weight=None, bias=None, norm="layer"):
    return reference.layer_norm_modulate(x, shift, scale, cu_rows, norm == "rms", weight, bias, 1e-6)[:1]


def exact_gate(cu_rows, residual, x, gate=None):
    return (reference.gate_residual(residual, x, gate, cu_rows),)


def exact_both(cu_rows, residual, x, gate=None, shift=None, scale=None, weight=None, norm="layer"):
    args = residual, x, gate, shift, scale, cu_rows, norm == "rms", weight, None, 1e-6
    return reference.gate_residual_layer_norm_modulate(*args)[:2]


def exact_qk(cu_rows, q, k, q_weight, k_weight):
    tables = (table.to(cu_rows.device) for table in (LAYOUT.cu_spans, LAYOUT.grid, LAYOUT.origin, LAYOUT.step))
    angles = rotary_angles(*tables, (10000.0,) * 3, default_axes_dim(8))
    return tuple(norm_rope(x, weight, angles, True, False, 1e-6)[0] for x, weight in ((q, q_weight), (k, k_weight)))


class Mixed(NamedTuple):
    """A function, its formula, its arguments, those in float32, and options."""

    function: Callable
    exact: Callable
    arguments: tuple[str, ...]
    wide: tuple[str, ...]
    options: dict[str, str] = {}  # noqa: RUF012

    def make(self, target: Target) -> tuple[Callable, Callable, list[Tensor]]:
        """Function and formula of tensors alone, and those."""
        cu_rows = target.boundaries(*LENGTHS)
        tensors = [target.randn(*SHAPES[name]) for name in self.arguments]
        tensors = [x.float() + 2.0**-14 if name in self.wide else x for name, x in zip(self.arguments, tensors, strict=True)]

        def named(function: Callable, *given: Tensor) -> tuple[Tensor, ...]:
            result = function(**dict(zip(self.arguments, given, strict=True)), cu_rows=cu_rows, **self.options)
            return (result,) if isinstance(result, Tensor) else tuple(result)

        return partial(named, self.function), partial(named, self.exact), tensors


MODULATE = layer_norm_modulate, exact_modulate
GATE = gate_residual, exact_gate
BOTH = gate_residual_layer_norm_modulate, exact_both
QK = qk_norm_rope, exact_qk
ROWS = ("gate", "shift", "scale")
CASES = {
    "modulate-rows": Mixed(*MODULATE, ("x", "shift", "scale", "weight", "bias"), ("shift", "scale")),
    "modulate-shift": Mixed(*MODULATE, ("x", "shift", "scale", "weight", "bias"), ("shift",)),
    "modulate-weight": Mixed(*MODULATE, ("x", "weight"), ("weight",), {"norm": "rms"}),
    "gate-gate": Mixed(*GATE, ("residual", "x", "gate"), ("gate",)),
    "gate-residual": Mixed(*GATE, ("residual", "x", "gate"), ("residual",)),
    "gate-none": Mixed(*GATE, ("residual", "x"), ("residual",)),
    "both-rows": Mixed(*BOTH, ("residual", "x", *ROWS, "weight"), ROWS),
    "both-residual": Mixed(*BOTH, ("residual", "x", *ROWS, "weight"), ("residual",), {"norm": "rms"}),
    "both-all": Mixed(*BOTH, ("residual", "x", *ROWS, "weight"), ("residual", *ROWS, "weight")),
    "both-without_gate": Mixed(*BOTH, ("residual", "x", "scale"), ("residual", "scale")),
    "qk-weights": Mixed(*QK, ("q", "k", "q_weight", "k_weight"), ("q_weight", "k_weight")),
    "qk-one_weight": Mixed(*QK, ("q", "k", "q_weight", "k_weight"), ("q_weight",)),
}

Result = tuple[list[Tensor], list[Tensor]]


def eager(function: Callable, tensors: list[Tensor]) -> Result:
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, random_cotangents(outputs)))


def compiled(function: Callable, tensors: list[Tensor]) -> Result:
    torch.compiler.reset()
    return eager(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)


def autocasted(function: Callable, tensors: list[Tensor]) -> Result:
    """These ops keep their inputs' dtypes."""
    device = tensors[0].device.type

    def under(*given: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            return function(*given)

    return eager(under, tensors)


def by_vjp(function: Callable, tensors: list[Tensor]) -> Result:
    outputs, pullback = torch.func.vjp(function, *tensors)
    return list(outputs), list(pullback(tuple(random_cotangents(outputs))))


def by_func_grad(function: Callable, tensors: list[Tensor]) -> Result:
    def product(*given: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs = function(*given)
        cotangents = random_cotangents(outputs)
        return sum((y.double() * x.double()).sum() for y, x in zip(outputs, cotangents, strict=True)), outputs

    grads, outputs = torch.func.grad(product, tuple(range(len(tensors))), has_aux=True)(*tensors)
    return list(outputs), list(grads)


def check_close(actual: list[Tensor], exact: list[Tensor], exactness: Callable[[Tensor], float]) -> None:
    for i, (got, right) in enumerate(zip(actual, exact, strict=True)):
        distance, allowed = largest(got.double() - right), exactness(got) * max(1.0, largest(right))
        assert distance <= allowed, f"{i}, {got.dtype}: error {distance:.3g} exceeds {allowed:.3g}"


@pytest.mark.parametrize("way", [eager, compiled, autocasted, by_vjp, by_func_grad])
@pytest.mark.parametrize("name", CASES)
def test_gradients(target16: Target, name: str, way: Callable) -> None:
    case = CASES[name]
    function, exact, tensors = case.make(target16)
    outputs, grads = way(function, tensors)
    assert [g.dtype for g in grads] == [x.dtype for x in tensors]
    assert outputs[0].dtype == tensors[0].dtype  # of x, q or the residual
    assert all(y.dtype == target16.dtype for y in outputs[1:])
    # The norm is of the residual as it is stored, so that all behind it is as exact.
    stored = "both" in name and "residual" not in case.wide
    right = eager(exact, [x.double() for x in tensors])
    check_close(outputs, right[0], lambda x: EXACT[x.dtype])
    check_close(grads, right[1], lambda x: EXACT[target16.dtype if stored else x.dtype])


def loss(function: Callable, *tensors: Tensor) -> Tensor:
    return sum(y.double().square().sum() for y in function(*tensors))


def penalty(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """The gradient of |gradient|**2."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(loss(function, *leaves), leaves, create_graph=True)
    return list(torch.autograd.grad(sum(g.double().square().sum() for g in grads), leaves))


def functional_penalty(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """The same by torch.func."""
    places = tuple(range(len(tensors)))

    def size(*given: Tensor) -> Tensor:
        return sum(g.double().square().sum() for g in torch.func.grad(partial(loss, function), places)(*given))

    return list(torch.func.grad(size, places)(*tensors))


@pytest.mark.parametrize("derivative", [penalty, functional_penalty])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_double_backward(name: str, dtype: torch.dtype, derivative: Callable) -> None:
    """Of gradients as they are stored: all are as exact as those in x's dtype."""
    torch.manual_seed(0)
    function, exact, tensors = CASES[name].make(Target("cpu", "", dtype))
    grads = derivative(function, tensors)
    assert [g.dtype for g in grads] == [x.dtype for x in tensors]
    check_close(grads, penalty(exact, [x.double() for x in tensors]), lambda x: 4 * EXACT[dtype])
