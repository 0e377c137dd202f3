"""A mask of keys, [B, Sk], as the order and the boundaries of a packed batch: on the device, without reading a value.

Keys that are attended to come first, sample after sample, and the others behind the last boundary. So all shapes are static, and
padding may be in front, in the middle, at the end, or a whole sample.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor, fail


class PackedKeys(NamedTuple):
    """Which key of the flattened batch [B * Sk] is at each place, int64 [B * Sk]; boundaries of the samples, int32 [B+1]."""

    order: Tensor
    cu_seqlens: Tensor


def key_mask(op: str, mask: Tensor, batch: int, num_keys: int) -> Tensor:
    """A mask that broadcasts to [B, H, S, Sk] and is the same for all heads and queries -> bool [B, Sk].

    [B, Sk] is taken as well, as diffusers' own backends do.

    Raises:
        ValueError, TypeError: for masks that differ by query or head, and for numbers that are added to scores.
    """
    check_tensor(op, "attn_mask", mask, dtype=torch.bool)
    shape = tuple(mask.shape)
    if len(shape) > 2 and all(n == 1 for n in shape[1:-1]):
        mask = mask.reshape(shape[0], shape[-1])
    if mask.ndim == 1:
        mask = mask[None]
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, num_keys):
        fail(op, "attn_mask", f"a mask of keys, [{batch}, {num_keys}] or [{batch}, 1, 1, {num_keys}]", str(list(shape)))
    return mask.expand(batch, num_keys)


def pack_keys(mask: Tensor) -> PackedKeys:
    """bool [B, Sk] -> the order of the keys, and the boundaries of the samples.

    >>> pack_keys(torch.tensor([[False, True], [True, True]]))
    PackedKeys(order=tensor([1, 2, 3, 0]), cu_seqlens=tensor([0, 1, 3], dtype=torch.int32))
    """
    kept = mask.flatten()
    place = kept.cumsum(0) - 1
    behind = place[-1:] + (~kept).cumsum(0)  # the last place of a kept key, and one more for each that is not
    place = torch.where(kept, place, behind)
    index = torch.arange(kept.shape[0], device=mask.device)
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return PackedKeys(torch.empty_like(index).scatter_(0, place, index), cu_seqlens)


class _Kept(NamedTuple):
    mask: weakref.ref
    version: int
    shape: tuple[int, int]
    keys: PackedKeys


_kept: _Kept | None = None


def _forget(mask: weakref.ref) -> None:
    """Frees what was made of a mask that is gone."""
    global _kept
    kept = _kept
    if kept is not None and kept.mask is mask:
        _kept = None


def packed_keys(op: str, mask: Tensor, batch: int, num_keys: int) -> PackedKeys:
    """The same, once for a mask that all layers of a model are given: the last one's is kept while the mask lives unchanged."""
    global _kept
    # Nobody counts changes of a tensor of inference, and replays of a graph must pack what the mask is by then.
    if torch.compiler.is_compiling() or mask.is_inference() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return pack_keys(key_mask(op, mask, batch, num_keys))
    kept = _kept
    if kept is None or kept.mask() is not mask or kept.version != mask._version or kept.shape != (batch, num_keys):
        keys = pack_keys(key_mask(op, mask, batch, num_keys))
        kept = _kept = _Kept(weakref.ref(mask, _forget), mask._version, (batch, num_keys), keys)
    return kept.keys
