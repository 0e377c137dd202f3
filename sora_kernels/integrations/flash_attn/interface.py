"""What stands in for flash_attn.flash_attn_interface: its public functions, and the passes behind them.

diffusers, and whoever splits a sequence over several devices, calls the passes themselves. There the backward is given an output
and an lse of more keys than the ones that it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention import flash_attn_func as flash_attn_func
from ...attention import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from ...attention import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from ...attention import flash_attn_varlen_func as flash_attn_varlen_func
from ...attention import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from ...attention import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from ...attention import flash_attn_with_kvcache as flash_attn_with_kvcache
from ...attention_arguments import attend
from ...checks import check_tensor, fail

PUBLIC = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)
NAMES = (
    *PUBLIC,
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_varlen_forward",
    "_wrapped_flash_attn_varlen_backward",
)


@torch.no_grad()
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of a dense batch, without derivatives.

    Returns:
        out, lse [B, H, S], and two empty tensors where flash_attn has its dropout mask and the state of its random numbers.
    """
    window = (window_size_left, window_size_right)
    out, lse, mask = flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, False, True)
    return out, lse, mask, _no_random_numbers(q)


@torch.no_grad()
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of a packed batch, with lse [H, N]. There is no leftpad_k; num_splits may be 0 or 1."""
    op = "_flash_attn_varlen_forward"
    if leftpad_k is not None:
        fail(op, "leftpad_k", "None (not supported)", type(leftpad_k).__name__)
    if num_splits not in (0, 1):
        fail(op, "num_splits", "0 or 1, as keys are not split", repr(num_splits))
    out, lse, mask = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        (window_size_left, window_size_right), softcap, alibi_slopes, False, True, block_table, seqused_k=seqused_k,
    )  # fmt: skip
    return out, lse, mask, _no_random_numbers(q)


def _no_random_numbers(q: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=q.device)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes the gradients of a dense batch into dq, dk and dv, those that are not None.

        p_ij = exp(s_ij - lse_i),   ds_ij = p_ij (dout_i . v_j - dout_i . out_i)

    Args:
        out, softmax_lse: [B, S, H, d] and float32 [B, H, S]: of these keys, or of these and others. The forward pass of these keys
            is computed once more.
        deterministic, rng_state: taken for compatibility.

    The others are those of the forward pass.

    Returns:
        dout . out, float32 [B, H, S].
    """
    window = (window_size_left, window_size_right)
    options = dropout_p, softmax_scale, causal, window, softcap, alibi_slopes
    return _backward("_flash_attn_backward", dout, q, k, v, out, softmax_lse, (dq, dk, dv), None, options)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """The same of a packed batch, with lse [H, N]; returns dout . out, float32 [H, N]."""
    window, boundaries = (window_size_left, window_size_right), (cu_seqlens_q, cu_seqlens_k)
    options = dropout_p, softmax_scale, causal, window, softcap, alibi_slopes
    return _backward("_flash_attn_varlen_backward", dout, q, k, v, out, softmax_lse, (dq, dk, dv), boundaries, options)


def _backward(
    op: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    boundaries: tuple[Tensor, Tensor] | None,
    options: tuple[float, float, bool, tuple[int, int], float, Tensor | None],
) -> Tensor:
    """Attention to these keys alone has an out' and an lse' of its own.

    With w = exp(lse' - lse), its probabilities times w are p. So w dout and w dout . (out' - out) are the gradients of out' and
    lse' that give ds.
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = own_q, own_k, own_v = [_saveable(x).detach().requires_grad_() for x in (q, k, v)]
        boundaries = None if boundaries is None else (_saveable(boundaries[0]), _saveable(boundaries[1]))
        dropout, scale, causal, window, softcap, slopes = options
        slopes = None if slopes is None else _saveable(slopes)
        own_out, own_lse, _ = attend(op, own_q, own_k, own_v, boundaries, dropout, scale, causal, window, softcap, slopes, True)
    with torch.no_grad():
        for name, x in (("dout", dout), ("out", out)):
            check_tensor(op, name, x, tuple(own_out.shape), dtype=own_out.dtype, like=q)
        check_tensor(op, "softmax_lse", lse, tuple(own_lse.shape), dtype=own_lse.dtype, like=q)
        for name, wanted, like in zip(("dq", "dk", "dv"), gradients, (q, k, v), strict=True):
            if wanted is not None:
                check_tensor(op, name, wanted, tuple(like.shape), dtype=like.dtype, like=q)

        weight = (own_lse - lse).exp().masked_fill(own_lse.isinf(), 0.0)  # -inf - -inf of queries that see no key
        wide = dout.to(lse.dtype)
        dlse = weight * (wide * (own_out.to(lse.dtype) - out)).sum(-1).transpose(-1, -2)
        own_dout = (wide * weight.transpose(-1, -2)[..., None]).to(own_out.dtype)
        found = torch.autograd.grad((own_out, own_lse), inputs, (own_dout, dlse))
        for wanted, gradient in zip(gradients, found, strict=True):
            if wanted is not None:
                wanted.copy_(gradient)
        return (wide * out).sum(-1).transpose(-1, -2).contiguous()


def _saveable(x: Tensor) -> Tensor:
    """One that a backward may save, as tensors of inference mode may not."""
    return x.clone() if x.is_inference() else x


# flash_attn's operators by the names of their functions: here both are the same.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
