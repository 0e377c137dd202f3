"""Boundaries of packed samples that use only their first keys: what `seqused_k` and `cache_seqlens` mean to the kernels.

Sample b becomes two: its queries with the keys it uses, and no query with the keys it does not. Kernels need nothing new for that,
forward or backward: keys without queries are never seen, and their gradients are zero. Causal masks, windows and ALiBi are aligned
to the end of the used keys, as FlashAttention's are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import check_boundaries, fail
from .library import define


def used_keys(
    op: str, argument: str, cu_q: Tensor, cu_k: Tensor, used: Tensor, tokens: tuple[int, int], new: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Boundaries int32 [2B+1] of queries and keys, and `used` within its limits, of samples that use used[b] + new keys each.

    >>> used_keys("op", "used", *torch.tensor([[0, 2, 5], [0, 4, 8]]).int(), torch.tensor([3, 4]).int(), (5, 8))[:2]
    (tensor([0, 2, 2, 5, 5], dtype=torch.int32), tensor([0, 3, 4, 8, 8], dtype=torch.int32))

    Args:
        used: int32 [B]. On the host a number that is negative or more than a sample has is an error; elsewhere it is not read and
            counts as the nearest one that is possible.
        tokens: rows of queries and keys.
        new: how many more keys each sample has room for and uses.
    """
    return _used_keys(cu_q, cu_k, used, *tokens, new, op, argument)


def _run(
    cu_q: Tensor, cu_k: Tensor, used: Tensor, num_q: int, num_k: int, new: int, op: str, argument: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_boundaries("attention", "cu_seqlens_q", cu_q, num_q)
    check_boundaries("attention", "cu_seqlens_k", cu_k, num_k)
    room = cu_k.diff() - new
    if used.is_cpu:
        values, limits = np.array(used.tolist(), dtype=np.int64), np.array(room.tolist(), dtype=np.int64)
        wrong = (values < 0) | (values > limits)
        if wrong.any():
            b = int(wrong.argmax())
            fail(op, argument, f"0 to {limits[b]} keys in sample {b}", str(values[b]))
    used = used.clamp(min=0).minimum(room.clamp(min=0))
    return _twice(cu_q, cu_q[1:]), _twice(cu_k, cu_k[:-1] + used + new), used


def _twice(cu: Tensor, ends: Tensor) -> Tensor:
    """`cu` [B+1] with a boundary more in every sample: [2B+1]."""
    return torch.cat([cu[:1], torch.stack([ends, cu[1:]], dim=1).flatten()])


def _fake(cu_q: Tensor, cu_k: Tensor, used: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    boundaries = 2 * used.shape[0] + 1
    return cu_q.new_empty(boundaries), cu_k.new_empty(boundaries), torch.empty_like(used)


_used_keys = define(
    "used_keys(Tensor cu_q, Tensor cu_k, Tensor used, SymInt num_q, SymInt num_k, SymInt new, str op, str argument)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
