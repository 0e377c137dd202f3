"""What FlashAttention documents of its padding holds for the functions that stand in for it: values, gradients, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels.integrations.flash_attn import bert_padding
from sora_kernels.integrations.flash_attn.bert_padding import pad_input, unpad_input, unpad_input_for_concatenated_sequences

MASK = [[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]


def padded(*inner: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 4, *inner).to(dtype)


def chosen(x: Tensor, mask: list) -> list[Tensor]:
    return [x[b, s] for b in range(3) for s in range(4) if mask[b][s]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("inner", [(5,), (2, 5), ()])
def test_unpad_input(inner: tuple[int, ...], dtype: torch.dtype) -> None:
    x, mask = padded(*inner), torch.tensor(MASK, dtype=dtype)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert torch.equal(tokens, torch.stack(chosen(x, MASK)))
    assert (indices.tolist(), indices.dtype) == ([0, 1, 3, 9, 10, 11], torch.int64)
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 3, 3, 6], torch.int32)
    assert (longest, type(longest)) == (3, int)
    assert (used.tolist(), used.dtype) == ([3, 0, 3], torch.int32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_unused_tokens_have_a_place_and_are_not_counted(dtype: torch.dtype) -> None:
    """Also where a token is marked in both masks."""
    unused = [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    x = padded(5)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, torch.tensor(MASK, dtype=dtype), torch.tensor(unused, dtype=dtype))
    both = [[a | b for a, b in zip(*rows, strict=True)] for rows in zip(MASK, unused, strict=True)]
    assert torch.equal(tokens, torch.stack(chosen(x, both)))
    assert indices.tolist() == [0, 1, 2, 3, 4, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 4, 5, 8]
    assert (longest, used.tolist()) == (4, [3, 0, 3])


@pytest.mark.parametrize("inner", [(5,), (2, 5), ()])
def test_pad_input_is_the_way_back(inner: tuple[int, ...]) -> None:
    x, mask = padded(*inner), torch.tensor(MASK)
    tokens, indices, *_ = unpad_input(x, mask)
    back = pad_input(tokens, indices, 3, 4)
    assert torch.equal(back, x * mask.view(3, 4, *(1 for _ in inner)))
    assert torch.equal(pad_input(tokens, indices.int(), batch=3, seqlen=4), back)


def test_gradients() -> None:
    x, indices = padded(2, 5).requires_grad_(), torch.tensor([2, 0, 7])
    assert torch.autograd.gradcheck(lambda x: unpad_input(x, torch.tensor(MASK))[0], x)
    assert torch.autograd.gradcheck(lambda x: pad_input(x, indices, 2, 4), x[0, :3])
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_first_axis(x.flatten(0, 1), indices), x)
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_first_axis(x.flatten(0, 1), torch.tensor([3, 3, 1])), x)
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_put_first_axis(x, indices, 9), x[0, :3])


def test_rows_by_their_index() -> None:
    x, indices = padded(5), torch.tensor([2, 0])
    assert torch.equal(bert_padding.index_first_axis(x, indices), torch.stack((x[2], x[0])))
    put = bert_padding.index_put_first_axis(x[:2], indices, 4)
    assert torch.equal(put, torch.stack((x[1], torch.zeros(4, 5, dtype=x.dtype), x[0], torch.zeros(4, 5, dtype=x.dtype))))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_several_samples(dtype: torch.dtype) -> None:
    """Rows of 2 and 3, 3 and 2, and 6 tokens, the first two with padding behind them."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]], dtype=dtype)
    x = torch.randn(3, 6, 4, requires_grad=True)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(tokens, torch.cat((x[0, :5], x[1, :5], x[2])))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 2, 5, 8, 10, 16], torch.int32)
    assert (longest, type(longest)) == (6, int)
    tokens.sum().backward()
    assert x.grad is not None
    assert x.grad[..., 0].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert torch.equal(pad_input(tokens, indices, 3, 6), x * x.grad)


def test_nothing_is_left() -> None:
    x = padded(5)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, torch.zeros(3, 4, dtype=torch.bool))
    assert (tokens.shape, len(indices), cu_seqlens.tolist(), longest) == ((0, 5), 0, [0, 0, 0, 0], 0)
    assert used.tolist() == [0, 0, 0]
    assert not pad_input(tokens, indices, 3, 4).any()
    _, _, cu_seqlens, longest, _ = unpad_input(x[:0], torch.zeros(0, 4, dtype=torch.bool))
    assert (cu_seqlens.tolist(), longest) == ([0], 0)
    _, _, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, torch.zeros(3, 4, dtype=torch.int32))
    assert (cu_seqlens.tolist(), longest) == ([0], 0)


X, TOKENS, INDICES = torch.zeros(3, 4, 5), torch.zeros(2, 5), torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unpad_input", (X, torch.ones(3, 5).bool()), r"attention_mask: expected shape \[3, 4\], got \[3, 5\]"),
        ("unpad_input", (X, torch.ones(3, 4)), "attention_mask: expected dtype bool or int64 or .*, got float32"),
        ("unpad_input", (X, torch.ones(3, 4).bool(), torch.ones(4, 4).bool()), r"unused_mask: expected shape \[3, 4\]"),
        ("unpad_input", (torch.zeros(3), torch.ones(3, 4)), r"hidden_states: expected shape \[B, S, ...\], got \[3\]"),
        ("unpad_input", (None, torch.ones(3, 4)), "hidden_states: expected a torch.Tensor, got NoneType"),
        (
            "unpad_input_for_concatenated_sequences",
            (X, torch.tensor([[2, 3, 0, 0]] * 3)),
            "attention_mask_in_length: expected lengths from 0 that add up to at most 4 in each row, got min 0, sums .5, 5, 5.",
        ),
        (
            "unpad_input_for_concatenated_sequences",
            (X, torch.tensor([[2, -1, 0, 0]] * 3)),
            "attention_mask_in_length: expected lengths from 0",
        ),
        ("pad_input", (TOKENS, torch.tensor([1, 12]), 3, 4), "indices: expected 0 to 11, got 1 to 12"),
        ("pad_input", (TOKENS, torch.tensor([1]), 3, 4), r"hidden_states: expected shape \[1, ...\], .* got \[2, 5\]"),
        ("pad_input", (TOKENS, INDICES, -1, 4), "batch: expected an int >= 0, got -1"),
        ("pad_input", (TOKENS, INDICES.float(), 3, 4), "indices: expected dtype int64 or int32, got float32"),
        ("index_first_axis", (TOKENS, torch.tensor([2])), "indices: expected 0 to 1, got 2 to 2"),
        ("index_first_axis", (torch.tensor(1.0), INDICES), r"input: expected shape \[N, ...\], got \[\]"),
        ("index_put_first_axis", (TOKENS, INDICES, 1), "indices: expected 0 to 0, got 0 to 1"),
    ],
)
def test_bad_arguments(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: {message}"):
        getattr(bert_padding, name)(*arguments)
