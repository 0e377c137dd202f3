"""Changes the arguments of a call by one source of chance: what a kernel, or a public function, must then refuse or serve."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from .foreign_tensors import foreign_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPES = (*DTYPES, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64)
INTS = (-1, 0, 1, 7, 2**31 - 1, 2**31, -(2**31), 2**62, -(2**62), 2**63 - 1, -(2**63), 2**63, 2**64)
FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e300, 1e-300)
HUGE = (2**31, 2**40, 2**53, 2**62)
FILLS = {torch.int32: (-1, 0, 1, 5, 2**30, 2**31 - 1, -(2**31)), torch.int64: (-1, 0, 5, 2**31, 2**63 - 1, -(2**63))}


def copied(value: Any) -> Any:
    """The same arguments in memory of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return type(value)(map(copied, value)) if isinstance(value, tuple | list) else value


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in tensors_in(item)] if isinstance(value, tuple | list) else []


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def described(value: Any) -> str:
    """A value in words that nothing can make fail."""
    with torch._C.DisableTorchFunctionSubclass():
        return _described(value)


def _described(value: Any, depth: int = 0) -> str:
    if depth > 4:
        return "..."
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            return f"{type(value).__name__} of layout {value.layout}"
        kind = str(value.dtype).removeprefix("torch.") if type(value) is Tensor else f"{type(value).__name__}:{value.dtype}"
        table = (
            f"={value.tolist()}"
            if value.dtype == torch.int32 and value.is_cpu and value.numel() <= 12 and has_memory(value)
            else ""
        )
        where = "" if value.is_cpu else f"@{value.device}"
        return f"{kind}{list(value.shape)}/{list(value.stride())}{where}{table}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_described(item, depth + 1) for item in value[:8])}{', ...' * (len(value) > 8)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_described(item, depth + 1)}' for key, item in list(value.items())[:8])}}}"
    try:
        return repr(value)[:200]
    except Exception:
        return f"a {type(value).__name__}"


def has_memory(x: Tensor) -> bool:
    """All that its sizes and strides reach."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.numel() == 0 or (x.storage_offset() + last + 1) * x.element_size() <= x.untyped_storage().nbytes()


class Mutation:
    """Changes values of one call.

    Args:
        tensors: all of the call.
        foreign: whether tensors may be passed as another library's.
    """

    def __init__(self, chance: random.Random, tensors: list[Tensor], foreign: bool = True) -> None:
        self.chance, self.tensors, self.is_foreign = chance, tensors, foreign
        self.huge = True  # one axis of a call at most: several would agree and be computed

    def __call__(self, value: Any) -> Any:
        if self.chance.random() < 0.05:
            return self.chance.choice(self.other_things())
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, bool):
            return self.chance.choice([not value, 2, None])
        if isinstance(value, int):
            return self.chance.choice((*INTS, value + 1, value - 1))
        if isinstance(value, float):
            return self.chance.choice(FLOATS)
        if isinstance(value, tuple | list):
            return self.sequence(list(value))
        return self.chance.choice([1, 1.0, self.chance.choice(self.tensors)] if self.tensors else [1, 1.0])

    def other_things(self) -> list[Any]:
        """What is of no type that anything takes."""
        meta, sparse = torch.zeros(3, device="meta"), torch.eye(3).to_sparse()
        return [None, "no", 3, -1.5, [], object(), meta, sparse, self.foreign(torch.ones(3, 4))]

    def sequence(self, items: list) -> Any:
        i = self.chance.randrange(len(items) + 1)
        if i == len(items) or self.chance.random() < 0.2:
            return items[:i] if self.chance.random() < 0.5 else items + items[:1]
        return [*items[:i], self(items[i]), *items[i + 1 :]]

    def tensor(self, x: Tensor) -> Any:
        changes = [self.dtype, self.shape, self.strides, self.offset, self.alias, self.values, self.other, self.foreign]
        if x.dtype == torch.int32:
            changes += [self.table] * 4  # whose values kernels rely on
        change = self.chance.choice(changes)
        try:
            return change(x)
        except RuntimeError:  # torch makes no such tensor
            return x

    def dtype(self, x: Tensor) -> Tensor:
        return x.to(self.chance.choice(OTHER_DTYPES))

    def shape(self, x: Tensor) -> Tensor:
        kind = self.chance.randrange(9)
        if kind == 7:
            return x.flatten()[0] if x.numel() else x.new_zeros(())
        if kind == 8:
            return x[(None,) * (7 - x.ndim)] if x.ndim < 7 else x
        if x.ndim == 0:
            return x[None]
        axis = self.chance.randrange(x.ndim)
        size = x.shape[axis]
        if kind == 0 and size > 0 and self.huge:
            self.huge = False
            return x.narrow(axis, 0, 1).expand(*x.shape[:axis], self.chance.choice(HUGE), *x.shape[axis + 1 :])
        if kind == 1:
            return x.narrow(axis, 0, 0)
        if kind == 2:
            return x[None]
        if kind == 3:
            return x.flatten()
        if kind == 4:
            return x.new_empty(0, *(self.chance.choice(HUGE[1:]) for _ in range(x.ndim - 1))) if x.ndim < 3 else x.mT
        if kind == 5:
            return torch.cat([x, x], dim=axis)
        return x.narrow(axis, 0, max(size - 1, 0))

    def strides(self, x: Tensor) -> Tensor:
        if x.ndim == 0:
            return x
        axis = self.chance.randrange(x.ndim)
        size = x.shape[axis]
        kind = self.chance.randrange(5)
        if kind == 0 and size > 0:
            return x.narrow(axis, 0, 1).expand(x.shape)
        if kind == 1:  # every second element
            return x.repeat_interleave(2, dim=axis).narrow(axis, 0, 2 * size).unflatten(axis, (size, 2)).select(axis + 1, 0)
        if kind == 2:
            return x.transpose(axis, -1).contiguous().transpose(axis, -1)
        if kind == 3:  # rows that overlap
            return torch.zeros(sum(x.shape) + 1, dtype=x.dtype).as_strided(x.shape, (1,) * x.ndim)
        return x.as_strided(x.shape, [2**62 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])

    def offset(self, x: Tensor) -> Tensor:
        """Its elements somewhere inside an allocation, perhaps not aligned to their size."""
        size, odd = x.nbytes, self.chance.choice([0, 0, 1])
        buffer = bytearray(size + 2 * x.element_size() + odd)
        if size == 0:
            return x
        flat = torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=x.element_size() + odd)
        return flat.view(x.shape) if odd else flat.view(x.shape).copy_(x)

    def alias(self, x: Tensor) -> Any:
        """A view of another argument's memory in the shape of this one."""
        fits = [t for t in self.tensors if t.untyped_storage().nbytes() >= x.nbytes > 0 and t.untyped_storage().data_ptr()]
        if not fits:
            return self.other(x)
        return torch.empty(0, dtype=x.dtype).set_(self.chance.choice(fits).untyped_storage(), 0, x.shape)

    def values(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        flat = x.flatten().clone()
        one = flat[self.chance.randrange(x.numel()) :][: self.chance.choice([1, x.numel()])]
        one.fill_(self.chance.choice((*FLOATS[:5], 6e4) if x.is_floating_point() else FILLS.get(x.dtype, (0, 1))))
        return flat.view(x.shape)

    def table(self, x: Tensor) -> Tensor:
        """Other boundaries, grids or lists, that are right in themselves more often than what `values` makes."""
        if x.numel() == 0:
            return x
        flat = x.flatten().tolist()
        i, j = self.chance.randrange(len(flat)), self.chance.randrange(len(flat))
        kind = self.chance.randrange(6)
        if kind == 0:
            flat[i] += self.chance.choice((-1, 1))
        elif kind == 1:
            flat[i], flat[j] = flat[j], flat[i]
        elif kind == 2:  # boundaries that rise to the same end
            flat = [0, *sorted(self.chance.randint(0, max(flat[-1], 0)) for _ in flat[2:]), flat[-1]][: len(flat)]
        elif kind == 3:
            flat = flat[1:] + flat[:1]
        elif kind == 4:
            flat[i], flat[j] = flat[i] + 1, flat[j] - 1
        else:
            flat = [self.chance.randint(0, max(*flat, 1)) for _ in flat]
        return torch.tensor(flat, dtype=torch.int64).clamp(-(2**31), 2**31 - 1).to(x.dtype).view(x.shape)

    def other(self, x: Tensor) -> Any:
        return self.chance.choice([None, *self.tensors])

    def foreign(self, x: Tensor) -> Any:
        return foreign_tensor(self.chance, x) if self.is_foreign else x
