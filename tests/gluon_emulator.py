"""Runs a Gluon kernel for Hopper on the CPU, as Triton's interpreter does not: `launch(kernel, programs, **arguments)`.

The kernel's Python runs on torch tensors, each partition of `warp_specialize` in a thread. What is asynchronous on the GPU happens
as late as the kernel permits, or at once, by chance:
  - a copy by TMA ruins its target when it is issued and fills it later, before its barrier completes;
  - a product of `wgmma` reads its operands at the wait for it, and its result cannot be read earlier.
So a stage that is freed too early, a missing wait and a wrong phase show as wrong results, and a deadlock as a TimeoutError.
Layouts, registers, and the barriers between the threads of a partition are not emulated. They are the compiler's.
"""

from __future__ import annotations

import builtins
import random
import threading
import time
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sora_kernels.triton import hopper, hopper_common

TIMEOUT = 60  # seconds
_changed = threading.Condition()  # any barrier did
_products = threading.local()  # of this partition, in flight


class Value(torch.Tensor):
    """A tensor or scalar in registers, which no operation changes in place; all layouts are None."""

    type = SimpleNamespace(layout=None)
    __iadd__, __isub__, __imul__ = torch.Tensor.__add__, torch.Tensor.__sub__, torch.Tensor.__mul__


def value(x: Any, dtype: torch.dtype | None = None) -> Any:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


class Pointer:
    """To elements of a tensor's storage."""

    def __init__(self, memory: torch.Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, x: torch.Tensor) -> Pointer:
        size = x.untyped_storage().nbytes() // x.element_size()
        return cls(x.as_strided((size,), (1,), 0), value(x.storage_offset()))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    if mask is None:
        return value(pointer.memory[pointer.offset])
    mask, offset = torch.broadcast_tensors(value(mask), pointer.offset)
    return value(torch.where(mask, pointer.memory[torch.where(mask, offset, 0)], other))


def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    mask, offset, x = torch.broadcast_tensors(value(True if mask is None else mask), pointer.offset, value(x))
    pointer.memory[offset[mask]] = x[mask].to(pointer.memory.dtype)


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory, self.shape, self.dtype, self.layout = memory, memory.shape, memory.dtype, None

    def index(self, i: Any) -> Shared:
        return Shared(self.memory[int(i)])

    def slice(self, first: int, length: int) -> Shared:
        return Shared(self.memory[first : first + length])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.memory.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory.permute(*order))

    def load(self, layout: None) -> Value:
        return value(self.memory.clone())

    def store(self, x: Value) -> None:
        self.memory.copy_(x)


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals: int, num_bytes: int = 0) -> None:
        with _changed:
            self.pending -= arrivals
            self.bytes += num_bytes
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.pending, self.phase = self.count, self.phase ^ 1
                _changed.notify_all()

    def wait(self, phase: Any) -> None:
        with _changed:
            if not _changed.wait_for(lambda: self.phase != int(phase), TIMEOUT):
                raise TimeoutError("gluon_emulator: deadlock")


class Barriers(list):
    def index(self, i: Any) -> Barrier:  # type: ignore[override]
        return self[int(i)]


def initialise(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: None) -> Shared | Barrier | Barriers:
    if dtype == torch.int64:
        return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))


class Descriptor:
    """Of blocks of a tensor for TMA; what is outside of it counts as zeros."""

    def __init__(self, descriptor: Any) -> None:
        self.memory = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
        self.block_shape, self.dtype, self.layout = list(descriptor.block_shape), self.memory.dtype, None
        self.block_type = SimpleNamespace(nbytes=self.memory.element_size() * torch.Size(self.block_shape).numel())

    def read(self, coordinates: Sequence[Any]) -> torch.Tensor:
        begins = [int(c) for c in coordinates]
        inside = self.memory[tuple(slice(b, b + size) for b, size in zip(begins, self.block_shape, strict=True))]
        block = torch.zeros(self.block_shape, dtype=self.dtype)
        block[tuple(slice(0, size) for size in inside.shape)] = inside
        return block


def copy_block(descriptor: Descriptor, coordinates: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    block = descriptor.read(coordinates)
    target.memory.fill_(float("nan"))

    def finish() -> None:
        time.sleep(random.choice((0, 0, 0.001)))
        target.memory.copy_(block)
        barrier.change(0, -descriptor.block_type.nbytes)

    threading.Thread(target=finish).start()


def product(a: Any, b: Any) -> Value:
    """Rounded once, so that it does not depend on the number of rows."""
    a, b = (x.memory if isinstance(x, Shared) else x for x in (a, b))
    return value((a.double() @ b.double()).float())


class Product:
    """Of `wgmma`, in flight."""

    def __init__(self, a: Any, b: Any, acc: Value, use_acc: bool) -> None:
        self.operands, self.acc, self.use_acc, self.result = (a, b), acc, use_acc, None

    def finish(self) -> None:
        if self.result is None:
            self.result = product(*self.operands) + self.acc if self.use_acc else product(*self.operands)


def warpgroup_mma(a: Any, b: Any, acc: Value, *, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    one = Product(a, b, acc, use_acc)
    _products.pending = [*getattr(_products, "pending", []), one]
    if random.random() < 0.3:
        for earlier in _products.pending:
            earlier.finish()
    return one


def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Product]) -> Any:
    time.sleep(random.choice((0, 0.001)))
    finished = len(_products.pending) - num_outstanding
    for one in _products.pending[:finished]:
        one.finish()
    assert not any(one in _products.pending[finished:] for one in deps), "the result of a product that is still in flight"
    _products.pending = _products.pending[max(finished, 0) :]
    results = [one.result for one in deps]
    return results[0] if len(results) == 1 else results


def warp_specialize(partitions: Sequence[tuple[Callable, tuple]], num_warps: list[int], num_registers: list[int]) -> None:
    failures: list[BaseException] = []

    def run(function: Callable, arguments: tuple) -> None:
        try:
            function(*arguments)
            assert not getattr(_products, "pending", []), "a product that nothing waits for"
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def dot(a: Value, b: Value, acc: Value | None = None, input_precision: str = "") -> Value:
    return product(a, b) if acc is None else product(a, b) + acc


LANGUAGE = SimpleNamespace(
    float32=torch.float32, float64=torch.float64, int32=torch.int32, int64=torch.int64,
    arange=lambda begin, end, layout=None: value(torch.arange(begin, end)),
    full=lambda shape, x, dtype, layout=None: value(torch.full(tuple(shape), x, dtype=dtype)),
    zeros=lambda shape, dtype, layout=None: value(torch.zeros(tuple(shape), dtype=dtype)), zeros_like=torch.zeros_like,
    where=lambda mask, x, y: value(torch.where(value(mask), x, y)),
    maximum=lambda x, y: value(torch.maximum(value(x), value(y))), minimum=lambda x, y: value(torch.minimum(value(x), value(y))),
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log=torch.log,
    cdiv=lambda x, y: -(-x // y), cast=lambda x, dtype: value(x, dtype), trans=lambda x: x.T, dot=dot,
    range=lambda begin, end, step=1, num_stages=None: range(begin, end, step), static_range=range,
    load=load, store=store, program_id=lambda axis: None, convert_layout=lambda x, layout: x,
    allocate_shared_memory=allocate, warp_specialize=warp_specialize,
    fma=lambda x, y, z: value((value(x).double() * value(y).double() + z).float()),
    **dict.fromkeys(
        ("SliceLayout", "BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SwizzledSharedLayout"), lambda *_: None
    ),
)  # fmt: skip
HOPPER = SimpleNamespace(
    warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait, fence_async_shared=lambda: None
)  # fmt: skip
MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: None, init=initialise, arrive=lambda barrier: barrier.change(1), wait=Barrier.wait,
    expect=lambda barrier, num_bytes: barrier.change(1, num_bytes),
)  # fmt: skip
REPLACED = [
    (tl, LANGUAGE), (gl, LANGUAGE), (hopper.hopper, HOPPER), (hopper.mbarrier, MBARRIER), (hopper_common.copy_block, copy_block)
]  # fmt: skip


def lowered(x: Any, known: dict[int, Any]) -> Any:
    """A kernel's function, or what it finds under a global name, as it runs here."""
    for original, replacement in REPLACED:
        if x is original:
            return replacement
    if isinstance(x, tl.constexpr):
        return x.value
    if not isinstance(x, JITFunction | InterpretedFunction):
        return x
    if id(x) not in known:
        names: dict[str, Any] = {"__builtins__": builtins}
        known[id(x)] = FunctionType(x.fn.__code__, names, x.fn.__name__, x.fn.__defaults__)
        names.update({name: lowered(x.fn.__globals__[name], known) for name in x.fn.__code__.co_names if name in x.fn.__globals__})
    return known[id(x)]


def argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer.to(x)
    if isinstance(x, hopper_common.TensorDescriptor):
        return Descriptor(x)
    if type(x) is tuple:
        return tuple(argument(field) for field in x)
    return value(x, torch.float32) if isinstance(x, float) else value(x) if type(x) is int else x


def launch(kernel: Any, programs: int, *, constants: dict[str, Any], **arguments: Any) -> None:
    """All programs, one after another."""
    function = lowered(kernel, {})
    for i in range(programs):
        LANGUAGE.program_id = lambda axis, i=i: value(i)
        function(**{name: argument(x) for name, x in arguments.items()}, **constants)
