"""The SIMT harness finds what is wrong with a kernel, and nothing wrong with a good one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from simt import build

from sora_kernels.signatures import parse

MISTAKES = {
    "reads_past_the_end": r"thread \(5,0,0\): out of bounds: read of 4 bytes at .*broken.cu",
    "writes_past_the_end": r"thread \(5,0,0\): out of bounds: write of 4 bytes at .*broken.cu",
    "reads_null": r"thread \(0,0,0\): out of bounds: read of 4 bytes",
    "writes_to_an_input": r"thread \(0,0,0\): write to an input: write of 4 bytes",
    "reads_past_shared_memory": "out of bounds: read of 1 bytes at .*, byte 128 of shared memory",
    "reads_what_nobody_wrote": "never written: read of 4 bytes",
    "reads_unwritten_shared_memory": "never written: read of 4 bytes at .*, byte 0 of shared memory",
    "reads_a_misaligned_vector": "misaligned: read of 16 bytes",
    "waits_at_a_barrier_in_a_branch": r"__syncthreads is waited at, but thread \(16,0,0\) has ended",
    "shuffles_in_a_branch": r"deadlock: thread \(31,0,0\) waits at __syncthreads, thread \(0,0,0\) waits for its warp",
    "forgets_a_barrier": r"thread \(1,0,0\): race: reads byte 0 of shared memory at .*, which thread \(0,0,0\) wrote",
    "forgets_a_barrier_in_global_memory": r"thread \(1,0,0\): race: reads memory at .*, which thread \(0,0,0\) wrote without",
    "blocks_write_one_element": r"race: writes memory at .*, which thread \(0,0,0\) of block \(0,0,0\) wrote",
    "blocks_read_what_others_wrote": r"race: reads memory at .*, which thread \(0,0,0\) of block \(0,0,0\) wrote",
    "blocks_write_what_others_read": r"race: writes memory at .*, which thread \(0,0,0\) of block \(0,0,0\) read",
    "takes_too_many_threads": "a block of 544 threads",
    "leaves_output_unwritten": r"y \[32\] is not wholly written",
}


@pytest.fixture(scope="module")
def broken() -> Callable:
    try:
        build.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    path = build.build("broken", [build.HERE / "broken.cu", build.HERE / "broken.cpp"])
    _, signature = parse("run(kernel, x) -> y")
    return build.Watched(path).function(build.load_extension("broken", path).run, signature)


def test_good_kernel(broken: Callable) -> None:
    x, y = torch.arange(32.0), torch.empty(32)
    broken("good", x, y)
    assert y.tolist() == [496.0] * 32


@pytest.mark.parametrize("kernel", MISTAKES)
def test_mistake_is_reported(broken: Callable, kernel: str) -> None:
    """With the kernel, the block and the thread; and the next launch is not the worse for it."""
    with pytest.raises(RuntimeError, match=MISTAKES[kernel]) as caught:
        broken(kernel, torch.zeros(32), torch.empty(32))
    if kernel != "leaves_output_unwritten":
        assert kernel in str(caught.value)
        assert f"block ({int(kernel.startswith('blocks'))},0,0)" in str(caught.value)
    test_good_kernel(broken)


def test_gaps_are_out_of_bounds(broken: Callable) -> None:
    """The elements between the rows of a view are not the view's."""
    x = torch.zeros(32, 64)[:, :8]
    with pytest.raises(RuntimeError, match=r"thread \(8,0,0\): out of bounds: read"):
        broken("good", x, torch.empty(32))


def test_shared_memory_is_limited(broken: Callable) -> None:
    """A kernel may ask for no more than the device says it has."""
    with pytest.raises(RuntimeError, match="takes_too_much_shared_memory: invalid argument"):
        broken("takes_too_much_shared_memory", torch.zeros(32), torch.empty(32))
