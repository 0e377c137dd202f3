"""What stands in for flash_attn.bert_padding: from a padded batch to a packed one and back, in plain torch, with gradients.

How many tokens there are is read from the device, as the shape of what comes back depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_int, check_tensor, fail

NAMES = (
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices`, int [Z], of input [N, ...] -> [Z, ...]. Gradients of a row that is taken twice are added.

    >>> index_first_axis(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0]))
    tensor([[3.],
            [1.]])
    """
    op = "index_first_axis"
    check_tensor(op, "input", input, dtype=None)
    if input.ndim == 0:
        fail(op, "input", "shape [N, ...]", "[]")
    _check_indices(op, indices, input.shape[0], input)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """values [Z, ...] as rows `indices`, int [Z], of [first_axis_dim, ...]; the other rows are zero.

    >>> index_put_first_axis(torch.tensor([[1.0], [2.0]]), torch.tensor([2, 0]), 3)
    tensor([[2.],
            [0.],
            [1.]])
    """
    op = "index_put_first_axis"
    return _put(op, "values", values, indices, check_int(op, "first_axis_dim", first_axis_dim, at_least=0))


def _put(op: str, name: str, values: Tensor, indices: Tensor, rows: int) -> Tensor:
    check_tensor(op, name, values, dtype=None)
    _check_indices(op, indices, rows, values)
    if values.shape[:1] != indices.shape:
        fail(op, name, f"shape [{len(indices)}, ...], as there are as many indices", str(list(values.shape)))
    return values.new_zeros(rows, *values.shape[1:]).index_copy(0, indices.long(), values)


def _check_indices(op: str, indices: Tensor, rows: int, like: Tensor) -> None:
    check_tensor(op, "indices", indices, ("Z",), dtype=(torch.int64, torch.int32), like=like)
    if indices.is_cpu and indices.numel():  # elsewhere the values would have to be read
        first, last = (int(x) for x in indices.aminmax())
        if first < 0 or last >= rows:
            fail(op, "indices", f"0 to {rows - 1}", f"{first} to {last}")


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one behind the other, sample after sample.

    >>> x, mask = torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 1, 0], [0, 1, 0]])
    >>> tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    >>> tokens.flatten(), indices, cu_seqlens, max_seqlen
    (tensor([0., 1., 4.]), tensor([0, 1, 4]), tensor([0, 2, 3], dtype=torch.int32), 2)

    Args:
        hidden_states: [B, S, ...].
        attention_mask: bool or int [B, S]: what is not 0 is a token.
        unused_mask: bool or int [B, S]: what is not 0 has a place in the packed batch, though it is not a token.

    Returns:
        tokens [N, ...]; indices, int64 [N], of them in the flattened batch; cu_seqlens, int32 [B+1]; the longest sample, an int;
        and how many of each sample are tokens, int32 [B], as flash_attn counts them: without the unused ones.
    """
    op = "unpad_input"
    _check_mask(op, "attention_mask", attention_mask, hidden_states)
    used = attention_mask != 0
    kept = used
    if unused_mask is not None:
        _check_mask(op, "unused_mask", unused_mask, hidden_states)
        kept = used | (unused_mask != 0)
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    return *_packed(hidden_states, kept, lengths), used.sum(dim=-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same of rows in which several samples stand one behind the other, with the padding at the end.

    >>> lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    >>> tokens, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(torch.randn(2, 6, 8), lengths)
    >>> tokens.shape, cu_seqlens, max_seqlen
    (torch.Size([11, 8]), tensor([ 0,  2,  5, 11], dtype=torch.int32), 6)

    Args:
        hidden_states: [B, S, ...].
        attention_mask_in_length: int [B, S]: the lengths of row b's samples, in order; zeros among them are none. They add up to
            at most S.

    Returns:
        tokens [N, ...], indices, int64 [N], cu_seqlens, int32 [samples + 1], and the longest sample, an int.
    """
    op, name = "unpad_input_for_concatenated_sequences", "attention_mask_in_length"
    lengths = attention_mask_in_length
    _check_mask(op, name, lengths, hidden_states, _INTEGERS)
    together, room = lengths.sum(dim=-1), lengths.shape[-1]
    if lengths.numel() and (int(lengths.min()) < 0 or int(together.max()) > room):
        fail(
            op, name, f"lengths from 0 that add up to at most {room} in each row", f"min {lengths.min()}, sums {together.tolist()}"
        )
    kept = torch.arange(room, device=lengths.device) < together[:, None]
    return _packed(hidden_states, kept, lengths[lengths != 0])


def _check_mask(op: str, name: str, mask: Tensor, x: Tensor, dtype: tuple[torch.dtype, ...] = (torch.bool, *_INTEGERS)) -> None:
    check_tensor(op, "hidden_states", x, dtype=None)
    if x.ndim < 2:
        fail(op, "hidden_states", "shape [B, S, ...]", str(list(x.shape)))
    check_tensor(op, name, mask, tuple(x.shape[:2]), dtype=dtype, like=x)


def _packed(x: Tensor, kept: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back from `unpad_input`: tokens [N, ...] and their indices, int [N] -> [batch, seqlen, ...], zero elsewhere."""
    op = "pad_input"
    batch, seqlen = check_int(op, "batch", batch, at_least=0), check_int(op, "seqlen", seqlen, at_least=0)
    return _put(op, "hidden_states", hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
