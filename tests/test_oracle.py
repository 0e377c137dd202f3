"""The float64 reference, which all else is held to, is held itself to central differences and to numbers of 50 digits.

Its gradients are autograd's, so differences of its values are a second way to them. Rows whose numbers cancel, overflow or vanish
in floating point are computed by mpmath, from formulas written once more here; kernels obey the rule of tolerance.py there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from reliability.layouts import Setting
from reliability.properties import OPS, SETTINGS
from reliability.subject import Subject
from tolerance import AGREE_FLOAT64, allowed_error, error, largest, random_cotangents, random_like, run
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm

from sora_kernels import backends, bias_gelu, flash_attn_func, layer_norm_modulate
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.reference.rope import rotary_angles, rotate

STEPS = (1e-3, 1e-4, 1e-5)
# Of differences of fourth order: rounding by the smallest step, and what is left where a function bends at a length of 1e-3.
AGREE_DIFFERENCES = 1e-7
DIGITS = 50
PLACES = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    *(("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


def oracle(subject: Subject) -> tuple[Callable, list[Tensor]]:
    arguments = subject.arguments([sample.tensors for sample in subject.samples])
    count = len(arguments)
    inputs = [*arguments, *subject.shared]
    return lambda *given: subject.exact(subject.layouts, list(given[:count]), list(given[count:])), inputs


def check_differences(subject: Subject) -> None:
    """The derivative along a random direction, by autograd and by central differences: the best of several steps."""
    function, inputs = oracle(subject)
    outputs, gradients = run(function, inputs)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs]
    derivative = sum(float((g * u).sum()) for g, u in zip(gradients, directions, strict=True))
    weights = random_cotangents(outputs)
    size = max(1.0, abs(derivative), *(float((y * w).abs().sum()) for y, w in zip(outputs, weights, strict=True)))

    def at(t: float) -> list[Tensor]:
        with torch.no_grad():
            return function(*(x + t * u for x, u in zip(inputs, directions, strict=True)))

    def along(h: float) -> float:
        near = [8 * (a - b) for a, b in zip(at(h), at(-h), strict=True)]
        far = [a - b for a, b in zip(at(2 * h), at(-2 * h), strict=True)]
        return sum(float(((n - f) * w).sum()) for n, f, w in zip(near, far, weights, strict=True)) / (12 * h)

    distance = min(abs(along(h) - derivative) for h in STEPS)
    assert distance <= AGREE_DIFFERENCES * size, f"{distance / size:.3g} of the outputs off"


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if not op.inference])
def test_gradients_are_differences(name: str) -> None:
    @settings(SETTINGS, max_examples=5, derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        check_differences(data.draw(OPS[name].draw(Setting("reference", 24, gentle=True))))

    check()


def test_a_wrong_gradient_differs() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dout: Tensor) -> Tensor:
            return dout * (1 + 1e-5)

    x = torch.randn(3, 4, dtype=torch.float64)
    unused = {"drawn": {}, "names": ("x",), "samples": [], "shared": [x], "call": None, "plain": None, "rows": None}
    check_differences(Subject(**unused, exact=lambda _, given, shared: [shared[0] ** 2], joined=False))
    with pytest.raises(AssertionError, match="of the outputs off"):
        check_differences(Subject(**unused, exact=lambda _, given, shared: [Wrong.apply(shared[0]) ** 2], joined=False))


def exact_numbers(x: Tensor) -> list[mpf]:
    return [mpf(float(number)) for number in x.detach().flatten()]


def stored(numbers: Sequence[mpf]) -> Tensor:
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64)


def check_row(function: Callable, plain: Callable, x: Tensor, backend: str, exactly: Callable) -> None:
    """Output and gradient of a row; `exactly` makes both of 50 digits, of numbers and cotangents."""
    with backends.use_backend(backend):
        outputs, gradients = run(function, [x])
    rough = run(plain, [x])
    with mp.workdps(DIGITS):
        right = exactly(exact_numbers(x), exact_numbers(random_like(outputs[0])))
        results = [stored(numbers) for numbers in right]
    for name, got, at_dtype, exact in zip(("output", "gradient"), outputs + gradients, rough[0] + rough[1], results, strict=True):
        distance, allowed = error(got.flatten(), exact), allowed_error(at_dtype.flatten(), exact, got.dtype)
        assert distance <= allowed < torch.inf, f"{name}: error {distance:.3g} exceeds {allowed:.3g}"


def places(function: Callable) -> Callable:
    return pytest.mark.parametrize(("backend", "dtype"), PLACES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in PLACES])(
        function
    )


LOGITS = {
    "near": [0.5, -1.25, 2.0, 0.0],
    "large": [1e10, 1e10, 2e10, -1e10],
    "equal": [-1e10] * 7,
    "least": [torch.finfo(torch.bfloat16).min] * 5,
    "hidden": [-1e30] * 8 + [0.0],
    "thin": [0.0, -80.0, -104.0, -700.0, -745.0, 88.0],
    "close": [2.0**20, 2.0**20 + 1, 2.0**20 - 1, 2.0**20 + 0.5],
}


@places
@pytest.mark.parametrize("name", LOGITS)
def test_softmax(name: str, backend: str, dtype: torch.dtype) -> None:
    """Weights of one query; the gradient is that of the values."""
    most = torch.finfo(dtype).max
    k = torch.tensor(LOGITS[name], dtype=torch.float64).clamp(-most, most).to(dtype)[None, :, None, None]
    q = torch.ones(1, 1, 1, 1, dtype=dtype)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(3)).to(dtype)

    def exactly(values: list[mpf], cotangents: list[mpf]) -> tuple[list[mpf], list[mpf]]:
        scores = exact_numbers(k)
        powers = [mp.exp(s - max(scores)) for s in scores]
        weights = [p / mp.fsum(powers) for p in powers]
        return [mp.fdot(weights, values)], [w * cotangents[0] for w in weights]

    def plain(v: Tensor) -> Tensor:
        weights = torch.softmax(k.flatten().to(torch.promote_types(dtype, torch.float32)), 0).to(dtype)
        return weights @ v.flatten()

    check_row(lambda v: flash_attn_func(q, k, v, softmax_scale=1.0), plain, v, backend, exactly)


ROWS = {
    "ordinary": lambda e: [1.0, -2.0, 0.5, 3.0, 0.25],
    "last_digits": lambda e: [1.0, 1 + e, 1 - e, 1 + 2 * e, 1.0, 1 + 4 * e, 1.0],
    "far_from_zero": lambda e: [256.0, 257.0, 258.0, 256.0, 260.0],
    "tiny": lambda e: [1e-4, -1e-4, 2e-4, 0.0, 3e-5],
    "one_large": lambda e: [0.0] * 15 + [200.0],
    "one_value": lambda e: [0.7] * 9,
    "pair": lambda e: [1.0, -1.0],
}


@places
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("name", ROWS)
def test_norm(name: str, norm: str, backend: str, dtype: torch.dtype) -> None:
    """A row alone; in the last digits of 1, its variance is what eps is or less."""
    eps = 1e-6
    x = torch.tensor([ROWS[name](float(torch.finfo(dtype).eps))], dtype=torch.float64).to(dtype)

    def exactly(row: list[mpf], cotangents: list[mpf]) -> tuple[list[mpf], list[mpf]]:
        n = len(row)
        mean = mp.fsum(row) / n if norm == "layer" else mpf(0)
        centred = [a - mean for a in row]
        rstd = 1 / mp.sqrt(mp.fdot(centred, centred) / n + mpf(eps))
        normed = [a * rstd for a in centred]
        average = mp.fsum(cotangents) / n if norm == "layer" else mpf(0)
        along = mp.fdot(cotangents, normed) / n
        return normed, [rstd * (g - average - y * along) for g, y in zip(cotangents, normed, strict=True)]

    def plain(x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], eps=eps) if norm == "layer" else rms_norm(x, x.shape[-1:], eps=eps)

    check_row(lambda x: layer_norm_modulate(x, norm=norm, eps=eps), plain, x, backend, exactly)


@places
def test_gelu(backend: str, dtype: torch.dtype) -> None:
    """Both tails, where a cubic goes into tanh, and numbers near 0."""
    tail = [40.0, 12.0, 8.0, 6.0, 5.5, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 1e-3, 1e-4]
    x = torch.tensor([[*tail, 0.0, *(-number for number in tail)]], dtype=torch.float64).to(dtype)

    def exactly(row: list[mpf], cotangents: list[mpf]) -> tuple[list[mpf], list[mpf]]:
        c, values, slopes = mp.sqrt(2 / mp.pi), [], []
        for u, g in zip(row, cotangents, strict=True):
            t = mp.tanh(c * (u + mpf("0.044715") * u**3))
            values.append(u * (1 + t) / 2)
            slopes.append(g * ((1 + t) + u * (1 - t**2) * c * (1 + 3 * mpf("0.044715") * u**2)) / 2)
        return values, slopes

    check_row(bias_gelu, lambda x: gelu(x, approximate="tanh"), x, backend, exactly)


@pytest.mark.parametrize("position", [0.0, 1.0, -0.3, 1e3, -12345.5, 2.0**24, 2.0**40])
def test_angles(position: float) -> None:
    """Of one token; cosines and sines are those of the angles as they are stored."""
    axes, thetas = (8, 12, 20), (1e4, 256.0, 1e6)
    layout = PackedLayout([[Span((1, 1, 1), origin=(position, -position, position))]])
    angles = rotary_angles(layout.cu_spans, layout.grid, layout.origin, layout.step, thetas, axes)[0]
    origin = exact_numbers(layout.origin)
    with mp.workdps(DIGITS):
        exact = [x * mpf(t) ** (-mpf(p) / (n // 2)) for x, t, n in zip(origin, thetas, axes, strict=True) for p in range(n // 2)]
        turned = [pair for a in exact_numbers(angles) for pair in (mp.cos(a), mp.sin(a))]
        right, pairs = stored(exact), stored(turned)
    assert error(angles, right) <= AGREE_FLOAT64 * max(1.0, largest(right))
    one = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(20)[None, None]
    assert error(rotate(one, angles[None], interleaved=True).flatten(), pairs) <= AGREE_FLOAT64
