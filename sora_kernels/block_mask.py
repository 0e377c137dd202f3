"""Which blocks of keys each block of queries sees, per sample and head, as block-sparse attention takes it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import check_device, check_list, check_tensor, fail, triple
from .last_result import LastResult
from .layout import Grid
from .token_blocks import TokenBlocks, run_sizes

__all__ = ["BlockMask"]  # what users call

Window = tuple[int, int, int]


class BlockLists(NamedTuple):
    """A list of numbers of blocks for each row: row r has indices[offsets[r]] to indices[offsets[r + 1] - 1], which rise.

    offsets int32 [rows + 1]; indices int32, which may hold more behind the last list. The rows of head h come after those of h - 1.
    """

    offsets: Tensor
    indices: Tensor


def transposed(offsets: Tensor, indices: Tensor, num_heads: int, rows: int, columns: int) -> BlockLists:
    """For each head and column, the rows whose lists have it."""
    entries = torch.arange(indices.shape[0], device=indices.device, dtype=torch.int32)
    row = torch.searchsorted(offsets, entries, right=True) - 1
    key = row // max(rows, 1) * columns + indices
    key = torch.where(entries < offsets[-1], key, num_heads * columns)  # what is behind the last list
    ordered, order = key.sort(stable=True)
    wanted = torch.arange(num_heads * columns + 1, device=key.device)
    starts = torch.searchsorted(ordered, wanted).to(torch.int32)
    return BlockLists(starts, (row % max(rows, 1))[order].to(torch.int32))


class BlockMask:
    """Which blocks of keys each block of queries sees. Build one with `from_dense`, `from_indices`, `from_flex` or `sliding`.

    >>> blocks = TokenBlocks.runs(layout, 64)
    >>> diagonal = BlockMask.from_dense([torch.eye(n, dtype=torch.bool) for n in blocks.num_blocks], blocks)
    >>> nearest = BlockMask.sliding(TokenBlocks.tiles(layout, (4, 4, 4)), (1, 3, 3))

    On an accelerator nothing is read back, so masks can be made anew in every layer. What is wrong with one, an index that a sample
    does not have, is an error on the CPU. Elsewhere, and in compiled code, such an index counts as the nearest possible one.

    Attributes:
        queries, keys: the blocks.
        num_heads: of the mask; 1 if it holds for all heads of the queries.
        lists: for each head and block of queries, the blocks of keys that it sees, counted from those of the first sample.
    """

    def __init__(self, queries: TokenBlocks, keys: TokenBlocks, num_heads: int, lists: BlockLists) -> None:
        self.queries, self.keys, self.num_heads, self.lists = queries, keys, num_heads, lists
        self._transposed = LastResult(transposed)

    @classmethod
    def from_dense(cls, mask: Sequence[Tensor], queries: TokenBlocks, keys: TokenBlocks | None = None) -> BlockMask:
        """From a table for each sample.

        Args:
            mask: bool [R, C] or [H, R, C] for each sample of R blocks of queries and C of keys: True is seen.
            queries, keys: the blocks; without `keys` those of the queries.
        """
        op = "BlockMask.from_dense"
        keys = _check_blocks(op, queries, keys)
        tables = _tables(op, "mask", mask, queries, torch.bool)
        num_heads = tables[0].shape[0] if tables else 1
        for i, (table, rows, columns) in enumerate(zip(tables, queries.num_blocks, keys.num_blocks, strict=True)):
            _check_shape(op, f"mask[{i}]", table, (num_heads, rows, columns))
        widths = [columns for rows, columns in zip(queries.num_blocks, keys.num_blocks, strict=True) for _ in range(rows)]
        firsts = [first for first, rows in zip(_firsts(keys), queries.num_blocks, strict=True) for _ in range(rows)]
        nothing = torch.zeros(num_heads, 0, dtype=torch.bool, device=queries.device)
        seen = torch.cat([nothing, *(table.flatten(1) for table in tables)], 1)
        column = _on(queries.device, _columns(firsts, widths)).expand(num_heads, -1)
        ends = _on(queries.device, np.cumsum([0, *widths], dtype=np.int64))
        first_row = torch.arange(num_heads, device=queries.device)[:, None] * seen.shape[1]
        starts = torch.cat([(first_row + ends[:-1]).flatten(), first_row[-1:, 0] + ends[-1:]])
        return cls(queries, keys, num_heads, _compact(seen.flatten(), column.reshape(-1), starts))

    @classmethod
    def from_indices(
        cls,
        indices: Sequence[Tensor],
        queries: TokenBlocks,
        keys: TokenBlocks | None = None,
        counts: Sequence[Tensor] | None = None,
    ) -> BlockMask:
        """From the numbers of the blocks that are seen, such as `torch.topk` gives them.

        Args:
            indices: integers [R, K] or [H, R, K] for each sample of R blocks of queries, in any order: blocks of keys, counted
                from the sample's first. K may differ.
            counts: integers [R] or [H, R] for each sample: how many of them hold, the first ones; without it all.
            queries, keys: the blocks; without `keys` those of the queries.

        Raises:
            ValueError: on the CPU, also where an index is out of range or comes twice.
        """
        op = "BlockMask.from_indices"
        keys = _check_blocks(op, queries, keys)
        tables = _tables(op, "indices", indices, queries, (torch.int32, torch.int64))
        num_heads = tables[0].shape[0] if tables else 1
        used: list[Tensor | None] = [None] * len(tables)
        if counts is not None:
            used = list(_tables(op, "counts", counts, queries, (torch.int32, torch.int64), 2))
        most = max([table.shape[-1] for table in tables]) if tables else 0  # torch.compile takes no default
        padded = []
        for i, (table, count, first) in enumerate(zip(tables, used, _firsts(keys), strict=True)):
            _check_shape(op, f"indices[{i}]", table, (num_heads, queries.num_blocks[i], table.shape[-1]))
            held = torch.ones_like(table, dtype=torch.bool)
            if count is not None:
                _check_shape(op, f"counts[{i}]", count, (num_heads, queries.num_blocks[i]))
                _check_counts(op, i, count, table.shape[-1])
                held = torch.arange(table.shape[-1], device=table.device) < count[..., None]
            last = keys.num_blocks[i] - 1
            _check_indices(op, i, table, held, last)
            held = held if last >= 0 else torch.zeros_like(held)
            table = torch.where(held, table.clamp(0, max(last, 0)) + first, _NONE).to(torch.int32)
            padded.append(torch.nn.functional.pad(table, (0, most - table.shape[-1]), value=_NONE))
        if not padded:
            padded = [torch.zeros(1, 0, 0, dtype=torch.int32, device=queries.device)]
        table = torch.cat(padded, 1).sort(-1).values  # what is not held comes last
        starts = torch.arange(table.shape[0] * table.shape[1] + 1, device=table.device) * most
        return cls(queries, keys, num_heads, _compact((table != _NONE).flatten(), table.flatten(), starts))

    @classmethod
    def from_flex(cls, mask: Any, queries: TokenBlocks, keys: TokenBlocks | None = None) -> BlockMask:
        """From a `BlockMask` of `torch.nn.attention.flex_attention`, whose batch are samples of equal length.

        Its rows and columns are tokens as `queries` and `keys` arrange them. If it has a mask_mod, the device is asked whether that
        masks anything within blocks.

        Raises:
            ValueError: if it masks tokens within blocks, or its blocks, samples or lengths are others.
        """
        op = "BlockMask.from_flex"
        keys = _check_blocks(op, queries, keys)
        if not hasattr(mask, "kv_num_blocks"):
            fail(op, "mask", "a BlockMask of flex_attention", type(mask).__name__, TypeError)
        has_mod = getattr(mask.mask_mod, "__name__", "") != "noop_mask"
        if has_mod and (in_part := int(mask.kv_num_blocks.sum())):
            fail(op, "mask", "one of whole blocks", f"one that masks {in_part} blocks in part")
        for name, side, length, size in zip(("queries", "keys"), (queries, keys), mask.seq_lengths, mask.BLOCK_SIZE, strict=True):
            expected = f"blocks of {size} {name} in samples of {length}"
            if set(side.layout.seqlens) != {length} or set(side.num_blocks) != {-(-length // size)}:
                fail(op, name, expected, f"{list(side.num_blocks)} blocks in samples of {list(side.layout.seqlens)}")
            if list(side.sizes) != run_sizes(length, size) * len(side.num_blocks):
                fail(op, name, expected, f"blocks of {list(dict.fromkeys(side.sizes))}")
        if mask.kv_num_blocks.shape[0] not in (1, len(queries.num_blocks)):
            fail(op, "mask", f"a batch of 1 or {len(queries.num_blocks)}", str(mask.kv_num_blocks.shape[0]))
        parts = [] if has_mod else [(mask.kv_indices, mask.kv_num_blocks)]
        if mask.full_kv_indices is not None:
            parts.append((mask.full_kv_indices, mask.full_kv_num_blocks))
        if not parts:  # no block is seen in full, or in part
            parts = [(mask.kv_indices, mask.kv_num_blocks)]
        seen = torch.stack([_scattered(*part) for part in parts]).any(0)
        return cls.from_dense(list(seen.expand(len(queries.num_blocks), -1, -1, -1)), queries, keys)

    @classmethod
    def sliding(cls, blocks: TokenBlocks, window: Window | Sequence[Window]) -> BlockMask:
        """Each tile sees a window of tiles of its own span, and all of its sample's other spans; text sees all.

        Along an axis of L tiles it sees w = min(window, L), from clamp(i - w // 2, 0, L - w) on.

        Args:
            blocks: made by `TokenBlocks.tiles`; runs lie along W.
            window: tiles along T, H and W, or as many of these as there are heads.
        """
        op = "BlockMask.sliding"
        if not isinstance(blocks, TokenBlocks):
            fail(op, "blocks", "TokenBlocks", type(blocks).__name__, TypeError)
        listed = check_list(op, "window", "three sizes (T, H, W), or a list of these", window)
        if not listed:
            fail(op, "window", "three sizes, or a list of these", repr(window))
        each = listed if isinstance(listed[0], Sequence) else [listed]
        windows = [tuple(triple(op, "window", one, int)) for one in each]
        if min(map(min, windows)) < 1:
            fail(op, "window", "sizes >= 1", repr(window))
        masks = []
        for spans, grids in zip(blocks.layout.spans, blocks.grids, strict=True):
            starts = [0, *itertools.accumulate(t * h * w for t, h, w in grids)]
            mask = np.ones((len(windows), starts[-1], starts[-1]), bool)
            for span, grid, first, last in zip(spans, grids, starts, starts[1:], strict=False):
                if not span.is_text:
                    mask[:, first:last, first:last] = [_near(grid, one) for one in windows]
            masks.append(torch.from_numpy(mask).to(blocks.device))
        return cls.from_dense(masks, blocks)

    @property
    def transposed(self) -> BlockLists:
        """For each head and block of keys, the blocks of queries that see it: for the backward. Kept while nothing changes."""
        return self._transposed(*self.lists, self.num_heads, sum(self.queries.num_blocks), sum(self.keys.num_blocks))

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its tensors on `device`."""
        device = check_device("BlockMask.to", "device", device)
        queries = self.queries.to(device)
        keys = queries if self.keys is self.queries else self.keys.to(device)
        return BlockMask(
            queries, keys, self.num_heads, BlockLists(*(x.to(device, non_blocking=device.type != "cpu") for x in self.lists))
        )

    def __repr__(self) -> str:
        rows, columns = sum(self.queries.num_blocks), sum(self.keys.num_blocks)
        return f"BlockMask({self.num_heads} heads, {rows} x {columns} blocks, {self.queries.device})"


_NONE = 2**31 - 1  # no block: sorts behind all


def _check_blocks(op: str, queries: object, keys: object) -> TokenBlocks:
    """The blocks of keys."""
    if not isinstance(queries, TokenBlocks):
        fail(op, "queries", "TokenBlocks", type(queries).__name__, TypeError)
    if keys is None:
        return queries
    if not isinstance(keys, TokenBlocks):
        fail(op, "keys", "TokenBlocks", type(keys).__name__, TypeError)
    if len(keys.num_blocks) != len(queries.num_blocks):
        fail(op, "keys", f"{len(queries.num_blocks)} samples, as many as queries", str(len(keys.num_blocks)))
    if keys.device != queries.device:
        fail(op, "keys", f"blocks on {queries.device}", f"on {keys.device}")
    return keys


def _tables(
    op: str, argument: str, tables: object, queries: TokenBlocks, dtype: torch.dtype | tuple[torch.dtype, ...], rank: int = 3
) -> list[Tensor]:
    """A tensor for each sample, of `rank` axes: what has one less is of one head."""
    if isinstance(tables, Tensor):
        fail(op, argument, "a list of tensors, one for each sample", "a tensor", TypeError)
    listed = check_list(op, argument, "a list of tensors", tables)
    if len(listed) != len(queries.num_blocks):
        fail(op, argument, f"{len(queries.num_blocks)} tensors, one for each sample", str(len(listed)))
    for i, table in enumerate(listed):
        check_tensor(op, f"{argument}[{i}]", table, dtype=dtype, like=queries.cu_blocks)
        if table.ndim not in (rank - 1, rank):
            axes = ("[R, K] or [H, R, K]" if argument == "indices" else "[R, C] or [H, R, C]") if rank == 3 else "[R] or [H, R]"
            fail(op, f"{argument}[{i}]", f"shape {axes}", str(list(table.shape)))
        if table.ndim == rank and table.shape[0] == 0:
            fail(op, f"{argument}[{i}]", "at least one head", "none")
    return [table[None] if table.ndim < rank else table for table in listed]


def _check_shape(op: str, argument: str, table: Tensor, shape: tuple[int, ...]) -> None:
    """Of a mask's table: [heads, rows, ...], where a table of one head may come without that axis."""
    if tuple(table.shape) != shape:
        fail(op, argument, f"{shape[0]} heads of shape {list(shape[1:])}", f"{table.shape[0]} of {list(table.shape[1:])}")


def _check_indices(op: str, sample: int, table: Tensor, held: Tensor, last: int) -> None:
    """Only on the host, as reading a value off an accelerator would stall its stream."""
    if not table.is_cpu or torch.compiler.is_compiling():
        return
    wrong = table[held & ((table < 0) | (table > last))]
    if wrong.numel():
        fail(op, f"indices[{sample}]", f"blocks 0 to {last} of the sample's keys", str(wrong[0].item()))
    ordered = torch.where(held, table, -1 - torch.arange(table.shape[-1], device="cpu")).sort(-1).values
    twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
    if twice.numel():
        fail(op, f"indices[{sample}]", "each block once in a row", f"{twice[0].item()} twice")


def _check_counts(op: str, sample: int, count: Tensor, most: int) -> None:
    """On the host, too."""
    if not count.is_cpu or torch.compiler.is_compiling():
        return
    wrong = count[(count < 0) | (count > most)]
    if wrong.numel():
        fail(op, f"counts[{sample}]", f"0 to {most}", str(wrong[0].item()))


def _scattered(indices: Tensor, counts: Tensor) -> Tensor:
    """bool [..., R, C] of indices [..., R, C], of which the first counts [..., R] hold."""
    most = indices.shape[-1]
    held = torch.arange(most, device=indices.device) < counts[..., None]
    seen = torch.zeros(*indices.shape[:-1], most + 1, dtype=torch.bool, device=indices.device)
    return seen.scatter(-1, torch.where(held, indices, most).clamp(0, most).long(), True)[..., :-1]


def _firsts(blocks: TokenBlocks) -> list[int]:
    """The number of each sample's first block."""
    return [0, *itertools.accumulate(blocks.num_blocks)][:-1]


def _on(device: torch.device, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def _columns(firsts: list[int], widths: list[int]) -> np.ndarray:
    """first, first + 1, ... of `width` numbers, one row after the other."""
    rows = [np.arange(first, first + width, dtype=np.int32) for first, width in zip(firsts, widths, strict=True)]
    return np.concatenate([np.zeros(0, np.int32), *rows])


def _compact(held: Tensor, numbers: Tensor, starts: Tensor) -> BlockLists:
    """The lists of the numbers that are held; those of row r are between starts[r] and starts[r + 1]."""
    if held.shape[0] > _NONE:
        fail("BlockMask", "mask", "fewer than 2**31 pairs of blocks", str(held.shape[0]))
    before = torch.nn.functional.pad(held.cumsum(0), (1, 0))
    offsets = before[starts].to(torch.int32)
    # Without reading how many there are: all others share a place behind the end.
    place = torch.where(held, before[:-1], held.shape[0])
    indices = numbers.new_zeros(held.shape[0] + 1).scatter_(0, place, numbers)[:-1]
    if indices.is_cpu and not torch.compiler.is_compiling():
        indices = indices[: int(offsets[-1])].clone()
    return BlockLists(offsets, indices)


def _near(grid: Grid, window: Window) -> np.ndarray:
    """bool [tiles, tiles]: which tiles of a grid each of them sees."""
    seen = []
    for length, size in zip(grid, window, strict=True):
        w = min(size, length)
        begin = (np.arange(length) - w // 2).clip(0, length - w)[:, None]
        j = np.arange(length)
        seen.append((j >= begin) & (j < begin + w))
    of_t, of_h, of_w = seen
    return np.kron(np.kron(of_t, of_h), of_w)
