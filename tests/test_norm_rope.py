"""RoPE from given tables, alone and fused with the norm of queries or keys."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import PackedContract
from tolerance import Case, Target, assert_bit_equal, check_accuracy, check_large, check_rejected, large_lengths, random_like, run
from torch import Tensor

from sora_kernels.layout import PackedLayout, Span
from sora_kernels.norm_rope import apply_rope, norm_rope
from sora_kernels.reference import norm_rope as reference
from sora_kernels.reference.rope import rotary_angles
from sora_kernels.rope import default_axes_dim, qk_norm_rope_3d, rope_3d

FUNCTION = "norm_rope_forward"


def make_tables(target: Target, *shape: int) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, float32."""
    angles = 3 * torch.randn(shape)
    return angles.cos().to(target.device), angles.sin().to(target.device)


def plain_rope(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool = True) -> Tensor:
    """As eager models write it, for x [..., S, H, d] and tables of S rows."""
    if cos is None or sin is None:
        return x
    r = 2 * cos.shape[-1]
    if cos.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]
    u, v = x[..., :r].unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x[..., :r].chunk(2, dim=-1)
    turned = [u * cos - v * sin, u * sin + v * cos]
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([joined.to(x.dtype), x[..., r:]], dim=-1)


def widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def plain_norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, across_heads: bool, eps: float) -> Tensor:
    groups = x.flatten(-2) if across_heads else x
    if norm == "layer":
        return F.layer_norm(groups, groups.shape[-1:], weight, bias, eps).reshape(x.shape)
    normed = F.rms_norm(groups, groups.shape[-1:], eps=eps)
    return (normed if weight is None else normed * weight).reshape(x.shape)


# Shapes of x, and of the tables; options of the rotation.
ROPE = {
    **{f"d{d}": {"x": (7, 3, d)} for d in (2, 8, 16, 64, 72, 128, 130)},
    **{f"half_d{d}": {"x": (7, 3, d), "interleaved": False} for d in (2, 72, 128, 130)},
    "partial": {"x": (7, 3, 128), "r": 96},
    "partial_half": {"x": (7, 3, 128), "r": 96, "interleaved": False},
    "partial_odd": {"x": (7, 3, 75), "r": 34},
    "partial_odd_half": {"x": (7, 3, 75), "r": 34, "interleaved": False},
    "two_channels": {"x": (7, 3, 64), "r": 2},
    "none": {"x": (7, 3, 20), "r": 0},
    "heads": {"x": (7, 3, 64), "per_head": True},
    "heads_half": {"x": (7, 5, 24), "per_head": True, "interleaved": False},
    "heads_partial": {"x": (7, 3, 40), "r": 18, "per_head": True},
    "dense": {"x": (2, 5, 3, 24)},
    "dense_shared": {"x": (3, 5, 2, 64), "rows": 5},
    "dense_heads": {"x": (3, 5, 2, 24), "rows": 5, "per_head": True},
    "many_tokens": {"x": (2, 70, 1, 16), "rows": 70},
    "one_token": {"x": (1, 1, 4)},
}


def table_shape(x: tuple[int, ...], r: int | None = None, rows: int | None = None, per_head: bool = False) -> tuple[int, ...]:
    heads = (x[-2],) if per_head else ()
    return (rows or torch.Size(x[:-2]).numel(), *heads, (x[-1] if r is None else r) // 2)


def with_rows(x: Tensor, table: Tensor | None) -> Tensor:
    """x of any rank as [..., M, H, d]."""
    return x if table is None else x.reshape(-1, len(table), *x.shape[-2:])


@pytest.mark.parametrize("case", ROPE)
def test_rope(target: Target, case: str) -> None:
    options = dict(ROPE[case])
    shape, interleaved = options.pop("x"), options.pop("interleaved", True)
    cos, sin = make_tables(target, *table_shape(shape, **options))

    def exact(x: Tensor) -> Tensor:
        return reference.rotate_by_tables(x.flatten(0, -3), cos.to(x.dtype), sin.to(x.dtype), interleaved).view(x.shape)

    check_accuracy(
        lambda x: apply_rope(x, cos, sin, interleaved=interleaved),
        lambda x: plain_rope(with_rows(widened(x), cos), cos, sin, interleaved).view(x.shape).to(x.dtype),
        exact,
        {"x": target.randn(*shape)},
    )


NORM = {
    "rms": {},
    "rms_across": {"across_heads": True},
    "layer": {"norm": "layer", "parameters": ("weight", "bias")},
    "layer_weight": {"norm": "layer"},
    "layer_bias": {"norm": "layer", "parameters": ("bias",)},
    "layer_alone": {"norm": "layer", "parameters": (), "tables": False},
    "no_weight": {"parameters": ()},
    "no_weight_across": {"parameters": (), "across_heads": True},
    "alone": {"tables": False},
    "alone_across": {"tables": False, "across_heads": True, "x": (2, 5, 3, 64)},
    "alone_d128": {"tables": False, "x": (5, 2, 128)},
    "half": {"interleaved": False},
    "half_across": {"interleaved": False, "across_heads": True, "x": (7, 3, 72)},
    "layer_half": {"norm": "layer", "parameters": ("weight", "bias"), "interleaved": False, "x": (7, 3, 72)},
    "partial": {"r": 96, "x": (5, 2, 128)},
    "partial_half_layer": {"norm": "layer", "parameters": ("weight", "bias"), "r": 10, "x": (7, 3, 21), "interleaved": False},
    "heads_across": {"per_head": True, "across_heads": True},
    "heads": {"per_head": True, "x": (7, 2, 128)},
    "heads_layer_half": {"norm": "layer", "per_head": True, "interleaved": False},
    "dense_shared": {"x": (3, 5, 2, 64), "rows": 5},
    "d10": {"x": (7, 5, 10)},
    "d10_layer": {"x": (7, 5, 10), "norm": "layer", "parameters": ("weight", "bias")},
    "d1": {"x": (7, 2, 1), "tables": False},
    "many_tokens": {"x": (2, 70, 1, 16), "rows": 70, "norm": "layer", "parameters": ("weight", "bias")},
    "eps": {"eps": 0.1},
    "small": {"scale": 1e-3},
    # For CUDA C++: teams of several warps; that go through several groups; groups that do not fit in registers.
    "warps_across": {"across_heads": True, "x": (3, 24, 64)},
    "many_groups_across": {"across_heads": True, "x": (1030, 3, 86)},
    "wide_across": {"across_heads": True, "x": (3, 40, 34), "r": 20},
    "wide_layer": {"norm": "layer", "parameters": ("weight", "bias"), "x": (3, 2, 514)},
    "large": {"scale": 100.0, "norm": "layer", "parameters": ("weight", "bias")},
}


def check_norm(target: Target, wide: tuple[str, ...] = (), **options) -> None:
    shape, scale = options.pop("x", (7, 3, 64)), options.pop("scale", 1.0)
    names, interleaved = options.pop("parameters", ("weight",)), options.pop("interleaved", True)
    norm, across, eps = options.pop("norm", "rms"), options.pop("across_heads", False), options.pop("eps", 1e-6)
    cos, sin = make_tables(target, *table_shape(shape, **options)) if options.pop("tables", True) else (None, None)
    inputs = {"x": target.randn(*shape, scale=scale)}
    width = shape[-2] * shape[-1] if across else shape[-1]
    inputs |= {name: (1 if name == "weight" else 0) + target.randn(width, scale=0.3) for name in names}
    inputs |= {name: inputs[name].float() for name in wide}

    def by_name(function: Callable) -> Callable:
        return lambda x, *rest: function(x, **dict(zip(names, rest, strict=True)))

    def plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        normed = plain_norm(widened(x) if wide else x, norm, weight, bias, across, eps).to(x.dtype)
        return plain_rope(with_rows(widened(normed), cos), cos, sin, interleaved).view(x.shape).to(x.dtype)

    def exact(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        heads = x.flatten(0, -3)
        return reference.norm_rope(heads, weight, bias, cos, sin, norm == "layer", across, interleaved, eps)[0].view(x.shape)

    op = partial(norm_rope, cos=cos, sin=sin, norm=norm, across_heads=across, eps=eps, interleaved=interleaved)
    check_accuracy(by_name(op), by_name(plain), by_name(exact), inputs)


@pytest.mark.parametrize("case", NORM)
def test_norm_rope(target: Target, case: str) -> None:
    check_norm(target, **NORM[case])


@pytest.mark.parametrize("case", ["rms_across", "layer", "d10_layer"])
def test_float32_parameters(target16: Target, case: str) -> None:
    check_norm(target16, wide=NORM[case].get("parameters", ("weight",)), **NORM[case])


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"rows": 5}, {"rows": 5, "per_head": True}], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_gradients_of_tables(target: Target, options: dict, interleaved: bool) -> None:
    """Learned angles get theirs, next to those of x and the parameters, behind each norm and without one."""
    shape = (3, 5, 2, 24)
    cos, sin = (t.to(target.dtype) for t in make_tables(target, *table_shape(shape, r=20, **options)))
    x, weight, bias = target.randn(*shape), 1 + target.randn(24, scale=0.3), target.randn(24, scale=0.3)

    def plain(x: Tensor, cos: Tensor, sin: Tensor, *parameters: Tensor, norm: str | None = None) -> Tensor:
        wide = widened(x)
        if norm is not None:
            parameters = tuple(p.to(wide.dtype) for p in parameters)
            wide = plain_norm(wide, norm, *parameters, *(None,) * (2 - len(parameters)), False, 1e-6)
        cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
        return plain_rope(with_rows(wide, cos), cos, sin, interleaved).view(x.shape).to(x.dtype)

    inputs = {"x": x, "cos": cos, "sin": sin}
    check_accuracy(partial(apply_rope, interleaved=interleaved), plain, plain, inputs)
    if target.dtype == torch.float64 or target.backend == "cpu":
        rms, layer = partial(plain, norm="rms"), partial(plain, norm="layer")
        op = partial(norm_rope, interleaved=interleaved)
        check_accuracy(lambda x, c, s, w: op(x, c, s, weight=w), rms, rms, {**inputs, "weight": weight})
        both = {**inputs, "weight": weight, "bias": bias}
        check_accuracy(lambda x, c, s, w, b: op(x, c, s, norm="layer", weight=w, bias=b), layer, layer, both)


def test_gradient_of_one_table(target32: Target) -> None:
    """cos alone may be learned; a table that wants no gradient costs no sum."""
    x, (cos, sin) = target32.randn(5, 2, 8).requires_grad_(), make_tables(target32, 5, 4)
    apply_rope(x, cos.requires_grad_(), sin).sum().backward()
    assert cos.grad is not None
    assert sin.grad is None
    torch.testing.assert_close(cos.grad, x.detach().unflatten(-1, (4, 2)).sum((1, 3)))


def test_gradients_of_tables_compiled(target32: Target) -> None:
    """Compiled functions and torch.func's transforms do not lose them."""
    x, angles, weight = target32.randn(2, 5, 3, 16), target32.randn(5, 3, 8), target32.randn(16)

    def both(x: Tensor, angles: Tensor, weight: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        return norm_rope(x, cos, sin, weight=weight) + apply_rope(x, cos, sin, interleaved=False)

    expected = run(both, [x, angles, weight], torch.ones_like)
    torch.compiler.reset()
    actual = run(torch.compile(both, fullgraph=True, backend="aot_eager"), [x, angles, weight], torch.ones_like)
    assert_bit_equal(actual[0] + actual[1], expected[0] + expected[1])
    assert_bit_equal([torch.func.grad(lambda angles: both(x, angles, weight).sum())(angles)], [expected[1][1]])


def test_tables_of_a_layout(target32: Target) -> None:
    """Its angles as tables give what `rope_3d` and `qk_norm_rope_3d` give: cosines may differ in their last place."""
    layout = PackedLayout.from_spans([[Span((2, 3, 4), origin=(1, 0, 2)), Span.text(3)]], target32.device)
    angles = rotary_angles(layout.cu_spans, layout.grid, layout.origin, layout.step, (1e4,) * 3, default_axes_dim(64))
    cos, sin = angles.cos().float(), angles.sin().float()
    q, k, weight = target32.randn(27, 3, 64), target32.randn(27, 2, 64), 1 + target32.randn(64, scale=0.3)
    for interleaved in (True, False):
        expected = (
            rope_3d(q, layout, interleaved=interleaved),
            *qk_norm_rope_3d(q, k, weight, None, layout, interleaved=interleaved),
        )
        actual = (
            apply_rope(q, cos, sin, interleaved=interleaved),
            norm_rope(q, cos, sin, weight=weight, interleaved=interleaved),
            norm_rope(k, cos, sin, interleaved=interleaved),
        )
        if target32.backend == "cpu":
            assert_bit_equal(actual, expected)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_fused_projection(target: Target) -> None:
    """Chunks of it are read where they are, in dense and packed form, and get the bits of copies."""
    q, k, _ = target.randn(2, 5, 3 * 2 * 16).chunk(3, dim=-1)
    cos, sin = make_tables(target, 5, 8)
    for x in (q.unflatten(-1, (2, 16)), k.unflatten(-1, (2, 16))):
        assert_bit_equal([norm_rope(x, cos, sin)], [norm_rope(x.contiguous(), cos, sin)])
        assert_bit_equal([apply_rope(x[0], cos, sin)], [apply_rope(x.contiguous(), cos, sin)[0]])
    transposed = target.randn(2, 2, 5, 16).transpose(1, 2)
    assert_bit_equal([norm_rope(transposed, cos, sin)], [norm_rope(transposed.contiguous(), cos, sin)])


def test_tables_of_any_strides(target: Target) -> None:
    x, (cos, sin) = target.randn(5, 3, 16), make_tables(target, 5, 8)
    expected = norm_rope(x, cos, sin)
    columns = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (cos, sin)]
    wide = [torch.cat([t, t + 1], dim=-1)[:, :8] for t in (cos, sin)]
    heads = [t[:, None].expand(5, 3, 8) for t in (cos, sin)]
    for tables in (columns, wide, heads):
        assert_bit_equal([norm_rope(x, *tables)], [expected])


@pytest.mark.parametrize("d", [24, 64])
def test_equal_channels(target: Target, d: int) -> None:
    """A LayerNorm of a head whose channels are all one large number gives the bias."""
    value = 12345.678 if target.dtype == torch.float16 else 1.2345678e10
    x, bias = torch.full((2, 3, d), value).to(target.device, target.dtype), target.randn(d)
    (y,), (dx, _) = run(lambda x, bias: norm_rope(x, norm="layer", bias=bias), [x, bias])
    assert_bit_equal([y], [bias.expand(x.shape).contiguous()])
    cotangent = random_like(y)
    exact = 1e3 * (cotangent.double() - cotangent.double().mean(-1, keepdim=True))  # 1 / sqrt(eps)
    torch.testing.assert_close(dx.double(), exact, rtol=0.01, atol=8 if target.dtype.itemsize == 2 else 0.01)


@pytest.mark.parametrize("shape", [(0, 3, 8), (0, 5, 3, 8), (2, 0, 3, 8), (4, 0, 8)], ids=str)
def test_nothing(target: Target, shape: tuple[int, ...]) -> None:
    """No tokens or no heads."""
    x = target.randn(*shape).requires_grad_()
    cos, sin = make_tables(target, torch.Size(shape[:-2]).numel(), 4)
    weight = target.randn(8).requires_grad_()
    (apply_rope(x, cos, sin).sum() + norm_rope(x, cos, sin, weight=weight).sum()).backward()
    assert x.grad.shape == shape
    assert not weight.grad.any()


@pytest.mark.parametrize(("batch", "pairs"), [(0, 4), (2, 0)])
def test_tables_of_nothing(target: Target, batch: int, pairs: int) -> None:
    """Without samples or without pairs, they have gradients of 0."""
    x, weight = target.randn(batch, 5, 3, 8).requires_grad_(), target.randn(8)
    cos, sin = (t.detach().requires_grad_() for t in make_tables(target, 5, pairs))
    (apply_rope(x, cos, sin).sum() + norm_rope(x, cos, sin, weight=weight).sum()).backward()
    for table in (cos, sin):
        assert table.grad.shape == (5, pairs)
        assert not table.grad.any()


class Tables:
    """A batch's rows of cos and sin, as a Case wants a layout."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin


def turn(tables: Tables, x: Tensor) -> Tensor:
    return apply_rope(x, tables.cos, tables.sin)


def normalise(tables: Tables, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    return norm_rope(x, tables.cos, tables.sin, weight=weight, bias=bias, **options)


def make_case(
    op: Callable, parameters: tuple[int, ...], operators: set[str], target: Target, *, per_head: bool = False,
    lengths: tuple[int, ...] = (60, 0, 43), heads: int = 3, d: int = 24,
) -> Case:  # fmt: skip
    cos, sin = make_tables(target, *table_shape((sum(lengths), heads, d), per_head=per_head))
    samples = zip(cos.split(lengths), sin.split(lengths), lengths, strict=True)
    parts = [(Tables(c, s), [target.randn(n, heads, d)]) for c, s, n in samples]
    return Case.of_samples(op, Tables(cos, sin), parts, operators, *(1 + target.randn(n, scale=0.3) for n in parameters))


BOTH = {"norm_rope_forward", "norm_rope_backward"}
LAYER = partial(normalise, norm="layer", interleaved=False)
OPS = {
    "rope": partial(make_case, turn, (), {"apply_rope"}),
    "rms": partial(make_case, normalise, (24,), BOTH),
    "across_heads": partial(make_case, partial(normalise, across_heads=True), (72,), BOTH, per_head=True),
    "layer": partial(make_case, LAYER, (24, 24), BOTH),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("name", ["rope", "rms", "layer"])
def test_large(name: str, d: int, dtype: torch.dtype) -> None:
    function, count, operators = {"rope": (turn, 0, {"apply_rope"}), "rms": (normalise, 1, BOTH), "layer": (LAYER, 2, BOTH)}[name]
    lengths = large_lengths(4 * d, dtype)
    check_large(make_case(function, (d,) * count, operators, Target("cpu", "cpu", dtype), lengths=lengths, heads=4, d=d))


X, X4D, COS = torch.zeros(6, 2, 8), torch.zeros(2, 3, 2, 8), torch.zeros(6, 4)
GOOD = {
    "apply_rope": {"x": X, "cos": COS, "sin": COS},
    "norm_rope": {"x": X, "cos": COS, "sin": COS},
}
SHAPE = "shape [6, r/2] or [6, 2, r/2] with r <= 8"
BAD = [
    ("apply_rope", {"x": [1]}, "x: expected a torch.Tensor, got list"),
    ("apply_rope", {"x": X.long()}, "x: expected dtype float32 or ~, got int64"),
    ("apply_rope", {"x": X[0]}, "x: expected shape [N, H, d] or [B, S, H, d], got [2, 8]"),
    ("apply_rope", {"x": X[None, None]}, "x: expected shape [N, H, d] or [B, S, H, d], got [1, 1, 6, 2, 8]"),
    ("apply_rope", {"x": X[..., :0]}, "x: expected a head dim of at least 1, got 0"),
    ("apply_rope", {"cos": COS[0]}, f"cos: expected {SHAPE}, got [4]"),
    ("apply_rope", {"cos": COS[:5]}, f"cos: expected {SHAPE}, got [5, 4]"),
    ("apply_rope", {"cos": COS[:3]}, f"cos: expected {SHAPE}, got [3, 4]"),
    ("apply_rope", {"cos": torch.zeros(6, 5)}, f"cos: expected {SHAPE}, got [6, 5]"),
    ("apply_rope", {"x": X[..., :7]}, "cos: expected ~r <= 7, got [6, 4]"),
    ("apply_rope", {"cos": torch.zeros(6, 3, 4)}, f"cos: expected {SHAPE}, got [6, 3, 4]"),
    ("apply_rope", {"cos": COS.half()}, "cos: expected dtype float32, got float16"),
    ("apply_rope", {"x": X.half(), "cos": COS.bfloat16()}, "cos: expected dtype float16 or float32, got bfloat16"),
    ("apply_rope", {"cos": COS.to("meta")}, "cos: expected a tensor on cpu, got one on meta"),
    ("apply_rope", {"sin": COS[:, :3]}, "sin: expected shape [6, 4], got [6, 3]"),
    ("apply_rope", {"sin": None}, "sin: expected a tensor, as there is cos, got None"),
    ("apply_rope", {"cos": None}, "cos: expected a torch.Tensor, got NoneType"),
    ("apply_rope", {"x": X4D, "cos": COS[:2]}, "cos: expected shape [6 or 3, r/2] or [6 or 3, 2, r/2] with r <= 8, got [2, 4]"),
    ("apply_rope", {"interleaved": "no"}, "interleaved: expected a bool, got 'no'"),
    ("norm_rope", {"x": X[0]}, "x: expected shape [N, H, d] or [B, S, H, d], got [2, 8]"),
    ("norm_rope", {"sin": None}, "sin: expected a tensor, as there is cos, got None"),
    ("norm_rope", {"cos": None}, "sin: expected None, as there is no cos, got a tensor"),
    ("norm_rope", {"cos": COS[:5]}, f"cos: expected {SHAPE}, got [5, 4]"),
    ("norm_rope", {"norm": "group"}, "norm: expected one of 'rms', 'layer', got 'group'"),
    ("norm_rope", {"weight": torch.ones(16)}, "weight: expected shape [8], got [16]"),
    ("norm_rope", {"weight": torch.ones(8), "across_heads": True}, "weight: expected shape [16], got [8]"),
    ("norm_rope", {"weight": torch.ones(8).half()}, "weight: expected dtype float32, got float16"),
    ("norm_rope", {"weight": torch.ones(8, device="meta")}, "weight: expected a tensor on cpu, got one on meta"),
    ("norm_rope", {"bias": torch.ones(8)}, "bias: expected None with norm 'rms', got a tensor"),
    ("norm_rope", {"bias": torch.ones(7), "norm": "layer"}, "bias: expected shape [8], got [7]"),
    ("norm_rope", {"norm": "layer", "across_heads": True}, "across_heads: expected False with norm 'layer', got True"),
    ("norm_rope", {"eps": -1.0}, "eps: expected a number >= 0, got -1.0"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), BAD)
def test_bad_input(name: str, wrong: dict, message: str) -> None:
    check_rejected({"apply_rope": apply_rope, "norm_rope": norm_rope}[name], {**GOOD[name], **wrong}, f"{name}: {message}")


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("op", [apply_rope, norm_rope])
def test_gradients_of_tables_in_batches(op: Callable, interleaved: bool) -> None:
    """A Jacobian in one pass is that of many."""
    x, (cos, sin) = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 4)

    def rotated(cos: Tensor) -> Tensor:
        return op(x, cos, sin, interleaved=interleaved)

    one_by_one, together = (torch.autograd.functional.jacobian(rotated, cos, vectorize=batched) for batched in (False, True))
    torch.testing.assert_close(together, one_by_one)
