"""torch's attention replaced within a context: right values and gradients, whoever calls it, and torch's own outside."""

import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType

import diffusers
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_bit_equal, check_accuracy
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils.checkpoint import checkpoint

from sora_kernels import backends
from sora_kernels.integrations.torch_sdpa import replace, replacement

# Shapes of query, key and value, and options; `mask` is the shape of one that is drawn.
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "cross": {"key": (2, 4, 9, 16), "scale": 0.3},
    "bool": {"mask": (2, 1, 13, 13), "bool": True},
    "bool_of_keys": {"mask": (2, 1, 1, 13), "bool": True},
    "float": {"mask": (2, 4, 13, 13)},
    "float_shared": {"mask": (13, 13)},
    "gqa": {"key": (2, 2, 13, 16), "enable_gqa": True, "is_causal": True},
    "broadcast": {"query": (3, 1, 4, 13, 16), "key": (2, 4, 13, 16)},
    "two_dimensions": {"query": (13, 16), "key": (9, 16)},
    "lower_right": {"key": (2, 4, 20, 16), "attn_mask": causal_lower_right(13, 20)},
}


def inside(function: Callable) -> Callable:
    return lambda *args: replace()(function)(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options = dict(CASES[name])
    query = options.pop("query", (2, 4, 13, 16))
    key = options.pop("key", query)
    inputs = {"query": torch.randn(query), "key": torch.randn(key), "value": torch.randn(key)}
    shape, is_bool = options.pop("mask", None), options.pop("bool", False)
    if shape:
        mask = torch.randn(shape)
        if is_bool:
            options["attn_mask"] = (mask > 0).index_fill(-1, torch.tensor(0), True)  # each query sees the first key
        else:
            inputs["attn_mask"] = mask

    def attention(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        return imported_by_name(q, k, v, *mask, **options)

    with backends.record() as calls:
        check_accuracy(inside(attention), attention, attention, {name: x.to(dtype) for name, x in inputs.items()})
    assert {name for name, _ in calls} == {"attention_forward", "attention_backward"}


@pytest.mark.parametrize(
    "call",
    [
        lambda *qkv: F.scaled_dot_product_attention(*qkv),
        imported_by_name,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.compile(imported_by_name, fullgraph=True, backend="aot_eager"),
    ],
    ids=["attribute", "imported", "operator", "overload", "compiled"],
)
def test_only_inside(call: Callable) -> None:
    """However it is called; before and after, and in another thread, torch's own runs."""
    qkv = torch.randn(3, 1, 2, 5, 16)

    def count() -> int:
        with backends.record() as calls:
            call(*qkv)
        return len(calls)

    counts = [count()]
    with replace():
        counts.append(count())
        with replace():
            counts.append(count())
        counts.append(count())
        thread = threading.Thread(target=lambda: counts.append(count()))
        thread.start()
        thread.join()
        counts.append(count())
    counts.append(count())
    assert counts == [0, 1, 1, 1, 0, 1, 0]


def test_an_exception_restores() -> None:
    qkv = torch.randn(3, 1, 2, 5, 16)
    with pytest.raises(KeyError, match="mine"), replace():
        raise KeyError("mine")
    with pytest.raises(ValueError, match="dropout_p"), replace():
        imported_by_name(*qkv, dropout_p=0.5)
    with backends.record() as calls:
        imported_by_name(*qkv, dropout_p=0.5)
    assert not calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, r"scaled_dot_product_attention: dropout_p: expected 0 .*, got 0\.1"),
        ({"attn_mask": torch.zeros(3, 5)}, r"attn_mask: expected a shape that broadcasts to \[1, 2, 5, 5\], got \[3, 5\]"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message), replace():
        imported_by_name(*torch.randn(3, 1, 2, 5, 16), **options)


def test_functions_that_run_later_are_refused() -> None:
    """Their bodies run when the context has been left."""

    def yields():
        yield

    async def waits():
        pass

    async def both():
        yield

    class Instance:
        __call__ = yields

    for function in (yields, waits, both, Instance()):
        name = re.escape(getattr(function, "__name__", str(function)))
        with pytest.raises(TypeError, match=f"replace: {name}: expected a function to decorate, got a generator"):
            replace()(function)


def test_decorator_without_parentheses() -> None:
    @replace
    def attend(x: Tensor) -> Tensor:
        return imported_by_name(x, x, x)

    with backends.record() as calls:
        attend(torch.randn(1, 2, 5, 16))
    assert calls[0][0] == "attention_forward"
    with pytest.raises(TypeError, match="replace: function: expected nothing for a context, or a function to decorate, got Linear"):
        replace(nn.Linear(2, 2))


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 5, 16), torch.randn(2, 5, 16)], layout=torch.jagged)
    with pytest.raises(TypeError, match="query: expected a dense tensor, got a nested one"), replace():
        imported_by_name(nested, nested, nested)


def test_float64_is_served() -> None:
    qkv = torch.randn(3, 1, 2, 5, 16, dtype=torch.float64)
    with backends.record() as calls, replace():
        out = imported_by_name(*qkv)
    assert calls == [("attention_forward", "reference")]
    torch.testing.assert_close(out, imported_by_name(*qkv), rtol=1e-12, atol=1e-12)


def test_autocast() -> None:
    qkv = torch.randn(3, 1, 2, 5, 16, requires_grad=True)
    results = []
    for context in (nullcontext(), replace()):
        with context, torch.autocast("cpu", torch.bfloat16):
            out = imported_by_name(*qkv)
        assert out.dtype == torch.bfloat16
        results.append([out, *torch.autograd.grad(out.float().square().sum(), qkv)])
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_transforms() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 16)

    def size(q: Tensor) -> Tensor:
        return imported_by_name(q, k, v).square().sum()

    expected = torch.func.grad(size)(q)
    with replace(), backends.record() as calls:
        torch.testing.assert_close(torch.func.grad(size)(q), expected)
    assert {name for name, _ in calls} == {"attention_forward", "attention_backward"}


MODULES = {
    "attention": lambda: nn.MultiheadAttention(32, 4, batch_first=True),
    "layer": lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
    "decoder_layer": lambda: nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2),
}
NUM_CALLS = {"attention": 1, "layer": 1, "decoder_layer": 2, "encoder": 2}


def apply(module: nn.Module, x: Tensor, padding: Tensor | None) -> Tensor:
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    if isinstance(module, nn.TransformerDecoderLayer):
        return module(x, x, tgt_key_padding_mask=padding)
    return module(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, padded: bool) -> None:
    """In training, and in eval without gradients, where they have fused paths of their own."""
    torch.manual_seed(0)
    module, x = MODULES[name](), torch.randn(2, 7, 32)
    padding = torch.arange(7) >= torch.tensor([[5], [7]]) if padded else None
    there = torch.ones(2, 7, dtype=torch.bool) if padding is None else ~padding

    def results() -> list[Tensor]:
        module.train()
        out = apply(module, x, padding)[there]
        grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        with torch.no_grad():
            return [out, *grads, apply(module.eval(), x, padding)[there]]

    expected = results()
    with replace(), backends.record() as calls:
        actual = results()
    assert [name for name, _ in calls].count("attention_forward") == 2 * NUM_CALLS[name]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["around", "within"])
def test_compiled_module(where: str) -> None:
    """One graph, forward and backward."""
    torch.manual_seed(0)
    layer, x = MODULES["layer"](), torch.randn(2, 7, 32)
    function = replace()(layer.forward) if where == "within" else layer
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = layer(x)
    grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    with backends.record() as calls, replace() if where == "around" else nullcontext():
        out = compiled(x)
        found = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    assert [name for name, _ in calls] == ["attention_forward", "attention_backward"]
    torch.testing.assert_close([out, *found], [expected, *grads], rtol=1e-4, atol=1e-5)


BACKWARDS = {
    "tensor": lambda out, x: out.sum().backward(),
    "function": lambda out, x: torch.autograd.backward(out.sum(), inputs=[x]),
    "grad": lambda out, x: torch.autograd.grad(out.sum(), x),
}


@pytest.mark.parametrize("backward", BACKWARDS)
def test_checkpoints_are_recomputed_with_it(backward: str) -> None:
    x = torch.randn(1, 2, 5, 16, requires_grad=True)
    with replace():
        out = checkpoint(lambda x: imported_by_name(x, x, x), x, use_reentrant=False)
        with backends.record() as calls:
            BACKWARDS[backward](out, x)
    assert [name for name, _ in calls] == ["attention_forward", "attention_backward"]


def test_model_that_calls_it_itself() -> None:
    """CogVideoX passes by diffusers' dispatch."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "in_channels": 4, "out_channels": 4}
    shapes = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "text_embed_dim": 8, "max_text_seq_length": 6}
    model = diffusers.CogVideoXTransformer3DModel(**sizes, **shapes, time_embed_dim=8).eval()
    video, text, timestep = torch.randn(1, 2, 4, 8, 8), torch.randn(1, 6, 8), torch.tensor([500])
    results = []
    for context in (nullcontext(), replace()):
        with context, torch.no_grad(), backends.record() as calls:
            results.append(model(video, text, timestep, return_dict=False)[0])
    assert [name for name, _ in calls] == ["attention_forward"]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_unflatten_is_compiled() -> None:
    """Models split heads by it, and torch.compile cannot trace it as a function."""
    x = torch.randn(2, 12)
    compiled = torch.compile(lambda x: x.unflatten(1, (3, 4)) * 2, fullgraph=True, backend="aot_eager")
    with replace():
        assert_bit_equal([compiled(x), x.unflatten(1, sizes=(3, 4))], [x.unflatten(1, (3, 4)) * 2, x.view(2, 3, 4)])


def test_callers_are_known() -> None:
    """Whatever of torch may be overridden, and calls attention by name."""
    overridable = {f for functions in torch.overrides.get_overridable_functions().values() for f in functions}
    callers = {f for f in overridable if isinstance(f, FunctionType) and "scaled_dot_product_attention" in f.__code__.co_names}
    assert callers == {F.multi_head_attention_forward}
    assert callers <= {function for function, _ in replacement._CALLERS}
