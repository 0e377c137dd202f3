"""What both kernels of attention's backward for Hopper are built on: how blocks of rows come into shared memory and leave it.

A program owns BLOCK rows of two tensors and loops over the rows of two others. The producer copies its own rows once, and then
block after block of the others into a ring of stages. A stage holds a block of both.

    own rows    stages     S = own.s stages.s^T    dP = own.dp stages.dp^T
    q, dout     k, v       the kernel of dq
    k, v        q, dout    the kernel of dk and dv, where S and dP are transposed
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_common import CONSUMERS, ROWS, clear_rows, copy_block, matrix


class Pair(NamedTuple):
    """Of two tensors: the one of the product that gives scores, and the one of that which gives dP."""

    s: Any
    dp: Any


class Ring(NamedTuple):
    """Shared memory: the program's own rows, one block for each consumer; stages of the others; and barriers."""

    own: Pair
    stages: Pair
    own_ready: Any
    ready: Any  # a stage, to be read
    free: Any  # a stage, to be filled


class Place(NamedTuple):
    """Coordinates in descriptors."""

    batch: Any
    head: Any
    row: Any


@gluon.jit
def allocate(own, others, STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """A ring for pairs of descriptors. A stage is ready after so many arrivals, of which `fill` is one."""
    D: gl.constexpr = own.s.block_shape[3]
    SIZE: gl.constexpr = others.s.block_shape[2]
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    ring = Ring(
        Pair(
            gl.allocate_shared_memory(own.s.dtype, [CONSUMERS, 1, 1, ROWS, D], own.s.layout),
            gl.allocate_shared_memory(own.dp.dtype, [CONSUMERS, 1, 1, ROWS, D], own.dp.layout),
        ),
        Pair(
            gl.allocate_shared_memory(others.s.dtype, [STAGES, 1, 1, SIZE, D], others.s.layout),
            gl.allocate_shared_memory(others.dp.dtype, [STAGES, 1, 1, SIZE, D], others.dp.layout),
        ),
        gl.allocate_shared_memory(gl.int64, [1], bars),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars),
    )
    mbarrier.init(ring.own_ready, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.ready.index(stage), ARRIVALS)
        mbarrier.init(ring.free.index(stage), CONSUMERS)
    hopper.fence_async_shared()
    return ring


@gluon.jit
def copy_own(descs, ring, place):
    mbarrier.expect(ring.own_ready, CONSUMERS * (descs.s.block_type.nbytes + descs.dp.block_type.nbytes))
    for c in gl.static_range(CONSUMERS):
        at = [place.batch, place.head, place.row + c * ROWS, 0]
        copy_block(descs.s, at, ring.own_ready, ring.own.s.index(c))
        copy_block(descs.dp, at, ring.own_ready, ring.own.dp.index(c))


@gluon.jit
def fill(descs, ring, place, step, STAGES: gl.constexpr):
    """The blocks at a place into the stage of a step, once both consumers have freed it."""
    stage = step % STAGES
    mbarrier.wait(ring.free.index(stage), (step // STAGES + 1) & 1)  # of a new barrier, phase 1 counts as complete
    mbarrier.expect(ring.ready.index(stage), descs.s.block_type.nbytes + descs.dp.block_type.nbytes)
    at = [place.batch, place.head, place.row, 0]
    copy_block(descs.s, at, ring.ready.index(stage), ring.stages.s.index(stage))
    copy_block(descs.dp, at, ring.ready.index(stage), ring.stages.dp.index(stage))


@gluon.jit
def wait_for_stage(ring, step, STAGES: gl.constexpr):
    mbarrier.wait(ring.ready.index(step % STAGES), (step // STAGES) & 1)


@gluon.jit
def read_stage(ring, step, valid, STAGES: gl.constexpr, CLEAR: gl.constexpr):
    """The two blocks of a step, with zeros in rows from `valid` on, which are not the sample's."""
    wait_for_stage(ring, step, STAGES)
    s, dp = matrix(ring.stages.s.index(step % STAGES)), matrix(ring.stages.dp.index(step % STAGES))
    SIZE: gl.constexpr = s.shape[0]
    if CLEAR and valid < SIZE:
        clear_rows(s, valid)
        clear_rows(dp, valid)
    return s, dp


@gluon.jit
def start_product(a, b, LAYOUT: gl.constexpr):
    """Of rows of a with rows of b, on its way."""
    NUM_ROWS: gl.constexpr = b.shape[0]
    nothing = gl.zeros([ROWS, NUM_ROWS], gl.float32, LAYOUT)
    return hopper.warpgroup_mma(a, b.permute((1, 0)), nothing, use_acc=False, is_async=True)
