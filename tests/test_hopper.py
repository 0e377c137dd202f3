"""Attention for Hopper compiles to what its headers say, and in emulation computes what the plain kernels do, bit for bit."""

import json
from pathlib import Path

import gluon_emulator
import pytest
import torch
from test_report import run_without_interpreter
from tolerance import allowed_error, error

from sora_kernels.triton import attention as plain_triton
from sora_kernels.triton import hopper, hopper_backward
from sora_kernels.triton.attention import UNBOUNDED, Call
from sora_kernels.triton.common import head_tensors, num_slots
from sora_kernels.triton.schedule import work_list_kernel

CONSUMERS, BLOCK = hopper.CONSUMERS.value, hopper.BLOCK.value
NAN = float("nan")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    """What compiled_hopper.py prints."""
    return json.loads(run_without_interpreter(str(Path(__file__).with_name("compiled_hopper.py"))))


def test_the_model_of_a_block_is_of_the_loops() -> None:
    """The products are those of the algorithm, and the kernels for Hopper take fewer instructions than the plain ones."""
    lines = run_without_interpreter("-m", "benchmarks.gpu_model", "--head-dim", "64").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    cycles = {(kernel, backend): list(map(int, numbers)) for kernel, backend, *numbers in rows}
    assert len(cycles) == 6
    for kernel, products in (("forward, 64", 2), ("dq, 64", 3), ("dkdv, 64", 4)):
        ours, plain = cycles[kernel, "`hopper`"], cycles[kernel, "`triton`"]
        assert ours[0] == plain[0] == products * 512
        assert ours[1] < plain[1]
        assert ours[2] == pytest.approx(1024, rel=0.05)  # one for each pair


def test_nothing_is_spilled(compiled):
    assert {name: row["spilled"] for name, row in compiled.items() if row["spilled"]} == {}


def test_shared_memory_fits(compiled):
    assert max(row["shared"] for row in compiled.values()) <= 227 << 10


def test_products_are_not_serialised(compiled):
    """Of two consumers, dq_kernel's have two loops with a wait for each of three products. That for dk also covers the one for dv.

    forward_kernel's start and await the first scores, two products each in both loops, and the last output.
    """
    waits = {"forward_kernel": 6, "dq_kernel": 6, "dkdv_kernel": 3}
    for name, row in compiled.items():
        assert row["waits"] == waits[name.partition(",")[0]] * CONSUMERS, name
        assert row["tensor_core"]["wgmma.mma_async"] >= 4 * row["waits"], name
    assert {name.partition(",")[0] for name in compiled} == waits.keys()


def test_softmax_overlaps_with_products(compiled):
    """In all loops, so all but that of the forward's first block, which is a third."""
    for name, row in compiled.items():
        assert row["exponentials"] > 0
        thirds = 2 if name.startswith("forward") else 3
        assert 3 * row["overlapped"] == thirds * row["exponentials"], name


def call_of(q, k, v, cu_q=None, cu_k=None, *, right=UNBOUNDED, scale=0.11, softcap=0.0, left=UNBOUNDED) -> Call:
    return Call((q, k, v, q), cu_q, cu_k, None, None, scale, left, right, softcap)


def emulated_work_list(call: Call, over_keys: bool = False) -> tuple[torch.Tensor | None, int]:
    if call.cu_q is None:
        return call.schedule(over_keys, BLOCK)
    own, other = (call.cu_q, call.num_q), (call.cu_k, call.num_k)
    (cu_own, total), (cu_other, num_other) = (other, own) if over_keys else (own, other)
    capacity = num_slots(total, call.batch, BLOCK)
    entries = torch.empty(call.batch + 1 + capacity, dtype=torch.int32)
    gluon_emulator.launch(
        work_list_kernel, call.batch + 2, constants={"BLOCK": BLOCK, "SAMPLES": 256}, p_cu=cu_own, p_cost=cu_other,
        p_list=entries, num_samples=call.batch, num_tokens=total, num_other=num_other, capacity=capacity,
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
        kernel, d = plain_triton.forward_kernel, q.shape[-1]
        arguments |= {"bias": None, "alibi": None, **head_tensors(1, q=q, k=k, v=v)}
        constants |= {"UNIT": 1, "D": d, "BLOCK_D": d, "BLOCK_M": BLOCK, "BLOCK_N": config.block_n, "PRECISION": "ieee"}
    else:
        kernel = hopper.forward_kernel
        arguments |= hopper.descriptors(q, k, v, config)
        constants |= {"STAGES": config.stages, "ORDERED": config.ordered}
    gluon_emulator.launch(kernel, blocks * heads, constants=constants, **arguments)
    return out, lse, statistics


def gradients(call: Call, q, k, v, dout, dlse, *, plain: bool) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) of these kernels or of the plain ones, emulated, of what the plain forward gives."""
    d = q.shape[-1]
    out, _, statistics = attention(call, q, k, v, plain=True, config=hopper.CONFIGS[d])
    dq, dk, dv = (torch.full(x.shape, 7.0, dtype=x.dtype) for x in (q, k, v))
    names = ("cu_q", "cu_k", "score_mod", "total_q", "total_k", "num_samples")
    scratch = hopper_backward.row_values(statistics).fill_(7.0)
    for over_keys, config in ((False, hopper_backward.DQ_CONFIGS[d]), (True, hopper_backward.DKDV_CONFIGS[d])):
        work, blocks = emulated_work_list(call, over_keys)
        heads = k.shape[-2] if over_keys else q.shape[-2]
        arguments = {name: call.arguments[name] for name in names} | {"work": work, "num_heads": heads}
        if over_keys:
            arguments |= head_tensors(1, dk=dk, dv=dv)
        else:
            arguments |= {"dlse": plain_triton.head_statistics(dlse), "p_statistics": statistics, **head_tensors(1, out=out, dq=dq)}
        constants = {name: call.arguments[name] for name in ("GROUP", "FEATURES")}
        if plain:
            kernels = plain_triton
            arguments |= {"p_statistics": statistics, "p_delta": scratch, "bias": None, "alibi": None}
            arguments |= head_tensors(1, dout=dout, q=q, k=k, v=v)
            block_m, block_n = (config.block, BLOCK) if over_keys else (BLOCK, config.block)
            constants |= {"UNIT": 1, "D": d, "BLOCK_D": d, "BLOCK_M": block_m, "BLOCK_N": block_n, "PRECISION": "ieee"}
        else:
            kernels = hopper_backward
            own, others = {"q": q, "dout": dout}, {"k": k, "v": v}
            if over_keys:
                own, others = others, own
            arguments |= {"p_values": scratch, **hopper_backward.descriptors(own, others, config)}
            constants |= {"STAGES": config.stages}
        kernel = kernels.dkdv_kernel if over_keys else kernels.dq_kernel
        gluon_emulator.launch(kernel, blocks * heads, constants=constants, **arguments)
    return dq, dk, dv


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


@pytest.mark.parametrize("right", [UNBOUNDED, 0, 70])
@pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (128, torch.float16)])
def test_packed_gradients_equal_the_plain_kernels(d, dtype, right):
    """On the same batch, with a gradient of lse."""
    q, k, v = random_heads(580, 4, d, dtype=dtype), random_heads(1100, 2, d, dtype=dtype), random_heads(1101, 2, d, dtype=dtype)[1:]
    boundaries = cu(0, 130, 130, 200, 330, 560), cu(0, 400, 433, 433, 500, 1060)
    dout, dlse = random_heads(581, 4, d, dtype=dtype)[1:], random_heads(4, 580, dtype=torch.float32)
    for x, end in ((q, 560), (dout, 560), (k, 1060), (v, 1060)):
        x[end:] = NAN
    dlse[:, 560:] = NAN
    call = call_of(q, k, v, *boundaries, right=right)
    dq, dk, dv = gradients(call, q, k, v, dout, dlse, plain=False)
    assert_equal((dq, dk, dv), gradients(call, q, k, v, dout, dlse, plain=True))
    for x, end in ((dq, 560), (dk, 1060), (dv, 1060)):
        assert not x[:end].isnan().any()


@pytest.mark.parametrize("right", [UNBOUNDED, 0])
@pytest.mark.parametrize("d", [64, 128])
def test_dense_equals_the_plain_kernel(d, right):
    q, k, v = random_heads(2, 260, 2, d), random_heads(2, 400, 1, d), random_heads(2, 401, 1, d)[:, 1:]
    call = call_of(q, k, v, right=right)
    config = hopper.CONFIGS[d]
    assert_equal(*(attention(call, q, k, v, plain=plain, config=config) for plain in (False, True)))


@pytest.mark.parametrize("right", [UNBOUNDED, 0])
@pytest.mark.parametrize("d", [64, 128])
def test_dense_gradients_equal_the_plain_kernels(d, right):
    q, k, v = random_heads(2, 260, 2, d), random_heads(2, 400, 1, d), random_heads(2, 401, 1, d)[:, 1:]
    dout, dlse = random_heads(2, 261, 2, d)[:, 1:], random_heads(2, 2, 260, dtype=torch.float32)
    call = call_of(q, k, v, right=right)
    assert_equal(*(gradients(call, q, k, v, dout, dlse, plain=plain) for plain in (False, True)))


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


def formula_gradients(q, k, v, dout, dlse) -> list[torch.Tensor]:
    """Of one head, with causality that ends with the last query and the last key."""
    q, k, v = leaves = [x[:, 0].clone().requires_grad_() for x in (q, k, v)]
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    scores = (0.11 * q @ k.T).masked_fill(hidden, -torch.inf)
    outputs = scores.softmax(1) @ v, scores.logsumexp(1)
    return [x[:, None] for x in torch.autograd.grad(outputs, leaves, (dout[:, 0], dlse[0].to(q.dtype)))]


@pytest.mark.parametrize("d", [64, 128])
def test_gradients_keep_the_tolerance(d):
    q, k, v, dout = random_heads(200, 1, d), random_heads(330, 1, d), random_heads(331, 1, d)[1:], random_heads(201, 1, d)[1:]
    dlse = random_heads(1, 200, dtype=torch.float32)
    actual = gradients(call_of(q, k, v, cu(0, 200), cu(0, 330), right=0), q, k, v, dout, dlse, plain=False)
    rough = formula_gradients(q, k, v, dout, dlse)
    exact = formula_gradients(*(x.double() for x in (q, k, v, dout, dlse)))
    for got, at_dtype, right in zip(actual, rough, exact, strict=True):
        assert error(got, right) <= allowed_error(at_dtype, right, got.dtype)


def test_other_samples_do_not_matter_to_gradients():
    q, k, v, dout = (random_heads(300, 1, 64) for _ in range(4))
    dlse = random_heads(1, 300, dtype=torch.float32)
    alone = gradients(call_of(q, k, v, cu(0, 300), cu(0, 300), right=0), q, k, v, dout, dlse, plain=False)
    q, k, v, dout = (
        torch.cat((torch.full((90, 1, 64), NAN), x, torch.full((200, 1, 64), NAN))).to(x.dtype) for x in (q, k, v, dout)
    )
    dlse = torch.cat((torch.full((1, 90), NAN), dlse, torch.full((1, 200), NAN)), dim=1)
    packed = gradients(call_of(q, k, v, *2 * [cu(0, 90, 390, 590)], right=0), q, k, v, dout, dlse, plain=False)
    assert_equal([x[90:390] for x in packed], alone)


def reason(q, k=None, v=None, **options) -> str | None:
    k, v = q if k is None else k, q if v is None else v
    arguments = {"q": q, "k": k, "v": v, "bias": None, "alibi": None, "softcap": 0.0, "left": UNBOUNDED, "scale": 0.1}
    function = "attention_backward" if "dout" in options else "attention_forward"
    return hopper.refuses(function, {**arguments, **options})


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
    assert reason(q, dout=q) is None
    assert reason(q, dout=q, left=5) == "has no window to the left"
    assert "needs rows of dout at their own multiples of 16 bytes" in reason(q, dout=strange[..., :64])


def test_where_it_cannot_run_is_named(monkeypatch):
    monkeypatch.setattr(hopper.triton, "__version__", "3.99.0")
    assert hopper.unavailable() == "was compiled with Triton 3.6 and 3.9, not with 3.99.0"
