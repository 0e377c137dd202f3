"""The forward for Hopper compiles to what its header says, and in emulation computes what the plain kernel does, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gluon_emulator
import pytest
import torch

from sora_kernels.triton import hopper
from sora_kernels.triton.attention import UNBOUNDED, Call, forward_kernel
from sora_kernels.triton.common import head_tensors, num_slots
from sora_kernels.triton.schedule import work_list_kernel

CONSUMERS, BLOCK = hopper.CONSUMERS.value, hopper.BLOCK.value
NAN = float("nan")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    """What compiled_hopper.py prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compiled_hopper.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_spilled(compiled):
    assert {name: row["spilled"] for name, row in compiled.items() if row["spilled"]} == {}


def test_shared_memory_fits(compiled):
    assert max(row["shared"] for row in compiled.values()) <= 227 << 10


def test_products_are_not_serialised(compiled):
    """A consumer starts and awaits six times: the first scores, two each in both loops, and the last output."""
    for name, row in compiled.items():
        assert row["waits"] == 6 * CONSUMERS, name
        assert row["tensor_core"]["wgmma.mma_async"] >= 6 * row["waits"], name


def test_softmax_overlaps_with_products(compiled):
    """In both loops, so all but the first block's third."""
    for name, row in compiled.items():
        assert row["exponentials"] > 0
        assert 3 * row["overlapped"] == 2 * row["exponentials"], name


def call_of(q, k, v, cu_q=None, cu_k=None, *, right=UNBOUNDED, scale=0.11, softcap=0.0, left=UNBOUNDED) -> Call:
    return Call((q, k, v, q), cu_q, cu_k, None, None, scale, left, right, softcap)


def emulated_work_list(call: Call) -> tuple[torch.Tensor | None, int]:
    if call.cu_q is None:
        return call.schedule(False, BLOCK)
    capacity = num_slots(call.num_q, call.batch, BLOCK)
    entries = torch.empty(call.batch + 1 + capacity, dtype=torch.int32)
    gluon_emulator.launch(
        work_list_kernel, call.batch + 2, constants={"BLOCK": BLOCK, "SAMPLES": 256}, p_cu=call.cu_q, p_cost=call.cu_k,
        p_list=entries, num_samples=call.batch, num_tokens=call.num_q, num_other=call.num_k, capacity=capacity,
    )  # fmt: skip
    return entries, capacity


def attention(call: Call, q, k, v, *, plain: bool, config: hopper.Config) -> tuple[torch.Tensor, ...]:
    """(out, lse, statistics) of this kernel or of the plain one, emulated."""
    heads = q.shape[-2]
    shape = (heads, call.num_q) if call.cu_q is not None else (call.batch, heads, call.num_q)
    out, lse, statistics = torch.full(q.shape, 7.0, dtype=q.dtype), torch.full(shape, 7.0), torch.full((2, *shape), 7.0)
    work, blocks = emulated_work_list(call)
    names = ("cu_q", "cu_k", "score_mod", "total_q", "total_k", "num_samples")
    arguments = {name: call.arguments[name] for name in names} | head_tensors(1, out=out)
    arguments |= {"p_lse": lse, "p_statistics": statistics, "work": work, "num_heads": heads}
    constants = {name: call.arguments[name] for name in ("GROUP", "FEATURES")}
    if plain:
        kernel, d = forward_kernel, q.shape[-1]
        arguments |= {"bias": None, "alibi": None, **head_tensors(1, q=q, k=k, v=v)}
        constants |= {"UNIT": 1, "D": d, "BLOCK_D": d, "BLOCK_M": BLOCK, "BLOCK_N": config.block_n, "PRECISION": "ieee"}
    else:
        kernel = hopper.forward_kernel
        arguments |= hopper.descriptors(q, k, v, config)
        constants |= {"STAGES": config.stages, "ORDERED": config.ordered}
    gluon_emulator.launch(kernel, blocks * heads, constants=constants, **arguments)
    return out, lse, statistics


def assert_equal(actual, expected) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def cu(*boundaries: int) -> torch.Tensor:
    return torch.tensor(boundaries, dtype=torch.int32)


def random_heads(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("right", [UNBOUNDED, 0, 70])
@pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (128, torch.float16)])
def test_packed_equals_the_plain_kernel(d, dtype, right, ordered):
    """With an empty sample, one of queries without keys, one of fewer keys than queries, and slack, which is NaN."""
    q, k, v = random_heads(580, 4, d, dtype=dtype), random_heads(1100, 2, d, dtype=dtype), random_heads(1101, 2, d, dtype=dtype)[1:]
    boundaries = cu(0, 130, 130, 200, 330, 560), cu(0, 400, 433, 433, 500, 1060)
    q[560:], k[1060:], v[1060:] = NAN, NAN, NAN
    call = call_of(q, k, v, *boundaries, right=right)
    config = hopper.CONFIGS[d]._replace(ordered=ordered)
    out, lse, statistics = attention(call, q, k, v, plain=False, config=config)
    assert_equal((out, lse, statistics), attention(call, q, k, v, plain=True, config=config))
    assert not out.isnan().any()
    assert (lse[:, 130:200] == -torch.inf).all()


@pytest.mark.parametrize("right", [UNBOUNDED, 0])
@pytest.mark.parametrize("d", [64, 128])
def test_dense_equals_the_plain_kernel(d, right):
    q, k, v = random_heads(2, 260, 2, d), random_heads(2, 400, 1, d), random_heads(2, 401, 1, d)[:, 1:]
    call = call_of(q, k, v, right=right)
    config = hopper.CONFIGS[d]
    assert_equal(*(attention(call, q, k, v, plain=plain, config=config) for plain in (False, True)))


def test_packed_equals_the_formula():
    q, k, v = random_heads(200, 1, 64), random_heads(700, 1, 64), random_heads(701, 1, 64)[1:]
    call = call_of(q, k, v, cu(0, 200), cu(0, 700))
    out, lse, _ = attention(call, q, k, v, plain=False, config=hopper.CONFIGS[64])
    scores = 0.11 * q[:, 0].double() @ k[:, 0].double().T
    torch.testing.assert_close(lse[0].double(), scores.logsumexp(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[:, 0].double(), scores.softmax(1) @ v[:, 0].double(), rtol=1e-2, atol=1e-2)


def test_other_samples_do_not_matter():
    """Not even where they are NaN."""
    q, k, v = random_heads(300, 1, 64), random_heads(300, 1, 64), random_heads(300, 1, 64)
    config = hopper.CONFIGS[64]
    alone = attention(call_of(q, k, v, cu(0, 300), cu(0, 300)), q, k, v, plain=False, config=config)
    q, k, v = (torch.cat((torch.full((90, 1, 64), NAN), x, torch.full((200, 1, 64), NAN))).to(x.dtype) for x in (q, k, v))
    packed = attention(call_of(q, k, v, *2 * [cu(0, 90, 390, 590)]), q, k, v, plain=False, config=config)
    assert_equal((packed[0][90:390], packed[1][:, 90:390], packed[2][..., 90:390]), alone)


def reason(q, k=None, v=None, **options) -> str | None:
    k, v = q if k is None else k, q if v is None else v
    arguments = {"q": q, "k": k, "v": v, "bias": None, "alibi": None, "softcap": 0.0, "left": UNBOUNDED, "scale": 0.1}
    return hopper.refuses("attention_forward", {**arguments, **options})


def test_what_it_cannot_compute_is_named():
    q = torch.empty(2, 16, 4, 64, dtype=torch.bfloat16)
    assert reason(q) is None
    assert reason(q, k=torch.empty(2, 16, 8, 64, dtype=q.dtype)[:, :, ::4]) is None
    assert reason(q[..., :32]) == "needs a head dim of 64 or 128, not 32"
    for options in ({"bias": q}, {"alibi": q}, {"softcap": 1.0}):
        assert reason(q, **options) == "has no mask, ALiBi or softcap"
    assert reason(q, left=5) == "has no window to the left"
    assert reason(q, scale=-1.0) == "needs a positive softmax_scale"
    assert reason(q, k=q[:, :0]) == "needs queries and keys; k has shape [2, 0, 4, 64]"
    strange = torch.empty(2, 16, 4, 68, dtype=q.dtype)
    assert "needs rows of v at their own multiples of 16 bytes" in reason(q, v=strange[..., :64])
    assert "needs rows of k at their own multiples of 16 bytes" in reason(q, k=torch.empty(2, 16, 4, 72, dtype=q.dtype)[..., 2:66])
    assert "needs rows of k at their own multiples of 16 bytes" in reason(q, k=q[:, :, :1].expand(-1, -1, 4, -1))


def test_where_it_cannot_run_is_named(monkeypatch):
    monkeypatch.setattr(hopper.triton, "__version__", "3.99.0")
    assert hopper.unavailable() == "was compiled with Triton 3.6 and 3.9, not with 3.99.0"
