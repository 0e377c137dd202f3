"""Attention, dense, packed and over spacetime windows: one score matrix per sample.

s[i,j] = scale · q[i]·k[j], softcapped, plus bias and ALiBi
m[i] = max_j s[i,j], l[i] = Σ_j exp(s[i,j] - m[i]) over the keys visible to i
out[i] = Σ_j exp(s[i,j] - m[i]) / l[i] · v[j]
lse[i] = m[i] + log l[i]
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad

from .common import pull_back, widen, write, write_gradients
from .rope import token_coordinates


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float = 0.0, added: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sample: q [i,H,d], k, v [j,Hk,d], visible bool broadcastable to [H,i,j] -> out [i,H,d]; lse, maximum, sum [H,i].

    Query head h reads key head h // (H / Hk). A query that sees no key gives out 0, lse and maximum -inf and sum 0, with zero
    gradients.
    """
    q, k, v = widen(q), widen(k), widen(v)
    k, v = (repeat(x, "j hk d -> j (hk g) d", g=q.shape[1] // max(x.shape[1], 1)) for x in (k, v))
    scores = scale * einsum(q, k, "i h d, j h d -> h i j")
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added
        visible = visible & (added > -torch.inf)
    scores = scores.masked_fill(~visible, -torch.inf)
    maximum = pad(scores.detach(), (0, 1), value=-torch.inf).amax(dim=-1)  # with a key that nobody sees, as there may be no other
    blind = maximum == -torch.inf
    # exp(-inf - 0) is 0 where exp(-inf - (-inf)) would be NaN
    total = torch.exp(scores.detach() - maximum.masked_fill(blind, 0.0)[..., None]).sum(dim=-1)
    scores = scores.masked_fill(blind[..., None], 0.0)
    # Not exp(s - m) / l: in the gradient of that, errors of the division do not cancel where one key has nearly all the weight.
    weights = torch.softmax(scores, dim=-1).masked_fill(blind[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(blind, -torch.inf)
    return einsum(weights, v, "h i j, j h d -> i h d"), lse, maximum, total


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense (`cu_q` None) or packed attention; key j is visible to query i iff i+Sk-Sq-left <= j <= i+Sk-Sq+right.

    q [B,Sq,H,d], k, v [B,Sk,Hk,d] -> out [B,Sq,H,d], lse [B,H,Sq]; packed q [N,H,d], k, v [Nk,Hk,d] -> out [N,H,d],
    lse [H,N]. bias [B,H,Sq,Sk] is added after the softcap, alibi [B,H] subtracts alibi·|i+Sk-Sq-j|.
    The third result is the maximum and the sum of each softmax: see `statistics`.
    """
    results = []
    for b, (q_b, k_b, v_b) in enumerate(samples(q, k, v, cu_q, cu_k)):
        distance = distances(q_b, k_b)
        added = None if bias is None else widen(bias[b])
        if alibi is not None:
            slope = -widen(alibi[b]).to(widen(q_b[:0]).dtype)[:, None, None] * distance.abs()
            added = slope if added is None else added + slope
        results.append(attend(q_b, k_b, v_b, (distance <= left) & (distance >= -right), scale, softcap, added))
    out, lse, maximum, total = join_samples(results, q)
    return out, lse, statistics(maximum, total, scale, is_plain=bias is None and alibi is None and not softcap > 0)


def samples(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> list[tuple[Tensor, ...]]:
    """(q [i,H,d], k [j,Hk,d], v) of each sample of a dense (`cu_q` None) or packed batch, as views."""
    if cu_q is None or cu_k is None:
        return list(zip(q, k, v, strict=True))
    return list(zip(cut(q, cu_q), cut(k, cu_k), cut(v, cu_k), strict=True))


def distances(q: Tensor, k: Tensor) -> Tensor:
    """i+Sk-Sq-j [i,j] of a sample's queries and keys."""
    i, j = torch.arange(len(q), device=q.device)[:, None], torch.arange(len(k), device=q.device)
    return i + len(k) - len(q) - j


def join_samples(results: Sequence[tuple[Tensor, ...]], q: Tensor) -> tuple[Tensor, ...]:
    """out as q; lse, maximum and sum [B,H,S] dense, [H,N] packed."""
    if q.ndim == 3:
        return join(results, q)
    batch, length = q.shape[:2]
    out, *of_queries = join(results, rearrange(q, "b i h d -> (b i) h d"))
    return out.reshape(q.shape), *(rearrange(x, "h (b i) -> b h i", b=batch, i=length) for x in of_queries)


def bias_gradient(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    alibi: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> Tensor:
    """The gradient of a dense batch's bias, of the bias's shape, which broadcasts to [B,H,Sq,Sk]; it can be differentiated itself.

    One sample after the other, as each takes memory for its scores.
    """
    gradients = []
    for b, sample in enumerate(zip(q[:, None], k[:, None], v[:, None], strict=True)):
        slopes = None if alibi is None else alibi[b : b + 1]

        def of_bias(own: Tensor, sample: Any = sample, slopes: Any = slopes) -> tuple[Tensor, ...]:
            q, k, v = sample
            added = own.expand(1, q.shape[2], q.shape[1], k.shape[1])
            return attention(q, k, v, None, None, added, slopes, scale, left, right, softcap)[:2]

        own = bias[b : b + 1] if len(bias) > 1 else bias
        cotangents = dout[b : b + 1], None if dlse is None else dlse[b : b + 1]
        (gradient,) = pull_back(of_bias, (own,), cotangents)
        if gradient is not None:
            gradients.append(gradient)
    if not gradients:
        return torch.zeros_like(bias)
    return torch.cat(gradients) if len(bias) > 1 else sum(gradients[1:], gradients[0])


def statistics(maximum: Tensor, total: Tensor, scale: float, is_plain: bool) -> Tensor:
    """[2, ...]: maximum and sum of each softmax, as every backend keeps them for the backward.

    Where scores are products times a positive scale and nothing else, the maximum is that of the products: kernels leave the scale
    to the exponential.
    """
    return torch.stack([maximum / scale if is_plain and scale > 0 else maximum, total.detach()])


def spatiotemporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_spans: Tensor,
    grid: Tensor,
    step: Tensor,
    window: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Packed attention where a query sees a window of its own span and all of the other spans of its sample.

    q [N,H,d], k, v [N,Hk,d] -> out [N,H,d], statistics [2,H,N].
    """
    span, coordinate = token_coordinates(cu_spans, grid)
    start, stop = neighbourhood(coordinate, grid.long()[span], window, causal)
    has_window = (step != 0).any(dim=-1)[span]

    results = []
    for first, last in boundaries(cu_seqlens):
        own = slice(first, last)
        key = rearrange(coordinate[own], "j thw -> 1 j thw")
        near = (key >= start[own, None]) & (key < stop[own, None])
        visible = near.all(dim=-1) | (span[own, None] != span[own]) | ~has_window[own, None]
        results.append(attend(q[own], k[own], v[own], visible, scale))
    out, _, maximum, total = join(results, q)
    return out, statistics(maximum, total, scale, is_plain=True)


def neighbourhood(coordinate: Tensor, length: Tensor, window: Sequence[int], causal: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """First key and one past the last key [n,3] of the queries at `coordinate` [n,3] in spans of `length` [n,3].

    A window of 0 is the whole axis. Otherwise w = min(window, length) keys: centred and shifted inward at the borders,
    or the last w up to the query itself on a causal axis.
    """
    asked = torch.tensor([w or torch.iinfo(torch.int64).max for w in window], device=length.device)
    w = torch.minimum(asked, length)
    is_causal = torch.tensor(causal, device=length.device)
    start = torch.where(is_causal, coordinate - w + 1, torch.minimum(coordinate - w // 2, length - w)).clamp(min=0)
    return start, torch.where(is_causal, coordinate + 1, start + w)


def boundaries(cu: Tensor) -> list[tuple[int, int]]:
    """(first, one past the last) of each sample of `cu` [B+1]."""
    return list(itertools.pairwise(cu.tolist()))


def cut(x: Tensor, cu: Tensor) -> list[Tensor]:
    """The samples of a packed tensor, as views."""
    return [x[first:last] for first, last in boundaries(cu)]


def join(results: Sequence[tuple[Tensor, ...]], q: Tensor) -> tuple[Tensor, ...]:
    """Packed out [N,H,d], lse, maximum and sum [H,N] of the samples' results; past the last boundary as of queries without keys."""
    slack = len(q) - sum(len(out) for out, *_ in results)
    none = q.new_full((q.shape[1], slack), -torch.inf)
    nothing = (q.new_zeros(slack, *q.shape[1:]), none, none, torch.zeros_like(none))
    outs, *of_queries = zip(*results, map(widen, nothing), strict=True)
    return torch.cat(outs), *(torch.cat(x, dim=-1) for x in of_queries)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
) -> None:
    write(attention(q, k, v, cu_q, cu_k, bias, alibi, scale, left, right, softcap), (out, lse, statistics))


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return attention(q, k, v, cu_q, cu_k, bias, alibi, scale, left, right, softcap)[:2]

    write_gradients(function, (q, k, v), (dout, dlse), (dq, dk, dv))


def spatiotemporal_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_spans: Tensor,
    grid: Tensor,
    step: Tensor,
    window: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    out: Tensor,
    statistics: Tensor,
) -> None:
    write(spatiotemporal_attention(q, k, v, cu_seqlens, cu_spans, grid, step, window, causal, scale), (out, statistics))


def spatiotemporal_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_seqlens: Tensor,
    cu_spans: Tensor,
    grid: Tensor,
    step: Tensor,
    window: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return spatiotemporal_attention(q, k, v, cu_seqlens, cu_spans, grid, step, window, causal, scale)[:1]

    write_gradients(function, (q, k, v), [dout], (dq, dk, dv))
