"""The FlashAttention implementation "SORA": torch's operators, installed for CPU tensors, forward and backward against float64."""

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tolerance import Target, check_accuracy
from torch import Tensor
from torch.nn.attention import SDPBackend, varlen
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from sora_kernels import backends
from sora_kernels.integrations.torch_sdpa import flash_implementation, register

FUNCTION = "attention_forward"
ATEN = torch.ops.aten
# The forward of torch 2.11, and what 2.13 has added to it.
FORWARD = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, "
    "SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None{}) "
    "-> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
)
ADDED = ", Tensor? block_table=None, int? num_splits=None"


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    handle = flash_implementation.install("CPU")
    yield
    handle.remove()


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, left: int = -1, right: int = -1) -> tuple[Tensor, Tensor]:
    """[B, S, H, d] -> out and lse [B, H, S], with flash_attn's windows; a query without keys gets 0 and -inf."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    hidden = (distance > (right if right >= 0 else 10**6)) | (distance < (-left if left >= 0 else -(10**6)))
    scores = scores.masked_fill(hidden, float("-inf"))
    p = scores.masked_fill(hidden.all(dim=1)[:, None], 0).softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), scores.logsumexp(-1)


def packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used: tuple[int, ...] | None = None, **options) -> Tensor:
    out = torch.zeros_like(q)
    for b, (i, j) in enumerate(zip(cu_q[:-1], cu_k[:-1], strict=True)):
        end = cu_k[b + 1] if used is None else j + used[b]
        sample = (x[None, first:last] for x, first, last in ((q, i, cu_q[b + 1]), (k, j, end), (v, j, end)))
        out = torch.cat([out[:i], formula(*sample, **options)[0][0], out[cu_q[b + 1] :]])
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """torch's operator on [B, S, H, d]; its logsumexp has no gradient."""
    out, lse, *_ = ATEN._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, **options)
    return out, lse


DENSE = {
    "plain": ((13, 13, 4, 4, 16), {}),
    "cross": ((13, 30, 4, 4, 40), {"scale": 0.3}),
    "grouped": ((13, 20, 4, 2, 16), {}),
    "causal": ((13, 20, 4, 4, 16), {"right": 0}),
    "without_keys": ((13, 5, 2, 2, 16), {"right": 0}),
    "window": ((40, 40, 2, 2, 16), {"left": 5, "right": 2}),
    "negative_scale": ((13, 13, 2, 2, 16), {"scale": -0.3}),
    "no_scale": ((13, 13, 2, 2, 16), {"scale": 0.0}),
    "no_keys": ((3, 0, 2, 2, 16), {}),
}


def windows(left: int | None = None, right: int | None = None, **options: object) -> dict:
    return {"window_size_left": left, "window_size_right": right, **options}


@pytest.mark.parametrize("name", DENSE)
def test_dense(target16: Target, name: str) -> None:
    (s, sk, h, hk, d), options = DENSE[name]
    inputs = {"query": target16.randn(2, s, h, d), "key": target16.randn(2, sk, hk, d), "value": target16.randn(2, sk, hk, d)}

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return formula(q, k, v, **options)[0]

    check_accuracy(lambda *qkv: dense(*qkv, **windows(**options))[0], exact, exact, inputs)
    _, lse = dense(*inputs.values(), **windows(**options))
    expected = formula(*(x.double() for x in inputs.values()), **options)[1]
    torch.testing.assert_close(lse, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product(target32: Target, causal: bool) -> None:
    """[B, H, S, d], contiguous and as models have it."""
    for shape, axes in (((2, 4, 13, 16), (0, 1, 2, 3)), ((2, 13, 4, 16), (0, 2, 1, 3))):
        inputs = {name: target32.randn(*shape).permute(axes) for name in ("query", "key", "value")}

        def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        check_accuracy(lambda *qkv: ATEN._scaled_dot_product_flash_attention(*qkv, 0.0, causal)[0], exact, exact, inputs)


def test_large_logits() -> None:
    """Of a thousand: as exact as a logsumexp is that is stored in float32, 1e-4 of the probabilities."""
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 13, 4, 16) * torch.tensor([20.0, 20.0, 1.0]).view(3, 1, 1, 1, 1))
    out, lse = dense(q, k, v)
    assert lse.max() > 1000
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(formula(q.double(), k.double(), v.double())[0].sum(), (q, k, v))
    for got, right in zip(grads, expected, strict=True):
        assert (got - right).abs().max() <= 1e-4 * right.abs().max()


CU_Q, CU_K = torch.tensor([0, 5, 5, 18], dtype=torch.int32), torch.tensor([0, 9, 12, 25], dtype=torch.int32)


def drawn(rows: tuple[int, int] = (20, 27), heads: tuple[int, int] = (4, 4), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values, with two tokens of slack behind the last boundary."""
    torch.manual_seed(0)
    return [torch.randn(n, h, 16).to(dtype) for n, h in ((rows[0], heads[0]), (rows[1], heads[1]), (rows[1], heads[1]))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 1)])
def test_varlen_attn(window: tuple[int, int], dtype: torch.dtype) -> None:
    """torch's own function, with a sample without queries."""
    inputs = dict(zip(("query", "key", "value"), drawn(dtype=dtype), strict=True))
    exact = partial(packed, cu_q=CU_Q, cu_k=CU_K, left=window[0], right=window[1])
    with backends.record() as calls:
        check_accuracy(lambda *qkv: varlen_attn(*qkv, CU_Q, CU_K, 13, 13, window_size=window), exact, exact, inputs)
    assert {name for name, _ in calls} == {"attention_forward", "attention_backward"}
    _, lse = varlen_attn(*inputs.values(), CU_Q, CU_K, 13, 13, return_aux=AuxRequest(lse=True))
    assert lse.shape == (4, 20)
    assert lse.dtype == torch.float32


@pytest.mark.skipif(not hasattr(varlen, "varlen_attn_out"), reason="needs torch 2.13")
def test_varlen_attn_of_new_versions() -> None:
    """Grouped heads, used keys, a given out, a paged cache refused."""
    qkv = drawn(heads=(4, 2))
    used = (4, 0, 13)
    options = {"enable_gqa": True, "seqused_k": torch.tensor(used, dtype=torch.int32), "num_splits": 1}
    out = torch.full((20, 4, 16), torch.nan)
    varlen.varlen_attn_out(out, *qkv, CU_Q, CU_K, 13, 13, **options)
    torch.testing.assert_close(out, packed(*qkv, CU_Q, CU_K, used), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(varlen_attn(*qkv, CU_Q, CU_K, 13, 13, **options), out, rtol=0, atol=0)
    pages = torch.randn(3, 16, 4, 16)
    with pytest.raises(ValueError, match="_flash_attention_forward: block_table: expected None"):
        varlen_attn(drawn()[0], pages, pages, CU_Q, None, 13, 13, block_table=torch.zeros(3, 1, dtype=torch.int32))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "fused"])
def test_compiled(compiler: str, layout: str) -> None:
    """Strides are those that torch's shape functions announce."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 13, 16) if layout == "contiguous" else torch.randn(2, 13, 3, 4, 16).permute(2, 0, 3, 1, 4)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        out = ATEN._scaled_dot_product_flash_attention(*x, 0.0, True)[0]
        tokens = x[0].transpose(1, 2).flatten(0, 1)
        return out * 2, varlen_attn(tokens, tokens, tokens, cu, cu, 13, 13)

    cu = torch.tensor([0, 13, 26], dtype=torch.int32)
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend=compiler)):
        leaf = x.detach().clone().requires_grad_()
        outputs = f(leaf)
        results.append([*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaf)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_nested_tensors() -> None:
    """Attention of jagged tensors calls the same operator; on the CPU torch would not choose it."""
    parts = [torch.randn(n, 2, 16) for n in (5, 9)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    choice = mock.patch("torch.nested._internal.sdpa._select_sdp_backend", return_value=SDPBackend.FLASH_ATTENTION)
    with choice, backends.record() as calls:
        out = F.scaled_dot_product_attention(*[nested.transpose(1, 2)] * 3)
        out.values().square().sum().backward()
    assert [name for name, _ in calls] == ["attention_forward", "attention_backward"]
    for x, y in zip(parts, out.transpose(1, 2).unbind(), strict=True):
        torch.testing.assert_close(y, formula(*[x[None]] * 3)[0][0], rtol=1e-5, atol=1e-5)


def test_autocast_is_torchs_affair() -> None:
    """It has casted what it wants casted: an operator below it keeps its inputs' dtype."""
    q = torch.randn(1, 5, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(q, q, q)[0].dtype == torch.float32


def forward(**changed: object) -> Callable:
    """A call of the packed operator with one argument changed."""
    q, k, v = drawn()
    names = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask")
    arguments = dict(zip(names, (q, k, v, CU_Q, CU_K, 13, 13, 0.0, False, False), strict=True))
    return lambda: ATEN._flash_attention_forward(**(arguments | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dropout_p": 0.1}, r"dropout_p: expected 0 \(attention dropout is not supported\), got 0\.1"),
        ({"return_debug_mask": True}, "return_debug_mask: expected False, as there is no dropout, got True"),
        ({"alibi_slopes": torch.zeros(4)}, "alibi_slopes: expected None, as torch does not hand them to the backward"),
        ({"window_size_left": -2}, r"window_size: expected two sizes >= -1 \(left, right\) on the host, got \(-2, -1\)"),
        ({"cum_seq_k": None}, "cum_seq_k: expected boundaries beside cum_seq_q, got None"),
        ({"cum_seq_q": None}, r"query: expected shape \[B, S, H, d\], got \[20, 4, 16\]"),
        ({"value": torch.randn(27, 4, 8)}, "value: expected a head dim of 16, got 8"),
        (
            {"key": torch.randn(27, 3, 16), "value": torch.randn(27, 3, 16)},
            "key: expected a head count that divides query's 4, got 3",
        ),
        (
            {"query": torch.randn(20, 4, 16, dtype=torch.float64)},
            "query: expected dtype float32 or bfloat16 or float16, got float64",
        ),
        (
            {"query": torch.randn(20, 4, 16, requires_grad=True), "seqused_k": torch.tensor([1, 1, 1]).int()},
            "seqused_k: expected None where gradients are wanted",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(changed: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^_flash_attention_forward: {message}"):
        forward(**changed)()


def test_used_keys_of_a_dense_batch_are_refused() -> None:
    q = torch.randn(1, 5, 2, 16)
    with pytest.raises(ValueError, match="seqused_k: expected None without cum_seq_q and cum_seq_k"):
        dense(q, q, q, seqused_k=torch.tensor([3], dtype=torch.int32))


def test_backward_refuses_a_strange_logsumexp() -> None:
    """Such as another kernel's, padded."""
    q = torch.randn(1, 5, 2, 16)
    out, lse = dense(q, q, q)
    state = torch.zeros(2, dtype=torch.uint64)
    with pytest.raises(ValueError, match=r"^_flash_attention_backward: logsumexp: expected shape \[1, 2, 5\], got \[1, 2, 8\]"):
        ATEN._flash_attention_backward(q, q, q, q, out, F.pad(lse, (0, 3)), None, None, 5, 5, 0.0, False, state, state)


@pytest.mark.parametrize("added", ["", ADDED], ids=["2.11", "2.13"])
def test_signatures_of_torch(added: str) -> None:
    (operator,) = (x for x in flash_implementation.OPERATORS if x.name == "_flash_attention_forward")
    schema = FORWARD.format(added)
    assert schema.count("Tensor? alibi_slopes=None") == 1
    flash_implementation.check_signature(operator, torch._C.parse_schema(schema))
    for old, new in (
        ("bool is_causal, ", ""),
        ("max_q", "longest_q"),
        ("SymInt max_q, SymInt max_k", "SymInt max_k, SymInt max_q"),
        ("float? scale=None", "float? scale=None, float softcap=0."),
        ("Tensor unused, ", ""),
    ):
        assert old in schema
        with pytest.raises(
            ValueError, match=r"^register: _flash_attention_forward: expected .*query, key, .* -> 5 results, got aten::"
        ):
            flash_implementation.check_signature(operator, torch._C.parse_schema(schema.replace(old, new)))


def test_all_signatures_are_those_of_this_torch() -> None:
    present = [x for x in flash_implementation.OPERATORS if hasattr(ATEN, x.name)]
    assert {x.name for x in flash_implementation.OPERATORS} - {x.name for x in present} <= {
        "_flash_attention_forward_no_dropout_inplace"
    }
    for operator in present:
        flash_implementation.check_signature(operator, getattr(ATEN, operator.name).default._schema)


def ours(dispatch_key: str) -> set[str]:
    """Names of the operators whose kernel for a key comes from here."""
    dumps = {operator.name: torch._C._dispatch_dump(f"aten::{operator.name}") for operator in flash_implementation.OPERATORS}
    return {
        name
        for name, dump in dumps.items()
        if any(line.startswith(f"{dispatch_key}:") and "flash_implementation.py" in line for line in dump.splitlines())
    }


@pytest.mark.filterwarnings("ignore:.*[Oo]verrid")
def test_register_activates_nothing() -> None:
    attention = torch.nn.attention
    register()
    assert "SORA" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None
    assert not ours("CUDA")
    attention.activate_flash_attention_impl("SORA")
    try:
        assert attention.current_flash_attention_impl() == "SORA"
        assert ours("CUDA") == ours("CPU") != set()
    finally:
        attention.restore_flash_attention_impl()
    assert not ours("CUDA")


def test_remove() -> None:
    handle = flash_implementation.install("MPS")
    assert ours("MPS") == ours("CPU")
    handle.remove()
    assert not ours("MPS")


def test_a_torch_without_implementations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(ValueError, match=r"^register: torch: expected 2\.10 or later, .*, got 2\."):
        register()
