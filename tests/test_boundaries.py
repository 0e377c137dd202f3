"""On a GPU the host reads no boundaries: wrong ones give wrong numbers, but in outputs alone and of inputs alone."""

import contextlib
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sora_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, H, D, GUARD = 32, 2, 16, 64
WRONG = [[0, 50, 32], [0, 32, 10], [20, 32, 32], [-7, 3, 32], [0, -5, 32], [40, 40, 40]]

pytestmark = [pytest.mark.gpu, pytest.mark.emulated, pytest.mark.parametrize("boundaries", WRONG, ids=str)]


def kernels(backend: str):
    """The backend's functions, as they run here: on the GPU, or emulated."""
    emulated = {"cuda": "simt"}.get(backend, backend) if DEVICE == "cpu" else backend
    if emulated not in backends.BACKENDS or DEVICE not in backends.BACKENDS[emulated].devices:
        pytest.skip(f"{backend} can neither run nor be emulated here")
    return backends.BACKENDS[emulated].load()


def inside(fill: float, *shape: int) -> tuple[Tensor, Tensor]:
    """A tensor of 7, and the whole of which it is the middle, `fill` around it."""
    whole = torch.full((shape[0] + 2 * GUARD, *shape[1:]), fill, device=DEVICE)
    whole[GUARD:-GUARD] = 7
    return whole[GUARD:-GUARD], whole


def check(*outputs: tuple[Tensor, Tensor]) -> None:
    """Nothing around an output was written, nothing around an input was read, which is NaN."""
    for output, whole in outputs:
        assert not output.isnan().any()
        assert torch.cat([whole[:GUARD], whole[-GUARD:]]).eq(3).all()


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """What the harness of the CUDA kernels may report: samples that overlap, or tokens of none."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("race: |is not wholly written", str(error)):
            raise


def test_attention(boundaries: list[int]) -> None:
    run = kernels("triton")
    q, _ = inside(torch.nan, N, H, D)
    q.normal_()
    cu = torch.tensor(boundaries, device=DEVICE, dtype=torch.int32)
    out, dq, dk, dv = (inside(3.0, N, H, D) for _ in range(4))
    lse, statistics = torch.zeros(H, N, device=DEVICE), torch.zeros(2, H, N, device=DEVICE)
    rest = cu, cu, None, None, 0.25, 2**30, 2**30, 0.0
    run.attention_forward(q, q, q, *rest, out[0], lse, statistics)
    run.attention_backward(torch.ones_like(q), None, q, q, q, out[0], statistics, *rest, dq[0], dk[0], dv[0])
    check(out, dq, dk, dv)


def test_int8_attention(boundaries: list[int]) -> None:
    q, _ = inside(torch.nan, N, H, D)
    q.normal_()
    cu = torch.tensor(boundaries, device=DEVICE, dtype=torch.int32)
    out, lse = inside(3.0, N, H, D), torch.zeros(H, N, device=DEVICE)
    kernels("triton").int8_attention_forward(q, q, q, cu, cu, None, 0.25, 2**30, 2**30, 128, 64, out[0], lse)
    check(out)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_adaln(boundaries: list[int], backend: str) -> None:
    run = kernels(backend)
    x, _ = inside(torch.nan, N, H * D)
    x.normal_()
    cu = torch.tensor(boundaries, device=DEVICE, dtype=torch.int32)
    shift, scale = torch.randn(2, len(boundaries) - 1, H * D, device=DEVICE)
    (mean, rstd), y, dx = torch.ones(2, N, device=DEVICE), inside(3.0, N, H * D), inside(3.0, N, H * D)
    dshift, dscale = inside(3.0, *shift.shape), inside(3.0, *scale.shape)
    with harmless():
        run.layer_norm_modulate_forward(x, shift, scale, cu, False, None, None, 1e-6, y[0], mean, rstd)
    with harmless():
        run.layer_norm_modulate_backward(x, x, scale, cu, False, None, None, mean, rstd, dx[0], dshift[0], dscale[0], None, None)
    check(y, dx, dshift, dscale)
