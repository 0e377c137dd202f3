"""From the arguments of flash_attn and torch to the registered op: what the functions of attention's stories share."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention_op import Longest, attention_forward
from .checks import (
    BOOLS,
    FLOATS,
    UNBOUNDED,
    AttentionNames,
    check_bool,
    check_cu_seqlens,
    check_int,
    check_number,
    check_qkv,
    check_tensor,
    fail,
    side,
)
from .library import autocast
from .used_keys import used_keys

# Of softcap, which kernels divide and multiply by in float32.
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 8


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: tuple[Tensor, Tensor] | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    names: AttentionNames = AttentionNames(),  # noqa: B008
    seqused_k: Tensor | None = None,
    longest: Longest = Longest(),  # noqa: B008
) -> Any:
    """Attention of a dense batch, or of a packed one with its `boundaries` (of queries, of keys), in flash_attn's terms.

    Only a packed batch has `seqused_k`, how many keys each sample uses.

    Returns out, or (out, lse, an empty tensor).
    """
    check_tensor(op, names.q, q, ("B", "S", "H", "d") if boundaries is None else ("Nq", "H", "d"))
    q, k, v = autocast(q, k, v)
    cu_q = cu_k = None
    batch = q.shape[0]
    if boundaries is not None:
        cu_q, cu_k = boundaries
        check_cu_seqlens(op, names.cu_q, cu_q, q)
        check_cu_seqlens(op, names.cu_k, cu_k, q, cu_q.shape[0])
        batch = cu_q.shape[0] - 1
    options = check_options(op, q, k, v, batch, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, names)
    return_attn_probs = check_bool(op, "return_attn_probs", return_attn_probs)
    try:
        if seqused_k is not None and cu_q is not None and cu_k is not None:
            check_tensor(op, "seqused_k", seqused_k, (batch,), dtype=torch.int32, like=q)
            cu_q, cu_k, _ = used_keys(op, "seqused_k", cu_q, cu_k, seqused_k, (q.shape[0], k.shape[0]))
            options = options.of_used_keys()
        out, lse = run(q, k, v, cu_q, cu_k, options, longest)
    except ValueError as error:  # the registered op checks the values of boundaries, and has names of its own for them
        message = str(error)
        for own, name in (("cu_seqlens_q", names.cu_q), ("cu_seqlens_k", names.cu_k)):
            message = message.replace(f"attention: {own}: ", f"{op}: {name}: ")
        raise ValueError(message) from None
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


class Options(NamedTuple):
    """What is not a tensor of tokens, as the registered op takes it."""

    alibi: Tensor | None
    scale: float
    left: int
    right: int
    softcap: float

    def of_used_keys(self) -> Options:
        """Those of the two samples that `used_keys` makes of each."""
        return self if self.alibi is None else self._replace(alibi=self.alibi.repeat_interleave(2, dim=0))


def check_options(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    names: AttentionNames,
) -> Options:
    """Checks k and v against q, which is checked already, and the options of `batch` samples."""
    scale = check_qkv(op, q, k, v, dropout_p, softmax_scale, names)
    left, right = decode_window(op, window_size, causal)
    softcap = check_number(op, "softcap", softcap)
    largest = math.inf if q.dtype == torch.float64 else _LARGEST
    softcap = min(max(softcap, _SMALLEST), largest) if softcap > 0 else 0.0
    alibi = None
    if alibi_slopes is not None:
        heads = q.shape[-2]
        check_tensor(op, "alibi_slopes", alibi_slopes, dtype=torch.float32, like=q)
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            fail(op, "alibi_slopes", f"shape [{heads}] or [{batch}, {heads}]", str(list(alibi_slopes.shape)))
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            fail(op, "alibi_slopes", "slopes that need no gradient", "requires_grad=True")
        alibi = alibi_slopes.expand(batch, heads)
    return Options(alibi, scale, left, right, softcap)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    options: Options,
    longest: Longest = Longest(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """out and lse of checked arguments."""
    width = v.shape[-1]
    if width != q.shape[-1]:
        q, k, v = of_one_head_dim(q, k, v)
    out, lse, _ = attention_forward(q, k, v, cu_q, cu_k, None, *options, *longest)
    return first_channels(out, width), lse


def of_one_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with zeros behind the channels of the shorter ones: kernels want one head dim.

    Zeros change no score, and `first_channels` drops those of the output. Where the head dims differ this copies what is shorter,
    and the kernel computes as for the longer one.
    """
    short = v.shape[-1] - k.shape[-1]
    if short == 0:
        return q, k, v
    if short < 0:
        return q, k, pad(v, (0, -short))
    return pad(q, (0, short)), pad(k, (0, short)), v


def first_channels(out: Tensor, width: int) -> Tensor:
    return out if out.shape[-1] == width else out[..., :width].contiguous()


def check_unpaged(op: str, block_table: object, num_splits: object = None) -> None:
    """What a paged cache and split keys would need: refused, and of no effect."""
    if block_table is not None:
        fail(op, "block_table", "None (no paged cache)", type(block_table).__name__)
    if num_splits is not None:
        check_int(op, "num_splits", num_splits, at_least=0)


def decode_window(op: str, window_size: object, causal: object) -> tuple[int, int]:
    """Sides of a window as kernels take them: two integers of any kind, as flash_attn takes them."""
    if type(window_size) is tuple and len(window_size) == 2:  # what most calls pass, in a third of the time
        left, right = window_size
        if type(left) is int and type(right) is int and left == right == -1:
            return UNBOUNDED, 0 if check_bool(op, "causal", causal) else UNBOUNDED
    sizes: Any = window_size
    if isinstance(sizes, np.ndarray) or (isinstance(sizes, Tensor) and not _cannot_be_read(sizes)):
        sizes = sizes.tolist()
    if not isinstance(sizes, tuple | list) or len(sizes) != 2:
        _no_window(op, window_size)
    left, right = (_side(op, size, window_size) for size in sizes)
    return left, 0 if check_bool(op, "causal", causal) else right


def _side(op: str, size: Any, window_size: object) -> int:
    if isinstance(size, Tensor):
        size = None if _cannot_be_read(size) or size.ndim else size.item()
    if isinstance(size, BOOLS):
        _no_window(op, window_size)
    if not isinstance(size, int):  # one stays what it is, as it may stand for one while torch.compile traces
        try:
            size = operator.index(size)
        except TypeError:
            _no_window(op, window_size)
    if size < -1:
        _no_window(op, window_size)
    return UNBOUNDED if size == -1 else side(size)


def _cannot_be_read(x: Tensor) -> bool:
    """Reading a value off an accelerator would stall its stream; nested and sparse tensors have no two numbers."""
    return not x.is_cpu or x.is_nested or x.layout is not torch.strided


def _no_window(op: str, window_size: object) -> NoReturn:
    where = f" on {window_size.device}" if isinstance(window_size, Tensor) and not window_size.is_cpu else ""
    fail(op, "window_size", "two sizes >= -1 (left, right) on the host", f"{window_size!r}{where}")


def bias_of_mask(op: str, mask: Tensor, scores: tuple[int, ...], q: Tensor) -> Tensor:
    """The mask as numbers to add to the scores [..., H, S, Sk]: [B, H, S, Sk], of which any size may be 1."""
    check_tensor(op, "attn_mask", mask, dtype=(torch.bool, *FLOATS), like=q)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=compute).masked_fill(~mask, float("-inf"))
    try:
        mask.expand(scores)
    except RuntimeError:
        fail(op, "attn_mask", f"a shape that broadcasts to {list(scores)}", str(list(mask.shape)))
    mask = mask.to(compute)
    last = (1, 1, 1, *mask.shape)[-3:]
    if math.prod(mask.shape[:-3]) == 1:  # as it is of no leading dimensions
        return mask.reshape(1, *last)
    return mask.expand(*scores[:-3], *last).reshape(q.shape[0], *last)
