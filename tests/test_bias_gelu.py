"""The bias and activation of an MLP."""

import pytest
import torch
from contract import PackedContract
from tolerance import (
    LARGE_WIDTHS,
    Case,
    Target,
    check_accuracy,
    check_large,
    check_rejected,
    large_lengths,
)
from torch import Tensor
from torch.nn.functional import gelu

from sora_kernels import backends
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.reference import bias_gelu as reference

FUNCTION = "bias_gelu_forward"
SHAPES = {
    **{f"D{d}": {"d": d} for d in (1, 3, 8, 37, 130, 1152)},
    "one_token": {"tokens": 1, "d": 1030},
    "many_tokens": {"tokens": 261, "d": 8},  # of more partial sums than one item or block adds
    "no_tokens": {"tokens": 0},
    "small": {"scale": 1e-3},
    "large": {"scale": 30.0},
}


def plain(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Eager PyTorch at x's dtype."""
    return gelu(x if bias is None else x + bias, approximate="tanh")


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_gelu(target: Target, shape: str, biased: bool) -> None:
    options = {"tokens": 50, "d": 64, "scale": 2.0, **SHAPES[shape]}
    inputs = {"x": target.randn(options["tokens"], options["d"], scale=options["scale"])}
    if biased:
        inputs["bias"] = target.randn(options["d"])
    check_accuracy(bias_gelu, plain, lambda x, bias=None: reference.bias_gelu(x, bias), inputs)


def test_far_out(target: Target) -> None:
    """Where powers of x overflow, gelu is x or 0 and its slope 1 or 0; NaN stays NaN."""
    far = 1e30 if target.dtype in (torch.float32, torch.bfloat16) else 6e4
    x = torch.tensor([[far, -far, 30.0, -30.0, 0.0, torch.nan]]).to(target.device, target.dtype).requires_grad_()
    y = bias_gelu(x)
    y.backward(torch.ones_like(y))
    exact = torch.tensor([[far, 0, 30, 0, 0, torch.nan]]).to(y)
    torch.testing.assert_close(y.detach(), exact, rtol=0, atol=0, equal_nan=True)
    if backends.forced_backend() != "reference":  # as autograd differentiates its powers, they overflow
        slope = torch.tensor([[1, 0, 1, 0, 0.5, torch.nan]]).to(y)
        torch.testing.assert_close(x.grad, slope, rtol=0, atol=0, equal_nan=True)


def make_case(target: Target, lengths=(37, 1, 0, 12), d=72) -> Case:
    parts = [(None, [target.randn(n, d)]) for n in lengths]
    operators = {"bias_gelu_forward", "bias_gelu_backward"}
    return Case.of_samples(lambda _, x, bias: bias_gelu(x, bias), None, parts, operators, target.randn(d))


OPS = {"bias_gelu": make_case}

X = torch.zeros(6, 8)
BAD = [
    ({"x": 1}, "x: expected a torch.Tensor, got int"),
    ({"x": X.int()}, "x: expected dtype float32 or ~, got int32"),
    ({"x": X[0]}, "x: expected shape [N, D] or [..., D], got [8]"),
    ({"bias": X}, "bias: expected shape [8], got [6, 8]"),
    ({"bias": X[0, :4]}, "bias: expected shape [8], got [4]"),
    ({"bias": X[0].half()}, "bias: expected dtype float32, got float16"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input(wrong: dict, message: str) -> None:
    check_rejected(bias_gelu, {"x": X, "bias": X[0], **wrong}, f"bias_gelu: {message}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", LARGE_WIDTHS)
def test_large(d: int, dtype: torch.dtype) -> None:
    check_large(make_case(Target("cpu", "cpu", dtype), large_lengths(d, dtype), d))


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""


def test_leading_dimensions() -> None:
    x, bias = torch.randn(2, 3, 5, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    flat = x.detach().flatten(0, 2).requires_grad_()
    out, want = bias_gelu(x, bias), bias_gelu(flat, bias)
    assert torch.equal(out, want.view(2, 3, 5, 16))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0].flatten(0, 2), torch.autograd.grad(want.sum(), flat)[0])
