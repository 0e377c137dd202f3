"""Calls every public function of sora_kernels with right arguments of which one to three were changed.

    python -m tests.reliability.calls 5000          # 5000 calls of every public function, constructor and method

A call may return, and then its gradients must come, too. Or it raises a ValueError or TypeError (of indices, IndexError) that names
the function and the argument. Where sizes ask for more memory than there is, it may say so. Of what is no valid tensor, such as
elements that are not aligned, the error may be another's, and of objects that raise, theirs. No storage was freed: torch's own
functions crash on those, and what our kernels do is asked by entries.py. Anything else, a crash, and a call that takes more than
10 s or 1 GiB, is a failure. Call n of a seed is always the same: --only n repeats it.
"""

from __future__ import annotations

import argparse
import inspect
import random
import re
import sys
import time
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sora_kernels import backends

from .children import Case, again, run
from .mutations import DTYPES, Mutation, copied, described, has_memory, tensors_in
from .right_arguments import FUNCTIONS, RIGHT, call, right

LARGE = 1 << 24  # elements, from which on memory may run out
NO_DEVICE = re.compile("Found no NVIDIA driver")  # of a torch that is built for GPUs
# What torch says where there is no memory for a result.
NO_MEMORY = re.compile(r"can't allocate memory|Storage size calculation overflowed|integer multiplication overflow|out of memory")

COUNTED = re.compile(r"^sora_kernels\._cpu: \w+: \w+: expected ")  # what kernels count in 32 bits, they say


class RaisedError(Exception):
    """What objects that raise have raised."""


class Raising:
    """An object none of whose methods returns."""

    def refuse(self, *_: Any) -> Any:
        raise RaisedError

    __int__ = __index__ = __float__ = __len__ = __iter__ = __bool__ = __eq__ = __hash__ = __getitem__ = __array__ = refuse  # type: ignore[assignment]


class Speechless(Raising):
    __repr__ = __str__ = Raising.refuse  # type: ignore[assignment]


class Subclass(Tensor):
    """A subclass as users write them."""


class Liar(Tensor):
    """One whose operations fail."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__repr__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RaisedError


def deep(levels: int) -> list:
    inner: list = []
    for _ in range(levels):
        inner = [inner]
    return inner


class PublicMutation(Mutation):
    """What Python allows besides."""

    def other_things(self) -> list[Any]:
        nested = torch.nested.nested_tensor([torch.zeros(2, 4)], layout=torch.jagged)
        numbers = [np.float32(2), np.int64(3), np.bool_(True), np.float64("nan"), 2**70, 1j, float("nan"), True, b"x", ""]
        objects = [Raising(), Speechless(), {}, {1: 2}, range(3), iter([1]), print, int, torch.float32, "cpu", "x" * 10_000]
        return [*super().other_things(), nested, *numbers, *objects, deep(300), np.zeros((4, 8)), RIGHT["layout"], RIGHT["mask"]]

    def tensor(self, x: Tensor) -> Any:
        if self.chance.random() < 0.6:
            return super().tensor(x)
        changes = [self.elsewhere, self.sparse, self.nested, self.quantized, self.wrapped, self.conjugate, self.python]
        try:
            return self.chance.choice(changes)(x)
        except (RuntimeError, TypeError, ValueError, IndexError):  # torch makes no such tensor
            return x

    def elsewhere(self, x: Tensor) -> Tensor:
        return x.to("meta")

    def sparse(self, x: Tensor) -> Tensor:
        return self.chance.choice([x.to_sparse, x.to_sparse_csr, x.to_mkldnn])()

    def nested(self, x: Tensor) -> Tensor:
        return torch.nested.nested_tensor([x, x], layout=self.chance.choice([torch.jagged, torch.strided]))

    def quantized(self, x: Tensor) -> Tensor:
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)

    def wrapped(self, x: Tensor) -> Tensor:
        return self.chance.choice([nn.Parameter, Subclass, Liar])(x)

    def conjugate(self, x: Tensor) -> Tensor:
        return self.chance.choice(
            [torch._neg_view, lambda y: y.to(torch.complex64).conj(), lambda y: y.to(torch.complex64).conj().imag]
        )(x)

    def python(self, x: Tensor) -> Any:
        return self.chance.choice([x.tolist, x.numpy, lambda: list(x), lambda: [x, x], lambda: {"x": x}])()

    def scalar(self, value: Any) -> Any:
        return self.chance.choice([str, np.float64, np.int64, torch.tensor, lambda v: [v], complex])(value)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, int | float) and self.chance.random() < 0.3:
            return self.scalar(value)
        return super().__call__(value)


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={described(value)}' for key, value in self.arguments.items())})"


def drawn(names: list[str], seed: int, index: int) -> Call:
    """Call `index` of a seed."""
    chance = random.Random(f"{seed} {index}")
    name = names[index % len(names)]
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    arguments = right(name)
    for parameter in parameters.values():
        if parameter.name not in arguments and chance.random() < 0.3:
            default = None if parameter.default is parameter.empty else parameter.default
            arguments[parameter.name] = RIGHT.get(parameter.name, default)
    dtype = chance.choice((torch.float32, torch.float32, torch.float64, *DTYPES))
    learns = chance.random() < 0.5 and name != "int8_attention"  # which has no gradients, and says so

    def started(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.rand_like(value).to(dtype).requires_grad_(learns)
        return type(value)(map(started, value)) if type(value) in (tuple, list) else copied(value)

    torch.default_generator.manual_seed(index)  # torch.manual_seed seeds those of all devices, and takes most of the time
    arguments = {key: started(value) for key, value in arguments.items()}
    mutate = PublicMutation(chance, tensors_in(list(arguments.values())))
    mutate.huge = "packed" not in name  # keys and values of one tensor agree in all sizes, and would be computed
    for key in chance.sample(list(arguments), min(len(arguments), chance.randint(1, 3))):
        arguments[key] = mutate(arguments[key])
    return Call(name, arguments)


def is_large(value: Any) -> bool:
    """Whether memory may run out of it."""
    if isinstance(value, Tensor):
        return not value.is_nested and value.layout is torch.strided and max(value.numel(), *value.shape, 0) >= LARGE
    if isinstance(value, tuple | list):
        return any(map(is_large, value))
    return isinstance(value, int | np.integer) and abs(int(value)) >= LARGE


def is_invalid(value: Any) -> bool:
    """Whether torch itself cannot work with it."""
    if isinstance(value, Liar):
        return True
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested or not value.is_cpu:
            return False
        if value.is_neg() and value.dtype == torch.bool:
            return True
        return not has_memory(value) or value.data_ptr() % value.element_size() != 0
    return any(map(is_invalid, value)) if isinstance(value, tuple | list) else False


def backward(result: Any) -> None:
    outputs = [x for x in tensors_in(result) if x.requires_grad and x.is_cpu and x.numel() < LARGE]
    if outputs:
        torch.autograd.backward([x.float().sum() for x in outputs])


def complaint(made: Call, error: Exception) -> str | None:
    """What is wrong with an error; None if nothing is."""
    with torch._C.DisableTorchFunctionSubclass():
        return _complaint(made, error)


def _complaint(made: Call, error: Exception) -> str | None:
    values = list(made.arguments.values())
    text = str(error)
    if isinstance(error, RaisedError):
        return None
    if isinstance(error, ValueError | TypeError | IndexError):
        for name in {made.name, "Span"}:  # which others make of what they are passed
            argument = "|".join(map(re.escape, inspect.signature(FUNCTIONS[name]).parameters))
            if re.match(rf"{re.escape(name)}: ({argument})([.\[]\S*)?: expected .+, got ", text, re.DOTALL):
                return None
    large, invalid = is_large(values), any(map(is_invalid, values))
    if large and (isinstance(error, MemoryError | OverflowError) or NO_MEMORY.search(text) or COUNTED.search(text)):
        return None
    if invalid and isinstance(error, RuntimeError | ValueError | TypeError):
        return None
    if made.name.endswith(".to") and NO_DEVICE.search(text):
        return None
    return f"{type(error).__name__}: {text[:500]}"


def failure(made: Call) -> str | None:
    try:
        backward(call(made.name, made.arguments))
    except Exception as error:
        return complaint(made, error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="calls of every public function")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--function", choices=list(FUNCTIONS), metavar="NAME", help="this one alone")
    parser.add_argument("--only", type=int, help="the call of this number alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # no threads before a fork
    for name in ("cpu", "reference"):
        backends.BACKENDS[name].load()  # once, for all the forks
    names = list(FUNCTIONS)

    def prepare(number: int) -> Case:
        made = drawn(names, options.seed, number)
        return Case(str(made), lambda: failure(made))

    numbers = range(options.count * len(names))
    if options.function:
        numbers = range(names.index(options.function), len(numbers), len(names))
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    start = time.perf_counter()
    outcome = run("public functions", numbers, prepare, again("tests.reliability.calls", "1", f"--seed {options.seed}"))
    print(f"{outcome.cases / (time.perf_counter() - start):.0f} calls a second", file=sys.stderr)
    print(outcome)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
