"""Blocks of tokens, and masks of them: what they hold, where they come from, and what is refused."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from sora_kernels import BlockMask, PackedLayout, Span, TokenBlocks, block_sparse_attention

LAYOUT = PackedLayout.from_spans([[Span.text(10), Span((5, 6, 7))], [], [Span((1, 9, 8))], [Span((0, 4, 4))]])


def seen(mask: BlockMask) -> list[Tensor]:
    """For each sample bool [heads, R, C]: the lists, read back."""
    offsets, indices = (x.tolist() for x in mask.lists)
    rows, tables = sum(mask.queries.num_blocks), []
    row_starts, column_starts = (b.cu_samples.tolist() for b in (mask.queries, mask.keys))
    for r, c, n, m in zip(row_starts, column_starts, mask.queries.num_blocks, mask.keys.num_blocks, strict=False):
        table = torch.zeros(mask.num_heads, n, m, dtype=torch.bool)
        for h, i in itertools.product(range(mask.num_heads), range(n)):
            row = h * rows + r + i
            found = indices[offsets[row] : offsets[row + 1]]
            assert found == sorted(set(found))
            table[h, i, [j - c for j in found]] = True
        tables.append(table)
    return tables


def test_runs() -> None:
    blocks = TokenBlocks.runs(LAYOUT, 64)
    assert blocks.num_blocks == (1 + 4, 0, 2, 0)
    assert blocks.grids == (((1, 1, 1), (1, 1, 4)), (), ((1, 1, 2),), ((1, 1, 0),))
    assert blocks.cu_blocks.tolist() == [0, 10, 74, 138, 202, 220, 284, 292]
    assert blocks.cu_samples.tolist() == [0, 5, 5, 7, 7]
    assert blocks.max_size == 64
    assert blocks.order is None
    x = torch.randn(300, 2)
    assert blocks.arrange(x) is x
    assert blocks.restore(x) is x


def test_tiles() -> None:
    """Each tile's tokens are those of a box of the grid, in raster order; text has runs."""
    blocks = TokenBlocks.tiles(LAYOUT, (2, 4, 3))
    assert blocks.grids == (((1, 1, 1), (3, 2, 3)), (), ((1, 3, 3),), ((1, 1, 0),))
    tokens = torch.arange(LAYOUT.num_tokens + 5)
    arranged = blocks.arrange(tokens)
    assert torch.equal(blocks.restore(arranged), tokens)
    assert torch.equal(arranged[LAYOUT.num_tokens :], tokens[LAYOUT.num_tokens :])
    cu = blocks.cu_blocks.tolist()
    assert arranged[:10].tolist() == list(range(10))
    number = 1  # after the text
    for grid, first in (((5, 6, 7), 10), ((1, 9, 8), 220)):
        positions = [range(0, n, m) for n, m in zip(grid, (2, 4, 3), strict=True)]
        for start in itertools.product(*positions):
            box = [range(a, min(a + m, n)) for a, n, m in zip(start, grid, (2, 4, 3), strict=True)]
            own = [first + (t * grid[1] + h) * grid[2] + w for t, h, w in itertools.product(*box)]
            assert arranged[cu[number] : cu[number + 1]].tolist() == own
            number += 1
    assert number == sum(blocks.num_blocks)
    assert blocks.max_size == 24


def test_dense_round_trip() -> None:
    blocks = TokenBlocks.tiles(LAYOUT, (2, 4, 3))
    for heads in (1, 3):
        tables = [torch.rand(heads, n, n) < 0.4 for n in blocks.num_blocks]
        for table, back in zip(tables, seen(BlockMask.from_dense(tables, blocks)), strict=True):
            assert torch.equal(table, back)


def test_transposed() -> None:
    """The lists of the keys are those of the transposed tables, and so are those that come from longer buffers."""
    queries, keys = TokenBlocks.runs(LAYOUT, 16), TokenBlocks.runs(LAYOUT, 40)
    tables = [torch.rand(2, n, m) < 0.4 for n, m in zip(queries.num_blocks, keys.num_blocks, strict=True)]
    mask = BlockMask.from_dense(tables, queries, keys)
    padded = BlockMask(queries, keys, 2, mask.lists._replace(indices=torch.cat([mask.lists.indices, torch.tensor([7, -3]).int()])))
    expected = BlockMask.from_dense([table.mT for table in tables], keys, queries).lists
    for lists in (mask.transposed, padded.transposed):
        assert torch.equal(lists.offsets, expected.offsets)
        assert torch.equal(lists.indices[: len(expected.indices)], expected.indices)


def test_indices() -> None:
    """In any order, of any number for each sample, and with counts."""
    blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 8, 8), (1, 8, 4)]), 16)
    first = torch.tensor([[3, 0], [1, 2], [2, 0], [0, 3]])
    second = torch.tensor([[1, 0, 9], [0, 5, -1]])
    mask = BlockMask.from_indices([first, second], blocks, counts=[torch.full((4,), 2), torch.tensor([2, 1])])
    expected = [torch.zeros(1, n, n, dtype=torch.bool) for n in (4, 2)]
    for row, columns in enumerate(first):
        expected[0][0, row, columns] = True
    expected[1][0, 0, :] = expected[1][0, 1, 0] = True
    assert all(map(torch.equal, seen(mask), expected))
    each = BlockMask.from_indices([first.expand(3, -1, -1), second[:, :1].expand(3, -1, -1)], blocks)
    assert each.num_heads == 3
    assert torch.equal(seen(each)[1][2], torch.tensor([[False, True], [True, False]]))


@pytest.mark.parametrize("grid", [(1, 1, 1), (4, 5, 6), (2, 9, 3)])
@pytest.mark.parametrize("window", [(1, 1, 1), (3, 3, 3), (2, 4, 2), (99, 1, 5)])
def test_sliding(grid: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    """The rule written out, tile by tile; text sees all and is seen by all, and each head may have its window."""
    tile = (2, 2, 2)
    layout = PackedLayout.from_spans([[Span(tuple(n * 2 - 1 for n in grid)), Span.text(3)]])
    blocks = TokenBlocks.tiles(layout, tile)
    tables = seen(BlockMask.sliding(blocks, [window, (1, 1, 1)]))[0]
    tiles = list(itertools.product(*map(range, grid)))
    for (i, query), (j, key) in itertools.product(enumerate(tiles), enumerate(tiles)):
        near = True
        for a, b, length, size in zip(query, key, grid, window, strict=True):
            w = min(size, length)
            start = min(max(a - w // 2, 0), length - w)
            near &= start <= b < start + w
        assert tables[0, i, j] == near
        assert tables[1, i, j] == (query == key)
    assert tables[:, -1].all()
    assert tables[:, :, -1].all()


def test_flex() -> None:
    """A mask of flex_attention's, of partial and of full blocks."""
    blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 16, 16), (1, 16, 16)]), 64)
    table = torch.rand(2, 3, 4, 4) < 0.5
    table[:, :, :, 0] = True
    counts = table.sum(-1).int()
    indices = table.int().argsort(dim=-1, descending=True, stable=True).int()
    theirs = flex.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=64)
    mask = BlockMask.from_flex(theirs, blocks)
    assert all(map(torch.equal, seen(mask), table))
    half = counts // 2  # some of them as full blocks
    both = flex.BlockMask.from_kv_blocks(half, indices, counts - half, _rest(indices, half), BLOCK_SIZE=64)
    assert all(map(torch.equal, seen(BlockMask.from_flex(both, blocks)), table))


def test_flex_by_a_function() -> None:
    """A mask that torch made of a mask_mod, if that masks nothing within blocks."""
    blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 16, 16), (1, 16, 16)]), 64)
    for band in (1, 0):
        theirs = flex.create_block_mask(
            lambda b, h, i, j, band=band: (i // 64 - j // 64).abs() < band, None, None, 256, 256, device="cpu", BLOCK_SIZE=64
        )
        mask = BlockMask.from_flex(theirs, blocks)
        assert all(torch.equal(table, torch.eye(4, dtype=torch.bool)[None] & (band > 0)) for table in seen(mask))


def _rest(indices: Tensor, skipped: Tensor) -> Tensor:
    """Each row without its first ones, which come last."""
    place = (torch.arange(indices.shape[-1]) + skipped[..., None]) % indices.shape[-1]
    return indices.gather(-1, place.long())


def test_nothing_but_numbers_is_kept() -> None:
    """The lists of a mask's keys, first asked for while a call is transformed or in inference mode, serve training all the same."""
    blocks = TokenBlocks.runs(EQUAL, 64)
    q, k, v = torch.randn(3, EQUAL.num_tokens, 1, 8)
    for start in ("grad", "inference"):
        mask = BlockMask.from_dense([torch.eye(2).bool()] * 3, blocks)
        if start == "grad":
            torch.func.grad(lambda q, mask=mask: block_sparse_attention(q, k, v, mask).sum())(q)
        else:
            with torch.inference_mode():
                _ = mask.transposed
        assert len(pickle.loads(pickle.dumps(mask)).transposed.indices) == 6
        leaf = q.clone().requires_grad_()
        block_sparse_attention(leaf, k, v, mask).sum().backward()
        assert leaf.grad.isfinite().all()


def test_repr() -> None:
    blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 8, 8)]), 16)
    assert (
        repr(blocks)
        == "TokenBlocks(4 blocks of at most 16 tokens, cpu: PackedLayout(1 samples, 64 tokens, longest 64, cpu: 1x8x8))"
    )
    assert repr(BlockMask.from_dense([torch.ones(4, 4).bool()], blocks)) == "BlockMask(1 heads, 4 x 4 blocks, cpu)"


SMALL = TokenBlocks.runs(PackedLayout.from_grids([(1, 8, 8), (1, 4, 4)]), 16)  # 4 and 1 blocks
YES = torch.ones(4, 4, dtype=torch.bool)
EQUAL = PackedLayout.from_grids([(1, 1, 128)] * 3)
KV = torch.zeros(2, 1, 4, dtype=torch.int32)
CAUSAL = flex.create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
BAD = [
    (lambda: TokenBlocks.runs(SMALL, 16), "TokenBlocks.runs: layout: expected a PackedLayout, got TokenBlocks"),
    (lambda: TokenBlocks.runs(SMALL.layout, 0), "TokenBlocks.runs: size: expected an int >= 1, got 0"),
    (lambda: TokenBlocks.tiles(SMALL.layout, (1, 0, 2)), "TokenBlocks.tiles: tile: expected sizes >= 1, got (1, 0, 2)"),
    (lambda: TokenBlocks.tiles(SMALL.layout, 4), "TokenBlocks.tiles: tile: expected three ints (T, H, W), got 4"),
    (lambda: SMALL.arrange(torch.zeros(79)), "TokenBlocks.arrange: tokens: expected at least 80 rows, got shape [79]"),
    (lambda: BlockMask.from_dense(YES, SMALL), "mask: expected a list of tensors, one for each sample, got a tensor"),
    (lambda: BlockMask.from_dense([YES, YES], SMALL), "mask[1]: expected 1 heads of shape [1, 1], got 1 of [4, 4]"),
    (lambda: BlockMask.from_dense([YES.int(), YES], SMALL), "mask[0]: expected dtype bool, got int32"),
    (lambda: BlockMask.from_dense([YES[0], YES], SMALL), "mask[0]: expected shape [R, C] or [H, R, C], got [4]"),
    (lambda: BlockMask.from_dense([YES], SMALL.layout), "queries: expected TokenBlocks, got PackedLayout"),
    (lambda: BlockMask.from_dense([YES], TokenBlocks.runs(LAYOUT), SMALL), "keys: expected 4 samples, as many as queries, got 2"),
    (
        lambda: BlockMask.from_indices([torch.tensor([[0], [1], [4], [0]]), torch.zeros(1, 1).long()], SMALL),
        "BlockMask.from_indices: indices[0]: expected blocks 0 to 3 of the sample's keys, got 4",
    ),
    (
        lambda: BlockMask.from_indices([torch.zeros(4, 1).long(), torch.tensor([[-1]])], SMALL),
        "BlockMask.from_indices: indices[1]: expected blocks 0 to 0 of the sample's keys, got -1",
    ),
    (
        lambda: BlockMask.from_indices([torch.tensor([[2, 2]] * 4), torch.zeros(1, 1).long()], SMALL),
        "BlockMask.from_indices: indices[0]: expected each block once in a row, got 2 twice",
    ),
    (lambda: BlockMask.from_dense([YES[None][:0], YES[:1, :1]], SMALL), "mask[0]: expected at least one head, got none"),
    (
        lambda: BlockMask.from_indices(
            [torch.zeros(4, 1).long(), torch.zeros(1, 1).long()], SMALL, counts=[torch.tensor([0, 1, 2, 1]), torch.ones(1).int()]
        ),
        "BlockMask.from_indices: counts[0]: expected 0 to 1, got 2",
    ),
    (
        lambda: BlockMask.from_indices(
            [torch.zeros(4, 1).long(), torch.zeros(1, 1).long()], SMALL, counts=[torch.ones(3).int()] * 2
        ),
        "BlockMask.from_indices: counts[0]: expected 1 heads of shape [4], got 1 of [3]",
    ),
    (
        lambda: BlockMask.from_indices(torch.zeros(2, 4, 1).long(), SMALL),
        "BlockMask.from_indices: indices: expected a list of tensors, one for each sample, got a tensor",
    ),
    (lambda: BlockMask.from_flex(YES, SMALL), "BlockMask.from_flex: mask: expected a BlockMask of flex_attention, got Tensor"),
    (
        lambda: BlockMask.from_flex(CAUSAL, SMALL),
        "BlockMask.from_flex: mask: expected one of whole blocks, got one that masks 4 blocks in part",
    ),
    (
        lambda: BlockMask.from_flex(flex.BlockMask.from_kv_blocks(KV, KV[..., None], BLOCK_SIZE=32), SMALL),
        "BlockMask.from_flex: queries: expected blocks of 32 queries in samples of 128, got [4, 1] blocks in samples of [64, 16]",
    ),
    (
        lambda: BlockMask.from_flex(flex.BlockMask.from_kv_blocks(KV, KV[..., None], BLOCK_SIZE=32), TokenBlocks.runs(EQUAL, 40)),
        "BlockMask.from_flex: queries: expected blocks of 32 queries in samples of 128, got blocks of [40, 8]",
    ),
    (  # as many blocks, of as many tokens at most, but cut elsewhere
        lambda: BlockMask.from_flex(
            flex.BlockMask.from_kv_blocks(
                KV[:1, :, :2], KV[:1, :, :2, None].expand(1, 1, 2, 2), BLOCK_SIZE=64, seq_lengths=(96, 96)
            ),
            TokenBlocks.runs(PackedLayout.from_spans([[Span.text(32), Span.text(64)]]), 64),
        ),
        "BlockMask.from_flex: queries: expected blocks of 64 queries in samples of 96, got blocks of [32, 64]",
    ),
    (
        lambda: BlockMask.from_flex(
            flex.BlockMask.from_kv_blocks(KV[:1].expand(4, 1, 4), KV[:1, ..., None].expand(4, 1, 4, 4), BLOCK_SIZE=32),
            TokenBlocks.runs(EQUAL, 32),
        ),
        "BlockMask.from_flex: mask: expected a batch of 1 or 3, got 4",
    ),
    (lambda: BlockMask.sliding(SMALL, (1, 0, 1)), "BlockMask.sliding: window: expected sizes >= 1, got (1, 0, 1)"),
    (lambda: BlockMask.sliding(SMALL, []), "BlockMask.sliding: window: expected three sizes, or a list of these, got []"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call()


@pytest.mark.parametrize("change", ["other lists", "in place", "other memory"])
@pytest.mark.parametrize("compiled", [False, True])
def test_lists_that_change_change_the_gradient(change: str, compiled: bool) -> None:
    """What was made of the old ones for the backward is made anew."""
    attend = torch.compile(block_sparse_attention, backend="aot_eager") if compiled else block_sparse_attention
    blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 2, 4)]), 2)
    below = torch.ones(4, 4, dtype=torch.bool).tril()
    mask, other = (BlockMask.from_dense([table], blocks) for table in (below, below.T.clone()))
    q, k = torch.randn(8, 2, 8), torch.randn(8, 2, 8, requires_grad=True)

    def gradient(mask: BlockMask, attend: Callable[..., Tensor] = block_sparse_attention) -> Tensor:
        return torch.autograd.grad(attend(q, k, q, mask).square().sum(), k)[0]

    assert not torch.equal(gradient(mask), gradient(other))
    assert torch.equal(gradient(mask, attend), gradient(mask))
    if change == "other lists":
        mask.lists = other.lists
    else:
        for ours, theirs in zip(mask.lists, other.lists, strict=True):
            if change == "in place":
                ours.copy_(theirs)
            else:
                ours.data = theirs.clone()
    assert torch.equal(gradient(mask, attend), gradient(other))


def test_masks_are_made_where_the_layout_is() -> None:
    """Whatever torch's default device is."""
    layout = PackedLayout.from_grids([(1, 2, 4)])
    indices = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    none = PackedLayout.from_grids([])
    with torch.device("meta"):
        blocks = TokenBlocks.tiles(layout, (1, 1, 2))
        masks = [BlockMask.from_indices([indices], some) for some in (blocks, TokenBlocks.runs(layout, 2))]
        masks.append(BlockMask.from_dense([], TokenBlocks.runs(none)))
    assert {x.device.type for mask in masks for x in (*mask.lists, mask.queries.cu_blocks)} == {"cpu"}
    x = torch.arange(8)
    assert torch.equal(blocks.restore(blocks.arrange(x)), x)
    on_meta = BlockMask.from_dense([], TokenBlocks.runs(none.to("meta")))
    assert {x.device.type for x in on_meta.lists} == {"meta"}


def test_tiles_in_compiled_code_are_where_torch_makes_tensors() -> None:
    layout = PackedLayout.from_grids([(1, 2, 4)], "meta")
    with torch.device("meta"):
        order = torch.compile(lambda: TokenBlocks.tiles(layout, (1, 1, 2)).order, backend="eager")()
        origin = torch.compile(lambda: PackedLayout.from_grids([(1, 2, 4)]).origin, backend="eager")()
    assert order.shape == (8,)
    assert origin.device.type == "cpu"


@pytest.mark.parametrize("num_queries", [8, 0])
def test_a_program_that_was_exported_without_gradients_has_them(num_queries: int) -> None:
    queries, keys = (TokenBlocks.runs(PackedLayout.from_spans([[Span.text(n)]]), 2) for n in (num_queries, 8))
    mask = BlockMask.from_dense([torch.ones(2, num_queries // 2, 4, dtype=torch.bool).tril()], queries, keys)

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return block_sparse_attention(q, k, k, mask)

    inputs = torch.randn(num_queries, 2, 8), torch.randn(8, 2, 8)
    program = torch.export.export(Attend(), inputs).module()
    inputs = [x.requires_grad_() for x in inputs]
    expected, actual = (torch.autograd.grad(attend(*inputs).square().sum(), inputs) for attend in (Attend(), program))
    assert all(map(torch.equal, actual, expected))
