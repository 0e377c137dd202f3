"""The activation of a transformer's MLP, with the bias of the linear layer before it.

    gelu(x + bias),   gelu(u) = u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u**3))) / 2

One pass over x instead of one to add the bias and one for the activation, each way; the bias's gradient is summed in float32 on
the way. Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016), the tanh approximation, as DiT and most of its
descendants use it; torch's `gelu(x, approximate="tanh")`.
"""

from __future__ import annotations

from torch import Tensor

from . import backends
from .checks import check_tensor, fail
from .library import Context, register, rows, shaped_as
from .memory import empty_like


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x + bias), in the tanh approximation.

    >>> x, linear = torch.randn(400, 384), nn.Linear(384, 1536)
    >>> bias_gelu(F.linear(x, linear.weight), linear.bias).shape
    torch.Size([400, 1536])

    Args:
        x: [N, D] or [..., D], float32, bfloat16, float16 or float64; computed in float32 (float64 in float64).
        bias: [D] in x's dtype; None is 0.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_tensor("bias_gelu", "x", x)
    if x.ndim < 2:
        fail("bias_gelu", "x", "shape [N, D] or [..., D]", str(list(x.shape)))
    if bias is not None:
        check_tensor("bias_gelu", "bias", bias, (x.shape[-1],), dtype=x.dtype, like=x)
    return shaped_as(_bias_gelu(x.flatten(0, -2), bias), x)


def _run(x: Tensor, bias: Tensor | None) -> Tensor:
    (x,), (bias,) = rows(x), rows(bias)
    out = empty_like(x)
    backends.call("bias_gelu_forward", x, x=x, bias=bias, out=out)
    return out


def _run_backward(dout: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    (dout, x), (bias,) = rows(dout, x), rows(bias)
    dx, dbias = _fake_backward(dout, x, bias)
    backends.call("bias_gelu_backward", x, dout=dout, x=x, bias=bias, dx=dx, dbias=None if bias is None else dbias)
    return dx, dbias


def _fake_backward(dout: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_like(x), x.new_empty(0 if bias is None else bias.shape)  # an op cannot return None


def _save(ctx: Context, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Context, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = _bias_gelu_backward(dout, x, bias)
    return dx, None if bias is None else dbias


_bias_gelu_backward = register(
    "bias_gelu_backward(Tensor dout, Tensor x, Tensor? bias) -> (Tensor, Tensor)", _run_backward, _fake_backward
)
_bias_gelu = register("bias_gelu_forward(Tensor x, Tensor? bias) -> Tensor", _run, lambda x, _: empty_like(x), _grad, _save)
