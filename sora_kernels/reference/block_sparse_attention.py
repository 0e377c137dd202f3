"""Block-sparse attention: a token sees the tokens of all blocks that its block sees.

out[i] = Σ_j softmax_j(scale · q[i]·k[j]) · v[j]
"""

import torch
from torch import Tensor

from .attention import attend, boundaries, join, statistics
from .common import write, write_gradients


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_blocks_q: Tensor,
    cu_blocks_k: Tensor,
    cu_samples_q: Tensor,
    cu_samples_k: Tensor,
    offsets: Tensor,
    indices: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N,H,d], k, v [Nk,Hk,d]; lists int32 of (heads, blocks of queries) -> out [N,H,d], lse [H,N], statistics [2,H,N]."""
    sees = seen_blocks(offsets, indices, len(cu_blocks_q) - 1, len(cu_blocks_k) - 1)
    results = []
    for (row, end_row), (column, end_column) in zip(boundaries(cu_samples_q), boundaries(cu_samples_k), strict=True):
        cu_q, cu_k = cu_blocks_q[row : end_row + 1], cu_blocks_k[column : end_column + 1]
        blocks = sees[:, row:end_row, column:end_column]
        visible = blocks.repeat_interleave(cu_q.diff(), dim=1).repeat_interleave(cu_k.diff(), dim=2)
        of_q, of_k = slice(int(cu_q[0]), int(cu_q[-1])), slice(int(cu_k[0]), int(cu_k[-1]))
        results.append(attend(q[of_q], k[of_k], v[of_k], visible, scale))
    out, lse, maximum, total = join(results, q)
    return out, lse, statistics(maximum, total, scale, is_plain=True)


def seen_blocks(offsets: Tensor, indices: Tensor, rows: int, columns: int) -> Tensor:
    """bool [heads, rows, columns] of the lists; one head if there are no rows."""
    counts = offsets.diff()
    row = counts.new_tensor(range(len(counts))).repeat_interleave(counts)
    sees = torch.zeros(len(counts), columns, dtype=torch.bool, device=counts.device)
    sees[row.long(), indices[: len(row)].long()] = True
    return sees.view(len(counts) // rows if rows else 1, rows, columns)


def block_sparse_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_blocks_q: Tensor,
    cu_blocks_k: Tensor,
    cu_samples_q: Tensor,
    cu_samples_k: Tensor,
    offsets: Tensor,
    indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
) -> None:
    lists = cu_blocks_q, cu_blocks_k, cu_samples_q, cu_samples_k, offsets, indices
    write(block_sparse_attention(q, k, v, *lists, scale), (out, lse, statistics))


def block_sparse_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_blocks_q: Tensor,
    cu_blocks_k: Tensor,
    cu_samples_q: Tensor,
    cu_samples_k: Tensor,
    offsets: Tensor,
    indices: Tensor,
    key_offsets: Tensor,
    key_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    lists = cu_blocks_q, cu_blocks_k, cu_samples_q, cu_samples_k, offsets, indices

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return block_sparse_attention(q, k, v, *lists, scale)[:2]

    write_gradients(function, (q, k, v), (dout, dlse), (dq, dk, dv))
