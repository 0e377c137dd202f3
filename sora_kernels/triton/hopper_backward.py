"""Attention's backward on Hopper, in Gluon: as in hopper.py, copies by TMA and products by `wgmma`, in warps of their own.

Two kernels without atomics, as in attention.py, whose formulas and order of sums these are:
  - dq_kernel: a program owns 128 queries of one head and loops over the keys that they attend to. It also stores what the other
    kernel needs of each query: maximum, 1 / sum and delta.
  - dkdv_kernel: a program owns 128 keys of one key head and loops over the queries of all its query heads.

hopper_ring.py has their producer's copies. Each of two consumers of 4 warps owns 64 of the program's rows. Gradients stay in
registers in float32. So do P and dS, which are left operands of the products that add to gradients: dS k to dq, and of transposed
ones P^T dout to dv and dS^T q to dk.

The product that gives dP runs during the exponentials, and the one that adds to dv during the subtractions of delta. A consumer
waits for its other products, while those of the other consumer run.

Blocks are copied whole. What follows the last row of a sample is set to zero in shared memory before it is multiplied, as a NaN
there would come through a probability of 0. Only the last block of a sample has such rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .attention import SIZES, Call, head_statistics
from .common import HeadTensor, Statistics, dscores, head_tensors, load_softmax, probabilities
from .configs import OPTIONS
from .hopper_common import (
    BLOCK,
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    descriptor,
    matrix,
    operand,
    row_block,
    row_layout,
    store_rows,
)
from .hopper_ring import Pair, Place, allocate, copy_own, fill, read_stage, start_product, wait_for_stage
from .schedule import locate, other_side
from .scores import (
    ScoreMod,
    Scores,
    finish_scores,
    head_rows,
    key_range,
    num_statistics,
    query_range,
    score_factor,
    statistics_offset,
)

NUM_ROW_VALUES: gl.constexpr = gl.constexpr(3)  # of a query: maximum, 1 / sum, delta


class Config(NamedTuple):
    """Rows of a block of the ring, and its stages."""

    block: int
    stages: int


# By head dim; not measured on a GPU yet.
DQ_CONFIGS = {64: Config(128, 2), 128: Config(64, 2)}
DKDV_CONFIGS = {64: Config(64, 4), 128: Config(64, 2)}


class Blocks(NamedTuple):
    """Blocks of the other side that a program loops over, by number. Between `full` and one of the ends they need no mask."""

    begin: Any
    full: Any
    end: Any


class Row(NamedTuple):
    """A consumer's queries [ROWS]: their number in the sample, and what gives P and dS."""

    number: Any
    maximum: Any
    inverse: Any
    delta: Any


class QueryRows(NamedTuple):
    """What dq's consumers read and write by pointers, from row 0 of the sample on."""

    out: Any
    dlse: Any
    statistics: Statistics
    p_values: Any
    value_stride: Any
    dq: Any


class KeyGrads(NamedTuple):
    """Rows of dk and dv from the block's first key on; the first num_rows of them are the sample's."""

    dk: Any
    dv: Any
    num_rows: Any


class RowValues(NamedTuple):
    """What dq_kernel stored of a head's queries, [NUM_ROW_VALUES, number of all queries], and where stages of it are."""

    pointer: Any  # of the sample's first query
    stride: Any
    num_q: Any
    stages: Any  # in shared memory, NUM_ROW_VALUES rows each


@gluon.jit
def values_offset(work, sample, begin, head, num_heads, num_rows):
    """Of the first value of row `begin` of a head in row values [H, NUM_ROW_VALUES, N] or [B, H, NUM_ROW_VALUES, S]."""
    return statistics_offset(work, sample, begin, head * NUM_ROW_VALUES, num_heads * NUM_ROW_VALUES, num_rows)


# dq


@gluon.jit
def produce_keys(own_descs, descs, ring, own, keys, num_blocks, STAGES: gl.constexpr):
    copy_own(own_descs, ring, own)
    SIZE: gl.constexpr = descs.s.block_shape[2]
    for n in range(num_blocks):
        fill(descs, ring, Place(keys.batch, keys.head, keys.row + n * SIZE), n, STAGES)


@gluon.jit
def query_grads(
    dq, row, ring, scores, begin, end,
    HALF: gl.constexpr, STAGES: gl.constexpr, CLEAR: gl.constexpr, MASKED: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """dq of the blocks of keys from begin to end."""
    SIZE: gl.constexpr = ring.stages.s.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    D_LAYOUT: gl.constexpr = dq.type.layout
    q, dout = matrix(ring.own.s.index(HALF)), matrix(ring.own.dp.index(HALF))
    for n in range(begin, end):
        k, v = read_stage(ring, n, scores.num_k - n * SIZE, STAGES, CLEAR and MASKED)
        s = start_product(q, k, S_LAYOUT)
        dp = start_product(dout, v, S_LAYOUT)
        s = hopper.warpgroup_mma_wait(1, [s])
        j = n * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, S_LAYOUT))
        s, _ = finish_scores(s, row.number[:, None], j[None, :], scores, MASKED, FEATURES)
        p = probabilities(s, score_factor(scores.score_mod, FEATURES), row.maximum[:, None], row.inverse[:, None])
        # Ready it is. The assembler would move the wait for dP ahead of the exponentials, but moves nothing across this loop.
        wait_for_stage(ring, n, STAGES)
        dp = hopper.warpgroup_mma_wait(0, [dp])
        ds = dscores(p, dp, row.delta[:, None], None, False)
        dq = hopper.warpgroup_mma(operand(ds, q.dtype, D_LAYOUT), k, dq, is_async=True)
        dq = hopper.warpgroup_mma_wait(0, [dq])
        mbarrier.arrive(ring.free.index(n % STAGES))
    return dq


@gluon.jit
def row_dots(x, y, first, num_rows):
    """x . y of a consumer's rows: x [ROWS, d] in shared memory, and HeadRows from row `first` on."""
    D: gl.constexpr = x.shape[1]
    p_block, inside = row_block(y, first, num_rows, D)
    y_block = gl.load(p_block, mask=inside, other=0.0)
    return gl.sum(x.load(row_layout(D)).to(gl.float32) * y_block.to(gl.float32), axis=1)


@gluon.jit
def consume_keys(
    ring, first, blocks, scores, rows,
    HALF: gl.constexpr, STAGES: gl.constexpr, CLEAR: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """The consumer of queries HALF * ROWS and following of the block."""
    D: gl.constexpr = ring.own.s.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ring.stages.s.shape[3], 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    num_q = scores.num_q
    first += HALF * ROWS
    number = first + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    inside = number < num_q
    maximum, inverse = load_softmax(rows.statistics, number, inside)
    mbarrier.wait(ring.own_ready, 0)
    delta = row_dots(matrix(ring.own.dp.index(HALF)), rows.out, first, num_q)
    delta = gl.convert_layout(delta, gl.SliceLayout(1, S_LAYOUT))
    if rows.dlse is not None:
        delta -= gl.load(rows.dlse.pointer + number * rows.dlse.stride, mask=inside, other=0.0).to(gl.float32)
    p_value = rows.p_values + number
    gl.store(p_value, maximum, mask=inside)
    gl.store(p_value + rows.value_stride, inverse, mask=inside)
    gl.store(p_value + 2 * rows.value_stride, delta, mask=inside)

    row = Row(number, maximum, inverse, delta)
    dq = gl.zeros([ROWS, D], gl.float32, D_LAYOUT)
    dq = query_grads(dq, row, ring, scores, blocks.begin, blocks.full, HALF, STAGES, CLEAR, False, FEATURES)
    dq = query_grads(dq, row, ring, scores, blocks.full, blocks.end, HALF, STAGES, CLEAR, True, FEATURES)
    store_rows(rows.dq, first, num_q, dq * scores.score_mod.softmax_scale, matrix(ring.own.s.index(HALF)))


@gluon.jit(do_not_specialize=SIZES)
def dq_kernel(
    q_desc, dout_desc, k_desc, v_desc, dlse, out, p_statistics, p_values, dq, cu_q, cu_k, work, score_mod, total_q, total_k,
    num_samples, num_heads,
    GROUP: gl.constexpr, STAGES: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    SIZE: gl.constexpr = k_desc.block_shape[2]
    score_mod = ScoreMod(*score_mod)
    sample, head, first, begin_q, num_q = locate(cu_q, work, total_q, num_samples, num_heads, BLOCK, FEATURES.right)
    if sample < 0:
        return
    begin_k, num_k = other_side(cu_k, work, sample, total_k, num_samples)
    scores = Scores(num_q, num_k, sample, head, None, None, score_mod)
    begin, full_end, end = key_range(first, scores, BLOCK, SIZE, FEATURES)
    blocks = Blocks(begin // SIZE, full_end // SIZE, gl.cdiv(end, SIZE))
    offset = statistics_offset(work, sample, begin_q, head, num_heads, total_q)
    statistics = Statistics(p_statistics + offset, num_statistics(work, num_samples, num_heads, total_q))
    dlse = None if dlse is None else head_rows(HeadTensor(*dlse), sample, begin_q, head)
    out_rows, dq_rows = head_rows(HeadTensor(*out), sample, begin_q, head), head_rows(HeadTensor(*dq), sample, begin_q, head)
    p_values += values_offset(work, sample, begin_q, head, num_heads, total_q)
    rows = QueryRows(out_rows, dlse, statistics, p_values, total_q, dq_rows)

    batch = sample if work is None else sample * 0
    own, others = Pair(q_desc, dout_desc), Pair(k_desc, v_desc)
    ring = allocate(own, others, STAGES, 1)
    queries, keys = Place(batch, head, begin_q + first), Place(batch, head // GROUP, begin_k)
    CLEAR: gl.constexpr = work is not None  # otherwise the rows end where the descriptors do
    gl.warp_specialize(
        [
            (consume_keys, (ring, first, blocks, scores, rows, 0, STAGES, CLEAR, FEATURES)),
            (consume_keys, (ring, first, blocks, scores, rows, 1, STAGES, CLEAR, FEATURES)),
            (produce_keys, (own, others, ring, queries, keys, blocks.end, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


# dk and dv


# Blocks of a head's queries come in the order of attention.dkdv_kernel: those that need no mask, then the others.


@gluon.jit
def first_block(blocks):
    return gl.where(blocks.full < blocks.end, blocks.full, blocks.begin)


@gluon.jit
def next_block(blocks, n):
    n += 1
    return gl.where(n < blocks.end, n, blocks.begin)


@gluon.jit
def produce_queries(own_descs, descs, ring, own, queries, values, blocks, num_steps, STAGES: gl.constexpr):
    copy_own(own_descs, ring, own)
    SIZE: gl.constexpr = descs.s.block_shape[2]
    layout: gl.constexpr = gl.BlockedLayout([SIZE // 32], [32], [1], [0])
    n, head, p_head = first_block(blocks), queries.head, values.pointer
    for step in range(num_steps):
        row = n * SIZE + gl.arange(0, SIZE, layout)
        p_row, inside = p_head + row, row < values.num_q
        # Loaded before the stage is waited for. Where 1 / sum is 0, so are P and dS.
        maximum = gl.load(p_row, mask=inside, other=0.0)
        inverse = gl.load(p_row + values.stride, mask=inside, other=0.0)
        delta = gl.load(p_row + 2 * values.stride, mask=inside, other=0.0)
        fill(descs, ring, Place(queries.batch, head, queries.row + n * SIZE), step, STAGES)
        stage = step % STAGES
        values.stages.index(stage * NUM_ROW_VALUES).store(maximum)
        values.stages.index(stage * NUM_ROW_VALUES + 1).store(inverse)
        values.stages.index(stage * NUM_ROW_VALUES + 2).store(delta)
        mbarrier.arrive(ring.ready.index(stage))
        n = next_block(blocks, n)
        if n == first_block(blocks):
            head += 1
            p_head += NUM_ROW_VALUES * values.stride


@gluon.jit
def load_value(values, step, i: gl.constexpr, LAYOUT: gl.constexpr, STAGES: gl.constexpr):
    """Value i of the queries in a step's stage, which is ready, as columns."""
    return values.stages.index(step % STAGES * NUM_ROW_VALUES + i).load(LAYOUT)[None, :]


@gluon.jit
def consume_queries(
    ring, values, first_query, blocks, num_steps, score_mod, grads,
    HALF: gl.constexpr, STAGES: gl.constexpr, CLEAR: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """The consumer of keys HALF * ROWS and following of the block."""
    D: gl.constexpr = ring.own.s.shape[4]
    SIZE: gl.constexpr = ring.stages.s.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    first_query += HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))[:, None]  # that attends to each key
    k, v = matrix(ring.own.s.index(HALF)), matrix(ring.own.dp.index(HALF))
    dk = gl.zeros([ROWS, D], gl.float32, D_LAYOUT)
    dv = gl.zeros([ROWS, D], gl.float32, D_LAYOUT)
    n = first_block(blocks)
    mbarrier.wait(ring.own_ready, 0)
    for step in range(num_steps):
        q, dout = read_stage(ring, step, values.num_q - n * SIZE, STAGES, CLEAR)
        s = start_product(k, q, S_LAYOUT)  # keys x queries
        dp = start_product(v, dout, S_LAYOUT)
        s = hopper.warpgroup_mma_wait(1, [s])
        if FEATURES.right and n < blocks.full:
            i = n * SIZE + gl.arange(0, SIZE, COLUMNS)[None, :]
            s = gl.where(i >= first_query, s, float("-inf"))
        maximum, inverse = load_value(values, step, 0, COLUMNS, STAGES), load_value(values, step, 1, COLUMNS, STAGES)
        p = probabilities(s, score_factor(score_mod, FEATURES), maximum, inverse)
        dv = hopper.warpgroup_mma(operand(p, k.dtype, D_LAYOUT), dout, dv, is_async=True)
        dp = hopper.warpgroup_mma_wait(1, [dp])
        ds = dscores(p, dp, load_value(values, step, 2, COLUMNS, STAGES), None, False)  # loaded late: registers are scarce
        dk = hopper.warpgroup_mma(operand(ds, k.dtype, D_LAYOUT), q, dk, is_async=True)
        dk, dv = hopper.warpgroup_mma_wait(0, [dk, dv])
        mbarrier.arrive(ring.free.index(step % STAGES))
        n = next_block(blocks, n)
    store_rows(grads.dk, HALF * ROWS, grads.num_rows, dk * score_mod.softmax_scale, matrix(ring.own.s.index(HALF)))
    store_rows(grads.dv, HALF * ROWS, grads.num_rows, dv, matrix(ring.own.dp.index(HALF)))


@gluon.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    k_desc, v_desc, q_desc, dout_desc, p_values, dk, dv, cu_q, cu_k, work, score_mod, total_q, total_k, num_samples, num_heads,
    GROUP: gl.constexpr, STAGES: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    SIZE: gl.constexpr = q_desc.block_shape[2]
    score_mod = ScoreMod(*score_mod)
    sample, key_head, first, begin_k, num_k = locate(cu_k, work, total_k, num_samples, num_heads, BLOCK, False)
    if sample < 0:
        return
    begin_q, num_q = other_side(cu_q, work, sample, total_q, num_samples)
    head = key_head * GROUP
    begin, full_begin, end = query_range(first, num_q, num_k, score_mod, BLOCK, SIZE, FEATURES)
    blocks = Blocks(begin // SIZE, full_begin // SIZE, gl.cdiv(end, SIZE))
    num_steps = GROUP * (blocks.end - blocks.begin)
    offset = values_offset(work, sample, begin_q, head, num_heads * GROUP, total_q)
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    stages = gl.allocate_shared_memory(gl.float32, [STAGES * NUM_ROW_VALUES, SIZE], layout)
    values = RowValues(p_values + offset, total_q, num_q, stages)
    first_query = first - (num_k - num_q) - score_mod.right  # that attends to the first key
    begin_k += first
    dk_rows = head_rows(HeadTensor(*dk), sample, begin_k, key_head)
    dv_rows = head_rows(HeadTensor(*dv), sample, begin_k, key_head)
    grads = KeyGrads(dk_rows, dv_rows, num_k - first)

    batch = sample if work is None else sample * 0
    own, others = Pair(k_desc, v_desc), Pair(q_desc, dout_desc)
    ring = allocate(own, others, STAGES, 2)
    keys, queries = Place(batch, key_head, begin_k), Place(batch, head, begin_q)
    CLEAR: gl.constexpr = work is not None  # otherwise the rows end where the descriptors do
    gl.warp_specialize(
        [
            (consume_queries, (ring, values, first_query, blocks, num_steps, score_mod, grads, 0, STAGES, CLEAR, FEATURES)),
            (consume_queries, (ring, values, first_query, blocks, num_steps, score_mod, grads, 1, STAGES, CLEAR, FEATURES)),
            (produce_queries, (own, others, ring, keys, queries, values, blocks, num_steps, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def descriptors(own: dict[str, Tensor], others: dict[str, Tensor], config: Config) -> dict[str, Any]:
    """By parameter, of a kernel's own rows and of the other side's."""
    found = {f"{name}_desc": descriptor(x, ROWS.value) for name, x in own.items()}
    return found | {f"{name}_desc": descriptor(x, config.block) for name, x in others.items()}


def row_values(statistics: Tensor) -> Tensor:
    """Memory for what dq_kernel stores for dkdv_kernel, [H, NUM_ROW_VALUES, N] or [B, H, NUM_ROW_VALUES, S]."""
    *heads, num_rows = statistics.shape[1:]
    return statistics.new_empty(*heads, NUM_ROW_VALUES.value, num_rows)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, cu_q: Tensor | None,
    cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None, scale: float, left: int, right: int, softcap: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    call = Call((q, k, v, out, dout), cu_q, cu_k, bias, alibi, scale, left, right, softcap)
    arguments = {name: call.arguments[name] for name in ("cu_q", "cu_k", "score_mod", "GROUP", "FEATURES", *SIZES[:3])}
    arguments["p_values"] = row_values(statistics)
    options = {"num_warps": 4, **OPTIONS}
    d = q.shape[-1]

    config = DQ_CONFIGS[d]
    work, blocks = call.schedule(False, BLOCK.value)
    dq_kernel[(blocks * call.heads,)](
        **descriptors({"q": q, "dout": dout}, {"k": k, "v": v}, config), dlse=head_statistics(dlse),
        p_statistics=statistics, **head_tensors(1, out=out, dq=dq), work=work, num_heads=call.heads, **arguments,
        STAGES=config.stages, **options,
    )  # fmt: skip
    config = DKDV_CONFIGS[d]
    work, blocks = call.schedule(True, BLOCK.value)
    dkdv_kernel[(blocks * call.key_heads,)](
        **descriptors({"k": k, "v": v}, {"q": q, "dout": dout}, config), **head_tensors(1, dk=dk, dv=dv), work=work,
        num_heads=call.key_heads, **arguments, STAGES=config.stages, **options,
    )  # fmt: skip
