"""Calls the entry points of module _cpu with arguments that no story would pass: python -m tests.bad_calls 5000 --seed 0

Each call starts from arguments that an op has passed and changes one to three of them: dtypes, shapes, strides, storages that other
arguments have or that were freed, values, things of another type. It may raise ValueError, TypeError, MemoryError or OverflowError,
or return; anything else, a crash and a call that takes longer than LIMIT among them, ends the program with an exit status that is
not 0. `make sanitize` runs this with AddressSanitizer. Call i of a seed is always the same: --first i with a count of 1 repeats it.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import itertools
import random
import sys
import warnings
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sora_kernels import backends
from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from sora_kernels.attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
    spatiotemporal_attention,
)
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.block_mask import BlockMask
from sora_kernels.block_sparse_attention import block_sparse_attention
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.norm_rope import apply_rope, norm_rope
from sora_kernels.patch_embed import patch_embed_3d, patchify_3d, unpatchify_3d
from sora_kernels.rope import qk_norm_rope_3d, rope_3d
from sora_kernels.signatures import SIGNATURES
from sora_kernels.token_blocks import TokenBlocks

LIMIT = 10  # seconds of one call
REFUSALS = (ValueError, TypeError, MemoryError, OverflowError)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPES = (*DTYPES, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64)
INTS = (-1, 0, 1, 7, 2**31 - 1, 2**31, -(2**31), 2**62, -(2**62), 2**63 - 1, -(2**63), 2**63, 2**64)
FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e300, 1e-300)
HUGE = (2**31, 2**40, 2**53, 2**62)


def workload(dtype: torch.dtype) -> None:
    """Every op forward and backward, with and without what is optional."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    def backward(outputs: Any) -> None:
        outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
        torch.autograd.backward([out.float().sum() for out in outputs if isinstance(out, Tensor) and out.requires_grad])

    layout = PackedLayout([[Span.text(3), Span((2, 4, 4), origin=(1, 0, 0))], [], [Span((1, 3, 5)), Span((0, 7, 2))]])
    n, d, cu = layout.num_tokens + 2, 16, layout.cu_seqlens
    rows = layout.num_samples
    x, y, bias = randn(n, 24), randn(n, 24), randn(24)
    shift, scale, gate = randn(3, rows, 24).unbind()
    for weight in (None, randn(24)):
        backward(layer_norm_modulate(x, shift, scale, cu, norm="rms" if weight is None else "layer", weight=weight))
        backward(layer_norm_modulate(x, weight=weight, bias=weight))
        backward(gate_residual_layer_norm_modulate(y, x, gate, shift, scale, cu, weight=weight, bias=weight))
        backward(gate_residual_layer_norm_modulate(y, x, None, None, scale, cu, weight=weight))
        backward(norm_gate_residual(y, x, gate, cu, weight=weight, bias=weight))
        backward(norm_gate_residual(y, x, norm="rms", weight=weight))
        backward(bias_gelu(x, None if weight is None else bias))
    backward(gate_residual(y, x, gate, cu))
    backward(gate_residual(y, x))
    for residual in (y, y.float()):
        backward(gate_residual(residual, x, gate.float(), cu))
        backward(gate_residual(residual, x))
        backward(gate_residual_layer_norm_modulate(residual, x, gate, shift, scale.float(), cu, weight=weight, bias=weight))
        backward(norm_gate_residual(residual, x, gate, cu, tanh=True, norm="rms", weight=weight))

    q, k, v = randn(n, 4, d), randn(n, 2, d), randn(n, 2, d)
    backward(rope_3d(q, layout, interleaved=False))
    for across_heads in (False, True):
        weights = [randn(m * d if across_heads else d) for m in (4, 2)]
        backward(qk_norm_rope_3d(q, k, *weights, layout, across_heads=across_heads))
    backward(qk_norm_rope_3d(q, k, None, None, layout))

    angles = torch.randn(n // 2, d // 2)
    cos, sin = angles.cos(), angles.sin()
    dense = q[: n // 2 * 2].unflatten(0, (2, -1))
    backward(apply_rope(dense, cos, sin))
    backward(apply_rope(q, *torch.randn(2, n, 4, 3), interleaved=False))
    backward(norm_rope(dense, cos, sin, norm="layer", weight=randn(d), bias=randn(d).float()))
    backward(norm_rope(q, *torch.randn(2, n, 4, 3), weight=randn(4 * d), across_heads=True, interleaved=False))
    backward(norm_rope(q))

    backward(flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=True, softcap=5.0, alibi_slopes=torch.rand(4)))
    backward(flash_attn_func(*(t[None] for t in (q, k, v)), window_size=(5, 3), return_attn_probs=True))
    mask = torch.randn(1, 1, n, n)
    backward(scaled_dot_product_attention(*(t[None].transpose(1, 2) for t in (q, k, v)), attn_mask=mask, enable_gqa=True))
    backward(spatiotemporal_attention(q, k, v, layout, window=(1, 3, 3), causal=(True, False, False)))
    blocks = TokenBlocks.tiles(layout, (2, 2, 2))
    for heads in (1, 4):
        seen = [torch.rand(heads, n, n) < 0.5 for n in blocks.num_blocks]
        backward(block_sparse_attention(q, k, v, BlockMask.from_dense(seen, blocks), return_lse=True))

    videos = [randn(3, 2, 4, 6), randn(3, 1, 6, 4)]
    weight = randn(20, 3, 1, 2, 2)
    backward(patch_embed_3d(videos, weight, randn(20), patch_size=(1, 2, 2))[0])
    backward(patch_embed_3d([video.detach() for video in videos], weight, None, patch_size=(1, 2, 2))[0])
    tokens, patches = patchify_3d(videos, patch_size=(1, 2, 2))
    backward(tokens)
    backward(unpatchify_3d(tokens.detach().requires_grad_(), patches, patch_size=(1, 2, 2)))


def recorded() -> dict[str, list[tuple]]:
    """entry -> lists of arguments that an op has passed it; of what no op calls, what a caller would pass."""
    calls: dict[str, list[tuple]] = collections.defaultdict(list)
    call = backends.call

    def record(function: str, like: Tensor, **arguments: Any) -> None:
        call(function, like, **arguments)
        hints = SIGNATURES[function].hints  # which no compiled entry takes
        calls[function].append(tuple(value for name, value in arguments.items() if name not in hints))

    with mock.patch.object(backends, "call", record), backends.use_backend("cpu"):
        for dtype in DTYPES:
            workload(dtype)
    x = torch.zeros(3, 4)
    calls["empty"] = [(x, [2, 3]), (x.half(), [])]
    calls["multiply_adds"] = [(2, 1e3)]
    calls["set_cache_limit"] = [(1 << 20,)]
    for function in ("isa", "isa_tiers", "num_threads", "cached_bytes", "empty_cache"):
        calls[function] = [()]
    return dict(calls)


def entries(module: ModuleType) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]


def copied(value: Any) -> Any:
    """The same arguments in memory of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return type(value)(map(copied, value)) if isinstance(value, tuple | list) else value


class Mutation:
    """Changes values of one call, by one source of chance."""

    def __init__(self, chance: random.Random, tensors: list[Tensor]) -> None:
        self.chance, self.tensors = chance, tensors  # tensors: all of the call
        self.huge = True  # one axis of a call at most: several would agree and be computed

    def __call__(self, value: Any) -> Any:
        if self.chance.random() < 0.05:
            return self.chance.choice([None, "no", 3, -1.5, [], object(), torch.zeros(3, device="meta"), torch.eye(3).to_sparse()])
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, bool):
            return self.chance.choice([not value, 2, None])
        if isinstance(value, int):
            return self.chance.choice(INTS)
        if isinstance(value, float):
            return self.chance.choice(FLOATS)
        if isinstance(value, tuple | list):
            return self.sequence(list(value))
        return self.chance.choice([1, 1.0, self.chance.choice(self.tensors)] if self.tensors else [1, 1.0])

    def sequence(self, items: list) -> Any:
        i = self.chance.randrange(len(items) + 1)
        if i == len(items) or self.chance.random() < 0.2:
            return items[:i] if self.chance.random() < 0.5 else items + items[:1]
        return [*items[:i], self(items[i]), *items[i + 1 :]]

    def tensor(self, x: Tensor) -> Any:
        change = self.chance.choice([self.dtype, self.shape, self.strides, self.offset, self.alias, self.values, self.other])
        try:
            return change(x)
        except RuntimeError:  # torch makes no such tensor
            return x

    def dtype(self, x: Tensor) -> Tensor:
        return x.to(self.chance.choice(OTHER_DTYPES))

    def shape(self, x: Tensor) -> Tensor:
        axis = self.chance.randrange(x.ndim)
        size = x.shape[axis]
        kind = self.chance.randrange(7)
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
        fill = (*FLOATS[:5], 6e4) if x.is_floating_point() else (-1, 5, 2**31 - 1, -(2**31)) if x.dtype == torch.int32 else (0, 1)
        one.fill_(self.chance.choice(fill))
        return flat.view(x.shape)

    def other(self, x: Tensor) -> Any:
        return self.chance.choice([None, *self.tensors])


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def mutated(calls: dict[str, list[tuple]], seed: int, index: int) -> tuple[str, list]:
    """Call `index` of a seed."""
    chance = random.Random(f"{seed} {index}")
    name = list(calls)[index % len(calls)]
    args = [copied(value) for value in chance.choice(calls[name])]
    flat = itertools.chain.from_iterable(value if isinstance(value, tuple | list) else [value] for value in args)
    mutate = Mutation(chance, [value for value in flat if isinstance(value, Tensor)])
    if not args:
        return name, [mutate(1)] if chance.random() < 0.5 else []
    changed = chance.sample(range(len(args)), min(len(args), chance.randint(1, 3)))
    if isinstance(args[changed[0]], Tensor) and chance.random() < 0.1:
        # On its own: of an argument that it cannot convert, pybind11 prints all the others, and torch dies printing this one.
        args[changed[0]] = freed(args[changed[0]])
        return name, args
    for i in changed:
        args[i] = mutate(args[i])
    if name == "multiply_adds" and all(isinstance(value, int | float) and 0 <= value < 2**31 for value in args):
        return name, [2, 1e3]  # it may take as long as it is told
    return name, args


def described(value: Any) -> str:
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}/{list(value.stride())}"
    return f"[{', '.join(map(described, value))}]" if isinstance(value, tuple | list) else repr(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first call's number")
    parser.add_argument("--show", action="store_true", help="print each call before it is made")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = backends.BACKENDS["cpu"].load()
    calls = recorded()
    if missing := set(entries(module)) ^ set(calls):
        print(f"entries of {module.__name__} and of what was recorded differ in {sorted(missing)}")
        return 1
    faulthandler.enable()
    outcomes: collections.Counter[str] = collections.Counter()
    bad = 0
    for index in range(options.first, options.first + options.count):
        name, args = mutated(calls, options.seed, index)
        if options.show:
            print(f"call {index}: {name}({', '.join(map(described, args))})", flush=True)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            getattr(module, name)(*args)
            outcome = "returned"
        except REFUSALS as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome, bad = type(error).__name__, bad + 1
            print(f"call {index}: {name}({', '.join(map(described, args))}): {type(error).__name__}: {error}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        outcomes[outcome] += 1
    print(f"{options.count} calls: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
