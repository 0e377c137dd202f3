"""A mask of keys, [B, Sk], as the order and the boundaries of a packed batch: on the device, without reading a value.

Keys that are attended to come first, sample after sample, and the others behind the last boundary. So all shapes are static, and
padding may be in front, in the middle, at the end, or a whole sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor, fail
from ..last_result import LastResult


class PackedKeys(NamedTuple):
    """Which key of the flattened batch [B * Sk] is at each place, int64 [B * Sk]; boundaries of the samples, int32 [B+1]."""

    order: Tensor
    cu_seqlens: Tensor


def key_mask(op: str, mask: Tensor, batch: int, num_keys: int) -> Tensor:
    """A mask of keys, bool [B, Sk], [Sk], or [B, 1, Sk] and [B, 1, 1, Sk] with any number of ones between -> bool [B, Sk].

    B and Sk of the mask may be 1, which stands for all samples or keys.

    Raises:
        ValueError, TypeError: for masks that differ by query or head, and for numbers that are added to scores.
    """
    check_tensor(op, "attn_mask", mask, dtype=None)
    if mask.dtype != torch.bool:
        fail(
            op, "attn_mask", 'dtype bool (the backend "sora" also adds numbers)', str(mask.dtype).removeprefix("torch."), TypeError
        )
    shape = tuple(mask.shape)
    if len(shape) > 2 and all(n == 1 for n in shape[1:-1]):
        mask = mask.reshape(shape[0], shape[-1])
    if mask.ndim == 1:
        mask = mask[None]
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, num_keys):
        expected = f'a mask of keys, [{batch}, {num_keys}] or [{batch}, 1, 1, {num_keys}] (the backend "sora" takes others)'
        fail(op, "attn_mask", expected, str(list(shape)))
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


@LastResult
def packed_keys(op: str, mask: Tensor, batch: int, num_keys: int) -> PackedKeys:
    """A mask that `key_mask` takes -> its keys packed, once for all layers of a model that are given it."""
    return pack_keys(key_mask(op, mask, batch, num_keys))
