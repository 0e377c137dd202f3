"""Error helpers: every complaint about an input names the operation, the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from ._torch_private import transforms_active

_STRIDED = torch.strided
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expected: str, actual: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument}: expected {expected}, got {actual}")


def check_tensor(
    op: str,
    argument: str,
    tensor: Tensor,
    shape: tuple[int | str, ...] | None = None,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = FLOATS,
    like: Tensor | None = None,
) -> None:
    """Checks type, layout, dtype, rank, sizes and device of one argument.

    Args:
        shape: one entry per dimension: an int is a required size, a letter stands for any size.
        dtype: the dtype, or dtypes, allowed; None: any.
        like: a tensor whose device must be shared.
    """
    if not isinstance(tensor, Tensor):
        fail(op, argument, "a torch.Tensor", type(tensor).__name__, TypeError)
    if tensor.layout is not _STRIDED or tensor.is_nested:
        fail(op, argument, "a dense tensor", "a nested one" if tensor.is_nested else f"layout {_name(tensor.layout)}", TypeError)
    actual = tensor.dtype
    if actual is not dtype and dtype is not None and not (isinstance(dtype, tuple) and actual in dtype):
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


def or_float32(x: Tensor) -> torch.dtype | tuple[torch.dtype, ...]:
    """The dtypes that parameters beside x may have."""
    return x.dtype if x.dtype is torch.float32 else (x.dtype, torch.float32)


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
    if boundaries.shape[0] > 2**31:  # an expanded tensor, for which what follows would take far more memory than it has itself
        fail(op, argument, "at most 2**31 entries", str(boundaries.shape[0]))
    # Where torch.func transforms, not even tensors that it leaves alone can lend NumPy their memory.
    values = np.array(boundaries.tolist()) if transforms_active() else boundaries.numpy()
    if values[0] != 0:
        fail(op, argument, "a first entry of 0", str(values[0]))
    if values[-1] > num_tokens:
        fail(op, argument, f"a last entry of at most {num_tokens} (the number of tokens)", str(values[-1]))
    falls = values[1:] < values[:-1]
    if np.count_nonzero(falls):  # a third of the cost of falls.any()
        i = int(falls.argmax())
        fail(op, argument, "entries that never fall", f"{values[i]} then {values[i + 1]} at entry {i + 1}")


def check_tables(op: str, like: Tensor, cu_spans: Tensor, grid: Tensor, *others: Tensor) -> None:
    """Checks a layout's tables: int32 grids [S, 3], and float32 rows [S, 3] such as origins, contiguous, on the device of `like`.

    A layout makes them so, but its attributes can be replaced. Not on the host, where the compiled kernels check them for less.
    """
    if like.is_cpu:
        return
    for table in (grid, *others):
        name = "layout.grid" if table is grid else "layout's origin or step"
        check_tensor(op, name, table, (cu_spans.shape[0] - 1, 3), dtype=torch.int32 if table is grid else torch.float32, like=like)
        if not table.is_contiguous():
            fail(op, name, "a contiguous tensor", f"strides {table.stride()}")


class AttentionNames(NamedTuple):
    """What an attention function calls its arguments."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    scale: str = "softmax_scale"
    cu_q: str = "cu_seqlens_q"
    cu_k: str = "cu_seqlens_k"


def check_qkv(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    names: AttentionNames = AttentionNames(),  # noqa: B008
) -> float:
    """Checks k and v against q ([..., H, d], already checked) and returns the softmax scale."""
    *lead, _, heads, width = q.shape
    check_tensor(op, names.k, k, (*lead, "Nk", "Hk", width), dtype=q.dtype, like=q)
    *of_keys, key_heads, _ = k.shape
    check_tensor(op, names.v, v, (*of_keys, key_heads, "dv"), dtype=q.dtype, like=q)
    if heads % key_heads if key_heads else heads:
        fail(op, names.k, f"a head count that divides {names.q}'s {heads}", f"{key_heads}")
    if width == 0:
        fail(op, names.q, "a head dim of at least 1", "0")
    if v.shape[-1] == 0:
        fail(op, names.v, "a head dim of at least 1", "0")
    if check_number(op, "dropout_p", dropout_p) != 0.0:
        fail(op, "dropout_p", "0 (attention dropout is not supported)", repr(dropout_p))
    return width**-0.5 if softmax_scale is None else check_float32(op, names.scale, softmax_scale, q)


UNBOUNDED = 2**30  # a side of a window without a limit: no sample that fits into memory is as long


def side(size: int) -> int:
    """A side of a window as kernels take it: any that no token can reach past is one without a limit."""
    return min(size, UNBOUNDED)


def check_list(op: str, argument: str, expected: str, value: object) -> list:
    """What can be gone through, as a list."""
    try:
        return list(value)  # type: ignore[call-overload]
    except (TypeError, RuntimeError):  # a sparse tensor's is a RuntimeError
        fail(op, argument, expected, repr(value), TypeError)


def check_device(op: str, argument: str, device: object) -> torch.device:
    """`device`, or what torch makes one of."""
    if isinstance(device, torch.device):
        return device
    if not isinstance(device, str | int) or isinstance(device, bool):
        fail(op, argument, "a device", repr(device), TypeError)
    try:
        return torch.device(device)
    except (RuntimeError, ValueError):  # of a text, of a number
        fail(op, argument, "a device", repr(device))


def check_choice(op: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        fail(op, argument, "one of " + ", ".join(map(repr, choices)), repr(value))


BOOLS = bool, np.bool_  # numbers of these are a mistake; NumPy's before 2 may stand for a whole number


def check_int(op: str, argument: str, value: object, at_least: int | None = None, at_most: int | None = None) -> int:
    """`value`, a whole number of any kind (Python's, NumPy's, an integer tensor's item), as an int."""
    try:
        if isinstance(value, BOOLS):
            raise TypeError
        # An int stays what it is, as it may stand for one while torch.compile traces.
        number = value if isinstance(value, int) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        fail(op, argument, "an int", repr(value), TypeError)
    if at_least is not None and number < at_least:
        fail(op, argument, f"an int >= {at_least}", repr(value))
    if at_most is not None and number > at_most:
        fail(op, argument, f"an int <= {at_most}", repr(value))
    return number


def _is_finite(x: float) -> bool:
    """math.isfinite, also of what stands for a float while torch.compile traces."""
    return x - x == 0


_NUMBERS = (int, float, numbers.Real, torch.SymFloat, torch.SymInt)
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
_FLOAT32_LEAST = 2.0**-149


def check_number(op: str, argument: str, value: object, at_least: float | None = None) -> float:
    """`value`, a finite number of any kind (Python's or NumPy's; no bool, no tensor), as a float."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
        got = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        fail(op, argument, "a number", got, TypeError)
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not _is_finite(number):
        fail(op, argument, "a finite number", repr(value))
    if at_least is not None and number < at_least:
        fail(op, argument, f"a number >= {at_least}", repr(value))
    return number


def check_float32(op: str, argument: str, value: object, beside: Tensor, at_least: float | None = None) -> float:
    """A number that kernels take as float32: it becomes neither infinite there nor, unless it is 0, 0.

    Beside a float64 tensor it is any number.
    """
    number = check_number(op, argument, value, at_least)
    if beside.dtype is torch.float64:  # the reference's, which computes in it
        return number
    if abs(number) > FLOAT32_MAX or 0 < abs(number) < _FLOAT32_LEAST:
        fail(op, argument, "a number that float32 has", repr(value))
    return number


def check_bool(op: str, argument: str, value: object) -> bool:
    """`value`, Python's or NumPy's, or a 0 or 1, as a bool: "no" and 2 are none."""
    if not isinstance(value, BOOLS) and not (isinstance(value, int) and value in (0, 1)):
        fail(op, argument, "a bool", repr(value), TypeError)
    return bool(value)


_KINDS: dict[type, Callable[[str, str, object], object]] = {int: check_int, float: check_number, bool: check_bool}


def triple(op: str, argument: str, value: object, kind: type) -> list:
    """`value` as three numbers of `kind`, for T, H and W: any three that a list can be made of, but no text."""
    if type(value) is tuple and len(value) == 3:  # what most calls pass, in a fifth of the time
        a, b, c = value
        if type(a) is kind and type(b) is kind and type(c) is kind and (kind is not float or _is_finite(a + b + c)):
            return [a, b, c]
    expected = f"three {kind.__name__}s (T, H, W)"
    try:
        items = [] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    except (TypeError, RuntimeError):
        items = []
    if len(items) != 3:
        fail(op, argument, expected, repr(value))
    try:
        return [_KINDS[kind](op, argument, item) for item in items]
    except (TypeError, ValueError):
        fail(op, argument, expected, repr(value))


def _name(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")
