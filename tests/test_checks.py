"""Numbers and tensors as arguments: what is taken for one, and the complaint that names the op and the argument."""

import math

import numpy as np
import pytest
import torch

from sora_kernels.adaln import gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.checks import check_bool, check_float32, check_int, check_number, check_tables, triple
from sora_kernels.layout import PackedLayout
from sora_kernels.norm_rope import norm_rope
from sora_kernels.patch_embed import patch_embed_3d, patchify_3d, unpatchify_3d
from sora_kernels.rope import qk_norm_rope_3d, rope_3d

LAYOUT = PackedLayout.from_grids([(1, 2, 2)])


@pytest.mark.parametrize("value", [3, np.int32(3), torch.tensor(3)], ids=str)
def test_ints_of_every_kind(value):
    assert type(check_int("op", "x", value)) is int
    assert check_int("op", "x", value) == 3


@pytest.mark.parametrize("value", [True, 3.0, "3", None, torch.tensor(3.0), torch.tensor([3, 3])], ids=repr)
def test_what_is_no_int(value):
    with pytest.raises(TypeError, match=r"^op: x: expected an int, got "):
        check_int("op", "x", value)


def test_range_of_ints():
    for value in (-1, 5):
        with pytest.raises(ValueError, match=f"^op: x: expected an int [<>]= [04], got {value}$"):
            check_int("op", "x", value, 0, 4)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2)], ids=repr)
def test_numbers_of_every_kind(value):
    assert type(check_number("op", "x", value)) is float
    assert check_number("op", "x", value) == 2


@pytest.mark.parametrize("value", [True, "2", None, 1j, torch.tensor(2.0), [2.0]], ids=repr)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"^op: x: expected a number, got "):
        check_number("op", "x", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400], ids=lambda x: str(x)[:5])
def test_numbers_are_finite(value):
    with pytest.raises(ValueError, match=r"^op: x: expected a finite number, got "):
        check_number("op", "x", value)


@pytest.mark.parametrize("value", [3.5e38, -1e300, 1e-46, -1e-300])
def test_numbers_that_float32_lacks(value):
    """A kernel would take infinity or 0 for them, in silence."""
    with pytest.raises(ValueError, match=r"^op: x: expected a number that float32 has, got "):
        check_float32("op", "x", value, torch.ones(1))
    assert check_float32("op", "x", value, torch.ones(1).double()) == value  # the reference's, which computes in float64


def test_eps_is_one_of_them():
    x, cos = torch.ones(4, 1, 8), torch.ones(4, 4)
    for op in (
        lambda eps: layer_norm_modulate(x[:, 0], eps=eps),
        lambda eps: norm_gate_residual(x[:, 0], x[:, 0], eps=eps),
        lambda eps: norm_rope(x, cos, cos, eps=eps),
        lambda eps: qk_norm_rope_3d(x, x, None, None, LAYOUT, eps=eps),
    ):
        for eps in (1e300, 1e-300):
            with pytest.raises(ValueError, match=r": eps: expected a number that float32 has, got 1e[+-]300$"):
                op(eps)


@pytest.mark.parametrize("value", [0, -0.0, 3.4e38, -1e-40, 2.0**-149])
def test_numbers_that_float32_has(value):
    assert check_float32("op", "x", value, torch.ones(1)) == value


def test_bools():
    for value in (np.bool_(True), 1):
        assert check_bool("op", "x", value) is True
    for value in ("no", 2, 1.0, None):
        with pytest.raises(TypeError, match=r"^op: x: expected a bool, got "):
            check_bool("op", "x", value)


def test_triples():
    assert triple("op", "x", np.array([1, 2, 3]), int) == [1, 2, 3]
    assert triple("op", "x", (1, np.float32(0.5), 2.0), float) == [1.0, 0.5, 2.0]
    assert triple("op", "x", (1, 0, False), bool) == [True, False, False]
    for value, kind in (
        ("123", int),
        ((1.9, 2, 2), int),
        ((True, 2, 2), int),
        ((1, math.nan, 1), float),
        ((1, 2, 0), bool),
        (1, int),
    ):
        with pytest.raises(ValueError, match=rf"^op: x: expected three {kind.__name__}s \(T, H, W\), got "):
            triple("op", "x", value, kind)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid": torch.zeros(1, 3, device="meta")}, "layout.grid: expected dtype int32, got float32"),
        ({"step": torch.zeros(2, 3, device="meta")}, r"layout's origin or step: expected shape \[1, 3\], got \[2, 3\]"),
        ({"step": torch.zeros(1, 6, device="meta")[:, ::2]}, "layout's origin or step: expected a contiguous tensor"),
        ({"step": torch.zeros(1, 3)}, "layout's origin or step: expected a tensor on meta, got one on cpu"),
    ],
)
def test_tables_that_a_caller_replaced(wrong, message):
    """As on a GPU, whose kernels cannot check them."""
    layout = LAYOUT.to("meta")
    tables = {name: getattr(layout, name) for name in ("cu_spans", "grid", "origin", "step")}
    check_tables("op", layout.grid, *tables.values())
    with pytest.raises((TypeError, ValueError), match=f"^op: {message}"):
        check_tables("op", layout.grid, *{**tables, **wrong}.values())


X, ROW, CU = torch.zeros(4, 8), torch.zeros(1, 8), LAYOUT.cu_seqlens
Q = torch.zeros(4, 1, 8)
VIDEO = torch.zeros(1, 2, 2, 2)
EPS = {
    "layer_norm_modulate": lambda eps: layer_norm_modulate(X, ROW, ROW, CU, eps=eps),
    "gate_residual_layer_norm_modulate": lambda eps: gate_residual_layer_norm_modulate(X, X, ROW, ROW, ROW, CU, eps=eps),
    "norm_gate_residual": lambda eps: norm_gate_residual(X, X, ROW, CU, eps=eps),
    "qk_norm_rope_3d": lambda eps: qk_norm_rope_3d(Q, Q, None, None, LAYOUT, eps=eps),
}


@pytest.mark.parametrize("op", EPS)
@pytest.mark.parametrize("eps", [-1, math.nan, math.inf, True, "1e-6", torch.tensor(1e-6), None], ids=repr)
def test_eps(op, eps):
    with pytest.raises((TypeError, ValueError), match=f"^{op}: eps: expected a .*number.*, got "):
        EPS[op](eps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify_3d([VIDEO], patch_size=(1.9, 2, 2)), "patchify_3d: patch_size: expected three ints"),
        (lambda: patchify_3d([VIDEO], patch_size=(True, 2, 2)), "patchify_3d: patch_size: expected three ints"),
        (lambda: unpatchify_3d(X, LAYOUT, patch_size="122"), "unpatchify_3d: patch_size: expected three ints"),
        (
            lambda: patch_embed_3d([VIDEO], torch.zeros(3, 1, 1, 2, 2), None, patch_size=(1.0, 2, 2)),
            "patch_embed_3d: patch_size: expected three ints",
        ),
        (lambda: rope_3d(Q, LAYOUT, axes_dim=(2.9, 4, 2)), "rope_3d: axes_dim: expected three ints"),
        (lambda: rope_3d(Q, LAYOUT, axes_dim=(2**40, 4, 4 - 2**40)), "rope_3d: axes_dim: expected three even sizes"),
        (lambda: rope_3d(Q, LAYOUT, theta=(1e4, math.inf, 1e4)), "rope_3d: theta: expected three floats"),
        (lambda: rope_3d(Q, LAYOUT, theta=True), "rope_3d: theta: expected three floats"),
        (lambda: rope_3d(Q, LAYOUT, interleaved="no"), "rope_3d: interleaved: expected a bool"),
        (lambda: qk_norm_rope_3d(Q, Q, None, None, LAYOUT, across_heads=2), "qk_norm_rope_3d: across_heads: expected a bool"),
    ],
)
def test_options_of_another_kind(call, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}.*, got "):
        call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("make", "actual"),
    [
        (lambda: torch.eye(4).to_sparse(), "layout sparse_coo"),
        (lambda: torch.eye(4).to_sparse_csr(), "layout sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(1, 4)]), "a nested one"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(1, 4)], layout=torch.jagged), "a nested one"),
    ],
    ids=["coo", "csr", "nested", "jagged"],
)
def test_tensors_that_are_not_dense(make, actual):
    with pytest.raises(TypeError, match=f"^bias_gelu: x: expected a dense tensor, got {actual}$"):
        bias_gelu(make())
