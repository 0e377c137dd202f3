"""Random batches of every attention: packed, dense, masked, windowed, by blocks, over a cache, with int8 products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from hypothesis.strategies import DrawFn
from sweep import Case, exact
from test_attention import exact_varlen, plain_sample, plain_varlen
from test_block_sparse_attention import token_mask
from test_spatiotemporal_attention import window_mask
from torch import Tensor

import sora_kernels
from sora_kernels import BlockMask, TokenBlocks
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.reference import attention as reference
from sora_kernels.reference import block_sparse_attention as block_reference

from . import layouts
from .layouts import Setting
from .subject import Op, Sample, Subject
from .subjects import boundaries, placed_blanks


class Lengths(NamedTuple):
    """Of a sample's queries and keys, of the keys it uses if not all, and a slope of each head for ALiBi."""

    queries: int
    keys: int
    used: int | None
    slopes: tuple[float, ...] | None


def rows_of_queries(own: Lengths) -> int:
    return own.queries


def split(of_samples: list[Lengths]) -> list[tuple[int, int]]:
    """Queries and keys of each sample; unused keys are those of a sample without queries."""
    pairs = []
    for own in of_samples:
        used = own.keys if own.used is None else own.used
        pairs += [(own.queries, used)] + [(0, own.keys - used)] * (own.used is not None)
    return pairs


def of_queries(out: Tensor, lse: Tensor | None) -> list[Tensor]:
    """Outputs with a row for each query. What is -inf of lse has no gradient."""
    return [out] if lse is None else [out, lse.masked_fill(lse.isinf(), 0).transpose(-1, -2)]


class RoundedSum(torch.autograd.Function):
    """out, whose sum with dout is computed apart from that with v, as kernels do: their roundings are lse's gradient.

    Without it plain PyTorch has no error where a query sees one key.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, out: Tensor, lse: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        return out.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: Tensor) -> tuple[Tensor, Tensor]:
        (out,) = ctx.saved_tensors  # type: ignore[attr-defined]
        terms = dout.to(torch.promote_types(out.dtype, torch.float32)) * out
        return dout, (terms.sum(-1) - terms.flip(-1).cumsum(-1)[..., -1]).mT


PACKED = ("flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "varlen_attn")
DENSE = ("flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_with_kvcache")
# Of numbers near 1, whose scores steps of int8 move by 0.02 at most.
NEAR_INT8 = 0.05


@st.composite
def flash(draw: DrawFn, name: str, setting: Setting) -> Subject:
    """Every name of flash_attn, and torch's varlen_attn, on packed or dense samples.

    What a function takes in one tensor, qkv or kv, is one column, so that views of it are what the function sees.
    """
    packed, function = name in PACKED, getattr(sora_kernels, name)
    alike, cached = "qkvpacked" in name, name == "flash_attn_with_kvcache"
    dtype = draw(setting.dtypes("attention_forward"))
    make, d, (h, hk) = draw(layouts.numbers(dtype)), draw(layouts.head_dims), draw(layouts.heads)
    hk = h if alike else hk
    names = ("qkv",) if alike else ("q", "kv") if "kvpacked" in name else ("q", "k", "v")
    torchs = name == "varlen_attn"
    window = draw(layouts.sliding(setting.longest))
    options: dict[str, Any] = {"causal": draw(st.booleans()), "window_size": window}
    options["softcap"] = 0.0 if torchs else draw(st.sampled_from([0.0, 0.0, 2.0]))
    with_slopes, with_lse = not torchs and draw(st.integers(0, 3)) == 3, draw(st.booleans()) and not torchs
    trims = name == "flash_attn_varlen_func" and draw(st.integers(0, 3)) == 3

    def lengths_of(queries: int, keys: int) -> Lengths:
        slopes = tuple(draw(st.sampled_from([0.5, 0.1, 0.0, 1.0])) for _ in range(h)) if with_slopes else None
        return Lengths(queries, queries if alike else keys, draw(st.integers(0, keys)) if trims else None, slopes)

    length = layouts.lengths(setting.longest)
    count = draw(setting.counts())
    if packed:
        found = [lengths_of(draw(length), draw(length)) for _ in range(count)]
    else:
        n, m = draw(length), draw(length)
        found = [lengths_of(n, m) for _ in range(count)]

    def sample(own: Lengths) -> Sample:
        lead = () if packed else (1,)
        q, k, v = (own.queries, h, d), (own.keys, hk, d), (own.keys, hk, d)
        shapes = {"qkv": [(own.queries, 3, h, d)], "q kv": [q, (own.keys, 2, hk, d)], "q k v": [q, k, v]}[" ".join(names)]
        return Sample(own, [make.randn(*lead, *shape) for shape in shapes])

    def apart(given: list[Tensor]) -> list[Tensor]:
        """q, k and v."""
        return [x for name, each in zip(names, given, strict=True) for x in (each.unbind(-3) if len(name) > 1 else [each])]

    def slopes(of_samples: list[Lengths]) -> Tensor | None:
        return torch.tensor([own.slopes for own in of_samples]).reshape(-1, h) if with_slopes else None

    def call(of_samples: list[Lengths], given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        cu = [boundaries(own[i] for own in of_samples) for i in (0, 1)]
        if torchs:
            sides = window[0], 0 if options["causal"] else window[1]
            return [function(*given, *cu, window_size=sides, enable_gqa=h != hk)]
        places = [] if not packed else cu[:1] if alike else cu
        used = {"seqused_k": torch.tensor([own.used for own in of_samples], dtype=torch.int32)} if trims else {}
        if cached:
            used = {}
        wanted = {("return_softmax_lse" if cached else "return_attn_probs"): with_lse}
        result = function(
            *given, **dict(zip(_places(name), places, strict=False)), **options, **wanted, **used, alibi_slopes=slopes(of_samples)
        )
        return of_queries(*(result[:2] if with_lse else (result, None)))

    def bind(function: Callable) -> Any:
        def run(of_samples: list[Lengths], given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
            q, k, v = (x if packed else x.flatten(0, 1) for x in apart(given))
            pairs = split(of_samples)
            alibi = slopes([own for own in of_samples for _ in range(1 + (own.used is not None))])
            cu = [boundaries(pair[i] for pair in pairs) for i in (0, 1)]
            out, lse = function(
                q, k, v, *cu, **{**options, "window_size": tuple(min(w, 2**30) for w in window)}, alibi_slopes=alibi
            )
            out, *rest = of_queries(out, lse if with_lse else None)
            return [out, *rest] if packed else [x.unflatten(0, (len(of_samples), -1 if len(x) else 0)) for x in (out, *rest)]

        return run

    drawn = {"dtype": dtype, "lengths": found, "d": d, "heads": (h, hk), **options, "lse": with_lse}
    groups = () if not packed else ((0,),) if alike else ((0,), tuple(range(1, len(names))))
    empty = [(place, sample(lengths_of(0, 0))) for place in draw(placed_blanks(count))] if packed else []
    return Subject(
        drawn, names, [sample(own) for own in found], [], call, bind(plain_varlen), bind(exact_varlen),
        rows_of_queries if packed else (lambda _: 1), slack=groups, blanks=empty, differentiable=not cached,
    )  # fmt: skip


def _places(name: str) -> tuple[str, ...]:
    return ("cu_seqlens",) if "qkvpacked" in name else ("cu_seqlens_q", "cu_seqlens_k")


@st.composite
def masked(draw: DrawFn, name: str, setting: Setting) -> Subject:
    """Dense batches with a mask for each sample, of any magnitude, or logits as large without one."""
    int8 = name == "int8_attention"
    dtype = draw(setting.dtypes("int8_attention_forward" if int8 else "attention_forward"))
    mask = draw(layouts.masks(setting.gentle or int8))
    make, d, (h, hk) = draw(layouts.numbers(dtype)), draw(layouts.head_dims), draw(layouts.heads)
    n, m = draw(layouts.lengths(setting.longest)), draw(layouts.lengths(setting.longest))
    # What a kernel rounds is exact then: see sweep.py. In float64 nothing is rounded to float32.
    whole, rounds = mask.is_large, mask.is_large and dtype != torch.float64
    # Gradients of logits so large are no numbers of float16.
    beyond = mask.kind == "logits" and dtype == torch.float16
    if mask.kind == "logits":
        scale = 2.0 ** draw(st.sampled_from([10, 30, 60, 100]))
    else:
        scale = 2.0 ** draw(st.sampled_from([-3, -1, 0])) if whole else d**-0.5
    learned = not whole and not int8 and draw(st.booleans()) and mask.kind in ("keys", "rows", "all", "each", "some")
    count = draw(setting.counts())

    def sample() -> Sample:
        shapes = (h, n, d), (hk, m, d), (hk, m, d)
        # Of a query that sees one key, gradients are exactly 0, so v must not round them.
        drawn = (make.whole, make.whole, make.whole_in_one_channel) if whole else (make.randn,) * 3
        tensors = [function(1, *shape) for function, shape in zip(drawn, shapes, strict=True)]
        own = mask.make(make, h if learned else draw(st.sampled_from([1, h])), n, m)
        return Sample(None if learned else own, [*tensors, own[None]] if learned and own is not None else tensors)

    def joined(of_samples: list[Tensor | None], given: list[Tensor]) -> Tensor | None:
        """[B, H, S, Sk]."""
        if len(given) == 4:
            return given[3]
        return None if of_samples[0] is None else torch.stack([own.expand(h, n, m) for own in of_samples])  # type: ignore[union-attr]

    def call(of_samples: list, given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        added, causal = joined(of_samples, given), mask.kind == "causal"
        if int8:
            q, k, v = (x.transpose(1, 2) for x in given)
            out = sora_kernels.int8_attention(q, k, v, attn_mask=added, causal=causal, softmax_scale=scale)
            return [out.transpose(1, 2)]
        return [sora_kernels.scaled_dot_product_attention(*given[:3], added, 0.0, causal, scale, True)]

    def visible(own: Tensor | None) -> Tensor:
        if mask.kind == "causal":
            return torch.ones(n, m, dtype=torch.bool).tril(m - n if int8 else 0)
        return own if own is not None and own.dtype == torch.bool else torch.ones(n, m, dtype=torch.bool)

    def added_to(own: Tensor | None) -> Tensor | None:
        return None if own is None or own.dtype == torch.bool else own

    def plain(of_samples: list, given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        added, outs = joined(of_samples, given), []
        for b, (q, k, v) in enumerate(zip(*given[:3], strict=True)):
            k, v = (x.repeat_interleave(h // hk, 0) for x in (k, v))
            own = None if added is None else added[b]
            # Masks go to float32 scores, as in autocast: 2 bytes do not hold them.
            wide = torch.promote_types(q.dtype, torch.float32)
            scores = scale * (q.to(wide) @ k.to(wide).mT)
            if (extra := added_to(own)) is not None:
                scores = rounded_sum(scores, extra) if rounds else scores + extra
            seen = visible(own) & (scores > -torch.inf)
            scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~seen.any(-1, keepdim=True), 0)
            outs.append(torch.softmax(scores, -1).masked_fill(~seen, 0).to(q.dtype) @ v)
        return [torch.stack(outs)]

    def exactly(of_samples: list, given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        added = joined(of_samples, given)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in given[:3])
        count = len(given[0])
        if rounds:
            pairs = [(slice(b * n, b * n + n), slice(b * m, b * m + m)) for b in range(count)]
            masks = None if added_to(added) is None else list(added)  # type: ignore[arg-type]
            seen = [visible(own) for own in (added if added is not None else [None] * count)]
            out = exact(Case("masked", q.dtype, q, k, v, pairs, seen, scale, 0.0, masks), q, k, v)
            return [out.reshape(count, n, h, d).transpose(1, 2)]
        bias = added_to(added)
        if added is not None and bias is None:
            bias = torch.zeros(added.shape, dtype=torch.float64).masked_fill(~added, -torch.inf)
        right = (0 if int8 else n - m) if mask.kind == "causal" else 2**30
        dense = (x.transpose(1, 2) for x in given[:3])
        return [reference.attention(*dense, None, None, bias, None, scale, 2**30, right, 0.0)[0].transpose(1, 2)]

    found = [sample() for _ in range(count)]
    drawn = {
        "dtype": dtype,
        "batch": count,
        "n": n,
        "m": m,
        "heads": (h, hk),
        "d": d,
        "mask": mask,
        "scale": scale,
        "learned": learned,
    }
    return Subject(
        drawn, ("q", "k", "v", "mask")[: len(found[0].tensors)], found, [], call, plain, exactly, lambda _: 1,
        differentiable=not (int8 or beyond), by_torch=(3,) if learned else (), near=NEAR_INT8 if int8 else None,
    )  # fmt: skip


def rounded_sum(scores: Tensor, mask: Tensor) -> Tensor:
    """The sum as float32 rounds it, with the gradient of a sum."""
    summed = (scores.detach().float() + mask).to(scores.dtype)
    return torch.where(summed == -torch.inf, -torch.inf, scores + (summed - scores.detach()).nan_to_num(neginf=0.0))


@st.composite
def int8(draw: DrawFn, setting: Setting) -> Subject:
    """Packed, or dense with masks. It promises to be near attention, and no gradients."""
    if not setting.packed and draw(st.booleans()):
        return draw(masked("int8_attention", setting))
    dtype = draw(setting.dtypes("int8_attention_forward"))
    make, d, (h, hk) = draw(layouts.numbers(dtype)), draw(layouts.head_dims), draw(layouts.heads)
    length = layouts.lengths(setting.longest)
    found = [Lengths(draw(length), draw(length), None, None) for _ in range(draw(setting.counts()))]
    options = {"causal": draw(st.booleans()), "window_size": draw(layouts.sliding(setting.longest))}

    def sample(own: Lengths) -> Sample:
        return Sample(own, [make.randn(n, each, d) for n, each in ((own.queries, h), (own.keys, hk), (own.keys, hk))])

    def bind(function: Callable) -> Any:
        def run(of_samples: list[Lengths], given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
            out = function(*given, *(boundaries(own[i] for own in of_samples) for i in (0, 1)), **options)
            return [out[0] if isinstance(out, tuple) else out]

        return run

    def without_end(function: Callable) -> Callable:
        sides = tuple(min(w, 2**30) for w in options["window_size"])  # type: ignore[attr-defined]
        return lambda *given, **_: function(*given, causal=options["causal"], window_size=sides)

    samples = [sample(own) for own in found]
    return Subject(
        {"dtype": dtype, "lengths": found, "d": d, "heads": (h, hk), **options}, ("q", "k", "v"), samples, [],
        bind(sora_kernels.int8_attention), bind(without_end(plain_varlen)), bind(without_end(exact_varlen)), rows_of_queries,
        slack=((0,), (1, 2)), blanks=[(p, sample(Lengths(0, 0, None, None))) for p in draw(placed_blanks(len(found)))],
        differentiable=False, near=NEAR_INT8,
    )  # fmt: skip


@st.composite
def windowed(draw: DrawFn, setting: Setting) -> Subject:
    """Samples of several spans under windows, short and long, and causal axes."""
    dtype = draw(setting.dtypes("spatiotemporal_attention_forward"))
    make, d, (h, hk) = draw(layouts.numbers(dtype)), draw(layouts.head_dims), draw(layouts.heads)
    found = draw(setting.batches(layouts.samples(setting.longest)))
    window, causal = draw(layouts.windows), draw(layouts.causal_axes)

    def sample(own: tuple[Span, ...]) -> Sample:
        return Sample(own, [make.randn(layouts.size(own), each, d) for each in (h, hk, hk)])

    def call(of_samples: list, given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        return [sora_kernels.spatiotemporal_attention(*given, PackedLayout(of_samples), window=window, causal=causal)]

    def plain(of_samples: list, given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        return [plain_sample(*given, window_mask(PackedLayout(of_samples), window, causal))[0]]

    def exactly(of_samples: list, given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        layout, sides = PackedLayout(of_samples), [w or 0 for w in window]
        tables = layout.cu_seqlens, layout.cu_spans, layout.grid, layout.step
        return [reference.spatiotemporal_attention(*given, *tables, sides, causal, d**-0.5)[0]]

    drawn = {"dtype": dtype, "spans": found, "window": window, "causal": causal, "d": d, "heads": (h, hk)}
    return Subject(
        drawn, ("q", "k", "v"), [sample(own) for own in found], [], call, plain, exactly, layouts.size, slack=((0, 1, 2),),
        blanks=[(place, sample(())) for place in draw(placed_blanks(len(found)))],
        stretched=[draw(layouts.with_empty_spans(own)) for own in found],
        function=None if any(window) or any(causal) else "attention_forward",
    )  # fmt: skip


class Blocks(NamedTuple):
    """The spans of a sample, and bool [heads, R, C]: which blocks of keys each block of queries sees."""

    spans: tuple[Span, ...]
    table: Tensor


@st.composite
def by_blocks(draw: DrawFn, setting: Setting) -> Subject:
    """Blocks that are runs or tiles, and masks of one head or of all. Empty spans have no blocks, so a table stays as it is."""
    dtype = draw(setting.dtypes("block_sparse_attention_forward"))
    make, d, (h, hk) = draw(layouts.numbers(dtype)), draw(layouts.head_dims), draw(layouts.heads)
    found = draw(setting.batches(layouts.samples(setting.longest)))
    shape = draw(st.sampled_from([1, 7, 16, 64, 90, (2, 4, 3), (4, 4, 4), (1, 3, 5)]))
    num_heads, kept, with_lse = draw(st.sampled_from([1, h])), draw(st.sampled_from([0.4, 0.8, 0.1, 1.0])), draw(st.booleans())

    def blocks(of_samples: list[tuple[Span, ...]]) -> TokenBlocks:
        layout = PackedLayout(of_samples)
        return TokenBlocks.tiles(layout, shape) if isinstance(shape, tuple) else TokenBlocks.runs(layout, shape)

    def sample(own: tuple[Span, ...]) -> Sample:
        count = sum(blocks([own]).num_blocks)
        table = make.chance(kept, num_heads, count, count)
        return Sample(Blocks(own, table), [make.randn(layouts.size(own), each, d) for each in (h, hk, hk)])

    def mask_of(of_samples: list[Blocks]) -> BlockMask:
        return BlockMask.from_dense([own.table for own in of_samples], blocks([own.spans for own in of_samples]))

    def call(of_samples: list[Blocks], given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        result = sora_kernels.block_sparse_attention(*given, mask_of(of_samples), return_lse=with_lse)
        return of_queries(*(result if with_lse else (result, None)))

    def plain(of_samples: list[Blocks], given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        of_tokens = blocks([own.spans for own in of_samples])
        out, lse = plain_sample(*given, token_mask([own.table for own in of_samples], of_tokens, of_tokens))
        return of_queries(RoundedSum.apply(out, lse.masked_fill(lse.isinf(), 0)), lse if with_lse else None)

    def exactly(of_samples: list[Blocks], given: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        mask = mask_of(of_samples)
        b = mask.queries
        tables = b.cu_blocks, b.cu_blocks, b.cu_samples, b.cu_samples, *mask.lists
        out, lse, _ = block_reference.block_sparse_attention(*given, *tables, d**-0.5)  # type: ignore[assignment]
        return of_queries(out, lse if with_lse else None)

    samples = [sample(own) for own in found]
    drawn = {"dtype": dtype, "spans": found, "blocks": shape, "heads": (h, hk), "of mask": num_heads, "seen": kept, "d": d}
    return Subject(
        drawn | {"lse": with_lse}, ("q", "k", "v"), samples, [], call, plain, exactly, lambda own: layouts.size(own.spans),
        slack=((0,), (1, 2)), blanks=[(place, sample(())) for place in draw(placed_blanks(len(found)))],
        stretched=[Blocks(draw(layouts.with_empty_spans(own.layout.spans)), own.layout.table) for own in samples],
    )  # fmt: skip


DENSE_ONLY = ("slack", "blank")
SUBJECTS = {
    **{name: Op(partial(flash, name), "attention_forward") for name in PACKED},
    **{name: Op(partial(flash, name), "attention_forward", DENSE_ONLY, inference="cache" in name) for name in DENSE},
    "scaled_dot_product_attention": Op(partial(masked, "scaled_dot_product_attention"), "attention_forward", DENSE_ONLY),
    "spatiotemporal_attention": Op(windowed, "spatiotemporal_attention_forward"),
    "block_sparse_attention": Op(by_blocks, "block_sparse_attention_forward"),
    "int8_attention": Op(int8, "int8_attention_forward", inference=True),
}
