"""Windows in space and time, against the mask written out."""

import itertools
from functools import partial

import pytest
import torch
from contract import PackedContract
from test_attention import plain_sample
from tolerance import (
    Case,
    Target,
    assert_bit_equal,
    assert_zero,
    check_accuracy,
    check_rejected,
    check_threads,
    error,
    run,
)
from torch import Tensor

from sora_kernels.attention import spatiotemporal_attention
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.reference import attention as reference

FUNCTION = "spatiotemporal_attention_forward"
SPANS = [
    [Span((4, 5, 6))],
    [Span.text(7), Span((1, 9, 8)), Span((3, 4, 4), origin=(1, 0, 0), step=(1, 0.5, 0.5)), Span.text(2)],
    [],
    [Span((2, 2, 2))],
    [Span.text(3)],
]
WINDOWS = {
    "odd": {"window": (3, 3, 5)},
    "even": {"window": (2, 4, 4)},
    "one": {"window": (1, 1, 1)},
    "wide": {"window": (99, 99, 99)},
    "axis": {"window": (None, 3, None)},
    "causal_time": {"causal": (True, False, False)},
    "causal_all": {"window": (2, None, 3), "causal": (True, True, True)},
    "causal_width": {"window": (3, 4, 2), "causal": (False, False, True)},
    "dense": {},
}


def window_mask(layout: PackedLayout, window=(None, None, None), causal=(False, False, False)) -> Tensor:
    """Who sees whom [N, N], span by span, from the definition along each axis."""
    visible = torch.block_diag(*(torch.ones(n, n) for n in layout.seqlens)).bool()
    for span, first in zip(itertools.chain(*layout.spans), layout.cu_spans.tolist(), strict=False):
        axes = []
        for length, size, past_only in zip(span.grid, window, causal, strict=True):
            seen = torch.zeros(length, length, dtype=torch.bool)
            w = min(size or length, length)
            for i in range(length):
                start = max(i - w + 1, 0) if past_only else min(max(i - w // 2, 0), length - w)
                seen[i, start : i + 1 if past_only else start + w] = True
            axes.append(seen)
        if any(span.step):
            own = slice(first, first + span.num_tokens)
            visible[own, own] = torch.kron(torch.kron(axes[0], axes[1]), axes[2])
    return visible


@pytest.mark.parametrize("case", WINDOWS)
def test_spatiotemporal(target: Target, case: str) -> None:
    """Mixed grids, several spans and text in a sample, against the mask written out."""
    options = WINDOWS[case]
    layout = PackedLayout.from_spans(SPANS, target.device)
    n, slack, d = layout.num_tokens, 4, 24
    inputs = {name: target.randn(n + slack, h, d) for name, h in (("q", 2), ("k", 1), ("v", 1))}
    for x in inputs.values():
        x[n:] = torch.nan
    visible = window_mask(layout, **options).to(target.device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.pad(plain_sample(q[:n], k[:n], v[:n], visible)[0], (0, 0, 0, 0, 0, slack))

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tables = layout.cu_seqlens, layout.cu_spans, layout.grid, layout.step
        window = [w or 0 for w in options.get("window", (None, None, None))]
        causal = options.get("causal", (False, False, False))
        return reference.spatiotemporal_attention(q, k, v, *tables, window, causal, d**-0.5)[0]

    op = partial(spatiotemporal_attention, layout=layout, **options)
    (out,), gradients = check_accuracy(op, plain, exact, inputs)
    assert_zero(*(x[n:] for x in (out, *gradients)))


# (spans of one sample, head dim, options), each longer than something that the CPU kernels have a limit for: what they gather at
# once (the text, a row of the third), or the panels of an item along one axis or the other.
LONG = {
    "text": ([Span((2, 70, 9)), Span.text(300)], 160, {"window": (2, 21, 5)}),
    "line": ([Span((1, 1, 700))], 160, {"window": (1, 1, 301)}),
    "rows": ([Span((1, 36, 35))], 1024, {"window": (1, 3, None)}),
    "outer": ([Span((33, 34, 2))], 24, {"window": (3, 4, 2), "causal": (True, False, False)}),
    "frames": ([Span((20, 6, 5)), Span((20, 6, 5))], 24, {"window": (None, 1, 1)}),
}


@pytest.mark.parametrize("case", LONG)
def test_long(case: str) -> None:
    spans, d, options = LONG[case]
    target, layout = Target("cpu", "cpu", torch.float32), PackedLayout.from_spans([spans])
    inputs = [target.randn(layout.num_tokens, h, d) for h in (2, 1, 1)]
    visible = window_mask(layout, **options)
    actual = check_threads(partial(spatiotemporal_attention, layout=layout, **options), inputs, counts=(1, 3))
    exact = run(lambda q, k, v: plain_sample(q, k, v, visible)[0], [x.double() for x in inputs])
    for got, right in zip(actual[0] + actual[1], exact[0] + exact[1], strict=True):
        assert error(got, right) < 3e-6 * right.abs().max()


def windowed(layout: PackedLayout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return spatiotemporal_attention(q, k, v, layout, window=(3, 3, 2), causal=(True, False, False))


def test_leftovers_do_not_matter(target: Target) -> None:
    """What a call of NaNs leaves in the kernels' scratch memory changes no bit of the next call."""
    layout, large = (PackedLayout.from_spans(spans, target.device) for spans in (SPANS, [[Span((5, 8, 9)), Span.text(70)]]))
    inputs = [target.randn(layout.num_tokens, h, 24) for h in (2, 1, 1)]
    nans = [target.randn(large.num_tokens, h, 24).fill_(torch.nan) for h in (2, 1, 1)]
    call = partial(run, partial(windowed, layout))
    expected = call(inputs)
    run(partial(windowed, large), nans)
    actual = call(inputs)
    assert_bit_equal(actual[0] + actual[1], expected[0] + expected[1])


def case(target: Target) -> Case:
    layout = PackedLayout.from_spans(SPANS, target.device)
    inputs = [layout.unpack(target.randn(layout.num_tokens, h, 24)) for h in (2, 1, 1)]
    parts = [(layout.select([b]), list(sample)) for b, sample in enumerate(zip(*inputs, strict=True))]
    operators = {"spatiotemporal_attention_forward", "spatiotemporal_attention_backward"}
    return Case.of_samples(windowed, layout, parts, operators)


OPS = {"windowed": case}

P = torch.zeros(12, 4, 8)
GOOD = {"q": P, "k": P, "v": P, "layout": PackedLayout.from_grids([(1, 2, 3), (1, 2, 3)])}
BAD = [
    ({"layout": P}, "layout: expected a PackedLayout, got Tensor"),
    ({"q": P[1:]}, "layout: expected at most 11 tokens, got 12"),
    ({"k": P[1:]}, "k: expected shape [12, Hk, ~], got [11, 4, 8]"),
    ({"window": (0, 1, 1)}, "window: expected three sizes >= 1~, got (0, 1, 1)"),
    ({"window": 3}, "window: expected three sizes >= 1~, got 3"),
    ({"causal": True}, "causal: expected three bools~, got True"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input(wrong: dict, message: str) -> None:
    check_rejected(spatiotemporal_attention, {**GOOD, **wrong}, f"spatiotemporal_attention: {message}")


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""
