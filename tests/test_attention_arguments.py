"""What flash_attn and torch take as arguments of attention, beyond tensors of one shape: right values, and errors by name."""

from functools import partial

import numpy as np
import pytest
import torch
from test_attention import packed_case
from tolerance import AGREE_PACKED, Target, assert_bit_equal, assert_zero, check_accuracy, check_rejected, largest, run
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from sora_kernels.attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
    spatiotemporal_attention,
    varlen_attn,
)
from sora_kernels.layout import PackedLayout
from sora_kernels.used_keys import used_keys

FUNCTION = "attention_forward"


def formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + added) v over [..., S, d], whose leading dimensions broadcast; zeros where nothing is visible."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if added is not None:
        scores = scores + added
    if visible is None:
        return scores.softmax(-1) @ v
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0) @ v


SHAPES = {
    "batch": ((2, 3, 9, 16), (1, 3, 11, 16), (1, 3, 11, 16)),
    "heads": ((2, 3, 9, 16), (2, 1, 11, 16), (2, 1, 11, 16)),
    "heads of k": ((2, 3, 9, 16), (2, 1, 11, 16), (2, 3, 11, 16)),
    "batch and heads": ((2, 3, 9, 16), (1, 1, 11, 16), (2, 1, 11, 16)),
    "queries": ((1, 1, 9, 16), (2, 3, 11, 16), (2, 1, 11, 16)),
    "ranks": ((2, 3, 9, 16), (3, 11, 16), (11, 16)),
    "many": ((2, 1, 3, 9, 16), (1, 2, 3, 11, 16), (1, 1, 1, 11, 16)),
    "2-D": ((9, 16), (11, 16), (11, 16)),
    "narrow values": ((2, 3, 9, 24), (2, 3, 11, 24), (2, 3, 11, 8)),
    "wide values": ((2, 3, 29, 24), (2, 3, 37, 24), (2, 3, 37, 40)),
    "2-D, wide values": ((29, 16), (37, 16), (37, 24)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(target: Target, name: str) -> None:
    """What broadcasts in torch's attention does so here; values may be narrower or wider than keys."""
    inputs = dict(zip("qkv", (target.randn(*shape) for shape in SHAPES[name]), strict=True))
    check_accuracy(scaled_dot_product_attention, formula, formula, inputs)


@pytest.mark.parametrize("width", [8, 40])
def test_head_dim_of_values(target: Target, width: int) -> None:
    """The other functions: the first channels of what values with zeros behind them give, and the same lse."""
    inputs, (cu_q, cu_k), _ = packed_case(target, queries=(5, 0, 9), keys=(3, 4, 7), heads=(4, 2), d=24)
    q, k, v = inputs["q"], inputs["k"], target.randn(14, 2, width)
    zeros = [torch.nn.functional.pad(x, (0, 40 - x.shape[-1])) for x in (q, k, v)]
    options = {"causal": True, "softcap": 3.0, "softmax_scale": 0.2, "return_attn_probs": True}
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, **options)
    wide, right, _ = flash_attn_varlen_func(*zeros, cu_q, cu_k, **options)
    assert out.is_contiguous()
    tolerance = 1e-5 if target.dtype.itemsize >= 4 else 2e-2
    torch.testing.assert_close(out, wide[..., :width], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, right, rtol=1e-5, atol=1e-5)
    dense = flash_attn_func(q[None, :5], k[None, :3], v[None, :3], causal=True, softcap=3.0, softmax_scale=0.2)
    assert_bit_equal([dense[0]], [out[:5]])
    by_torchs_name = varlen_attn(q, k, v, cu_q, cu_k, window_size=(-1, 0), enable_gqa=True)
    assert_bit_equal([by_torchs_name], [flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True)])


@pytest.mark.parametrize("window", [None, (1, 1, 2)])
def test_head_dim_of_values_in_windows(window: tuple[int, int, int] | None) -> None:
    layout = PackedLayout.from_grids([(2, 2, 3)])
    q, k, v = torch.randn(12, 2, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 8)
    attention = partial(spatiotemporal_attention, layout=layout, window=window)
    (out,), grads = run(attention, [q, k, v])
    (wide,), padded = run(lambda *x: attention(*x)[..., :8], [q, k, torch.nn.functional.pad(v, (0, 8))])
    torch.testing.assert_close(out, wide)
    torch.testing.assert_close(grads, [*padded[:2], padded[2][..., :8]])


WINDOWS = {
    "list": [7, 3],
    "tensor": torch.tensor([7, 3]),
    "int32": torch.tensor([7, 3], dtype=torch.int32),
    "array": np.array([7, 3]),
    "NumPy's": (np.int64(7), np.int32(3)),
    "0-d tensors": (torch.tensor(7), torch.tensor(3)),
    "0-d arrays": [np.array(7), np.array(3)],
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_of_any_integers(kind: str) -> None:
    q, k, v = (torch.randn(1, n, 2, 16) for n in (20, 30, 30))
    assert torch.equal(flash_attn_func(q, k, v, window_size=WINDOWS[kind]), flash_attn_func(q, k, v, window_size=(7, 3)))
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (20, 30))
    packed = varlen_attn(q[0], k[0], v[0], cu_q, cu_k, window_size=WINDOWS[kind])
    assert torch.equal(packed, varlen_attn(q[0], k[0], v[0], cu_q, cu_k, window_size=(7, 3)))


def test_windows_in_space_of_numpy() -> None:
    layout = PackedLayout.from_grids([(2, 3, 4)])
    q = torch.randn(24, 1, 8)
    numpys = spatiotemporal_attention(q, q, q, layout, window=(np.int64(1), None, np.int32(3)))
    assert torch.equal(numpys, spatiotemporal_attention(q, q, q, layout, window=(1, None, 3)))


def test_numbers_of_numpy() -> None:
    q = torch.randn(1, 9, 2, 16)
    actual = flash_attn_func(q, q, q, softcap=np.float32(5), softmax_scale=np.float32(0.25), causal=np.bool_(True))
    assert torch.equal(actual, flash_attn_func(q, q, q, softcap=5.0, softmax_scale=0.25, causal=True))


CAUSAL = {"lower": (causal_lower_right, True), "upper": (causal_upper_left, False)}


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
@pytest.mark.parametrize("sizes", [(9, 9), (5, 12), (12, 5)])
@pytest.mark.parametrize("corner", CAUSAL)
def test_causal_masks_of_torch(target: Target, corner: str, sizes: tuple[int, int]) -> None:
    """No mask is built; queries without keys, for which torch gives NaN, get zeros."""
    make, from_the_end = CAUSAL[corner]
    visible = torch.ones(sizes, dtype=torch.bool).tril(sizes[1] - sizes[0] if from_the_end else 0)
    inputs = {name: target.randn(2, 3, n, 16) for name, n in (("q", sizes[0]), ("k", sizes[1]), ("v", sizes[1]))}
    plain = partial(formula, visible=visible.to(target.device))
    check_accuracy(partial(scaled_dot_product_attention, attn_mask=make(*sizes)), plain, plain, inputs)


MASKS = {
    "all": (2, 4, 29, 37),
    "position bias": (1, 4, 29, 37),
    "shared": (29, 37),
    "per sample": (2, 1, 1, 37),
    "per query": (29, 1),
    "one": (),
}


@pytest.mark.parametrize("name", MASKS)
def test_gradient_of_a_mask(target: Target, name: str) -> None:
    """Summed over all that the mask is shared by, beside the kernels' gradients of q, k and v."""
    inputs = {key: target.randn(2, h, n, 24) for key, h, n in (("q", 4, 29), ("k", 2, 37), ("v", 2, 37))}
    inputs["mask"] = target.randn(*MASKS[name])

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return formula(q, *(x.repeat_interleave(2, dim=1) for x in (k, v)), added=mask)

    check_accuracy(partial(scaled_dot_product_attention, enable_gqa=True), plain, plain, inputs)


def test_gradient_of_a_mask_of_many_dimensions(target32: Target) -> None:
    inputs = {name: target32.randn(2, 3, 2, n, 8) for name, n in (("q", 9), ("k", 11), ("v", 11))}
    inputs["mask"] = target32.randn(3, 1, 9, 11)
    plain = lambda q, k, v, mask: formula(q, k, v, added=mask)  # noqa: E731
    check_accuracy(scaled_dot_product_attention, plain, plain, inputs)


def test_gradient_of_what_a_mask_hides(target32: Target) -> None:
    """Zero, of queries without keys, too, and without the gradients of q, k and v."""
    q, k, v = (target32.randn(2, 2, n, 8) for n in (5, 7, 7))
    mask = target32.randn(5, 7)
    mask[2] = mask[:, 3] = -torch.inf
    (out,), (dmask,) = run(lambda mask: scaled_dot_product_attention(q, k, v, mask), [mask])
    assert_zero(out[:, :, 2], dmask[2], dmask[:, 3])
    assert (dmask[0] != 0).sum() == 6


def test_gradient_of_a_mask_compiled(target32: Target) -> None:
    inputs = [target32.randn(2, 2, n, 8) for n in (5, 7, 7)] + [target32.randn(2, 5, 7)]
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    actual, expected = run(compiled, inputs), run(scaled_dot_product_attention, inputs)
    assert_bit_equal(actual[0] + actual[1], expected[0] + expected[1])


USED = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (6, 2)},
    "alibi": {"alibi_slopes": torch.tensor([[0.5, 0.1, 0.0, 1.0], [1.0, 0.2, 0.3, 0.4], [0.1] * 4, [0.7] * 4])},
    "softcap": {"softcap": 1.5, "causal": True},
}


@pytest.mark.parametrize("name", USED)
def test_used_keys(target: Target, name: str) -> None:
    """The bits of samples that have no other keys, forward and backward; the others' gradients are zero, NaNs among them."""
    options = {key: x.to(target.device) if isinstance(x, Tensor) else x for key, x in USED[name].items()}
    lengths, used = (21, 4, 30, 3), (13, 0, 30, 1)
    inputs, (cu_q, cu_k), _ = packed_case(target, queries=(9, 3, 17, 0), keys=lengths, heads=(4, 2), slack=2)
    seqused_k = torch.tensor(used, dtype=torch.int32, device=target.device)
    kept = torch.cat([torch.arange(n) < m for n, m in zip(lengths, used, strict=True)] + [torch.zeros(2) > 0]).to(target.device)
    q, k, v = inputs.values()
    k[~kept] = v[~kept] = torch.nan
    options["return_attn_probs"] = True
    (out, lse), (dq, dk, dv) = run(
        lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_q, cu_k, seqused_k=seqused_k, **options)[:2], [q, k, v]
    )
    short = target.boundaries(*used)
    right, grads = run(lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_q, short, **options)[:2], [q, k[kept], v[kept]])
    assert_bit_equal([out, lse], right)
    for actual, expected in zip((dq, dk[kept], dv[kept]), grads, strict=True):
        assert largest(actual.double() - expected.double()) <= AGREE_PACKED * max(1, largest(expected))
    assert_zero(dk[~kept], dv[~kept])


def test_used_keys_by_torchs_name(target: Target) -> None:
    inputs, (cu_q, cu_k), _ = packed_case(target, queries=(5, 6), keys=(9, 8))
    seqused_k = torch.tensor([4, 8], dtype=torch.int32, device=target.device)
    actual = varlen_attn(
        *inputs.values(), cu_q, cu_k, 6, 9, window_size=(-1, 0), seqused_k=seqused_k, block_table=None, num_splits=1
    )
    assert_bit_equal([actual], [flash_attn_varlen_func(*inputs.values(), cu_q, cu_k, causal=True, seqused_k=seqused_k)])


def test_used_keys_compiled(target32: Target) -> None:
    """One graph, whose numbers of used keys may change."""
    inputs, (cu_q, cu_k), _ = packed_case(target32, queries=(5, 6), keys=(9, 8))

    def function(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True, seqused_k=used)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for used in ([4, 8], [0, 3]):
        seqused_k = torch.tensor(used, dtype=torch.int32, device=target32.device)
        assert_bit_equal([compiled(*inputs.values(), seqused_k)], [function(*inputs.values(), seqused_k)])


class Elsewhere(Tensor):
    """A tensor whose values the host must not read."""

    is_cpu = False

    def tolist(self) -> list:
        raise AssertionError("read on the host")

    item = numpy = tolist


def test_used_keys_are_clamped_where_they_cannot_be_read() -> None:
    cu_q, cu_k, used = (
        torch.tensor(x, dtype=torch.int32).as_subclass(Elsewhere) for x in ([0, 2, 4, 6], [0, 5, 9, 9], [-3, 2**31 - 1, 1])
    )
    keys = used_keys("op", "used", cu_q, cu_k, used, (6, 9))[1]
    assert torch.equal(keys.as_subclass(Tensor), torch.tensor([0, 0, 5, 9, 9, 9, 9], dtype=torch.int32))
    torch.library.opcheck(
        torch.ops.sora_kernels.used_keys.default, (cu_q.as_subclass(Tensor),) * 2 + (torch.ones(3).int(), 6, 9, 0, "f", "a")
    )


X, P, CU = torch.zeros(2, 6, 4, 8), torch.zeros(12, 4, 8), torch.tensor([0, 6, 12], dtype=torch.int32)
DENSE, TORCHS = {"q": X, "k": X, "v": X}, {"query": X, "key": X, "value": X}
PACKED = {"q": P, "k": P, "v": P, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
VARLEN = {"query": P, "key": P, "value": P, "cu_seq_q": CU, "cu_seq_k": CU}
BAD = [
    (flash_attn_func, DENSE, {"window_size": torch.zeros(2)}, "window_size: expected two sizes~, got tensor(~"),
    (flash_attn_func, DENSE, {"window_size": torch.ones(3, dtype=torch.int32)}, "window_size: expected two sizes~, got tensor(~"),
    (flash_attn_func, DENSE, {"window_size": torch.tensor([True, False])}, "window_size: expected two sizes~, got tensor(~"),
    (flash_attn_func, DENSE, {"window_size": torch.ones(2, device="meta")}, "window_size: expected ~ on the host, got ~ on meta"),
    (flash_attn_func, DENSE, {"window_size": (torch.ones((), device="meta").int(), 0)}, "window_size: expected two~, got ~"),
    (flash_attn_func, DENSE, {"window_size": (np.float32(3), 0)}, "window_size: expected two sizes~, got ~"),
    (flash_attn_func, DENSE, {"window_size": (np.int64(-2), 0)}, "window_size: expected two sizes~, got ~"),
    (flash_attn_func, DENSE, {"window_size": (np.bool_(True), 0)}, "window_size: expected two sizes~, got ~"),
    (scaled_dot_product_attention, TORCHS, {"value": X[:, :5]}, "value: expected 6 heads~, got 5"),
    (scaled_dot_product_attention, TORCHS, {"key": X[..., :7]}, "key: expected a head dim of 8, got 7"),
    (scaled_dot_product_attention, TORCHS, {"value": X[..., :3, :]}, "value: expected 4 keys, got 3"),
    (scaled_dot_product_attention, TORCHS, {"value": X[0, 0, 0]}, "value: expected shape [..., H, S, d] or [S, d], got [8]"),
    (scaled_dot_product_attention, TORCHS, {"key": torch.zeros(3, 6, 4, 8)}, "key: expected leading dimensions that~, got [3]"),
    (scaled_dot_product_attention, TORCHS, {"value": X[:, :2], "enable_gqa": True}, "value: expected 6 heads, ~, got 2"),
    (
        scaled_dot_product_attention,
        TORCHS,
        {"attn_mask": causal_lower_right(4, 5)},
        "attn_mask: expected a causal mask of 4 queries and 4 keys, got 4 and 5",
    ),
    (
        scaled_dot_product_attention,
        TORCHS,
        {"attn_mask": causal_upper_left(4, 4), "is_causal": True},
        "attn_mask: expected None with is_causal=True, got a mask",
    ),
    (flash_attn_varlen_func, PACKED, {"seqused_k": CU}, "seqused_k: expected shape [2], got [3]"),
    (flash_attn_varlen_func, PACKED, {"seqused_k": CU[:2].long()}, "seqused_k: expected dtype int32, got int64"),
    (flash_attn_varlen_func, PACKED, {"seqused_k": CU[:2] - 1}, "seqused_k: expected 0 to 6 keys in sample 0, got -1"),
    (flash_attn_varlen_func, PACKED, {"seqused_k": CU[:2] + 1}, "seqused_k: expected 0 to 6 keys in sample 1, got 7"),
    (varlen_attn, VARLEN, {"seqused_k": [3, 3]}, "seqused_k: expected a torch.Tensor, got list"),
    (varlen_attn, VARLEN, {"block_table": CU}, "block_table: expected None (no paged cache), got Tensor"),
    (varlen_attn, VARLEN, {"num_splits": -1}, "num_splits: expected an int >= 0, got -1"),
    (varlen_attn, VARLEN, {"num_splits": "1"}, "num_splits: expected an int, got '1'"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "good", "wrong", "message"), BAD)
def test_bad_input(function, good: dict, wrong: dict, message: str) -> None:
    check_rejected(function, {**good, **wrong}, f"{function.__name__}: {message}")


def test_bad_boundaries_beside_used_keys() -> None:
    """Are named themselves."""
    wrong = {**PACKED, "cu_seqlens_k": CU[[0, 2, 1]], "seqused_k": CU[:2]}
    check_rejected(flash_attn_varlen_func, wrong, "flash_attn_varlen_func: cu_seqlens_k: expected entries that never fall, got ~")
