"""What stands in for flash_attn.layers.rotary: `apply_rope` with flash_attn's tables, offsets and fused projections.

A table has a row for each position: cos, sin [R, r/2]. Token s of sample b takes row s + offset_b, and the first r channels of its
heads are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._torch_private import is_dual_level_open, transforms_active
from ...checks import check_bool, check_boundaries, check_cu_seqlens, check_int, check_number, check_tensor, fail
from ...norm_rope import apply_rope

NAMES = (
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
)
Part = tuple[Any, Tensor, Tensor]  # the index of a view [..., H, d] to rotate, and the cosines and sines of its tokens


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first r channels of each head.

    >>> angles = torch.outer(torch.arange(512.0), 10000 ** -torch.linspace(0, 1, 16))
    >>> apply_rotary_emb(torch.randn(2, 128, 8, 64), angles.cos(), angles.sin(), seqlen_offsets=100).shape
    torch.Size([2, 128, 8, 64])

    Args:
        x: [B, S, H, d], or packed [N, H, d] with cu_seqlens. Tokens past the last boundary stay as they are.
        cos, sin: [R, r/2], r <= d, of any float dtype.
        interleaved: pair i is channels (2i, 2i+1); if False (i, i + r/2).
        inplace: write into x and return it. As in flash_attn, gradients are those of what comes back: x is not to be used again,
            and no op that has kept x, or the tensor that it is a view of, for its backward may still need it. The tables need no
            gradient then.
        seqlen_offsets: an int, or int32 or int64 [B]: the position of each sample's first token. On the CPU a position without a
            row is an error; elsewhere, and in compiled code, it is not read and counts as the nearest one that has a row.
        cu_seqlens: int32 [B+1].
        max_seqlen: taken for compatibility; the boundaries alone decide.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "apply_rotary_emb"
    check_tensor(op, "x", x, ("B", "S", "H", "d") if cu_seqlens is None else ("N", "H", "d"))
    interleaved, inplace = check_bool(op, "interleaved", interleaved), check_bool(op, "inplace", inplace)
    tables = _of_tokens(op, x, cos, sin, seqlen_offsets, cu_seqlens)
    return _in_place(op, x, [(..., *tables)], interleaved) if inplace else apply_rope(x, *tables, interleaved=interleaved)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates the queries and the keys of a fused projection, in place.

    Args:
        qkv: [B, S, 3, H, d], or [B, S, H + 2 Hk, d] with num_heads_q = H.
        cos_k, sin_k: tables of the keys, where theirs are others.

    The others, and how gradients flow, are as in `apply_rotary_emb`.
    """
    op = "apply_rotary_emb_qkv_"
    check_tensor(op, "qkv", qkv)
    of_q: Any
    of_k: Any
    if qkv.ndim == 5:
        check_tensor(op, "qkv", qkv, ("B", "S", 3, "H", "d"))
        of_q, of_k = 0, 1
    else:
        check_tensor(op, "qkv", qkv, ("B", "S", "H + 2 Hk", "d"))
        if num_heads_q is None:
            fail(op, "num_heads_q", f"an int, as qkv is {list(qkv.shape)}", "None")
        heads = check_int(op, "num_heads_q", num_heads_q, 1, qkv.shape[2])
        if (qkv.shape[2] - heads) % 2:
            fail(op, "num_heads_q", f"a number that leaves as many keys as values of {qkv.shape[2]} heads", str(heads))
        of_q, of_k = slice(0, heads), slice(heads, (heads + qkv.shape[2]) // 2)
    everything = slice(None), slice(None)
    parts = []
    for part, cos_, sin_ in ((of_q, cos, sin), (of_k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)):
        index = (*everything, part)
        parts.append((index, *_of_tokens(op, qkv[index], cos_, sin_, seqlen_offsets)))
    return _in_place(op, qkv, parts, check_bool(op, "interleaved", interleaved))


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """The same of the keys of kv [B, S, 2, H, d]."""
    op = "apply_rotary_emb_kv_"
    check_tensor(op, "kv", kv, ("B", "S", 2, "H", "d"))
    index = (slice(None), slice(None), 0)
    tables = _of_tokens(op, kv[index], cos, sin, seqlen_offsets)
    return _in_place(op, kv, [(index, *tables)], check_bool(op, "interleaved", interleaved))


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The formula in plain torch, in whatever dtype torch gives it: x [B, S, H, d], cos, sin [S, r/2] or [B, S, r/2]."""
    rotated, rest = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    u, v = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, dim=-1)
    pairs = torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1 if interleaved else -2)
    return torch.cat((pairs.flatten(-2), rest), dim=-1)


class RotaryEmbedding(torch.nn.Module):
    """Tables of theta_i = base ** (-2i / dim), made as long as they are needed, and their rotation.

    >>> RotaryEmbedding(64)(torch.randn(2, 128, 3, 8, 64)).shape
    torch.Size([2, 128, 3, 8, 64])

    Args:
        dim: r, the channels that are rotated; even.
        interleaved: as in `apply_rotary_emb`.
        scale_base: XPos (Sun et al. 2022): queries of position n are multiplied by zeta_i ** ((n - R // 2) / scale_base), and keys
            divided, zeta_i = (2i + 0.4 dim) / (1.4 dim) and R the length of the tables. None: no such factor.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        op = "RotaryEmbedding"
        self.dim = check_int(op, "dim", dim, at_least=2)
        if dim % 2:
            fail(op, "dim", "an even int", str(dim))
        self.base, self.interleaved = _positive(op, "base", base), check_bool(op, "interleaved", interleaved)
        self.scale_base = None if scale_base is None else _positive(op, "scale_base", scale_base)
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        return self.base ** (-torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Tables of at least `seqlen` rows: computed in float32, kept in `dtype`."""
        cos = self._cos_cached
        fits = cos is not None and seqlen <= self._seq_len_cached and (cos.device, cos.dtype) == (device, dtype)
        if fits and cos is not None and not (self.training and cos.is_inference()):
            return
        self._seq_len_cached = seqlen
        place = torch.arange(seqlen, device=device, dtype=torch.float32)
        kept: Any = self.inv_freq  # lower precision after model.bfloat16()
        angles = torch.outer(place, kept.to(place.device) if kept.dtype == torch.float32 else self._frequencies(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        zeta = (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) + 0.4 * self.dim) / (1.4 * self.dim)
        factor = zeta ** ((place - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * factor).to(dtype), (sin * factor).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / factor).to(dtype), (sin / factor).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates queries and keys in place.

        Args:
            qkv: as `apply_rotary_emb_qkv_` takes it; with kv, the queries alone, [B, S, H, d].
            kv: [B, S, 2, Hk, d].
            seqlen_offset: an int, or int32 or int64 [B], with which max_seqlen is needed unless the tables are long enough.
            max_seqlen: the length of the tables.

        Returns:
            qkv, or (q, kv).
        """
        op = "RotaryEmbedding"
        check_tensor(op, "qkv", qkv)
        if qkv.ndim not in (4, 5):
            fail(op, "qkv", "shape [B, S, 3, H, d], [B, S, H + 2 Hk, d] or, with kv, [B, S, H, d]", str(list(qkv.shape)))
        if not isinstance(seqlen_offset, Tensor):
            seqlen_offset = check_int(op, "seqlen_offset", seqlen_offset, at_least=0)
        if max_seqlen is None and not isinstance(seqlen_offset, Tensor):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(check_int(op, "max_seqlen", max_seqlen, at_least=0), qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            fail(op, "max_seqlen", "an int, as seqlen_offset is a tensor", "None")
        cos_k, sin_k = (cos, sin) if self.scale_base is None else (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)  # type: ignore[arg-type]


def _positive(op: str, argument: str, value: object) -> float:
    number = check_number(op, argument, value)
    if number <= 0:
        fail(op, argument, "a number above 0", repr(value))
    return number


def _of_tokens(
    op: str, x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the tokens of x, a row for each, or those that all samples share."""
    check_tensor(op, "cos", cos, ("R", "r/2"), like=x)
    check_tensor(op, "sin", sin, tuple(cos.shape), like=x)
    if 2 * cos.shape[1] > x.shape[-1]:
        fail(op, "cos", f"at most {x.shape[-1] // 2} columns, as heads have {x.shape[-1]} channels", str(cos.shape[1]))
    cos, sin = (t if t.dtype in (x.dtype, torch.float32) else t.float() for t in (cos, sin))
    if cu_seqlens is None and not isinstance(offsets, Tensor):
        length = x.shape[1]
        if length > cos.shape[0]:
            fail(op, "cos", f"at least {length} rows, as many as tokens", str(cos.shape[0]))
        first = check_int(op, "seqlen_offsets", offsets, 0, cos.shape[0] - length)
        return cos[first : first + length], sin[first : first + length]

    batch = x.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(op, "cu_seqlens", cu_seqlens, x)
        batch = cu_seqlens.shape[0] - 1
    if isinstance(offsets, Tensor):
        check_tensor(op, "seqlen_offsets", offsets, (batch,), dtype=(torch.int32, torch.int64), like=x)
    else:
        offsets = torch.full((batch,), check_int(op, "seqlen_offsets", offsets, 0), device=x.device)
    if not cos.shape[0]:
        fail(op, "cos", "at least one row", "none")
    on_host = x.is_cpu and not torch.compiler.is_compiling()
    if cu_seqlens is None:
        rows = (offsets[:, None] + torch.arange(x.shape[1], device=x.device)).flatten()
        _check_rows(op, rows, cos.shape[0], on_host)
        rows = rows.clamp(0, cos.shape[0] - 1)
        return cos[rows], sin[rows]

    if on_host:
        check_boundaries(op, "cu_seqlens", cu_seqlens, x.shape[0])
    token = torch.arange(x.shape[0], device=x.device)
    sample = torch.bucketize(token, cu_seqlens[1:], right=True)
    inside = (sample < batch)[:, None]
    first_row = torch.nn.functional.pad(offsets - cu_seqlens[:-1], (0, 1))  # also of what is past the last boundary
    rows = token + first_row[sample]
    _check_rows(op, rows[inside[:, 0]] if on_host else rows, cos.shape[0], on_host)
    rows = rows.clamp(0, cos.shape[0] - 1)
    return torch.where(inside, cos[rows], 1.0), torch.where(inside, sin[rows], 0.0)


def _check_rows(op: str, rows: Tensor, available: int, on_host: bool) -> None:
    if on_host and rows.numel():
        first, last = (int(row) for row in rows.aminmax())
        if first < 0 or last >= available:
            fail(op, "seqlen_offsets", f"positions within the {available} rows of cos", f"{first} to {last}")


def _in_place(op: str, x: Tensor, parts: list[Part], interleaved: bool) -> Tensor:
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        fail(op, "x", "a tensor to write to, whose elements share no memory", f"one expanded to {list(x.shape)}")
    tables = [table for _, *tables in parts for table in tables]
    if torch.is_grad_enabled() and not transforms_active() and any(table.requires_grad for table in tables):
        fail(op, "cos, sin", "tables that need no gradient where x is written to", "requires_grad=True")
    if torch.compiler.is_compiling() and x.requires_grad and x.is_leaf:
        return _in_place_eagerly(op, x, parts, interleaved)
    if torch.compiler.is_compiling() or transforms_active() or is_dual_level_open():
        _write(x, x.clone(), parts, interleaved)  # torch's own gradient of writing in place, which refuses some views
    elif torch.is_grad_enabled() and x.requires_grad:
        # Of a tensor by itself autograd counts the write, and so finds an op that has kept it for its backward.
        counted = not (x.is_leaf or x._is_view())
        return _InPlace.apply(x, counted, interleaved, [index for index, *_ in parts], *tables)
    else:
        with torch.no_grad():
            _write(x, x, parts, interleaved)
    return x


@torch.compiler.disable
def _in_place_eagerly(op: str, x: Tensor, parts: list[Part], interleaved: bool) -> Tensor:
    """Of a parameter, which no graph may write to: between two graphs, so not with fullgraph=True."""
    return _in_place(op, x, parts, interleaved)


def _write(out: Tensor, x: Tensor, parts: list[Part], interleaved: bool) -> None:
    for index, cos, sin in parts:
        out[index].copy_(apply_rope(x[index], cos, sin, interleaved=interleaved))


class _InPlace(torch.autograd.Function):
    """Rotates parts of x and returns it. A write that is not counted is for parameters, and for views of one projection that are
    rotated one after the other: flash_attn takes both, and torch would refuse them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counted: bool, interleaved: bool, indices: list, *tables: Tensor) -> Tensor:
        ctx.interleaved, ctx.indices = interleaved, indices
        ctx.save_for_backward(*tables)
        _write(x if counted else x.data, x, list(zip(indices, tables[::2], tables[1::2], strict=True)), interleaved)
        return x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:  # type: ignore[override]
        tables = ctx.saved_tensors
        dx = dout.clone()
        back = [(index, cos, -sin) for index, cos, sin in zip(ctx.indices, tables[::2], tables[1::2], strict=True)]
        _write(dx, dout, back, ctx.interleaved)
        return dx, None, None, None, *(None for _ in tables)
