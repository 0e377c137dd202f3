"""Random batches of every op that works token by token: rotations, norms, modulation, activation, patches."""

from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import test_norm_gate_residual
import torch
from hypothesis.strategies import DrawFn
from test_adaln import exact_gate, exact_gate_modulate, exact_modulate, plain_gate, plain_gate_modulate, plain_modulate
from test_bias_gelu import plain as plain_gelu
from test_norm_rope import plain_norm as plain_any_norm
from test_norm_rope import plain_rope as plain_by_tables
from test_norm_rope import widened
from test_patchify import written_out
from test_rope import exact_angles, options_of, plain_norm, plain_rope
from torch import Tensor
from torch.nn.functional import linear

import sora_kernels
from sora_kernels.layout import PackedLayout
from sora_kernels.reference import bias_gelu as gelu_reference
from sora_kernels.reference import norm_rope as table_reference
from sora_kernels.reference import patch_embed as patch_reference
from sora_kernels.reference import rope as reference

from . import layouts
from .layouts import Setting
from .subject import Op, Sample, Subject

ROWS = ("shift", "scale", "gate")
NO_BOUNDARIES = ("slack",)


@st.composite
def placed_blanks(draw: DrawFn, count: int) -> list[int]:
    """Places of samples without tokens among `count` others."""
    return sorted(draw(st.lists(st.integers(0, count), min_size=1, max_size=3)))


def boundaries(lengths: Any) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@st.composite
def adaln(draw: DrawFn, name: str, functions: tuple, tokens: tuple[str, ...], rows: tuple[str, ...], setting: Setting) -> Subject:
    """Each sample is some rows of shift, scale and gate with their tokens; dense batches have as many of both."""
    dtype = draw(setting.dtypes(f"{name}_forward"))
    make = draw(layouts.numbers(dtype))
    dense = not setting.packed and draw(st.integers(0, 3)) == 3
    if dense:
        lengths = [(draw(layouts.lengths(20)),) * draw(st.integers(1, 3))] * draw(setting.counts())
    else:
        of_rows = st.lists(layouts.lengths(setting.longest // 3), min_size=1, max_size=3).map(tuple)
        lengths = draw(setting.batches(layouts.seldom(st.just(()), of_rows), 4))
    width, used = draw(layouts.widths), draw(layouts.some(rows))
    options: dict[str, Any] = {}
    weights: tuple[str, ...] = ()
    if name != "gate_residual":
        options = {"norm": draw(st.sampled_from(["rms"] if setting.ruled and width == 1 else ["layer", "rms"]))}
        options["eps"] = draw(layouts.epsilons)
        weights = draw(layouts.some(("weight", "bias") if options["norm"] == "layer" else ("weight",)))
    if name == "norm_gate_residual":
        options["tanh"] = draw(st.booleans())
    wide = draw(layouts.some((*(n for n in tokens if n == "residual"), *used, *weights)))
    scale = 1.0 if setting.gentle else draw(layouts.scales)
    bounded = bool(used) or setting.packed or draw(st.booleans())
    names, columns = (*tokens, *used, *weights), (*tokens, *used)

    def tensor(column: str, own: tuple[int, ...]) -> Tensor:
        if column in ROWS:
            return make.randn(len(own), width, wide=column in wide)
        return make.randn(sum(own), width, scale=scale, wide=column in wide)

    def sample(own: tuple[int, ...]) -> Sample:
        return Sample(own, [tensor(column, own) for column in columns])

    def bind(function: Any, batched: bool) -> Any:
        def run(of_samples: list[tuple[int, ...]], given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
            by_name = dict(zip(names, [*given, *shared], strict=True))
            cu = boundaries(n for own in of_samples for n in own) if bounded else None
            if not batched:
                outputs = function(**by_name, cu_rows=cu, **options)
            else:
                b, f = len(of_samples), len(of_samples[0])
                shapes = {n: (b, f if n in ROWS else sum(of_samples[0]), width) for n in columns}
                outputs = function(**by_name | {n: by_name[n].reshape(shape) for n, shape in shapes.items()}, **options)
            return [x.flatten(0, -2) for x in (outputs if isinstance(outputs, tuple) else (outputs,))]

        return run

    op, plain, exact = functions
    shared = [make.randn(width, scale=0.3, wide=n in wide) + (n == "weight") for n in weights]
    drawn = {"dtype": dtype, "rows": lengths, "D": width, "of rows": used, "weights": weights, "float32": wide, "times": scale}
    blanks = (
        [] if dense else [(place, sample(draw(st.sampled_from([(0,), (), (0, 0)])))) for place in draw(placed_blanks(len(lengths)))]
    )
    return Subject(
        {**drawn, "dense": dense, "bounded": bounded, **options}, columns, [sample(own) for own in lengths], shared,
        bind(op, dense), bind(plain, False), bind(exact, False), sum,
        slack=() if dense or not bounded else (tuple(range(len(tokens))),), blanks=blanks,
    )  # fmt: skip


def adaln_of(name: str, tokens: tuple[str, ...], rows: tuple[str, ...], plain: Any, exact: Any) -> Op:
    return Op(partial(adaln, name, (getattr(sora_kernels, name), plain, exact), tokens, rows), f"{name}_forward")


@st.composite
def rotated(draw: DrawFn, name: str, setting: Setting) -> Subject:
    """rope_3d and qk_norm_rope_3d of samples of spans."""
    with_norm = name == "qk_norm_rope_3d"
    dtype = draw(setting.dtypes(f"{name}_forward" if with_norm else name))
    make, d, heads = draw(layouts.numbers(dtype)), draw(layouts.even_head_dims), draw(layouts.heads)
    found = draw(setting.batches(layouts.samples(setting.longest)))
    options: dict[str, Any] = {"interleaved": draw(st.booleans())}
    options["theta"] = draw(st.sampled_from([1e4, 256.0, (100.0, 1e4, 1e6)]))
    if draw(st.booleans()):
        t = draw(st.integers(0, d // 2))
        h = draw(st.integers(0, d // 2 - t))
        options["axes_dim"] = (2 * t, 2 * h, d - 2 * t - 2 * h)
    heads = heads if with_norm else heads[:1]
    names = ("q", "k") if with_norm else ("x",)
    theta, axes, interleaved = options_of(d, **options)
    norm: dict[str, Any] = {}
    used: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    shared: list[Tensor] = []
    if with_norm:
        norm = {"across_heads": draw(st.booleans()), "eps": draw(layouts.epsilons)}
        used = draw(layouts.some(("q_weight", "k_weight")))
        wide = draw(layouts.some(used))
        sizes = {f"{n}_weight": h * d if norm["across_heads"] else d for n, h in zip("qk", heads, strict=True)}
        shared = [1 + make.randn(sizes[n], scale=0.3, wide=n in wide) for n in used]
    scale = 1.0 if setting.gentle else draw(layouts.scales)

    def sample(own: Any) -> Sample:
        return Sample(own, [make.randn(layouts.size(own), h, d, scale=scale) for h in heads])

    def weights(given: list[Tensor]) -> list[Tensor | None]:
        by_name = dict(zip(used, given, strict=True))
        return [by_name.get("q_weight"), by_name.get("k_weight")]

    def call(of_samples: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        layout = PackedLayout(of_samples)
        if with_norm:
            return list(sora_kernels.qk_norm_rope_3d(*given, *weights(shared), layout, **norm, **options))
        return [sora_kernels.rope_3d(*given, layout, **options)]

    def plain(of_samples: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        layout = PackedLayout(of_samples)
        if with_norm:
            given = [plain_norm(x, w, **norm) for x, w in zip(given, weights(shared), strict=True)]
        return [plain_rope(x, layout, **options) for x in given]

    def exact(of_samples: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        angles = exact_angles(PackedLayout(of_samples), theta, axes)
        if with_norm:
            sides = zip(given, weights(shared), strict=True)
            return [reference.norm_rope(x, w, angles, interleaved, **norm)[0] for x, w in sides]
        return [reference.rotate(x, angles, interleaved) for x in given]

    drawn = {"dtype": dtype, "spans": found, "heads": heads, "d": d, "weights": used, "float32": wide, "times": scale}
    return Subject(
        {**drawn, **norm, **options}, names, [sample(own) for own in found], shared, call, plain, exact, layouts.size,
        slack=(tuple(range(len(names))),), blanks=[(place, sample(())) for place in draw(placed_blanks(len(found)))],
        stretched=[draw(layouts.with_empty_spans(own)) for own in found],
    )  # fmt: skip


@st.composite
def by_tables(draw: DrawFn, name: str, setting: Setting) -> Subject:
    """apply_rope and norm_rope of packed tokens with a row of the tables each, or of a dense batch that shares them."""
    with_norm = name == "norm_rope"
    dtype = draw(setting.dtypes("norm_rope_forward" if with_norm else name))
    make, (h, _), d = draw(layouts.numbers(dtype)), draw(layouts.heads), draw(layouts.even_head_dims)
    dense = not setting.packed and draw(st.booleans())
    count = draw(setting.counts())
    lengths = [draw(layouts.lengths(setting.longest // 2)) for _ in range(count)]
    lengths = lengths[:1] * count if dense else lengths
    pairs = draw(st.integers(0, d // 2)) if draw(st.booleans()) else d // 2
    per_head, wide_tables, interleaved = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    has_tables = not with_norm or draw(st.integers(0, 3)) < 3
    options: dict[str, Any] = {}
    used: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    if with_norm:
        options = {"norm": draw(st.sampled_from(["rms", "layer"])), "eps": draw(layouts.epsilons), "across_heads": False}
        used = draw(layouts.some(("weight", "bias") if options["norm"] == "layer" else ("weight",)))
        wide = draw(layouts.some(used))
        options["across_heads"] = options["norm"] == "rms" and draw(st.booleans())
    across, scale = options.get("across_heads", False), 1.0 if setting.gentle else draw(layouts.scales)

    def tables(n: int) -> list[Tensor]:
        if not has_tables:
            return []
        angles = 3 * make.randn(n, *((h,) if per_head else ()), pairs, wide=wide_tables)
        return [angles.cos(), angles.sin()]

    def sample(n: int) -> Sample:
        x = make.randn(*((1,) if dense else ()), n, h, d, scale=scale)
        return Sample(n, [x, *(() if dense else tables(n))])

    def split(given: list[Tensor], shared: list[Tensor]) -> tuple[Tensor, list[Any], dict[str, Tensor]]:
        """x, the tables and the weights by name."""
        rest = [*given[1:], *shared]
        count = 2 if has_tables else 0
        return given[0], rest[:count] or [None, None], dict(zip(used, rest[count:], strict=True))

    def call(_: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        x, (cos, sin), weights = split(given, shared)
        function = getattr(sora_kernels, name)
        return [function(x, cos, sin, interleaved=interleaved, **weights, **options)]

    def plain(_: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        x, (cos, sin), weights = split(given, shared)
        y = widened(x)
        if with_norm:
            weights = {n: w.to(torch.promote_types(y.dtype, w.dtype)) for n, w in weights.items()}
            y = plain_any_norm(y, options["norm"], weights.get("weight"), weights.get("bias"), across, options["eps"])
        return [plain_by_tables(y, *(t if t is None else t.to(y.dtype) for t in (cos, sin)), interleaved).to(x.dtype)]

    def exact(_: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        x, (cos, sin), weights = split(given, shared)
        rows = x.flatten(0, -3)
        if with_norm:
            layer, both = options["norm"] == "layer", [weights.get("weight"), weights.get("bias")]
            y = table_reference.norm_rope(rows, *both, cos, sin, layer, across, interleaved, options["eps"])[0]
        else:
            y = table_reference.rotate_by_tables(rows, cos, sin, interleaved)
        return [y.reshape(x.shape)]

    sizes = h * d if across else d
    shared = [
        *(tables(lengths[0]) if dense else []),
        *(make.randn(sizes, scale=0.3, wide=n in wide) + (n == "weight") for n in used),
    ]
    drawn = {"dtype": dtype, "lengths": lengths, "dense": dense, "heads": h, "d": d, "pairs": pairs, "tables": has_tables}
    drawn |= {"per head": per_head, "float32 tables": wide_tables, "weights": used, "float32": wide, "interleaved": interleaved}
    names = ("x", "cos", "sin")[: 1 if dense or not has_tables else 3]
    return Subject(
        {**drawn, "times": scale, **options}, names, [sample(n) for n in lengths], shared,
        call, plain, exact, (lambda _: 1) if dense else (lambda n: n),
        blanks=[] if dense else [(place, sample(0)) for place in draw(placed_blanks(count))],
    )  # fmt: skip


@st.composite
def gelu(draw: DrawFn, setting: Setting) -> Subject:
    dtype = draw(setting.dtypes("bias_gelu_forward"))
    make, width = draw(layouts.numbers(dtype)), draw(layouts.widths)
    lengths = draw(setting.batches(layouts.lengths(setting.longest)))
    biased, scale = draw(st.booleans()), draw(st.sampled_from([1.0, 2.0] if setting.gentle else [1.0, 1e-3, 5.0, 30.0]))

    def sample(n: int) -> Sample:
        return Sample(n, [make.randn(n, width, scale=scale)])

    def bind(function: Any) -> Any:
        return lambda _, given, shared: [function(*given, *(shared or [None]))]

    drawn = {"dtype": dtype, "lengths": lengths, "D": width, "biased": biased, "times": scale}
    return Subject(
        drawn, ("x",), [sample(n) for n in lengths], [make.randn(width)] if biased else [],
        bind(sora_kernels.bias_gelu), bind(plain_gelu), bind(gelu_reference.bias_gelu), lambda n: n,
        blanks=[(place, sample(0)) for place in draw(placed_blanks(len(lengths)))],
    )  # fmt: skip


@st.composite
def patches(draw: DrawFn, name: str, setting: Setting) -> Subject:
    """Videos to patches, embedded or not, and patches to videos."""
    embeds, back = name == "patch_embed_3d", name == "unpatchify_3d"
    dtype = draw(setting.dtypes("patch_embed_3d_forward" if embeds else name))
    make, channels = draw(layouts.numbers(dtype)), draw(st.sampled_from([1, 3, 4, 16]))
    patch = draw(st.sampled_from([(1, 2, 2), (1, 1, 1), (2, 4, 1), (3, 1, 5), (1, 2, 8)]))
    found = draw(setting.batches(layouts.grids(setting.longest // 4), 4))
    d, biased, scale = draw(layouts.widths), draw(st.booleans()), 1.0 if setting.gentle else draw(layouts.scales)
    volume = patch[0] * patch[1] * patch[2] * channels

    def shape(grid: tuple[int, int, int]) -> tuple[int, ...]:
        return channels, *(n * p for n, p in zip(grid, patch, strict=True))

    def sample(grid: tuple[int, int, int]) -> Sample:
        if back:
            return Sample(grid, [make.randn(layouts.tokens(grid), volume, scale=scale)])
        return Sample(grid, [make.randn(*shape(grid), scale=scale)])

    def call(of_samples: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        if back:
            return sora_kernels.unpatchify_3d(given[0], PackedLayout.from_grids(of_samples), patch_size=patch)
        if embeds:
            return [sora_kernels.patch_embed_3d(given, shared[0], shared[1] if biased else None, patch_size=patch)[0]]
        return [sora_kernels.patchify_3d(given, patch_size=patch)[0]]

    def plain(of_samples: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        if back:
            of_each = given[0].split([layouts.tokens(grid) for grid in of_samples])
            videos = [x.reshape(*grid, *patch, channels) for x, grid in zip(of_each, of_samples, strict=True)]
            return [x.permute(6, 0, 3, 1, 4, 2, 5).reshape(shape(grid)) for x, grid in zip(videos, of_samples, strict=True)]
        held = [video for video in given if video.numel()]
        if not held:
            return [(given[0].sum() + sum(x.sum() for x in shared)) * given[0].new_zeros(0, d if embeds else volume)]
        if not embeds:
            return [written_out(held, patch)]
        # Not conv3d: torch's gives NaN now and then for finite bfloat16 numbers on the CPU.
        cut = torch.cat([patch_reference.patchify([video], patch) for video in held])
        return [linear(cut, shared[0].permute(0, 2, 3, 4, 1).flatten(1), shared[1] if biased else None)]

    def exact(of_samples: list, given: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
        if back:
            return patch_reference.unpatchify(given[0], patch, [torch.Size(shape(grid)) for grid in of_samples])
        if embeds:
            return [patch_reference.patch_embed_3d(given, shared[0], shared[1] if biased else None, patch)]
        return [patch_reference.patchify(given, patch)]

    shared = [make.randn(d, channels, *patch, scale=0.2), *([make.randn(d)] if biased else [])] if embeds else []
    drawn = {"dtype": dtype, "grids": found, "patch": patch, "channels": channels, "times": scale}
    drawn |= {"D": d, "biased": biased} if embeds else {}
    blanks = [(place, sample(draw(st.sampled_from([(0, 2, 3), (2, 0, 1)])))) for place in draw(placed_blanks(len(found)))]
    return Subject(
        drawn, ("tokens",) if back else ("videos",), [sample(grid) for grid in found], shared, call, plain, exact,
        None if back else layouts.tokens, slack=((0,),) if back else (), blanks=blanks, joined=back,
    )  # fmt: skip


TOKENS = ("residual", "x")
SUBJECTS = {
    "layer_norm_modulate": adaln_of("layer_norm_modulate", ("x",), ("shift", "scale"), plain_modulate, exact_modulate),
    "gate_residual": adaln_of("gate_residual", TOKENS, ("gate",), plain_gate, exact_gate),
    "gate_residual_layer_norm_modulate": adaln_of(
        "gate_residual_layer_norm_modulate", TOKENS, ("gate", "shift", "scale"), plain_gate_modulate, exact_gate_modulate
    ),
    "norm_gate_residual": adaln_of(
        "norm_gate_residual", TOKENS, ("gate",), test_norm_gate_residual.plain, test_norm_gate_residual.exact
    ),
    "rope_3d": Op(partial(rotated, "rope_3d"), "rope_3d"),
    "qk_norm_rope_3d": Op(partial(rotated, "qk_norm_rope_3d"), "qk_norm_rope_3d_forward"),
    "apply_rope": Op(partial(by_tables, "apply_rope"), "apply_rope", NO_BOUNDARIES),
    "norm_rope": Op(partial(by_tables, "norm_rope"), "norm_rope_forward", NO_BOUNDARIES),
    "bias_gelu": Op(gelu, "bias_gelu_forward", NO_BOUNDARIES),
    "patch_embed_3d": Op(partial(patches, "patch_embed_3d"), "patch_embed_3d_forward", NO_BOUNDARIES),
    "patchify_3d": Op(partial(patches, "patchify_3d"), "patchify_3d", NO_BOUNDARIES),
    "unpatchify_3d": Op(partial(patches, "unpatchify_3d"), "unpatchify_3d"),
}
