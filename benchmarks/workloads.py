"""What is measured: one packed batch, our ops and their peers in plain torch on it, and how the work is counted.

A `Race` is one op at one dtype and pass, computed by several implementations from the same numbers, ours first. A peer gets its
inputs in the layout that suits it best (padded, or a tensor per sample), arranged before the clock starts.

Useful work is what the op asks for, not what an implementation happens to do:

    attention        4 H d sum_b Sq_b Sk_b FLOPs forward (Sk: the keys in the window), 3.5 times that with the backward
    patch embedding  2 N K D FLOPs forward, twice that with the weight's gradient
    RoPE, adaLN      bytes of each input read once and each output written once, in the forward and again in the backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
from sora_kernels.layout import PackedLayout
from sora_kernels.patch_embed import patch_embed_3d, unpatchify_3d
from sora_kernels.rope import default_axes_dim, qk_norm_rope_3d, rope_3d

OURS = "sora_kernels"
# Images and videos of 256, 1024, 1600, 4096, 576 and 2304 tokens.
LAYOUT = PackedLayout.from_grids([(1, 16, 16), (4, 16, 16), (4, 20, 20), (16, 16, 16), (1, 24, 24), (4, 24, 24)])
HEADS, HEAD_DIM, WIDTH = 8, 64, 1152
TEXT_TOKENS = 77
WINDOW_LAYOUT, WINDOW = PackedLayout.from_grids([(8, 24, 24)]), (3, 7, 7)
PATCH, CHANNELS = (1, 2, 2), 16
# The batch before patching: latents [C, T, H, W].
LATENTS = [(CHANNELS, *(n * p for n, p in zip(sample[0].grid, PATCH, strict=True))) for sample in LAYOUT.spans]
# Largest error allowed, relative to the largest element of the float32 result.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Tensors = list[Tensor]


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to compute the op: `run(*inputs)` returns a tensor or a sequence of them.

    Args:
        inputs, cotangents: in this implementation's layout, a list of tensors where it works sample by sample; default the race's.
        restore: brings outputs, followed by the gradients of the inputs that need one, into the race's layout.
        comparable: False for a row that computes something else on purpose.
    """

    run: Callable[..., Any]
    inputs: Sequence[Any] | None = None
    cotangents: Sequence[Any] | None = None
    restore: Callable[[Tensors], Tensors] = list
    comparable: bool = True


@dataclass(frozen=True, eq=False)
class Race:
    """One op at one dtype and pass, and everything that computes it.

    Args:
        backward: forward and backward, with the gradients of all inputs that require one.
        work: useful FLOPs or bytes of one call, in units of 1e9; `unit` is "gflops" or "gbps".
        reference: plain torch, run once in float32; every row is checked against it.
    """

    op: str
    dtype: torch.dtype
    backward: bool
    work: float
    unit: str
    inputs: Sequence[Any]
    cotangents: Sequence[Any]
    reference: Callable[..., Any]
    implementations: dict[str, Implementation]

    def call(self, name: str) -> Tensors:
        """Runs one implementation: outputs, then gradients, in its own layout."""
        row = self.implementations[name]
        inputs = self.inputs if row.inputs is None else row.inputs
        return self._run(row.run, inputs, self.cotangents if row.cotangents is None else row.cotangents)

    def check(self, name: str) -> None:
        """Raises ArithmeticError if an output or a gradient of an implementation is wrong."""
        row = self.implementations[name]
        if not row.comparable:
            return
        for i, (got, expected) in enumerate(zip(row.restore(self.call(name)), self.expected, strict=True)):
            error = float((got - expected).detach().abs().max() / expected.detach().abs().max())
            if got.shape != expected.shape or not error <= TOLERANCE[self.dtype]:
                raise ArithmeticError(f"{self.op} {self.dtype} by {name}: result {i} is off by {error:.2g} of its largest element")

    @cached_property
    def expected(self) -> Tensors:
        def single(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return [single(y) for y in x]
            return x if x.dtype == torch.float32 else x.detach().float().requires_grad_(x.requires_grad)

        return self._run(self.reference, single(self.inputs), single(self.cotangents))

    def _run(self, run: Callable[..., Any], inputs: Sequence[Any], cotangents: Sequence[Any]) -> Tensors:
        with torch.set_grad_enabled(self.backward):
            outputs = run(*inputs)
        outputs = leaves([outputs])
        if not self.backward:
            return outputs
        return outputs + list(torch.autograd.grad(outputs, [x for x in leaves(inputs) if x.requires_grad], leaves(cotangents)))


def leaves(values: Iterable[Any]) -> Tensors:
    """The tensors of nested sequences of tensors, in order."""
    return [x for value in values for x in ([value] if isinstance(value, Tensor) else leaves(value))]


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes at hand, its best case."""
    return torch.compile(function, dynamic=False)


def gigabytes(*tensors: Tensor) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / 1e9


# ---- attention


def _leaf(x: Tensor) -> Tensor:
    """A contiguous copy to run and to differentiate by."""
    return x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)


def _per_sample(lengths: Sequence[int]) -> Callable[[Tensor], Tensors]:
    """[N, H, d] -> one dense [1, H, S, d] per sample."""
    return lambda x: [_leaf(rearrange(sample, "s h d -> 1 h s d")) for sample in x.split(list(lengths))]


def _padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """[N, H, d] -> [B, H, S, d], S the longest sample."""
    return _leaf(torch.nn.utils.rnn.pad_sequence(list(x.split(list(lengths))), batch_first=True).transpose(1, 2))


def _unpadded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([sample[:, :n].transpose(0, 1) for sample, n in zip(x, lengths, strict=True)])


def attention(dtype: torch.dtype, backward: bool, *, cross: bool = False) -> Race:
    """Packed self-attention, or cross-attention of each sample to its own text."""
    torch.manual_seed(0)
    q_lengths = LAYOUT.seqlens
    k_lengths = (TEXT_TOKENS,) * len(q_lengths) if cross else q_lengths
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (q_lengths, k_lengths))
    q, k, v = (randn(sum(n), HEADS, HEAD_DIM, dtype=dtype, grad=backward) for n in (q_lengths, k_lengths, k_lengths))
    dout = randn(*q.shape, dtype=dtype)
    split_q, split_k = _per_sample(q_lengths), _per_sample(k_lengths)

    def per_sample(q: Tensors, k: Tensors, v: Tensors) -> Tensors:
        return [F.scaled_dot_product_attention(*qkv) for qkv in zip(q, k, v, strict=True)]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        samples = zip(q.split(list(q_lengths)), k.split(list(k_lengths)), v.split(list(k_lengths)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in s)).transpose(0, 1) for s in samples])

    def join_samples(results: Tensors) -> Tensors:
        count = len(q_lengths)
        parts = [results[i : i + count] for i in range(0, len(results), count)]
        return [torch.cat([rearrange(x, "1 h s d -> s h d") for x in part]) for part in parts]

    rows = {
        OURS: Implementation(lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(q_lengths), max(k_lengths))),
        "SDPA per sample": Implementation(per_sample, [split_q(q), split_k(k), split_k(v)], [split_q(dout)], join_samples),
        "SDPA padded": _sdpa_padded([q, k, v, dout], q_lengths, k_lengths),
    }
    if not cross:
        sample = torch.repeat_interleave(torch.arange(LAYOUT.num_samples), torch.tensor(q_lengths))
        rows["flex_attention compiled"] = _flex(q, k, v, dout, lambda b, h, i, j: sample[i] == sample[j])
    flops = 4e-9 * HEADS * HEAD_DIM * sum(a * b for a, b in zip(q_lengths, k_lengths, strict=True))
    op = "cross-attention" if cross else "attention"
    return Race(op, dtype, backward, flops * (3.5 if backward else 1), "gflops", [q, k, v], [dout], reference, rows)


def _sdpa_padded(qkvd: Tensors, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Implementation:
    mask = (torch.arange(max(k_lengths)) < torch.tensor(k_lengths)[:, None])[:, None, None]  # [B, 1, 1, Sk]

    def unpad(results: Tensors) -> Tensors:
        return [_unpadded(x, lengths) for x, lengths in zip(results, (q_lengths, q_lengths, k_lengths, k_lengths), strict=False)]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    *inputs, dout = [_padded(x, lengths) for x, lengths in zip(qkvd, (q_lengths, k_lengths, k_lengths, q_lengths), strict=True)]
    return Implementation(sdpa, inputs, [dout], unpad)


def _flex(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask_mod: Callable[..., Tensor]) -> Implementation:
    mask = create_block_mask(mask_mod, None, None, q.shape[0], k.shape[0], device="cpu")
    flex = compiled(flex_attention)
    dense = [_leaf(rearrange(x, "s h d -> 1 h s d")) for x in (q, k, v, dout)]

    def restore(results: Tensors) -> Tensors:
        return [rearrange(x, "1 h s d -> s h d") for x in results]

    return Implementation(lambda q, k, v: flex(q, k, v, block_mask=mask), dense[:3], dense[3:], restore)


def window_attention(dtype: torch.dtype, backward: bool) -> Race:
    """Attention within a (t, h, w) window of one video, NATTEN's rule, against a mask and against all of the video."""
    torch.manual_seed(0)
    (grid,) = (span.grid for sample in WINDOW_LAYOUT.spans for span in sample)
    q, k, v, dout = (randn(WINDOW_LAYOUT.num_tokens, HEADS, HEAD_DIM, dtype=dtype, grad=backward) for _ in range(4))

    def seen(i: Tensor, j: Tensor) -> Tensor:
        inside, stride = j >= 0, 1
        for n, w in reversed(list(zip(grid, WINDOW, strict=True))):
            first = (i // stride % n - w // 2).clamp(0, n - w)
            key = j // stride % n
            inside, stride = inside & (key >= first) & (key < first + w), stride * n
        return inside

    tokens = torch.arange(q.shape[0])
    mask = seen(tokens[:, None], tokens)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)

    rows = {
        OURS: Implementation(lambda q, k, v: spatiotemporal_attention(q, k, v, WINDOW_LAYOUT, window=WINDOW)),
        f"{OURS}, no window": Implementation(lambda q, k, v: spatiotemporal_attention(q, k, v, WINDOW_LAYOUT), comparable=False),
        "SDPA with mask": Implementation(masked),
        "flex_attention compiled": _flex(q, k, v, dout, lambda b, h, i, j: seen(i, j)),
    }
    flops = 4e-9 * HEADS * HEAD_DIM * q.shape[0] * WINDOW[0] * WINDOW[1] * WINDOW[2]
    return Race("window attention", dtype, backward, flops * (3.5 if backward else 1), "gflops", [q, k, v], [dout], masked, rows)


# ---- RoPE


def rope_tables(layout: PackedLayout, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, head_dim/2], which peers compute once per shape."""
    parts = []
    for position, channels in zip(layout.positions().double().unbind(1), default_axes_dim(head_dim), strict=True):
        frequency = theta ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
        parts.append(torch.outer(position, frequency))
    angles = torch.cat(parts, dim=1)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of interleaved pairs in float32, as the video models of diffusers apply it."""
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1).flatten(-2).type_as(x)


def norm_rotate(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (F.rms_norm(x, x.shape[-1:], weight, eps=1e-6) for x, weight in ((q, q_weight), (k, k_weight)))
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rope(dtype: torch.dtype, backward: bool, *, norm: bool) -> Race:
    """rope_3d, or qk_norm_rope_3d with `norm`."""
    torch.manual_seed(0)
    cos, sin = rope_tables(LAYOUT, HEAD_DIM)
    x, y, dx, dy = (randn(LAYOUT.num_tokens, HEADS, HEAD_DIM, dtype=dtype, grad=backward) for _ in range(4))
    weights = [randn(HEAD_DIM, dtype=dtype, grad=backward) for _ in range(2)]
    inputs, cotangents, peer = ([x, y, *weights], [dx, dy], norm_rotate) if norm else ([x], [dx], rotate)

    def ours(*xs: Tensor) -> Any:
        return qk_norm_rope_3d(*xs, LAYOUT) if norm else rope_3d(*xs, LAYOUT)

    def plain(*xs: Tensor) -> Any:
        return peer(*xs, cos, sin)

    # Forward: x in, y out. Backward: dy in, dx out; the norm needs x again.
    tensors = 2 * len(cotangents) * (2 if backward else 1) + (2 if norm and backward else 0)
    rows = {
        OURS: Implementation(ours),
        "torch eager": Implementation(plain),
        "torch.compile": Implementation(compiled(plain)),
    }
    name = "qk_norm_rope_3d" if norm else "rope_3d"
    return Race(name, dtype, backward, tensors * gigabytes(x), "gbps", inputs, cotangents, plain, rows)


# ---- adaLN

Spread = Callable[[Tensor], Tensor]  # rows [R, D] -> [N, D]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, spread: Spread) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + spread(scale)) + spread(shift)


def gated(residual: Tensor, x: Tensor, gate: Tensor, spread: Spread) -> Tensor:
    return residual + spread(gate) * x


def gated_modulate(residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, spread: Spread) -> Tensors:
    residual = gated(residual, x, gate, spread)
    return [residual, modulate(residual, shift, scale, spread)]


# our op; the same in torch; [N, D] inputs, [R, D] rows, outputs; [N, D] tensors that a backward must read or write
ADALN = {
    "layer_norm_modulate": (layer_norm_modulate, modulate, 1, 2, 1, 3),
    "gate_residual": (gate_residual, gated, 2, 1, 1, 3),
    "gate_residual_layer_norm_modulate": (gate_residual_layer_norm_modulate, gated_modulate, 2, 3, 2, 6),
}


def adaln(op: str, dtype: torch.dtype, backward: bool, *, per_frame: bool) -> Race:
    """One of the three adaLN ops, with modulation rows per sample or per latent frame."""
    torch.manual_seed(0)
    ours, peer, num_inputs, num_rows, num_outputs, backward_tensors = ADALN[op]
    boundaries = LAYOUT.cu_frames if per_frame else LAYOUT.cu_seqlens
    lengths = boundaries.diff().tolist()
    row_of_token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = [randn(LAYOUT.num_tokens, WIDTH, dtype=dtype, grad=backward) for _ in range(num_inputs)]
    inputs = tokens + [randn(len(lengths), WIDTH, dtype=dtype, grad=backward) for _ in range(num_rows)]
    cotangents = [randn(LAYOUT.num_tokens, WIDTH, dtype=dtype) for _ in range(num_outputs)]

    def by_index(*xs: Tensor) -> Any:
        return peer(*xs, lambda rows: rows[row_of_token])

    def by_expand(*xs: Tensor) -> Any:
        return peer(*xs, lambda rows: torch.cat([row.expand(n, -1) for row, n in zip(rows, lengths, strict=True)]))

    rows = {
        OURS: Implementation(lambda *xs: ours(*xs, boundaries)),
        "torch eager": Implementation(by_index),
        "torch.compile": Implementation(compiled(by_index)),
    }
    if backward and not per_frame:  # few rows: a sum over slices compiles to less work than the index's scatter
        rows["torch.compile"] = Implementation(compiled(by_expand))
    work = (num_inputs + num_outputs + (backward_tensors if backward else 0)) * gigabytes(tokens[0])
    name = f"{op}, rows per {'frame' if per_frame else 'sample'}"
    return Race(name, dtype, backward, work, "gbps", inputs, cotangents, by_expand, rows)


# ---- patches


def patch_embedding(dtype: torch.dtype, backward: bool) -> Race:
    """A list of latents to packed tokens; with the backward, the gradients of weight and bias."""
    torch.manual_seed(0)
    videos = [randn(*shape, dtype=dtype) for shape in LATENTS]
    weight, bias = randn(WIDTH, CHANNELS, *PATCH, dtype=dtype, grad=backward), randn(WIDTH, dtype=dtype, grad=backward)
    dtokens = randn(LAYOUT.num_tokens, WIDTH, dtype=dtype)
    split = LAYOUT.unpack(dtokens)

    def conv(videos: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        return [F.conv3d(video[None], weight, bias, stride=PATCH)[0].flatten(1).T for video in videos]

    def linear(videos: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        pattern, (pt, ph, pw) = "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)", PATCH
        return [F.linear(rearrange(x, pattern, pt=pt, ph=ph, pw=pw), weight.flatten(1), bias) for x in videos]

    def join(results: Tensors) -> Tensors:
        return [torch.cat(results[: len(videos)]), *results[len(videos) :]]

    rows = {
        OURS: Implementation(lambda *xs: patch_embed_3d(*xs, patch_size=PATCH)[0]),
        "Conv3d per video": Implementation(conv, cotangents=split, restore=join),
        "einops + linear per video": Implementation(linear, cotangents=split, restore=join),
        "einops + linear, packed": Implementation(lambda *xs: torch.cat(linear(*xs))),
    }
    flops = 2e-9 * LAYOUT.num_tokens * weight.numel() * (2 if backward else 1)
    inputs = [videos, weight, bias]
    return Race("patch_embed_3d", dtype, backward, flops, "gflops", inputs, [dtokens], lambda *xs: torch.cat(linear(*xs)), rows)


def unpatchify(dtype: torch.dtype, backward: bool) -> Race:
    """Packed tokens to a list of latents."""
    torch.manual_seed(0)
    pt, ph, pw = PATCH
    tokens = randn(LAYOUT.num_tokens, pt * ph * pw * CHANNELS, dtype=dtype, grad=backward)
    cotangents = [randn(*shape, dtype=dtype) for shape in LATENTS]

    def peer(tokens: Tensor) -> Tensors:
        pattern = "(t h w) (pt ph pw c) -> c (t pt) (h ph) (w pw)"
        samples = [(x, span.grid) for x, (span,) in zip(LAYOUT.unpack(tokens), LAYOUT.spans, strict=True)]
        return [rearrange(x, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw).contiguous() for x, (t, h, w) in samples]

    rows = {
        OURS: Implementation(lambda tokens: unpatchify_3d(tokens, LAYOUT, patch_size=PATCH)),
        "einops per video": Implementation(peer),
    }
    work = (4 if backward else 2) * gigabytes(tokens)
    return Race("unpatchify_3d", dtype, backward, work, "gbps", [tokens], cotangents, peer, rows)
