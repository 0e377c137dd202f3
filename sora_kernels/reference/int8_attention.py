"""Attention of queries and keys that are rounded to int8 steps, keys less their mean.

m = mean of a sample's keys
q', k' = q and k - m rounded: x' = c · floor(x / c + 1/2), c = max|x| / 127 over a block of tokens of a head
out[i] = Σ_j softmax_j(scale · q'[i]·k'[j]) · v[j]
lse[i] = log Σ_j exp(scale · q'[i]·k'[j]) + scale · q[i]·m
"""

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad

from .attention import attend, distances, join_samples, samples
from .common import widen, write

SMALLEST = 2.0**-100  # a block's largest number counts as this at least


def quantized(x: Tensor, block: int) -> Tensor:
    """x [n,H,d] in steps of each block of tokens and head. The steps are float32's, whatever the dtype of x."""
    blocks = rearrange(pad(x.float(), (0, 0, 0, 0, 0, -len(x) % block)), "(b i) h d -> b i h d", i=block)
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=SMALLEST)
    # bfloat16 numbers are often in the middle of two steps, so roundings are fixed: of the quotient, where 127 / x would take two,
    # and one of the sum, as by a fused multiply-add.
    inverse = torch.full_like(largest, 127) / largest
    steps = torch.floor((blocks.double() * inverse + 0.5).float())
    numbers = steps.to(widen(x[:0]).dtype) * (largest * (1 / 127))
    return rearrange(numbers, "b i h d -> (b i) h d")[: len(x)]


def mean_of_keys(k: Tensor) -> Tensor:
    """[Hk,d] of k [j,Hk,d]: float32 numbers that bfloat16 holds, zeros without keys.

    So rounded it hardly depends on how it is summed, and what is taken off all keys need not be their very mean.
    """
    return (k.float().sum(dim=0) / max(len(k), 1)).bfloat16().float()


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    bias: Tensor | None,
    scale: float,
    left: int,
    right: int,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """Dense or packed, masked as `attention`: -> out as q, lse [B,H,Sq] or [H,N]; scales of block_q queries, block_k keys."""
    results = []
    for b, (q_b, k_b, v_b) in enumerate(samples(q, k, v, cu_q, cu_k)):
        distance, mean = distances(q_b, k_b), mean_of_keys(k_b)
        q_int8, k_int8 = quantized(q_b, block_q), quantized(k_b.float() - mean, block_k)
        visible = (distance <= left) & (distance >= -right)
        out, lse, *statistics = attend(
            q_int8, k_int8.to(q_int8.dtype), v_b, visible, scale, added=None if bias is None else widen(bias[b])
        )
        means = repeat(mean, "hk d -> (hk g) d", g=q.shape[-2] // max(k.shape[-2], 1))
        shift = scale * einsum(widen(q_b), means.to(lse.dtype), "i h d, h d -> h i")
        # A query that sees no key keeps its -inf, whatever the mean.
        results.append((out, torch.where(lse == -torch.inf, lse, lse + shift), *statistics))
    out, lse, *_ = join_samples(results, q)
    return out, lse


def int8_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    bias: Tensor | None,
    scale: float,
    left: int,
    right: int,
    block_q: int,
    block_k: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    write(int8_attention(q, k, v, cu_q, cu_k, bias, scale, left, right, block_q, block_k), (out, lse))
