"""Attention drawn at random, against plain float64 torch written out here: python -m tests.sweep 20000

Lengths lie on both sides of every block size, which are read from the code; spans, windows and text are mixed in every way; masks
and logits reach from 1e-3 to the largest number. Each case checks outputs and all gradients. Cases are divided among all
instruction-set tiers of this machine, a process each; with --backend triton they run on the emulated GPU kernels.

    --seed N         of everything random
    --backend NAME   cpu (default), triton or reference
    --only I         the case number I alone, with what it is made of

Scores are rounded to float32 where kernels round them, at the product times its scale and at the sum with a mask. So that both
round alike, masks larger than MODERATE go with small whole numbers and a scale that is a power of two, whose products are exact.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.reliability.outcome import Outcome

ROOT = Path(__file__).resolve().parent.parent
MODERATE = 100.0  # masks up to here leave float32 scores precise enough to be compared with exact ones
MAGNITUDES = (1e-3, 1.0, MODERATE, 1e4, 1e9, 5e9, 1e10, 9e15, 1e20, 1e30, torch.finfo(torch.float32).min)
HEAD_DIMS = (1, 2, 7, 8, 16, 17, 24, 32, 40, 64, 72, 80, 128, 136)
# Largest error, of the largest number of a result.
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def block_sizes() -> list[int]:
    """Every block size of attention in the C++ and Triton sources, up to 1,024."""
    found = set()
    for path in sorted((ROOT / "csrc" / "cpu").rglob("*.[hc]*")):
        for line in path.read_text().splitlines():
            if re.search(r"constexpr (int|int64_t) k\w*(Panel|Block|Columns|Tile|Tokens)\w* =", line):
                code = line.partition("=")[2].partition("//")[0]
                found |= {int(number) for number in re.findall(r"(?<![\w{<])\d+", code)}
    for name in ("configs.py", "schedule.py"):
        code = (ROOT / "sora_kernels" / "triton" / name).read_text()
        for entry in re.findall(r"\((\d+), (\d+), \d+, \d+\)", code):
            found |= set(map(int, entry))
        found |= {int(number) for number in re.findall(r'"BLOCK_[MN]": (\d+)', code)}
    return sorted(n for n in found if 8 <= n <= 1024)


BLOCKS = block_sizes()


class Draw:
    """Everything random of one case."""

    def __init__(self, seed: int, number: int, longest: int) -> None:
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        self.longest = longest

    def below(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.generator))

    def pick(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def chance(self, share: float) -> bool:
        return bool(torch.rand(1, generator=self.generator) < share)

    def length(self, most: int | None = None) -> int:
        """Next to a multiple of a block size, or any small number."""
        most = self.longest if most is None else most
        if self.chance(0.4):
            return self.below(min(most, 20) + 1)
        block = self.pick([b for b in BLOCKS if b <= most] or [1])
        return min(block * (1 + self.below(max(most // block, 1))) + self.pick((-1, 0, 1)), most)

    def numbers(self, whole: bool, *shape: int) -> Tensor:
        if whole:
            return torch.randint(-3, 4, shape, generator=self.generator).float()
        return torch.randn(shape, generator=self.generator)


@dataclass
class Case:
    """q [N, H, d], k and v [Nk, Hk, d] of some samples, the pairs that see each other, and what is called."""

    kind: str
    dtype: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    samples: list[tuple[slice, slice]]  # queries and keys of each
    visible: list[Tensor]  # [Sq, Sk] of each
    scale: float
    softcap: float = 0.0
    mask: list[Tensor] | None = None  # [H, Sq, Sk] of each
    call: Any = None
    drawn: dict[str, Any] = field(default_factory=dict)


def drawn(draw: Draw) -> Case:
    return draw.pick((masked, masked, packed, spans, spans))(draw)


def heads_of(draw: Draw) -> tuple[int, int]:
    return draw.pick(((1, 1), (2, 2), (2, 1), (3, 1)))


def masked(draw: Draw) -> Case:
    """A dense batch with an additive mask, or large logits without one."""
    from sora_kernels.attention import scaled_dot_product_attention

    n, m, d, batch = draw.length(), draw.length(), draw.pick(HEAD_DIMS), 1 + draw.below(2)
    heads, key_heads = heads_of(draw)
    magnitude, shape = draw.pick(MAGNITUDES), draw.pick(("keys", "rows", "all", "each", "some", "logits"))
    whole = abs(magnitude) > MODERATE or shape == "logits"
    dtype = draw.pick((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    q, k, v = (draw.numbers(whole, batch, h, s, d) for h, s in ((heads, n), (key_heads, m), (key_heads, m)))
    scale = 2.0 ** draw.pick((-3, -1, 0)) if whole else d**-0.5
    bias = None
    if shape == "logits":  # up to 9 d times this
        scale = 2.0 ** draw.pick((10, 30, 60, 100))
    else:
        signed = magnitude if magnitude < 0 or draw.chance(0.2) else -magnitude
        bias = torch.zeros(batch, heads, n, m)
        if shape == "keys":
            bias[..., draw.numbers(False, m) > 0.3] = signed
        elif shape == "rows":
            bias[:, :, draw.numbers(False, n) > 0] = signed
        elif shape == "all":
            bias[:] = signed
        elif shape == "each":
            bias = signed * torch.rand(bias.shape, generator=draw.generator)
        else:
            bias = torch.where(draw.numbers(False, *bias.shape) > 0, signed, bias)
        if draw.chance(0.2):
            bias = bias.masked_fill(draw.numbers(False, *bias.shape) > 1, -torch.inf)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1).to(dtype)

    if n == 0 or m == 0:  # -1 in a reshape needs numbers
        batch = 1
        q, k, v = (x[:1] for x in (q, k, v))
        bias = None if bias is None else bias[:1]
    samples = [(slice(b * n, b * n + n), slice(b * m, b * m + m)) for b in range(batch)]
    masks = None if bias is None else list(bias)
    seen = [torch.ones(n, m, dtype=torch.bool)] * batch
    values = {"n": n, "m": m, "d": d, "heads": heads, "of keys": key_heads, "mask": shape, "magnitude": magnitude, "scale": scale}
    return Case("masked", dtype, rows(q), rows(k), rows(v), samples, seen, scale, 0.0, masks, call, values)


def packed(draw: Draw) -> Case:
    """Samples of two lengths each, causal or not, sliding, capped."""
    from sora_kernels.attention import flash_attn_varlen_func

    lengths = [(draw.length(), draw.length()) for _ in range(1 + draw.below(3))]
    d, (heads, key_heads) = draw.pick(HEAD_DIMS), heads_of(draw)
    causal, softcap = draw.chance(0.3), draw.pick((0.0, 0.0, 2.0))
    window = draw.pick(((-1, -1), (-1, -1), (draw.length(), draw.length()), (draw.length(), -1), (-1, draw.length()), (2**62, 3)))
    dtype = draw.pick((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    cu_q, cu_k = (torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).int() for i in (0, 1))
    slack = draw.pick((0, 0, 3))
    q = draw.numbers(False, int(cu_q[-1]) + slack, heads, d).to(dtype)
    k, v = (draw.numbers(False, int(cu_k[-1]) + slack, key_heads, d).to(dtype) for _ in range(2))
    left, right = window[0], 0 if causal else window[1]
    visible, samples = [], []
    for b, (n, m) in enumerate(lengths):
        distance = torch.arange(n)[:, None] + m - n - torch.arange(m)
        seen = torch.ones(n, m, dtype=torch.bool)
        seen &= distance <= left if left >= 0 else True
        seen &= distance >= -right if right >= 0 else True
        visible.append(seen)
        samples.append((slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=causal, window_size=window, softcap=softcap)

    values = {"lengths": lengths, "d": d, "heads": heads, "of keys": key_heads, "causal": causal, "window": window}
    return Case("packed", dtype, q, k, v, samples, visible, d**-0.5, softcap, None, call, {**values, "softcap": softcap})


def spans(draw: Draw) -> Case:
    """Samples of windowed grids, grids smaller than their windows, and text, in any order."""
    from sora_kernels.attention import spatiotemporal_attention
    from sora_kernels.layout import PackedLayout, Span

    def span() -> Span:
        if draw.chance(0.35):
            return Span.text(draw.length(draw.longest // 2))
        sides, room = [1, 1, 1], draw.longest
        for axis in sorted(range(3), key=lambda _: draw.below(100)):
            sides[axis] = draw.length(room) if draw.chance(0.4) else draw.below(min(room, 9) + 1)
            room //= max(sides[axis], 1)
        return Span(tuple(sides))  # type: ignore[arg-type]

    layout = PackedLayout([[span() for _ in range(draw.below(4))] for _ in range(1 + draw.below(2))])
    window = tuple(draw.pick((None, 1 + draw.below(6), 1 + draw.below(60), 2**40)) for _ in range(3))
    causal = tuple(draw.chance(0.2) for _ in range(3))
    d, (heads, key_heads) = draw.pick(HEAD_DIMS), heads_of(draw)
    dtype = draw.pick((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    large = draw.chance(0.15)  # logits
    scale = 2.0 ** draw.pick((20, 50)) if large else d**-0.5
    q = draw.numbers(large, layout.num_tokens + 2, heads, d).to(dtype)
    k, v = (draw.numbers(large, layout.num_tokens + 2, key_heads, d).to(dtype) for _ in range(2))
    visible, samples, first = [], [], 0
    for sample in layout.spans:
        seen = torch.ones(n := sum(s.num_tokens for s in sample), n, dtype=torch.bool)
        begin = 0
        for s in sample:
            own = slice(begin, begin + s.num_tokens)
            if any(s.step):
                near = torch.ones(1, 1, dtype=torch.bool)
                for size, w, past in zip(s.grid, window, causal, strict=True):
                    near = torch.kron(near, axis(size, min(w or size, size), past))
                seen[own, own] = near
            begin += s.num_tokens
        visible.append(seen)
        samples.append((slice(first, first + n), slice(first, first + n)))
        first += n

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spatiotemporal_attention(q, k, v, layout, window=window, causal=causal, softmax_scale=scale)

    values = {
        "spans": layout.spans,
        "window": window,
        "causal": causal,
        "d": d,
        "heads": heads,
        "of keys": key_heads,
        "scale": scale,
    }
    return Case("spans", dtype, q, k, v, samples, visible, scale, 0.0, None, call, values)


def axis(size: int, window: int, past: bool) -> Tensor:
    """Which keys the queries of an axis see: NATTEN's rule, or the last `window` up to a query itself."""
    i, j = torch.arange(size)[:, None], torch.arange(size)
    start = (i - window + 1).clamp(min=0) if past else torch.minimum((i - window // 2).clamp(min=0), torch.tensor(size - window))
    return (j >= start) & (j < (i + 1 if past else start + window))


def exact(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in float64: one matrix of scores per sample and head, rounded as float32 rounds them where a mask is large."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for i, ((of_q, of_k), seen) in enumerate(zip(case.samples, case.visible, strict=True)):
        for h in range(q.shape[1]):
            scores = case.scale * (q[of_q, h] @ k[of_k, h // group].T)
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if case.mask is not None:
                summed = (scores.detach().float() + case.mask[i][h]).double()
                scores = torch.where(summed == -torch.inf, -torch.inf, scores + (summed - scores.detach()).nan_to_num(neginf=0.0))
            scores = scores.masked_fill(~seen, -torch.inf)
            blind = (scores == -torch.inf).all(dim=1, keepdim=True)
            weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=1).masked_fill(blind, 0.0)
            out[of_q, h] = weights @ v[of_k, h // group]
    return out


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def failure(case: Case) -> str | None:
    """What is wrong with outputs or gradients; None if nothing is."""
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    doubles = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]
    out, right = case.call(*leaves), exact(case, *doubles)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(out.numel())).bfloat16()
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype), **options)
    expected = torch.autograd.grad(right, doubles, cotangent.double(), **options)
    # What gradients of scores are differences of: with an output of 16 bits, they keep its rounding.
    steep = max(case.scale, 1.0)
    if case.dtype != torch.float32:
        q, k, v = (largest(x.double()) for x in (case.q, case.k, case.v))
        steep = max(case.scale * case.q.shape[-1] ** 0.5 * v * max(q, k), 1.0)
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), (out, *grads), (right, *expected), strict=True):
        unit = max(largest(wanted), steep if name in ("dq", "dk") else 1.0)
        if unit > torch.finfo(case.dtype).max:
            continue  # more than float16 holds
        wrong = ((got.double() - wanted).abs() / unit).nan_to_num(nan=torch.inf)
        if wrong.numel() and wrong.max() > TOLERANCES[case.dtype]:
            return f"{name}: off by {wrong.max():.3g} at {[int(i) for i in (wrong == wrong.max()).nonzero()[0]]}"
    return None


def run(cases: range, seed: int, backend: str, longest: int) -> list[str]:
    """A line for every case that fails."""
    from sora_kernels import backends

    failures = []
    for number in cases:
        case = drawn(Draw(seed, number, longest))
        with backends.use_backend(backend):
            wrong = failure(case)
        if wrong is not None:
            failures.append(f"case {number}: {case.kind} {str(case.dtype)[6:]}: {wrong}: {case.drawn}")
    return failures


def tiers() -> list[str]:
    from sora_kernels import backends

    return [name for name, supported in backends.BACKENDS["cpu"].load().isa_tiers() if supported]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="cpu", choices=["cpu", "triton", "reference"])
    parser.add_argument("--longest", type=int, default=None, help="tokens of a sample's axis; default 300, or 80 emulated")
    parser.add_argument("--only", type=int, default=None)
    parser.add_argument("--from", type=int, default=0, dest="first", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, str(ROOT / "tests"))
        import interpreter

        interpreter.prepare()
    longest = options.longest or (80 if options.backend == "triton" else 300)
    if options.only is not None:
        cases = range(options.only, options.only + 1)
    elif options.backend == "cpu" and "SORA_KERNELS_ISA" not in os.environ:
        return per_tier(options)
    else:
        cases = range(options.first, options.first + options.count)
    failures = run(cases, options.seed, options.backend, longest)
    where = os.environ.get("SORA_KERNELS_ISA", options.backend)
    print(*failures, where, Outcome("attention of any lengths", len(cases), len(failures)), sep="\n", flush=True)
    return 1 if failures else 0


def per_tier(options: argparse.Namespace) -> int:
    names, status, first = tiers(), 0, 0
    for i, name in enumerate(names):
        count = options.count // len(names) + (i < options.count % len(names))
        command = [sys.executable, "-m", "tests.sweep", str(count), "--seed", str(options.seed), "--from", str(first)]
        command += ["--longest", str(options.longest)] if options.longest else []
        status |= subprocess.run(command, env={**os.environ, "SORA_KERNELS_ISA": name}, cwd=ROOT, check=False).returncode
        first += count
    return status


if __name__ == "__main__":
    sys.exit(main())
