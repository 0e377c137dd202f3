"""A packed batch cut into blocks of tokens, as block-sparse attention counts them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .checks import check_device, check_int, check_tensor, fail, triple
from .layout import Grid, PackedLayout

__all__ = ["TokenBlocks"]  # what users call


class TokenBlocks:
    """The tokens of a layout in blocks: the rows or columns of a `BlockMask`. Build one with `runs` or `tiles`.

    >>> layout = PackedLayout.from_grids([(4, 8, 12), (1, 16, 9)])
    >>> TokenBlocks.runs(layout, 64).num_blocks, TokenBlocks.tiles(layout, (4, 4, 4)).num_blocks
    ((6, 3), (6, 12))

    No block reaches over the end of a span. A layout of text and video has blocks of either, but none of both.

    Attributes:
        cu_blocks: int32 [R+1], boundaries of blocks in tokens.
        cu_samples: int32 [B+1], boundaries of samples in blocks.
        order: int64 [N], the token at each place, or None where tokens stay in the layout's order; see `arrange`.
        num_blocks: of each sample.
        sizes: tokens of each block.
        max_size: of the largest one.
        grids: for each sample and span, how many blocks there are along T, H and W. Runs lie along W.
        layout: whose tokens they are.
    """

    cu_blocks: Tensor
    cu_samples: Tensor
    order: Tensor | None
    _inverse: Tensor | None
    _constants = ("layout", "grids", "num_blocks", "sizes", "max_size")
    _tensors = ("cu_blocks", "cu_samples", "order", "_inverse")

    def __init__(
        self, layout: PackedLayout, grids: Iterable[Iterable[Grid]], sizes: Sequence[int], order: np.ndarray | None = None
    ) -> None:
        self.layout = layout
        self.grids = tuple(tuple(sample) for sample in grids)
        self.num_blocks = tuple(sum(t * h * w for t, h, w in sample) for sample in self.grids)
        self.sizes = tuple(sizes)
        self.max_size = max(sizes) if sizes else 0  # torch.compile takes no default
        self.cu_blocks = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device="cpu")
        self.cu_samples = torch.tensor([0, *itertools.accumulate(self.num_blocks)], dtype=torch.int32, device="cpu")
        self.order = self._inverse = None
        if order is not None:
            self.order = torch.from_numpy(order)
            self._inverse = torch.empty_like(self.order)
            self._inverse[self.order] = torch.arange(self.order.shape[0], device=self.order.device)
        self._move(layout.device)

    @classmethod
    def runs(cls, layout: PackedLayout, size: int = 64) -> TokenBlocks:
        """Runs of `size` tokens, counted from the first one of each span; the last of a span may be shorter."""
        _check_layout("TokenBlocks.runs", layout)
        size = check_int("TokenBlocks.runs", "size", size, at_least=1)
        grids = [[(1, 1, -(-span.num_tokens // size)) for span in sample] for sample in layout.spans]
        sizes = [n for sample in layout.spans for span in sample for n in run_sizes(span.num_tokens, size)]
        return cls(layout, grids, sizes)

    @classmethod
    def tiles(cls, layout: PackedLayout, tile: tuple[int, int, int] = (4, 4, 4)) -> TokenBlocks:
        """Boxes of `tile` tokens along T, H and W of each span's grid; those at its ends may be smaller.

        The tokens of a tile must lie together, and so `arrange` has to put them there. Text has runs of as many tokens.
        """
        op = "TokenBlocks.tiles"
        _check_layout(op, layout)
        tile = tuple(triple(op, "tile", tile, int))
        if min(tile) < 1:
            fail(op, "tile", "sizes >= 1", repr(tile))
        grids: list[list[Grid]] = []
        sizes: list[int] = []
        order, first = [np.zeros(0, np.int64)], 0
        for sample in layout.spans:
            grids.append([])
            for span in sample:
                if span.is_text or span.num_tokens == 0:
                    volume = tile[0] * tile[1] * tile[2]
                    grids[-1].append((1, 1, -(-span.num_tokens // volume)))
                    sizes += run_sizes(span.num_tokens, volume)
                    order.append(np.arange(span.num_tokens))
                else:
                    t, h, w = (-(-n // m) for n, m in zip(span.grid, tile, strict=True))
                    grids[-1].append((t, h, w))
                    of_tile = _tile_of_token(span.grid, tile)
                    sizes += np.bincount(of_tile).tolist()
                    order.append(of_tile.argsort(kind="stable"))
                order[-1] = order[-1] + first
                first += span.num_tokens
        return cls(layout, grids, sizes, np.concatenate(order))

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.cu_blocks.device

    def to(self, device: torch.device | str) -> TokenBlocks:
        """The same blocks with their tensors, and the layout's, on `device`."""
        device = check_device("TokenBlocks.to", "device", device)
        moved = object.__new__(TokenBlocks)
        for name in (*self._constants, *self._tensors):
            setattr(moved, name, getattr(self, name))
        moved.layout = self.layout.to(device)
        moved._move(device)
        return moved

    def _move(self, device: torch.device) -> None:
        for name in self._tensors:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu"))

    def arrange(self, tokens: Tensor) -> Tensor:
        """[N, ...] in the layout's order -> in the order of the blocks; what comes behind the last token stays there."""
        return self._ordered("arrange", tokens, self.order)

    def restore(self, tokens: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        return self._ordered("restore", tokens, self._inverse)

    def _ordered(self, op: str, tokens: Tensor, order: Tensor | None) -> Tensor:
        num_tokens = self.layout.num_tokens
        check_tensor(f"TokenBlocks.{op}", "tokens", tokens, dtype=None, like=self.cu_blocks)
        if tokens.ndim < 1 or tokens.shape[0] < num_tokens:
            fail(f"TokenBlocks.{op}", "tokens", f"at least {num_tokens} rows", f"shape {list(tokens.shape)}")
        if order is None:
            return tokens
        ordered = tokens.index_select(0, order)
        return ordered if tokens.shape[0] == num_tokens else torch.cat([ordered, tokens[num_tokens:]])

    def __repr__(self) -> str:
        return f"TokenBlocks({sum(self.num_blocks)} blocks of at most {self.max_size} tokens, {self.device}: {self.layout!r})"


def _check_layout(op: str, layout: object) -> None:
    if not isinstance(layout, PackedLayout):
        fail(op, "layout", "a PackedLayout", type(layout).__name__, TypeError)


def run_sizes(num_tokens: int, size: int) -> list[int]:
    """How many tokens the runs of a span have."""
    return [min(size, num_tokens - first) for first in range(0, num_tokens, size)]


def _tile_of_token(grid: Grid, tile: tuple[int, ...]) -> np.ndarray:
    """The number of the tile of each token of a grid, both in raster order."""
    t, h, w = (np.arange(n) // m for n, m in zip(grid, tile, strict=True))
    _, tiles_h, tiles_w = (-(-n // m) for n, m in zip(grid, tile, strict=True))
    return ((t[:, None, None] * tiles_h + h[:, None]) * tiles_w + w).reshape(-1)
