"""Arguments that no kernel can serve end in an error that names op and argument: no crash, no hang, no memory but their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reliability.foreign_tensors import Hollow, Later, NoCapsule, Pretender, Renamed, described
from reliability.outcome import outcomes
from torch import Tensor

from sora_kernels import backends
from sora_kernels.adaln import gate_residual, layer_norm_modulate
from sora_kernels.attention import flash_attn_func, spatiotemporal_attention
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.layout import PackedLayout
from sora_kernels.patch_embed import patch_embed_3d, patchify_3d
from sora_kernels.rope import rope_3d

ROOT = Path(__file__).parent.parent
LAYOUT = PackedLayout.from_grids([(1, 4, 4)])
REFUSED = (ValueError, MemoryError, RuntimeError)  # the last is torch's own, where sizes overflow


@pytest.fixture
def cpu():
    return backends.BACKENDS["cpu"].load()


def test_random_bad_calls_are_refused_or_served():
    command = [sys.executable, "-m", "tests.reliability.entries", "15", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    (outcome,) = outcomes(done.stdout)
    assert outcome.cases >= 500


def huge(*shape: int) -> Tensor:
    """Any number of elements in the memory of one."""
    return torch.zeros([1] * len(shape)).expand(shape)


@pytest.mark.parametrize("size", [2**50, 2**53, 2**55])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_that_no_memory_holds(size, dtype):
    """Sizes in bytes that are zero, small or negative numbers in 64 bits."""
    cu = torch.tensor([0, 4], dtype=torch.int32)
    row = torch.zeros(1, 64, dtype=dtype)
    x, heads, video = row.expand(size, 64), row[None].expand(size, 1, 64), row[:, :1, None, None].expand(size, 1, 1, 1)
    for call in (
        lambda: bias_gelu(x),
        lambda: layer_norm_modulate(x, row, row, cu),
        lambda: gate_residual(x, x, row, cu),
        lambda: rope_3d(heads, PackedLayout.from_grids([(1, 2, 2)])),
        lambda: patchify_3d([video], patch_size=(1, 1, 1)),
        lambda: flash_attn_func(heads[None], heads[None], heads[None]),
    ):
        with pytest.raises(REFUSED):
            call()


def test_an_output_that_cannot_be_had_names_its_op():
    with pytest.raises(MemoryError, match=r"^bias_gelu_forward: .*: no memory for an output of shape \[9007199254740992, 64\]$"):
        bias_gelu(torch.zeros(1, 64).expand(2**53, 64))
    with pytest.raises(MemoryError, match=r"^bias_gelu_forward: .*can't allocate memory"):  # a copy, as rows are not contiguous
        bias_gelu(huge(2**53, 64))


def test_videos_of_more_tokens_than_are_counted():
    video = huge(1, 2**20, 2**20, 2**18)
    weight = torch.zeros(4, 1, 1, 1, 1)
    for call in (
        lambda: patchify_3d([video], patch_size=(1, 1, 1)),
        lambda: patch_embed_3d([video], weight, None, patch_size=(1, 1, 1)),
    ):
        with pytest.raises(ValueError, match=r"^patch\w+: videos: expected fewer than 2\*\*31 tokens, got"):
            call()


def test_allocation_says_what_it_cannot_have(cpu):
    x = torch.zeros(1)
    for shape in ([2**61], [2**62, 4], [2**40, 2**40], [0, 2**62, 4]):
        with pytest.raises(MemoryError, match=r"sora_kernels\._cpu: empty: no memory for an output of shape \[\d+, "[:-2]):
            cpu.empty(x, shape)
    with pytest.raises(ValueError, match="shape: expected sizes >= 0, got"):
        cpu.empty(x, [2, -1])
    with pytest.raises(TypeError, match=r"like: expected a dense torch\.Tensor on the CPU"):
        cpu.empty(x.to("meta"), [2])
    assert cpu.empty(x, [0]).shape == (0,)
    assert cpu.empty(x, []).shape == ()


def test_an_allocation_that_failed_counts_for_nothing():
    """Otherwise all memory would be kept from then on, as if that much were in use. In a process that has used no more before."""
    code = """
import torch
from sora_kernels import memory
like = torch.zeros(1)
kept = [memory.empty(like, (rows, 1 << 20)) for rows in (2, 3, 5, 7)]
try:
    memory.empty(like, (2**33, 2**20))
except MemoryError:
    most = sum(x.nbytes for x in kept)
    del kept
    for rows in range(8, 24):
        memory.empty(like, (rows, 1 << 20))
    assert memory.cached_bytes() <= 2 * max(most, 24 << 22), memory.cached_bytes()
    print("right")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr


def test_scratch_memory_that_cannot_be_had():
    """Each thread of a parallel region asks for it; the caller is told, and the next call works. In a process of its own."""
    code = """
import resource, torch
from sora_kernels.attention import flash_attn_func
q = torch.ones(1, 64, 1, 8)
flash_attn_func(q, q, q)
d = 1 << 22
q = torch.zeros(1, 1, 1, 1).expand(1, 2, 1, d)
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (2 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    flash_attn_func(q, q, q)
except MemoryError as error:
    print(error)
print(flash_attn_func(*(torch.ones(1, 4, 1, 8),) * 3).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sora_kernels._cpu: attention_forward: no ")
    assert lines[0].endswith(" bytes of memory to work in")
    assert lines[1] == "32.0"


def test_head_dims_beyond_what_is_counted():
    q = huge(1, 1, 1, 2**27)
    with (
        backends.use_backend("cpu"),
        pytest.raises(ValueError, match="attention_forward: q: expected at most 4194304 along axis 3"),
    ):
        flash_attn_func(q, q, q)


def test_spans_without_tokens_need_no_tables():
    """Their other sides may be of any length."""
    x = torch.randn(4, 1, 64)
    expected = rope_3d(x, PackedLayout.from_grids([(1, 2, 2)]))
    assert torch.equal(rope_3d(x, PackedLayout.from_grids([(1, 2, 2), (0, 2**30, 5)])), expected)
    assert torch.equal(rope_3d(x, PackedLayout.from_grids([(2**31 - 1, 0, 2**31 - 1), (1, 2, 2)])), expected)


def test_nothing_to_write_takes_no_time(cpu):
    """Sizes beside an empty axis are no work."""
    x, cu = torch.zeros(2**53, 0), torch.tensor([0, 4], dtype=torch.int32)
    cpu.bias_gelu_forward(x, None, x.clone())
    cpu.gate_residual_forward(x, x, torch.zeros(1, 0), cu, x.clone())
    q = torch.zeros(2**53, 0, 1, 8)
    lse, statistics = torch.zeros(2**53, 1, 0), torch.zeros(2, 2**53, 1, 0)
    cpu.attention_forward(q, q, q, None, None, None, None, 1.0, 0, 0, 0.0, q.clone(), lse, statistics)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", LAYOUT.step.double(), "step: expected float32, got float64"),
        ("step", LAYOUT.step.new_zeros(1, 6)[:, ::2], "step: expected a contiguous tensor, got strides"),
        ("step", LAYOUT.step[:, :2], r"step: expected shape \[1, 3\], got shape \[1, 2\]"),
        ("grid", LAYOUT.grid.long(), "grid: expected int32, got another dtype"),
        ("grid", torch.tensor([[-1, -4, 4]], dtype=torch.int32), r"grid: expected sizes >= 0 that hold the 16 tokens of span 0"),
        ("grid", torch.tensor([[2**30, 2**30, 16]], dtype=torch.int32), "grid: expected sizes >= 0"),
        ("cu_spans", torch.tensor([0, 99], dtype=torch.int32), "cu_spans: expected"),
        ("cu_spans", torch.tensor([0, 0, 16], dtype=torch.int32)[::2], None),
    ],
)
def test_tables_that_a_caller_replaced(name, value, message):
    q = torch.randn(16, 1, 8)
    layout = PackedLayout.from_grids([(1, 4, 4)])
    setattr(layout, name, value)
    with backends.use_backend("cpu"), pytest.raises((ValueError, TypeError), match=message):
        spatiotemporal_attention(q, q, q, layout, window=(1, 3, 3))
    with backends.use_backend("cpu"), pytest.raises((ValueError, TypeError), match=message):
        rope_3d(q, layout)


def windowed(cpu, window, out=None, step=LAYOUT.step):
    q = torch.randn(16, 1, 8)
    tables = LAYOUT.cu_seqlens, LAYOUT.cu_spans, LAYOUT.grid, step
    out = torch.empty_like(q) if out is None else out
    cpu.spatiotemporal_attention_forward(
        q, q, q, *tables, window, [False] * 3, 1.0, out, torch.empty(2, 1, 16)
    )  # fmt: skip


def test_windows_below_zero(cpu):
    with pytest.raises(ValueError, match=r"spatiotemporal_attention_forward: window: expected sizes >= 0, got \[1, -3, 3\]"):
        windowed(cpu, [1, -3, 3])


def test_axes_beyond_int32(cpu):
    x = torch.zeros(16, 1, 8)
    tables = LAYOUT.cu_spans, LAYOUT.grid, LAYOUT.origin, LAYOUT.step
    for axes in ([2**31 - 2, 2**31 - 2, 12], [2**40, 0, 0], [-2, 4, 6]):
        with pytest.raises((ValueError, TypeError)):
            cpu.rope_3d(x, *tables, [1e4] * 3, axes, True, False, torch.empty_like(x))


@pytest.mark.parametrize("left", [-(2**62), -(2**63), 2**63 - 1])
@pytest.mark.parametrize("right", [-(2**62), 2**63 - 1, 0])
def test_window_sides_of_any_size(cpu, left, right):
    """A side far below zero leaves nothing to see, one far above everything."""
    q, k = torch.randn(1, 40, 1, 8), torch.randn(1, 30, 1, 8)
    out, lse, statistics = torch.empty_like(q), torch.empty(1, 1, 40), torch.empty(2, 1, 1, 40)
    cpu.attention_forward(q, k, k, None, None, None, None, 1.0, left, right, 0.0, out, lse, statistics)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    cpu.attention_backward(
        torch.ones_like(q), None, q, k, k, out, statistics, None, None, None, None, 1.0, left, right, 0.0, *grads
    )
    if left < 0 or right < -40:
        assert not out.any()
        assert lse.eq(-torch.inf).all()
        assert not any(grad.any() for grad in grads)
    else:
        assert lse.isfinite().any()


def test_outputs_keep_to_memory_of_their_own(cpu):
    x = torch.randn(16, 8)
    bad = {
        "elements that do not overlap": torch.empty(1, 8).expand(16, 8),
        "memory of its own, got some of x's": x,
        "a contiguous last axis": torch.empty(16, 16)[:, ::2],
        "float32, got float16": torch.empty(16, 8, dtype=torch.float16),
    }
    for message, out in bad.items():
        with pytest.raises(ValueError, match=f"sora_kernels._cpu: bias_gelu_forward: out: expected {message}"):
            cpu.bias_gelu_forward(x, None, out)
    cu = torch.tensor([0, 16], dtype=torch.int32)
    q = torch.randn(16, 1, 8)
    everything = torch.zeros(16 * 8 + 2)
    everything[:2] = cu.view(torch.float32)
    with pytest.raises(ValueError, match="out: expected memory of its own, got some of cu_rows's"):
        cpu.gate_residual_forward(
            x, x.clone(), torch.zeros(1, 8), everything[:2].view(torch.int32), everything.as_strided((16, 8), (8, 1), 1)
        )
    outputs = torch.empty_like(q), torch.zeros(1, 1).expand(1, 16), torch.empty(2, 1, 16)
    with pytest.raises(ValueError, match="lse: expected elements that do not overlap"):
        cpu.attention_forward(q, q, q, cu, cu, None, None, 1.0, 9, 9, 0.0, *outputs)


def test_patch_embed_writes_rows_one_behind_the_other(cpu):
    """Its kernels take tokens and the weight's gradient for contiguous."""
    videos, weight = [torch.randn(3, 2, 4, 4)], torch.randn(20, 3, 1, 2, 2)
    for tokens in (torch.empty(8, 40)[:, :20], torch.empty(1, 20).expand(8, 20)):
        with pytest.raises(ValueError, match="patch_embed_3d_forward: tokens: expected "):
            cpu.patch_embed_3d_forward(videos, weight, None, [1, 2, 2], tokens)
    for dweight in (torch.empty(20, 3, 1, 2, 4)[..., ::2], torch.empty(1, 3, 1, 2, 2).expand(weight.shape)):
        with pytest.raises(ValueError, match="patch_embed_3d_backward: dweight: expected "):
            cpu.patch_embed_3d_backward(torch.randn(8, 20), videos, weight, [1, 2, 2], None, dweight, None)
    dvideos = [torch.empty(3, 1, 4, 4).expand(3, 2, 4, 4)]
    with pytest.raises(ValueError, match="patch_embed_3d_backward: dvideos: expected elements that do not overlap"):
        cpu.patch_embed_3d_backward(torch.randn(8, 20), videos, weight, [1, 2, 2], dvideos, torch.empty_like(weight), None)


def test_patches_leave_no_row_unwritten(cpu):
    """Behind the last patch there would be whatever the memory held."""
    videos = [torch.randn(3, 1, 4, 4)]
    for rows in (3, 5):
        with pytest.raises(ValueError, match=rf"patchify_3d: tokens: expected 4 rows, got shape \[{rows}, 12\]"):
            cpu.patchify_3d(videos, [1, 2, 2], torch.empty(rows, 12))
    with pytest.raises(ValueError, match=r"unpatchify_3d: tokens: expected at least 4 rows, got shape \[3, 12\]"):
        cpu.unpatchify_3d(torch.randn(3, 12), [1, 2, 2], videos)
    cpu.unpatchify_3d(torch.randn(5, 12), [1, 2, 2], videos)


def test_a_gradient_of_no_weight(cpu):
    """It would stay what the memory held."""
    q, rstd = torch.randn(16, 1, 8), torch.ones(16, 1)
    tables = LAYOUT.cu_spans, LAYOUT.grid, LAYOUT.origin, LAYOUT.step, [1e4] * 3, [2, 2, 4], True, False
    outputs = [torch.empty_like(q) for _ in range(2)]
    with pytest.raises(ValueError, match="dk_weight: expected None, as there is no weight, got a tensor"):
        cpu.qk_norm_rope_3d_backward(q, q, q, q, None, None, rstd, rstd, *tables, *outputs, None, torch.empty(8))


def test_memory_that_is_not_there(cpu):
    x = torch.randn(16, 8)
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="bias_gelu_forward: x: expected a tensor with memory, got none"):
        cpu.bias_gelu_forward(freed, None, torch.empty_like(x))
    with pytest.raises(ValueError, match="bias_gelu_forward: x: expected a tensor with memory, got none"):
        bias_gelu(freed)
    unaligned = torch.frombuffer(bytearray(16 * 8 * 4 + 4), dtype=torch.float32, count=128, offset=1).view(16, 8)
    with pytest.raises(ValueError, match="bias_gelu_forward: x: expected elements aligned to their size"):
        cpu.bias_gelu_forward(unaligned, None, torch.empty_like(x))


def test_what_is_missing_is_named(cpu):
    x = torch.randn(16, 8)
    with pytest.raises(ValueError, match="bias_gelu_forward: out: expected a tensor, got None"):
        cpu.bias_gelu_forward(x, None, None)
    with pytest.raises(ValueError, match="multiply_adds: expected items below"):
        cpu.multiply_adds(1, float("nan"))


@pytest.mark.parametrize("kind", [Hollow, Later, NoCapsule, Pretender, Renamed])
def test_tables_that_are_none(cpu, kind):
    """Of a type that says that its tensors can be had, and cannot give them."""
    x = torch.randn(16, 8)
    other = kind(x.numpy(), None)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cpu.bias_gelu_forward(other, None, torch.empty_like(x))
    with pytest.raises(TypeError, match="empty: like: expected a dense"):
        cpu.empty(other, [2])


@pytest.mark.parametrize(
    ("field", "value"),
    [("sizes", None), ("ndim", -1), ("ndim", 0), ("ndim", 7), ("bits", 0), ("lanes", 0), ("lanes", 65535)],
)
def test_descriptions_of_no_tensor(cpu, field, value):
    x = torch.randn(16, 8)
    other = described(x)
    setattr(other.view, field, value)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cpu.bias_gelu_forward(other, None, torch.empty_like(x))


def test_tensors_of_another_library(cpu):
    x, out, expected = torch.randn(16, 8), torch.empty(16, 8), torch.empty(16, 8)
    cpu.bias_gelu_forward(x, None, expected)
    for strides in (True, False):
        other = described(x)
        if not strides:
            other.view.strides = None  # contiguous
        cpu.bias_gelu_forward(other, None, out)
        assert torch.equal(out, expected)
    with pytest.raises(TypeError, match="empty: like: expected a dense"):
        cpu.empty(described(x), [2])
    other = described(x)
    other.view.byte_offset = 2**64 - 64 - other.view.data
    with pytest.raises(ValueError, match=r"bias_gelu_forward: x: expected memory below 2\*\*64"):
        cpu.bias_gelu_forward(other, None, out)


def test_lists_of_keys_that_do_not_match_those_of_queries(cpu):
    """Each kernel follows its own: dq is of the lists of queries, dk and dv of those of keys, and nothing else is touched."""
    n, blocks = 32, torch.tensor([0, 16, 32], dtype=torch.int32)
    q, dout = torch.randn(2, n, 1, 8)
    samples = torch.tensor([0, 2], dtype=torch.int32)
    everything = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    first = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)
    nothing = torch.zeros(3, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    tables = blocks, blocks, samples, samples
    out, lse, statistics = torch.empty_like(q), torch.empty(1, n), torch.empty(2, 1, n)
    cpu.block_sparse_attention_forward(q, q, q, *tables, *everything, 16, 16, 1.0, out, lse, statistics)

    def gradients(keys):
        grads = [torch.full_like(q, torch.nan) for _ in range(3)]
        cpu.block_sparse_attention_backward(
            dout, None, q, q, q, out, statistics, *tables, *everything, *keys, 16, 16, 1.0, *grads
        )  # fmt: skip
        return grads

    right = gradients(everything)
    for keys in (first, nothing):
        dq, dk, dv = gradients(keys)
        assert torch.equal(dq, right[0])
        assert not dk.isnan().any()
        assert not dv.isnan().any()
        if keys is nothing:
            assert not dk.any()
            assert not dv.any()
