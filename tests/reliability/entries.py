"""Calls the entry points of the compiled modules with arguments that no story would pass.

    python -m tests.reliability.entries 2000            # 2000 calls of every entry of _cpu
    python -m tests.reliability.entries 2000 --module _cuda     # whose kernels run on the CPU, by the harness of tests/simt

Each call starts from arguments that an op has passed and changes one to three of them: dtypes, shapes, strides, storages that other
arguments have or that were freed, values, things of another type, arguments of another call. It may raise ValueError, TypeError,
MemoryError or OverflowError, or return. Anything else, a crash, and a call that takes more than 10 s or 1 GiB, is a failure. The
harness of _cuda raises RuntimeError where a kernel reads or writes outside its tensors. `make fuzz-calls` runs those of
_cpu with AddressSanitizer, each tier with a seed of its own. Call n of a seed is always the same: --only n repeats it.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
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

from .children import Case, again, run
from .mutations import DTYPES, Mutation, copied, described, freed, tensors_in

REFUSALS = (ValueError, TypeError, MemoryError, OverflowError)
# Of boundaries that only the host could check, which reads none on a GPU: samples that overlap are written twice, tokens of no
# sample not at all. Both stay inside the outputs.
HARMLESS = re.compile("race: |is not wholly written")
BOUNDARIES = re.compile("cu_|grid")
MODULES = ("_cpu", "_cuda")


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
    """entry of _cpu -> lists of arguments that an op has passed it; of what no op calls, what a caller would pass."""
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


def recorded_of(module: ModuleType) -> dict[str, list[tuple]]:
    """entry of this module -> arguments: the modules take the same. ValueError if there is an entry without any."""
    calls = recorded()
    if module.__name__ == "simt":
        calls = {name: of_entry for name, of_entry in calls.items() if hasattr(module, name) and name in SIGNATURES}
        calls.update(archs=[()], unavailable=[()])
    if missing := set(entries(module)) ^ set(calls):
        raise ValueError(f"recorded_of: module: expected entries that are recorded, got {sorted(missing)} on one side only")
    return calls


class Call(NamedTuple):
    """moved: whether boundaries may not be what an op would pass."""

    name: str
    args: list
    moved: bool = False


def mutated(calls: dict[str, list[tuple]], seed: int, index: int, foreign: bool = True) -> Call:
    """Call `index` of a seed; with tensors of another library, whose memory the harness of _cuda does not know, if `foreign`."""
    chance = random.Random(f"{seed} {index}")
    name = list(calls)[index % len(calls)]
    args = [copied(value) for value in chance.choice(calls[name])]
    mutate = Mutation(chance, tensors_in(args), foreign)
    if not args:
        return Call(name, [mutate(1)] if chance.random() < 0.5 else [])
    changed = chance.sample(range(len(args)), min(len(args), chance.randint(1, 3)))
    if isinstance(args[changed[0]], Tensor) and chance.random() < 0.1:
        # On its own: of an argument that it cannot convert, pybind11 prints all the others, and torch dies printing this one.
        args[changed[0]] = freed(args[changed[0]])
        return Call(name, args)
    for i in changed:
        args[i] = copied(chance.choice(calls[name])[i]) if chance.random() < 0.1 else mutate(args[i])
    moved = name in SIGNATURES and any(BOUNDARIES.match(SIGNATURES[name].arguments[i]) for i in changed)
    if name == "multiply_adds" and all(isinstance(value, int | float) and 0 <= value < 2**31 for value in args):
        return Call(name, [2, 1e3])  # it may take as long as it is told
    return Call(name, args, moved)


def failure(function: Callable, args: list, moved: bool = True) -> str | None:
    """What is wrong with how a call ends."""
    try:
        function(*args)
    except REFUSALS:
        return None
    except Exception as error:
        if moved and isinstance(error, RuntimeError) and HARMLESS.search(str(error)):
            return None
        return f"{type(error).__name__}: {error}"
    return None


def load(name: str) -> ModuleType:
    if name == "_cpu":
        return backends.BACKENDS["cpu"].load()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from simt import build

    return build.load()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="calls of every entry")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", choices=MODULES, default="_cpu")
    parser.add_argument("--entry", help="this one alone")
    parser.add_argument("--only", type=int, help="the call of this number alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # no threads before a fork
    torch.manual_seed(0)
    module = load(options.module)
    calls = recorded_of(module)
    if options.entry not in (None, *calls):
        parser.error(f"--entry: expected one of {', '.join(calls)}, got {options.entry}")

    def prepare(number: int) -> Case:
        name, args, moved = mutated(calls, options.seed, number, options.module == "_cpu")
        text = f"{name}({', '.join(map(described, args))})"
        return Case(text, lambda: failure(getattr(module, name), args, moved))

    numbers = range(options.count * len(calls))
    if options.entry:
        numbers = range(list(calls).index(options.entry), len(numbers), len(calls))
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    hint = again("tests.reliability.entries", "1", f"--module {options.module}", f"--seed {options.seed}")
    outcome = run(f"compiled entries of {options.module}", numbers, prepare, hint)
    print(outcome)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
