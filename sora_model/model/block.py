"""One block of the transformer, on packed tokens: attention, cross-attention to text, MLP.

    x <- x + gate * attention(modulate(norm(x)))            shift, scale, gate: rows of adaLN-Zero
    x <- x + cross_attention(norm(x), text)                 with text only
    x <- x + gate * mlp(modulate(norm(x)))

What a block hands on is a `Residual`: x, and the update that the next norm adds first. So each addition is one pass over memory
with the norm and the modulation that follow it, even across blocks.

Sources: Peebles and Xie, Scalable Diffusion Models with Transformers (2023); Chen et al., PixArt-alpha (2023): cross-attention
without a gate, between the two; Wan Team, Wan (2025): norms across heads, norms in cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from sora_kernels.attention import flash_attn_varlen_func
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.layout import PackedLayout
from sora_kernels.norm_rope import norm_rope
from sora_kernels.rope import qk_norm_rope_3d, rope_3d
from sora_kernels.spatiotemporal_attention import spatiotemporal_attention

from .config import DiTConfig

Window = tuple[int | None, int | None, int | None]
"""How many tokens a token sees along T, H and W; None is all of an axis. See `spatiotemporal_attention`."""


class ImageKeys(NamedTuple):
    """Tokens [M, C] of the images of B samples, end to end, to which cross-attention attends beside the captions.

    cu_seqlens: int32 [B+1].
    """

    tokens: Tensor
    cu_seqlens: Tensor


class TextKeys(NamedTuple):
    """What tokens attend to in cross-attention: [M, C] of B captions, end to end.

    With `log_padding` the last of the M tokens belongs to no caption: it is what padding has become, one key that stands for many.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    """int32 [B+1], of the captions."""
    log_padding: Tensor | None = None
    """float32 [N, 1]: for each token of the latents, the logarithm of how many padding tokens its caption has."""
    images: ImageKeys | None = None


class Context(NamedTuple):
    """What all blocks of a pass share.

    layout: of the tokens. cu_rows: int32 [R+1], the tokens that each row of modulation serves. text: captions, if there are any.
    window: of self-attention; None is the whole sample.
    """

    layout: PackedLayout
    cu_rows: Tensor
    text: TextKeys | None = None
    window: Window | None = None


class SelfAttention(nn.Module):
    """Attention among the tokens of each sample, or of each token's window in it."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, self.num_heads = config.hidden_size, config.num_heads
        self.rope, self.theta, self.eps = config.positions == "rope", config.rope_theta, config.eps
        self.across_heads = config.qk_norm_across_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        width = dim if self.across_heads else dim // config.num_heads
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(width)) if config.qk_norm else None for _ in range(2))

    def forward(self, x: Tensor, layout: PackedLayout, window: Window | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # [N, H, d] each, views
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.to(q), self.k_norm.to(k)  # autocast leaves them as they are
            q, k = qk_norm_rope_3d(q, k, *weights, layout, across_heads=self.across_heads, eps=self.eps, theta=self.theta)
        elif self.rope:
            q, k = rope_3d(q, layout, theta=self.theta), rope_3d(k, layout, theta=self.theta)
        if window is not None:
            return self.out(spatiotemporal_attention(q, k, v, layout, window=window).flatten(1))
        cu, longest = layout.cu_seqlens, layout.max_seqlen
        return self.out(flash_attn_varlen_func(q, k, v, cu, cu, longest, longest).flatten(1))


class CrossAttention(nn.Module):
    """Attention of each sample's tokens to its caption; a caption without tokens adds the output bias alone.

    With an image_dim, attention to the sample's images is added, by the same queries.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, self.num_heads, self.eps = config.hidden_size, config.num_heads, config.eps
        context: Any = config.context_dim
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(context, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(dim)) if config.cross_attention_norms else None for _ in range(2))
        self.image_kv = nn.Linear(dim, 2 * dim) if config.image_dim else None
        self.image_k_norm = nn.Parameter(torch.ones(dim)) if config.image_dim else None

    def forward(self, x: Tensor, layout: PackedLayout, text: TextKeys) -> Tensor:
        q = self.q(x).unflatten(1, (self.num_heads, -1))
        k, v = self.kv(text.tokens).unflatten(1, (2, self.num_heads, -1)).unbind(1)  # [M, H, d] each, views
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        if text.log_padding is None:
            y = flash_attn_varlen_func(q, k, v, layout.cu_seqlens, text.cu_seqlens, layout.max_seqlen, len(k))
        else:
            y = padded_attention(q, k, v, layout.cu_seqlens, text.cu_seqlens, text.log_padding)
        if text.images is not None and self.image_kv is not None and self.image_k_norm is not None:
            k, v = self.image_kv(text.images.tokens).unflatten(1, (2, self.num_heads, -1)).unbind(1)
            k, cu = self._normed(k, self.image_k_norm), text.images.cu_seqlens
            y = y + flash_attn_varlen_func(q, k, v, layout.cu_seqlens, cu, layout.max_seqlen, len(k))
        return self.out(y.flatten(1))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over all heads of a token [M, H, d]."""
        return norm_rope(x, weight=weight.to(x), across_heads=True, eps=self.eps)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, log_padding: Tensor) -> Tensor:
    """Attention to keys and, of each sample, n further ones that all equal the last key.

        out = (1 - w) attention(q, k, v) + w v_last,    w = sigmoid(s_last + log n - lse)

    s_last is the last key's score, and lse the logarithm of the other scores' sum of exponentials.
    """
    last = len(k) - 1
    out, lse, _ = flash_attn_varlen_func(q, k[:last], v[:last], cu_q, cu_k, len(q), last, return_attn_probs=True)
    cu_one = torch.arange(2, dtype=torch.int32, device=q.device)  # [0, 1], without a copy that the device waits for
    _, score, _ = flash_attn_varlen_func(q, k[last:], v[last:], cu_one * len(q), cu_one, len(q), 1, return_attn_probs=True)
    weight = torch.sigmoid((score - lse).mT + log_padding)  # [N, H]
    return torch.lerp(out, v[last].expand_as(out), weight[..., None].to(out.dtype))


class Mlp(nn.Sequential):
    """Two linear layers with a GELU between them, in one pass with the first one's bias; weights are named as in a Sequential."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim if out is None else out))

    def forward(self, x: Tensor) -> Tensor:
        first: nn.Linear = self[0]  # type: ignore[assignment]
        hidden = F.linear(x, first.weight)
        return self[2](bias_gelu(hidden, first.bias.to(hidden)))  # autocast leaves the bias as it is


class ImageProjection(nn.Module):
    """CLIP's tokens of images [M, C] -> [M, D]: two linear layers between norms, which are computed in float32 (Wan)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        image: Any = config.image_dim
        self.norm_in, self.norm_out = nn.LayerNorm(image), nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Sequential(nn.Linear(image, image), nn.GELU(), nn.Linear(image, config.hidden_size))
        self.positions = nn.Parameter(torch.zeros(config.image_positions, image)) if config.image_positions else None

    def forward(self, images: Sequence[Tensor]) -> ImageKeys:
        """images: the tokens of each sample."""
        weight: Any = self.mlp[0].weight
        width, length = weight.shape[1], "n" if self.positions is None else len(self.positions)
        if any(image.ndim != 2 or image.shape[1] != width or length not in ("n", len(image)) for image in images):
            got = [list(image.shape) for image in images]
            raise ValueError(f"DiT: image_tokens: expected [{length}, {width}] for each sample, got {got}")
        x = torch.cat([image.to(weight) if self.positions is None else image.to(weight) + self.positions for image in images])
        cu_seqlens = torch.tensor([0, *accumulate(map(len, images))], dtype=torch.int32).to(weight.device, non_blocking=True)
        return ImageKeys(self._norm(self.mlp(self._norm(x, self.norm_in)), self.norm_out), cu_seqlens)

    @staticmethod
    def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps).to(x)


class Residual(NamedTuple):
    """The residual stream x + gate * update, whose addition is fused with the norm that follows; `gate` None is 1.

    x, update: [N, D]; update None is nothing to add. gate: [R, D].
    """

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None

    def sum(self, cu_rows: Tensor) -> Tensor:
        """The stream [N, D]."""
        return self.x if self.update is None else gate_residual(self.x, self.update, self.gate, cu_rows)

    def norm_modulate(
        self, shift: Tensor | None, scale: Tensor | None, cu_rows: Tensor, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """The stream [N, D], and norm(stream) * (1 + scale) + shift, the input of the next sub-layer."""
        options: dict[str, Any] = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
        if self.update is None:
            return self.x, layer_norm_modulate(self.x, shift, scale, cu_rows, **options)
        return gate_residual_layer_norm_modulate(self.x, self.update, self.gate, shift, scale, cu_rows, **options)


class Block(nn.Module):
    """Attention, cross-attention if there is text, and MLP, each behind a norm of the residual stream."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        if config.modulation == "block":
            self.modulation = nn.Linear(dim, 6 * dim)
        else:
            self.offset = nn.Parameter(torch.zeros(6 * dim))
        self.norm = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.attention = SelfAttention(config)
        self.cross_attention = None
        if config.text_dim:
            self.cross_norm = nn.LayerNorm(dim, config.eps, elementwise_affine=config.cross_attention_norms)
            self.cross_attention = CrossAttention(config)
        self.mlp = Mlp(dim, config.mlp_width)

    def forward(self, stream: Residual, modulation: Tensor, context: Context) -> Residual:
        """One block; modulation: [R, 6D]: shift, scale and gate of the attention, then of the MLP."""
        layout, cu_rows, text, window = context
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x, y = stream.norm_modulate(shift_attention, scale_attention, cu_rows, self.norm)
        stream = Residual(x, self.attention(y, layout, window), gate_attention)
        if self.cross_attention is not None and text is not None:
            x, y = stream.norm_modulate(None, None, cu_rows, self.cross_norm)
            stream = Residual(x, self.cross_attention(y, layout, text))
        x, y = stream.norm_modulate(shift_mlp, scale_mlp, cu_rows, self.norm)
        return Residual(x, self.mlp(y), gate_mlp)
