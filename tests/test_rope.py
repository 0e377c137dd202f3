"""3D RoPE alone and fused with QK-norm."""

import inspect
import itertools
import math
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
from contract import PackedContract
from tolerance import (
    Case,
    Target,
    assert_zero,
    check_accuracy,
    check_large,
    check_rejected,
    large_lengths,
)
from torch import Tensor
from torch.nn.functional import pad, rms_norm

from sora_kernels import backends
from sora_kernels import rope as ops
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.reference import rope as reference

FUNCTION = "rope_3d"
SPANS = [
    [Span((3, 4, 5))],
    [Span.text(7), Span((1, 6, 5), origin=(-2, 0.5, 1.25)), Span((2, 3, 3), origin=(3, 0, 0), step=(1, 0.5, 0.1))],
    [],
    [Span.text(3, origin=(5, 5, 5)), Span((0, 4, 4)), Span((1, 1, 1))],
]


def options_of(d: int, theta=10000.0, axes_dim=None, interleaved=True, **others):
    """Thetas and channels per axis, and the layout of pairs, as the reference takes them."""
    pairs = d // 2
    default = (d - 4 * (pairs // 3), 2 * (pairs // 3), 2 * (pairs // 3))
    thetas = theta if isinstance(theta, tuple) else (theta,) * 3
    return thetas, axes_dim or default, interleaved


def plain_rope(x: Tensor, layout: PackedLayout, theta=10000.0, axes_dim=None, interleaved=True) -> Tensor:
    """As diffusers writes it: float64 angles from a table of positions, x times cosines and sines in x's dtype."""
    thetas, axes, _ = options_of(x.shape[-1], theta, axes_dim)
    spans = list(itertools.chain(*layout.spans))
    indices = torch.tensor([i for span in spans for i in itertools.product(*map(range, span.grid))]).reshape(-1, 3)
    lengths = torch.tensor([span.num_tokens for span in spans], dtype=torch.long)
    origin, step = (  # float32, as the layout stores them
        torch.tensor(rows, dtype=torch.float32).reshape(-1, 3).double().repeat_interleave(lengths, dim=0)
        for rows in ([span.origin for span in spans], [span.step for span in spans])
    )
    positions = origin + step * indices
    frequencies = [1 / base ** (torch.arange(0, n, 2, dtype=torch.float64) / n) for base, n in zip(thetas, axes, strict=True)]
    angles = torch.cat([torch.outer(positions[:, a], frequencies[a]) for a in range(3)], dim=1)
    stored = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (f(angles).to(x.device, stored)[:, None] for f in (torch.cos, torch.sin))
    n = len(angles)
    a, b = x[:n].unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x[:n].chunk(2, dim=-1)
    turned = [a * cos - b * sin, a * sin + b * cos]
    turned = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return pad(turned.to(x.dtype), (0, 0, 0, 0, 0, len(x) - n))


def exact_angles(layout: PackedLayout, theta, axes_dim) -> Tensor:
    return reference.rotary_angles(layout.cu_spans, layout.grid, layout.origin, layout.step, theta, axes_dim)


ROPE = {
    **{f"d{d}": {"d": d} for d in (2, 8, 16, 64, 72, 80, 96, 128, 256)},
    "half": {"interleaved": False},
    "half_d72": {"d": 72, "interleaved": False},
    "hunyuan": {"d": 128, "axes_dim": (16, 56, 56), "theta": 256.0},
    "cogvideox": {"axes_dim": (16, 24, 24)},
    "theta_per_axis": {"theta": (100.0, 1e4, 1e6), "interleaved": False},
    "one_axis": {"axes_dim": (0, 64, 0)},
    "slack": {"slack": 9},
    "far": {"spans": [[Span((2, 2, 2), origin=(2e3, -1e3, 0.3)), Span((1, 3, 2), step=(1, 500, 1e-3))]]},
    "nothing": {"spans": [[]], "slack": 2},
}


def make_layout(target: Target, spans=SPANS) -> PackedLayout:
    return PackedLayout.from_spans(spans, target.device)


def slacked(target: Target, n: int, slack: int, *shape: int) -> Tensor:
    """[n + slack, *shape] whose last `slack` rows are NaN."""
    return torch.cat([target.randn(n, *shape), target.randn(slack, *shape) * torch.nan])


@pytest.mark.parametrize("case", ROPE)
def test_rope(target: Target, case: str) -> None:
    """The rotation and its gradient (the rotation back) obey the rule; slack rows are exactly 0."""
    options = dict(ROPE[case])
    d, slack, layout = options.pop("d", 64), options.pop("slack", 0), make_layout(target, options.pop("spans", SPANS))
    theta, axes_dim, interleaved = options_of(d, **options)
    angles = exact_angles(layout, theta, axes_dim)

    (y,), (dx,) = check_accuracy(
        lambda x: ops.rope_3d(x, layout, **options),
        lambda x: plain_rope(x, layout, **options),
        lambda x: reference.rotate(x, angles, interleaved),
        {"x": slacked(target, layout.num_tokens, slack, 3, d)},
    )
    assert_zero(y[layout.num_tokens :], dx[layout.num_tokens :])


def test_very_far(target: Target) -> None:
    """Frequencies are so exact that at position 2**24 angles are right to 3e-7; numbers of 40 digits are the oracle."""
    axes, thetas, position = (16, 24, 24), (1e4, 123456.7, 1.0), 2.0**24
    layout = PackedLayout.from_spans([[Span((1, 1, 1), origin=(position, -position, position))]], target.device)
    x = torch.stack([torch.ones(32), torch.zeros(32)], dim=-1).reshape(1, 1, 64).to(target.device, target.dtype)
    y = ops.rope_3d(x, layout, theta=thetas, axes_dim=axes).cpu().double().reshape(32, 2)
    tau, angles = Decimal("6.283185307179586476925286766559005768394"), []
    with localcontext() as context:
        context.prec = 40
        for sign, base, channels in zip((1, -1, 1), thetas, axes, strict=True):
            for pair in range(channels // 2):
                angle = sign * Decimal(position) * Decimal(base) ** (Decimal(-2 * pair) / channels)
                angles.append(float(angle % tau))
    exact = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float64)
    assert (y - exact).abs().max() < 3e-7 + torch.finfo(target.dtype).eps / 2


def test_text_is_not_turned(target: Target) -> None:
    """A span of origin and step 0 keeps its bits."""
    x = target.randn(7, 3, 64)
    assert torch.equal(ops.rope_3d(x, PackedLayout.from_spans([[Span.text(7)]], target.device)), x)


def test_origin_continues(target: Target) -> None:
    """Frames 2 and 3 of a video are the same bits as a span of two frames with origin 2."""
    x = target.randn(4 * 6, 2, 32)
    whole = PackedLayout.from_grids([(4, 2, 3)], target.device)
    tail = PackedLayout.from_spans([[Span((2, 2, 3), origin=(2, 0, 0))]], target.device)
    assert torch.equal(ops.rope_3d(x, whole)[12:], ops.rope_3d(x[12:], tail))


QK_NORM = {
    "per_head": {},
    "across_heads": {"across_heads": True},
    "no_weights": {"weights": ()},
    "no_weights_across": {"weights": (), "across_heads": True},
    "q_weight": {"weights": ("q",)},
    "k_weight": {"weights": ("k",), "across_heads": True},
    "half": {"interleaved": False, "across_heads": True},
    "gqa": {"heads": (6, 2), "d": 72},
    "gqa_across": {"heads": (6, 2), "across_heads": True},
    **{f"d{d}": {"d": d, "heads": (2, 1)} for d in (10, 80, 128, 256)},
    "eps": {"eps": 0.1},
    "small": {"scale": 1e-3},
    "large": {"scale": 100.0},
    "theta": {"theta": 256.0, "axes_dim": (16, 24, 24)},
    "slack": {"slack": 5, "across_heads": True},
    "nothing": {"spans": [[]], "slack": 2},
}


def plain_norm(x: Tensor, weight: Tensor | None, across_heads: bool, eps: float) -> Tensor:
    groups = x.flatten(1) if across_heads else x
    normed = rms_norm(groups, groups.shape[-1:], eps=eps)
    return (normed if weight is None else normed * weight).reshape(x.shape)


def check_qk_norm(target: Target, wide=(), **options) -> None:
    """q, k and the gradients of both and of their weights obey the rule; slack rows are exactly 0. wide: weights in float32."""
    d, heads, slack = options.pop("d", 64), options.pop("heads", (3, 3)), options.pop("slack", 0)
    layout, weights = make_layout(target, options.pop("spans", SPANS)), options.pop("weights", ("q", "k"))
    scale, across, eps = options.pop("scale", 1.0), options.pop("across_heads", False), options.pop("eps", 1e-6)
    theta, axes_dim, interleaved = options_of(d, **options)
    angles = exact_angles(layout, theta, axes_dim)

    inputs = {name: scale * slacked(target, layout.num_tokens, slack, h, d) for name, h in zip("qk", heads, strict=True)}
    for name, h in zip("qk", heads, strict=True):
        if name in weights:
            inputs[f"{name}_weight"] = 1 + target.randn(h * d if across else d, scale=0.3)
    inputs |= {name: inputs[name].float() for name in wide}

    def by_name(function):
        return lambda *tensors: function(**{"q_weight": None, "k_weight": None, **dict(zip(inputs, tensors, strict=True))})

    def plain(q, k, q_weight, k_weight):
        sides = (q[: layout.num_tokens], q_weight), (k[: layout.num_tokens], k_weight)
        turned = [plain_rope(plain_norm(x, weight, across, eps), layout, **options) for x, weight in sides]
        return [pad(x, (0, 0, 0, 0, 0, slack)) for x in turned]

    def exact(q, k, q_weight, k_weight):
        sides = (q, q_weight), (k, k_weight)
        return [reference.norm_rope(x, weight, angles, interleaved, across, eps)[0] for x, weight in sides]

    outputs, gradients = check_accuracy(
        by_name(partial(ops.qk_norm_rope_3d, layout=layout, across_heads=across, eps=eps, **options)),
        by_name(plain),
        by_name(exact),
        inputs,
    )
    assert_zero(*(x[layout.num_tokens :] for x in (*outputs, *gradients[:2])))


@pytest.mark.parametrize("case", QK_NORM)
def test_qk_norm_rope(target: Target, case: str) -> None:
    check_qk_norm(target, **QK_NORM[case])


@pytest.mark.parametrize("wide", [("q_weight",), ("q_weight", "k_weight")], ids="+".join)
@pytest.mark.parametrize("case", ["slack", "gqa", "d10", "half"])
def test_float32_weights(target16: Target, case: str, wide: tuple[str, ...]) -> None:
    check_qk_norm(target16, wide=wide, **QK_NORM[case])


def test_no_heads(target: Target) -> None:
    layout = PackedLayout.from_grids([(1, 1, 2)], target.device)
    q, k = ops.qk_norm_rope_3d(target.randn(2, 0, 8), target.randn(2, 1, 8), None, None, layout)
    assert q.shape == (2, 0, 8)
    assert k.shape == (2, 1, 8)


def test_no_tokens(target: Target) -> None:
    """Not even the strides of a tensor without elements matter."""
    x = target.randn(0, 3, 128)[..., ::2].requires_grad_()
    y = ops.rope_3d(x, PackedLayout.from_spans([[]], target.device))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 64)


def turn(layout: PackedLayout, x: Tensor) -> Tensor:
    return ops.rope_3d(x, layout, theta=256.0, axes_dim=(4, 12, 8))


def norm_and_turn(layout: PackedLayout, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, **options):
    return ops.qk_norm_rope_3d(q, k, q_weight, k_weight, layout, **options)


def make_case(op, heads: tuple[int, ...], weights: tuple[int, ...], operators: set[str], target: Target) -> Case:
    layout, d = make_layout(target), 24
    inputs = [layout.unpack(target.randn(layout.num_tokens, h, d)) for h in heads]
    parts = [(layout.select([b]), list(sample)) for b, sample in enumerate(zip(*inputs, strict=True))]
    return Case.of_samples(op, layout, parts, operators, *(1 + target.randn(n, scale=0.3) for n in weights))


BOTH = {"qk_norm_rope_3d_forward", "qk_norm_rope_3d_backward"}
OPS = {
    "rope": partial(make_case, turn, (3,), (), {"rope_3d"}),
    "per_head": partial(make_case, norm_and_turn, (4, 2), (24, 24), BOTH),
    "across_heads": partial(make_case, partial(norm_and_turn, across_heads=True), (4, 2), (96, 48), BOTH),
}

X, W, LAYOUT = torch.zeros(6, 2, 8), torch.ones(8), PackedLayout.from_grids([(1, 2, 3)])
GOOD = {
    "rope_3d": {"x": X, "layout": LAYOUT},
    "qk_norm_rope_3d": {"q": X, "k": X, "q_weight": W, "k_weight": W, "layout": LAYOUT},
}
BAD = [
    ("rope_3d", {"x": [1]}, "x: expected a torch.Tensor, got list"),
    ("rope_3d", {"x": X.long()}, "x: expected dtype float32 or ~, got int64"),
    ("rope_3d", {"x": X[0]}, "x: expected shape [N, H, d], got [2, 8]"),
    ("rope_3d", {"x": X[..., :7]}, "x: expected an even head dim, got 7"),
    ("rope_3d", {"x": X[:5]}, "layout: expected at most 5 tokens, got 6"),
    ("rope_3d", {"layout": LAYOUT.cu_spans}, "layout: expected a PackedLayout, got Tensor"),
    ("rope_3d", {"axes_dim": (4, 4, 2)}, "axes_dim: expected three even sizes that add up to 8, got (4, 4, 2)"),
    ("rope_3d", {"axes_dim": (3, 3, 2)}, "axes_dim: expected three even sizes that add up to 8, got (3, 3, 2)"),
    ("rope_3d", {"axes_dim": 8}, "axes_dim: expected three ints~, got 8"),
    ("rope_3d", {"theta": -1.0}, "theta: expected positive numbers, got -1.0"),
    ("rope_3d", {"theta": (1.0, 2.0)}, "theta: expected three floats~, got (1.0, 2.0)"),
    ("rope_3d", {"theta": "1"}, "theta: expected ~, got '1'"),
    ("qk_norm_rope_3d", {"q": X[0]}, "q: expected shape [N, H, d], got [2, 8]"),
    ("qk_norm_rope_3d", {"k": X[1:]}, "k: expected shape [6, Hk, 8], got [5, 2, 8]"),
    ("qk_norm_rope_3d", {"k": X.double()}, "k: expected dtype float32, got float64"),
    ("qk_norm_rope_3d", {"q_weight": torch.ones(16)}, "q_weight: expected shape [8], or across_heads=True ~, got [16]"),
    ("qk_norm_rope_3d", {"q_weight": torch.ones(15)}, "q_weight: expected shape [8], got [15]"),
    (
        "qk_norm_rope_3d",
        {"k_weight": W, "across_heads": True, "q_weight": None},
        "k_weight: expected shape [16], got [8]",
    ),
    ("qk_norm_rope_3d", {"k_weight": W.half()}, "k_weight: expected dtype float32, got float16"),
    (
        "qk_norm_rope_3d",
        {"q": X[..., :7], "k": X[..., :7], "q_weight": None, "k_weight": None},
        "q: expected an even ~, got 7",
    ),
]


@pytest.mark.parametrize(("name", "wrong", "message"), BAD)
def test_bad_input(name: str, wrong: dict, message: str) -> None:
    check_rejected(getattr(ops, name), {**GOOD[name], **wrong}, f"{name}: {message}")


@pytest.mark.parametrize("name", [name for name in backends.FUNCTIONS if "rope_3d" in name])
def test_missing_tensor(name: str) -> None:
    """The compiled functions may lack the norm's weights, and no other tensor."""
    others = {"theta": (1e4,) * 3, "axes_dim": (4, 2, 2), "interleaved": True, "inverse": False, "across_heads": False, "eps": 1e-6}
    others |= {key: getattr(LAYOUT, key) for key in ("cu_spans", "grid", "origin", "step")}
    others |= {key: torch.ones(6, 2) for key in ("q_rstd", "k_rstd")}
    names = inspect.signature(getattr(reference, name)).parameters
    good = {key: others[key] if key in others else (W if "weight" in key else X).clone() for key in names}
    function = getattr(backends.BACKENDS["cpu"].load(), name)
    function(*good.values())
    for key, value in good.items():
        if isinstance(value, torch.Tensor) and key not in ("q_weight", "k_weight"):
            with pytest.raises(ValueError, match=r"sora_kernels\._cpu: "):
                function(*{**good, key: None}.values())


def test_subnormal_bfloat16() -> None:
    """Where one instruction rounds to bfloat16, subnormal numbers become zero; on other tiers they stay, as all others do."""
    x = torch.tensor([1e-39, -1e-39, 1.2e-38, -3e38, 0.0, 1.0, -2.0, 3.0]).bfloat16().repeat(6, 2, 1)
    standing = PackedLayout.from_spans([[Span.text(6)]])
    flushed = backends.BACKENDS["cpu"].load().isa() in ("avx512bf16", "amx")
    subnormal = x.float().abs() < torch.finfo(torch.bfloat16).tiny
    with backends.use_backend("cpu"):
        assert torch.equal(ops.rope_3d(x, standing), x.masked_fill(subnormal & flushed, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("name", ["rope_3d", "qk_norm_rope_3d"])
def test_large(name: str, d: int, dtype: torch.dtype) -> None:
    target, lengths = Target("cpu", "cpu", dtype), large_lengths(4 * d, dtype)
    layout = PackedLayout.from_grids([(1, 1, n) for n in lengths])
    parts = [(PackedLayout.from_grids([(1, 1, n)]), [target.randn(n, 4, d) for _ in range(2)]) for n in lengths]
    if name == "rope_3d":
        parts = [(each, inputs[:1]) for each, inputs in parts]
        check_large(Case.of_samples(lambda layout, x: ops.rope_3d(x, layout), layout, parts, {"rope_3d"}))
    else:
        check_large(Case.of_samples(norm_and_turn, layout, parts, BOTH, *(1 + target.randn(d, scale=0.3) for _ in range(2))))


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""
