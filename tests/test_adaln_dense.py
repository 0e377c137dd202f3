"""adaLN of a dense batch [B, S, D]: rows of samples, of frames and of tokens."""

import pytest
import torch
from tolerance import assert_bit_equal
from torch.nn.functional import layer_norm

from sora_kernels import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual

B, S, D = 2, 12, 40
ROWS = {"samples_2d": (B, D), "samples": (B, 1, D), "frames": (B, 3, D), "tokens": (B, S, D)}


def per_token(row):
    """[B, D] or [B, F, D] -> [B, S, D]."""
    row = row.reshape(B, -1, D)
    return row.repeat_interleave(S // row.shape[1], dim=1)


def modulate(x, shift, scale):
    return layer_norm(x, (D,), eps=1e-6) * (1 + per_token(scale)) + per_token(shift)


def added(residual, x, gate):
    return residual + per_token(gate) * x


def gated_norm(residual, x, gate):
    return added(residual, layer_norm(x, (D,), eps=1e-6), gate)


FUNCTIONS = {
    "modulate": (layer_norm_modulate, modulate, 1, 2),
    "gate": (gate_residual, added, 2, 1),
    "norm_gate": (norm_gate_residual, gated_norm, 2, 1),
    "both": (
        gate_residual_layer_norm_modulate,
        lambda residual, x, gate, shift, scale: (added(residual, x, gate), modulate(added(residual, x, gate), shift, scale)),
        2,
        3,
    ),
}


@pytest.fixture(params=FUNCTIONS)
def functions(request):
    return FUNCTIONS[request.param]


def differentiated(function, tensors, cotangents):
    tensors = [x.detach().requires_grad_() for x in tensors]
    outs = function(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, tensors, [c.to(o.dtype) for c, o in zip(cotangents, outs, strict=False)])
    return [*outs, *grads]


@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_equals_the_formula(functions, shape):
    ours, exact, num_tokens, num_rows = functions
    inputs = [torch.randn(B, S, D, dtype=torch.float64) for _ in range(num_tokens)]
    inputs += [torch.randn(shape, dtype=torch.float64) for _ in range(num_rows)]
    cotangents = torch.randn(2, B, S, D, dtype=torch.float64)
    wanted = differentiated(exact, inputs, cotangents)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for got, want in zip(differentiated(ours, [x.to(dtype) for x in inputs], cotangents), wanted, strict=True):
            assert got.dtype == dtype
            assert got.shape == want.shape
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_is_the_packed_call(functions, shape):
    """Bit for bit, in bfloat16 with float32 rows, that are chunks of a projection as models have them."""
    ours, _, num_tokens, num_rows = functions
    tokens = [torch.randn(B, S, D, dtype=torch.bfloat16) for _ in range(num_tokens)]
    rows = list(torch.randn(*shape[:-1], num_rows * D).chunk(num_rows, dim=-1))
    cotangents = torch.randn(2, B, S, D)
    num = rows[0].numel() // D
    cu_rows = torch.arange(0, B * S + 1, B * S // num, dtype=torch.int32)

    def packed(*tensors):
        outs = ours(*(x.reshape(-1, D) for x in tensors), cu_rows=cu_rows)
        return tuple(out.view(B, S, D) for out in (outs if isinstance(outs, tuple) else (outs,)))

    for got, want in zip(
        differentiated(ours, tokens + rows, cotangents), differentiated(packed, tokens + rows, cotangents), strict=True
    ):
        assert_bit_equal(got, want)


def test_without_rows():
    x, residual = torch.randn(2, B, S, D)
    assert_bit_equal(layer_norm_modulate(x, norm="rms"), layer_norm_modulate(x.flatten(0, 1), norm="rms").view(B, S, D))
    assert_bit_equal(gate_residual(residual, x), residual + x)


def test_strides():
    """Some tokens of each sample, as of a joint sequence of text and video."""
    joint = torch.randn(B, S + 5, D)
    shift, scale = torch.randn(2, B, D)
    x = joint[:, 5:]
    assert_bit_equal(layer_norm_modulate(x, shift, scale), layer_norm_modulate(x.contiguous(), shift, scale))
    assert_bit_equal(gate_residual(x, x, scale), gate_residual(x.contiguous(), x.contiguous(), scale))


@pytest.mark.parametrize(("b", "s"), [(0, 4), (2, 0), (0, 0)])
def test_nothing(b, s):
    x, rows = torch.randn(b, s, D, requires_grad=True), torch.randn(b, 1, D, requires_grad=True)
    out = layer_norm_modulate(x, rows, rows)
    assert out.shape == x.shape
    out.sum().backward()
    assert rows.grad.shape == rows.shape
    assert not rows.grad.any()


def test_compiled_once_for_all_sizes():
    """Sizes change without another compilation."""
    torch._dynamo.reset()
    compiled = torch.compile(layer_norm_modulate, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, s in ((3, 6), (5, 10), (4, 8)):
        x, shift, scale = torch.randn(b, s, D), torch.randn(b, 2, D), torch.randn(b, 2, D)
        with torch._dynamo.config.patch(error_on_recompile=s != 6):
            out = compiled(x, shift, scale)
        assert_bit_equal(out, layer_norm_modulate(x, shift, scale))


x = torch.zeros(B, S, D)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (layer_norm_modulate, (x, torch.zeros(B, 5, D)), r"shift: expected shape \[2, 40\] or \[2, F, 40\], .* got \[2, 5, 40\]"),
        (layer_norm_modulate, (x, torch.zeros(B, 0, D)), r"shift: .* got \[2, 0, 40\]"),
        (layer_norm_modulate, (x, torch.zeros(1, D)), r"shift: .* got \[1, 40\]"),
        (layer_norm_modulate, (x, torch.zeros(B, 3, D), torch.zeros(B, 4, D)), r"scale: .* got \[2, 4, 40\]"),
        (layer_norm_modulate, (x, torch.zeros(B, 3, D), torch.zeros(B, D)), r"scale: .* got \[2, 40\]"),
        (layer_norm_modulate, (x, torch.zeros(D)), r"shift: .* got \[40\]"),
        (layer_norm_modulate, (x, None, None, torch.tensor([0, 24], dtype=torch.int32)), r"cu_rows: expected None with x"),
        (layer_norm_modulate, (x[None],), r"x: expected shape \[N, D\] or \[B, S, D\], got \[1, 2, 12, 40\]"),
        (gate_residual, (x[:, 1:], x), r"residual: expected shape \[2, 12, 40\], got \[2, 11, 40\]"),
        (gate_residual, (x.view(-1, D), x), r"residual: expected shape \[2, 12, 40\]"),
    ],
)  # fmt: skip
def test_rejected(function, arguments, message):
    with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
        function(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_of_no_channels(norm, dtype):
    assert layer_norm_modulate(torch.zeros(3, 0, dtype=dtype), norm=norm).shape == (3, 0)
