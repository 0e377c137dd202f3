"""Objects that offer memory through DLPack's C exchange API as torch.Tensor does, and describe it in ways that torch never would.

Their memory is real. What they say of it may be wrong in all that a reader can check: ranks, sizes and strides that are negative
or beyond all memory, no sizes, no strides, dtypes of no bits. Or the table is missing, of another version, or not one at all.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

I64 = ctypes.c_int64


class View(ctypes.Structure):
    """DLTensor of DLPack."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("sizes", ctypes.POINTER(I64)),
        ("strides", ctypes.POINTER(I64)),
        ("byte_offset", ctypes.c_uint64),
    ]


FromObject = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(View))


class Table(ctypes.Structure):
    """DLPackExchangeAPI of DLPack."""

    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", ctypes.c_void_p),
        ("managed_to_object", ctypes.c_void_p),
        ("tensor_from_object", FromObject),
        ("current_stream", ctypes.c_void_p),
    ]


@FromObject
def from_object(source: Foreign, out: Any) -> int:
    if source.view is None:
        return -1  # without saying why
    out[0] = source.view
    return 0


def capsule(table: Table, name: bytes) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(table), name, None)


TABLE = Table(1, 3, tensor_from_object=from_object)
OTHER_VERSION = Table(2, 0, tensor_from_object=from_object)
EMPTY = Table(1, 3)
NAME, OTHER_NAME = b"dlpack_exchange_api", b"another"  # capsules keep no copy


class Foreign:
    """A tensor of another library, whose description is `view`."""

    __dlpack_c_exchange_api__: Any = capsule(TABLE, NAME)

    def __init__(self, array: np.ndarray, view: View | None) -> None:
        self.array, self.view = array, view  # the memory lives as long as this

    def __repr__(self) -> str:
        view = self.view
        if view is None:
            return f"{type(self).__name__}()"
        axes = range(min(max(view.ndim, 0), 6))
        sizes, strides = ([numbers[i] for i in axes] if numbers else None for numbers in (view.sizes, view.strides))
        kind = f"code {view.code} bits {view.bits} lanes {view.lanes}"
        where = f"{'memory' if view.data else 'no memory'} + {view.byte_offset} on {view.device_type}:{view.device_id}"
        return f"{type(self).__name__}({view.ndim} axes, {sizes}/{strides}, {kind}, {where})"


class Renamed(Foreign):
    __dlpack_c_exchange_api__ = capsule(TABLE, OTHER_NAME)


class Later(Foreign):
    __dlpack_c_exchange_api__ = capsule(OTHER_VERSION, NAME)


class Hollow(Foreign):
    __dlpack_c_exchange_api__ = capsule(EMPTY, NAME)


class NoCapsule(Foreign):
    __dlpack_c_exchange_api__ = 7


class Pretender(Foreign):
    """It says that torch can read it."""

    __dlpack_c_exchange_api__ = torch.Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]


KINDS = {torch.float32: (2, 32), torch.float64: (2, 64), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int32: (0, 32)}


def described(x: Tensor) -> Foreign:
    """x's values in NumPy's memory, described rightly. As many sizes and strides as any reader might look at are there."""
    x = x.detach().to("cpu").contiguous()
    array = np.frombuffer(bytearray(x.flatten().view(torch.uint8).numpy().tobytes() or b"\0" * 8), dtype=np.uint8)
    sizes, strides = (I64 * (x.ndim + 8))(*x.shape, *[1] * 8), (I64 * (x.ndim + 8))(*x.stride(), *[1] * 8)
    code, bits = KINDS.get(x.dtype, (1, 8 * x.element_size()))
    return Foreign(array, View(array.ctypes.data, 1, 0, x.ndim, code, bits, 1, sizes, strides, 0))


def foreign_tensor(chance: random.Random, x: Tensor) -> Any:
    """x described rightly or wrongly; once in a while by a type whose table is none."""
    foreign = described(x)
    view, ndim, shape, stride = foreign.view, x.ndim, x.shape, x.contiguous().stride()
    assert view is not None
    kind = chance.randrange(14)
    axis = chance.randrange(ndim) if ndim else 0
    if kind == 1 and ndim and shape[axis] > 0:  # the axis backwards, from its last element
        view.byte_offset = (shape[axis] - 1) * stride[axis] * x.element_size()
        view.strides[axis] = -stride[axis]
    elif kind == 2:
        view.ndim = chance.choice((-1, 0, 7, 8))
    elif kind == 3:
        view.sizes[axis] = chance.choice((-1, -(2**63), 2**62, 2**63 - 1))
    elif kind == 4:
        view.strides[axis] = chance.choice((-1, -(2**63), 2**62, 2**63 - 1))
    elif kind == 5:
        view.sizes = None
    elif kind == 6:
        view.strides = None  # that is, contiguous
    elif kind == 7:
        view.bits, view.lanes = chance.choice(((0, 1), (32, 0), (1, 1), (4, 1), (255, 65535), (32, 4)))
    elif kind == 8:
        view.device_type, view.device_id = chance.choice(((2, 0), (-1, 0), (1, 5)))
    elif kind == 9:
        view.data = None
    elif kind == 10:
        view.code = chance.randrange(256)
        view.bits = chance.choice([bits for bits in (8, 16, 32, 64) if bits <= view.bits])
    elif kind == 11:
        return chance.choice((Renamed, Later, Hollow, NoCapsule, Pretender))(foreign.array, view)
    elif kind == 12:
        foreign.view = None
    return foreign
