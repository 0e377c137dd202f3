"""Error helpers: every complaint about an input names the operation, the argument, what was expected and what came."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expected: str, actual: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument}: expected {expected}, got {actual}")


def check_tensor(
    op: str,
    argument: str,
    tensor: Tensor,
    shape: tuple[int | str, ...] | None = None,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] = FLOATS,
    like: Tensor | None = None,
) -> None:
    """Checks type, dtype, rank, sizes and device of one argument.

    Args:
        shape: one entry per dimension: an int is a required size, a letter stands for any size.
        dtype: the dtype, or dtypes, allowed.
        like: a tensor whose device must be shared.
    """
    if not isinstance(tensor, Tensor):
        fail(op, argument, "a torch.Tensor", type(tensor).__name__, TypeError)
    actual = tensor.dtype
    if actual is not dtype and not (isinstance(dtype, tuple) and actual in dtype):
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        fail(op, argument, "dtype " + " or ".join(map(_name, allowed)), _name(actual), TypeError)
    if shape is not None:
        sizes = tensor.shape
        fits = len(sizes) == len(shape)
        for n, m in zip(shape, sizes, strict=False):
            if n != m and not isinstance(n, str):
                fits = False
        if not fits:
            fail(op, argument, f"shape [{', '.join(map(str, shape))}]", str(list(sizes)))
    if like is not None and tensor.device != like.device:
        fail(op, argument, f"a tensor on {like.device}", f"one on {tensor.device}")


def check_cu_seqlens(op: str, argument: str, cu_seqlens: Tensor, like: Tensor, entries: int | str = "B+1") -> None:
    """Checks what can be checked without reading the values: int32 [B+1] on the device of `like`."""
    check_tensor(op, argument, cu_seqlens, (entries,), dtype=torch.int32, like=like)
    if cu_seqlens.shape[0] < 1:
        fail(op, argument, "at least one entry (the leading 0)", "none")


def check_boundaries(op: str, argument: str, boundaries: Tensor, num_tokens: int) -> None:
    """Checks the values: start at 0, never fall, end within the tokens.

    Only for boundaries on the host: on an accelerator this would stall the stream, and the kernels there clamp instead.
    """
    if not boundaries.is_cpu:
        return
    values = boundaries.numpy()
    if values[0] != 0:
        fail(op, argument, "a first entry of 0", str(values[0]))
    if values[-1] > num_tokens:
        fail(op, argument, f"a last entry of at most {num_tokens} (the number of tokens)", str(values[-1]))
    falls = values[1:] < values[:-1]
    if np.count_nonzero(falls):  # a third of the cost of falls.any()
        i = int(falls.argmax())
        fail(op, argument, "entries that never fall", f"{values[i]} then {values[i + 1]} at entry {i + 1}")


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None) -> float:
    """Checks k and v against q ([..., H, d], already checked) and returns the softmax scale."""
    check_tensor(op, "k", k, (*q.shape[:-3], "Nk", "Hk", q.shape[-1]), dtype=q.dtype, like=q)
    check_tensor(op, "v", v, tuple(k.shape), dtype=q.dtype, like=q)
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        fail(op, "k", f"a head count that divides q's {q.shape[-2]}", f"{k.shape[-2]}")
    if q.shape[-1] == 0:
        fail(op, "q", "a head dim of at least 1", "0")
    if dropout_p != 0.0:
        fail(op, "dropout_p", "0 (attention dropout is not supported)", repr(dropout_p))
    return q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)


def check_choice(op: str, argument: str, value: object, choices: tuple) -> None:
    if value not in choices:
        fail(op, argument, "one of " + ", ".join(map(repr, choices)), repr(value))


def triple(op: str, argument: str, value: object, kind: type) -> list:
    """`value` as three numbers of `kind`, for T, H and W."""
    try:
        result = [kind(x) for x in value]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        result = []
    if len(result) != 3:
        fail(op, argument, f"three {kind.__name__}s (T, H, W)", repr(value))
    return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
