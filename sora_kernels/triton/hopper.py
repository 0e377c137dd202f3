"""Attention's forward on Hopper, in Gluon: copies by TMA, products by `wgmma`, each in warps of their own.

A program owns BLOCK = 128 queries of one head. Three groups of warps share it:
  - the producer, one warp, copies the queries once and then block after block of keys and values into a ring of STAGES stages;
  - two consumers of 4 warps own 64 queries each. Scores, maximum, sum and output stay in registers in float32.

A consumer starts the product of its queries with the next block of keys before that of the last probabilities with their values.
So the softmax of a block overlaps with the product of the block before, and with whatever the other consumer computes.

Blocks, their order and the softmax are those of attention.forward_kernel with blocks of the same sizes. Two things differ:
  - Blocks are copied whole. What follows the last key is masked in the scores, and its values are set to zero in shared memory:
    a NaN there would come through a probability of 0. The last block is the only one that holds such rows.
  - A block of queries without keys runs one block that is all masked, so that no branch surrounds the products.

The grid has a program for each entry of the work list, longest first, and the hardware starts one as another ends. A persistent
grid would have to count finished programs in memory to balance the load as well.

hopper_backward.py has the backward, and hopper_common.py what both share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .attention import SIZES, UNBOUNDED, Call
from .common import HeadTensor, head_tensors
from .configs import OPTIONS, architecture
from .configs import unavailable as triton_unavailable
from .hopper_backward import attention_backward
from .hopper_common import (
    BLOCK,
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    ROWS,
    clear_rows,
    copy_block,
    descriptor,
    matrix,
    operand,
    store_rows,
    strides,
)
from .schedule import locate, other_side
from .scores import ScoreMod, Scores, finish_scores, head_rows, key_range, num_statistics, score_factor, statistics_offset

__all__ = ["attention_backward", "attention_forward", "refuses", "unavailable"]  # what backends.py asks for

TRITON_VERSIONS = ("3.6", "3.9")  # that this was compiled with


class Config(NamedTuple):
    """Keys of a block, stages of the ring, and whether the consumers take turns at starting products."""

    block_n: int
    stages: int
    ordered: bool


CONFIGS = {64: Config(128, 4, True), 128: Config(128, 2, True)}  # by head dim; not measured on a GPU yet


class Ring(NamedTuple):
    """Shared memory: queries, stages of keys and of values, and barriers: for what is `ready` to be read and `free`."""

    q: Any
    k: Any
    v: Any
    q_ready: Any
    k_ready: Any
    k_free: Any
    v_ready: Any
    v_free: Any
    turn: Any  # one barrier for each consumer


class Block(NamedTuple):
    """Where the rows of a program are: coordinates of the first ones in the descriptors, and how many blocks of keys."""

    batch: Any
    head: Any
    key_head: Any
    q_row: Any
    k_row: Any
    first: Any  # query, in its sample
    end: Any  # of the keys that any query of the block attends to
    full_blocks: Any  # that need no mask
    num_blocks: Any


class Target(NamedTuple):
    """Where results go: rows of out, and row 0 of the sample in lse, maxima and sums."""

    out: Any
    p_lse: Any
    p_maximum: Any
    p_total: Any


class State(NamedTuple):
    """The running softmax of a consumer: maximum and sum [ROWS]. The products lag behind it by a block."""

    maximum: Any
    total: Any
    acc: Any  # sum of p * v without the last block
    correction: Any  # of acc, for the last block's maximum
    p: Any  # the last block's probabilities


@gluon.jit
def fill(desc, stages, ready, free, block, n, STAGES: gl.constexpr):
    """Block n of keys or values into its stage, once both consumers have freed it."""
    stage = n % STAGES
    mbarrier.wait(free.index(stage), (n // STAGES + 1) & 1)  # of a new barrier, phase 1 counts as complete
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
    row = block.k_row + n * desc.block_shape[2]
    copy_block(desc, [block.batch, block.key_head, row, 0], ready.index(stage), stages.index(stage))


@gluon.jit
def produce(q_desc, k_desc, v_desc, ring, block, STAGES: gl.constexpr):
    """The producer: a block's queries, and all keys and values that they attend to, in the order in which they are needed."""
    mbarrier.expect(ring.q_ready, CONSUMERS * q_desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        copy_block(q_desc, [block.batch, block.head, block.q_row + c * ROWS, 0], ring.q_ready, ring.q.index(c))
    fill(k_desc, ring.k, ring.k_ready, ring.k_free, block, 0, STAGES)
    for n in range(1, block.num_blocks):
        fill(k_desc, ring.k, ring.k_ready, ring.k_free, block, n, STAGES)
        fill(v_desc, ring.v, ring.v_ready, ring.v_free, block, n - 1, STAGES)
    fill(v_desc, ring.v, ring.v_ready, ring.v_free, block, block.num_blocks - 1, STAGES)


@gluon.jit
def start_scores(q, ring, n, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """Products of the queries with block n of the keys, on their way."""
    stage = n % STAGES
    mbarrier.wait(ring.k_ready.index(stage), (n // STAGES) & 1)
    k = matrix(ring.k.index(stage))
    BLOCK_N: gl.constexpr = k.shape[0]
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return hopper.warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def take_turn(ring, n, HALF: gl.constexpr, ORDERED: gl.constexpr):
    """Waits until the other consumer has started its products: consumer 0 those of block n - 1, consumer 1 those of block n."""
    if ORDERED:
        mbarrier.wait(ring.turn.index(HALF), (n + 1 + HALF) & 1)


@gluon.jit
def pass_turn(ring, HALF: gl.constexpr, ORDERED: gl.constexpr):
    if ORDERED:
        mbarrier.arrive(ring.turn.index(1 - HALF))


@gluon.jit
def wait_for_values(ring, n, STAGES: gl.constexpr):
    mbarrier.wait(ring.v_ready.index(n % STAGES), (n // STAGES) & 1)


@gluon.jit
def start_output(state, ring, n, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """The sum of p * v up to block n, which has arrived, on its way."""
    acc = state.acc * gl.convert_layout(state.correction, gl.SliceLayout(1, LAYOUT))[:, None]
    return hopper.warpgroup_mma(state.p, matrix(ring.v.index(n % STAGES)), acc, is_async=True)


@gluon.jit
def exponentials(s, i, n, maximum, total, scores, MASKED: gl.constexpr, FEATURES: gl.constexpr):
    """As common.softmax_step up to p, of the products of queries i with block n of the keys: (maximum, sum, correction, p)."""
    BLOCK_N: gl.constexpr = s.shape[1]
    j = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))[None, :]
    s, _ = finish_scores(s, i, j, scores, MASKED, FEATURES)
    factor = score_factor(scores.score_mod, FEATURES)
    before = maximum
    maximum = gl.maximum(before, gl.max(s, axis=1))
    reference = gl.where(maximum == float("-inf"), 0.0, maximum) if MASKED else maximum  # all keys so far may be masked
    p = gl.exp2((s - reference[:, None]) * factor)
    correction = gl.exp2((before - reference) * factor)
    return maximum, total * correction + gl.sum(p, axis=1), correction, p


@gluon.jit
def attend(
    state, q, i, ring, scores, begin, end,
    HALF: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr, MASKED: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """Blocks begin to end of the keys into the running softmax of queries i."""
    S_LAYOUT: gl.constexpr = i.type.layout
    O_LAYOUT: gl.constexpr = state.acc.type.layout
    for n in range(begin, end):
        take_turn(ring, n, HALF, ORDERED)
        s = start_scores(q, ring, n, STAGES, S_LAYOUT)
        acc = start_output(state, ring, n - 1, STAGES, O_LAYOUT)
        pass_turn(ring, HALF, ORDERED)
        s = hopper.warpgroup_mma_wait(1, [s])
        mbarrier.arrive(ring.k_free.index(n % STAGES))
        maximum, total, correction, p = exponentials(s, i, n, state.maximum, state.total, scores, MASKED, FEATURES)
        # The next values are waited for before the last product is: the assembler would move the wait for the product ahead of
        # the softmax, which would then overlap with nothing, but moves nothing across this loop.
        wait_for_values(ring, n, STAGES)
        acc = hopper.warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(ring.v_free.index((n - 1) % STAGES))
        state = State(maximum, total, acc, correction, operand(p, q.dtype, O_LAYOUT))
    return state


@gluon.jit
def consume(
    ring, block, scores, target,
    HALF: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr, CLEAR: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """The consumer of queries HALF * ROWS and following of the block."""
    D: gl.constexpr = ring.q.shape[4]
    BLOCK_N: gl.constexpr = ring.k.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    first = block.first + HALF * ROWS
    q = matrix(ring.q.index(HALF))
    row = first + gl.arange(0, ROWS, ROW_LAYOUT)
    i, inside = row[:, None], row < scores.num_q
    last = block.num_blocks - 1

    mbarrier.wait(ring.q_ready, 0)
    take_turn(ring, 0, HALF, ORDERED)
    s = start_scores(q, ring, 0, STAGES, S_LAYOUT)
    pass_turn(ring, HALF, ORDERED)
    s = hopper.warpgroup_mma_wait(0, [s])
    mbarrier.arrive(ring.k_free.index(0))
    maximum = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
    total = gl.zeros([ROWS], gl.float32, ROW_LAYOUT)
    maximum, total, correction, p = exponentials(s, i, 0, maximum, total, scores, True, FEATURES)
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    state = State(maximum, total, acc, correction, operand(p, q.dtype, O_LAYOUT))
    wait_for_values(ring, 0, STAGES)
    full = gl.maximum(block.full_blocks, 1)
    state = attend(state, q, i, ring, scores, 1, full, HALF, STAGES, ORDERED, False, FEATURES)
    state = attend(state, q, i, ring, scores, full, block.num_blocks, HALF, STAGES, ORDERED, True, FEATURES)

    if CLEAR:
        clear_rows(matrix(ring.v.index(last % STAGES)), block.end - last * BLOCK_N)
    acc = hopper.warpgroup_mma_wait(0, [start_output(state, ring, last, STAGES, O_LAYOUT)])

    empty = state.total == 0
    divisor = gl.where(empty, 1.0, state.total)
    acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, O_LAYOUT))[:, None]
    store_rows(target.out, first, scores.num_q, acc, q)
    unit = scores.score_mod.softmax_scale if FEATURES.scale_last else 1.0
    row_lse = state.maximum.to(gl.float64) * unit + gl.log(divisor.to(gl.float64))
    gl.store(target.p_lse + row, gl.where(empty, float("-inf"), row_lse).to(gl.float32), mask=inside)
    gl.store(target.p_maximum + row, state.maximum, mask=inside)
    gl.store(target.p_total + row, state.total, mask=inside)


@gluon.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_desc, k_desc, v_desc, out, p_lse, p_statistics, cu_q, cu_k, work, score_mod, total_q, total_k, num_samples, num_heads,
    GROUP: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = k_desc.block_shape[2]
    D: gl.constexpr = k_desc.block_shape[3]
    score_mod = ScoreMod(*score_mod)
    sample, head, first, begin_q, num_q = locate(cu_q, work, total_q, num_samples, num_heads, BLOCK, FEATURES.right)
    if sample < 0:
        return
    begin_k, num_k = other_side(cu_k, work, sample, total_k, num_samples)
    scores = Scores(num_q, num_k, sample, head, None, None, score_mod)
    _, full_end, end = key_range(first, scores, BLOCK, BLOCK_N, FEATURES)
    batch = sample if work is None else sample * 0
    num_blocks = gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    block = Block(batch, head, head // GROUP, begin_q + first, begin_k, first, end, full_end // BLOCK_N, num_blocks)
    offset = statistics_offset(work, sample, begin_q, head, num_heads, total_q)
    stride = num_statistics(work, num_samples, num_heads, total_q)
    rows = head_rows(HeadTensor(*out), sample, begin_q, head)
    target = Target(rows, p_lse + offset, p_statistics + offset, p_statistics + stride + offset)

    CLEAR: gl.constexpr = work is not None or FEATURES.right  # otherwise the keys end where the descriptor does
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    ring = Ring(
        gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout),
        gl.allocate_shared_memory(gl.int64, [1], bars),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bars),
    )
    mbarrier.init(ring.q_ready, 1)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(ring.turn.index(c), 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.k_ready.index(stage), 1)
        mbarrier.init(ring.v_ready.index(stage), 1)
        mbarrier.init(ring.k_free.index(stage), CONSUMERS)
        mbarrier.init(ring.v_free.index(stage), CONSUMERS)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (ring, block, scores, target, 0, STAGES, ORDERED, CLEAR, FEATURES)),
            (consume, (ring, block, scores, target, 1, STAGES, ORDERED, CLEAR, FEATURES)),
            (produce, (q_desc, k_desc, v_desc, ring, block, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def unavailable() -> str | None:
    """Why this kernel cannot run on the present GPU, or None."""
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in TRITON_VERSIONS:
        return f"was compiled with Triton {' and '.join(TRITON_VERSIONS)}, not with {triton.__version__}"
    reason = triton_unavailable()
    if reason is not None or not torch.cuda.is_available():
        return reason
    table = architecture(torch.device("cuda", torch.cuda.current_device()))
    return None if table == "sm90" else f"is for GPUs of table sm90; this one's is {table}"


def refuses(function: str, arguments: dict[str, Any]) -> str | None:
    """Why it cannot compute a call, or None."""
    q, k, v = (arguments[name] for name in "qkv")
    copied = {"q": q, "k": k, "v": v} | ({"dout": arguments["dout"]} if function == "attention_backward" else {})
    if arguments["bias"] is not None or arguments["alibi"] is not None or arguments["softcap"] > 0:
        return "has no mask, ALiBi or softcap"
    if arguments["left"] < UNBOUNDED:
        return "has no window to the left"
    if arguments["scale"] <= 0:
        return "needs a positive softmax_scale"
    if q.shape[-1] not in CONFIGS:
        return f"needs a head dim of {' or '.join(map(str, CONFIGS))}, not {q.shape[-1]}"
    for name, x in copied.items():
        if x.numel() == 0:
            return f"needs queries and keys; {name} has shape {list(x.shape)}"
        if x.data_ptr() % 16 or any(n % 8 or n == 0 for n in strides(x)):
            return f"needs rows of {name} at their own multiples of 16 bytes, not strides {x.stride()} from address {x.data_ptr()}"
    return None


def descriptors(q: Tensor, k: Tensor, v: Tensor, config: Config) -> dict[str, Any]:
    return {"q_desc": descriptor(q, ROWS.value), "k_desc": descriptor(k, config.block_n), "v_desc": descriptor(v, config.block_n)}


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None,
    scale: float, left: int, right: int, softcap: float, out: Tensor, lse: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    call = Call((q, k, v, out), cu_q, cu_k, bias, alibi, scale, left, right, softcap)
    config = CONFIGS[q.shape[-1]]
    work, blocks = call.schedule(False, BLOCK.value)
    arguments = {name: call.arguments[name] for name in ("cu_q", "cu_k", "score_mod", "GROUP", "FEATURES", *SIZES[:3])}
    forward_kernel[(blocks * call.heads,)](
        **descriptors(q, k, v, config), **head_tensors(1, out=out), p_lse=lse, p_statistics=statistics, work=work,
        num_heads=call.heads, **arguments, STAGES=config.stages, ORDERED=config.ordered, num_warps=4, **OPTIONS,
    )  # fmt: skip
