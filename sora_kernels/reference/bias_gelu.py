"""gelu(x + bias), gelu(u) = u · (1 + tanh(√(2/π) · (u + 0.044715 · u³))) / 2."""

import math

import torch
from torch import Tensor

from .common import widen, write, write_gradients


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [N,D], bias [D] -> [N,D], in the dtype of computation."""
    u = widen(x) if bias is None else widen(x) + widen(bias)
    return u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) / 2


def bias_gelu_forward(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    write([bias_gelu(x, bias)], [out])


def bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor, dbias: Tensor | None) -> None:
    write_gradients(lambda *inputs: [bias_gelu(*inputs)], [x, bias], [dout], [dx, dbias])
