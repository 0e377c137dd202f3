"""The FlashAttention implementation "SORA" of torch: its operators of CUDA tensors, forward and backward, on these kernels.

    _flash_attention_forward                      q [B, S, H, d], or [N, H, d] with boundaries -> out, logsumexp
    _flash_attention_forward_no_dropout_inplace   the same into a given out
    _flash_attention_backward                     dq, dk, dv of out, logsumexp and the gradient of out
    _scaled_dot_product_flash_attention           q [B, H, S, d]; and its backward

torch's formulas of autograd call them in pairs, and hand the backward logsumexp where our kernels take each softmax's maximum and
sum. Probabilities are exp(s - lse), so that lse is a maximum whose sum is 1.

The signatures are torch's, and private. One that differs is refused before anything is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from ...attention_arguments import Options, check_options, check_unpaged, run
from ...attention_op import Longest, attention_backward, statistics_of_lse
from ...checks import AttentionNames, check_cu_seqlens, check_tensor, fail
from ...library import rows
from ...used_keys import used_keys

NAME = "SORA"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = AttentionNames("query", "key", "value", "scale", "cum_seq_q", "cum_seq_k")


def register() -> None:
    """Offers these kernels to torch as the FlashAttention implementation "SORA", and activates nothing.

    >>> register()
    >>> torch.nn.attention.activate_flash_attention_impl("SORA")
    >>> torch.nn.attention.current_flash_attention_impl()
    'SORA'
    >>> torch.nn.attention.restore_flash_attention_impl()

    While it is active, the operators of FlashAttention are these kernels for all CUDA tensors of the process. They are called by
    `torch.nn.functional.scaled_dot_product_attention` where torch chooses FlashAttention, by
    `torch.nn.attention.varlen.varlen_attn`, and by attention of nested tensors.

    Raises:
        ValueError: if this torch has no such implementations. Later, from `activate_flash_attention_impl`, if its operators have
            another signature than the one that these functions were written for. From a call, for what cannot be honoured.
    """
    offer = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if offer is None:
        fail("register", "torch", "2.10 or later, which has register_flash_attention_impl", torch.__version__)
    offer(NAME, register_fn=install)


class Handle:
    """Operators as they are installed, until `remove()`."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        self._library = None  # what it has installed goes with it


def install(dispatch_key: str = "CUDA") -> Handle:
    """Puts these kernels in the place of torch's. Tests do so for tensors on the CPU."""
    present = [operator for operator in OPERATORS if hasattr(torch.ops.aten, operator.name) or not operator.is_new]
    for operator in present:
        packet = getattr(torch.ops.aten, operator.name, None)
        if packet is None:
            fail("register", operator.name, "an operator of torch", f"none in torch {torch.__version__}")
        check_signature(operator, packet.default._schema)
    library = Library("aten", "IMPL", dispatch_key)
    for operator in present:
        library.impl(operator.name, operator.function, dispatch_key)
    return Handle(library)


class Operator(NamedTuple):
    """What is installed under a name of torch's, and how many results it has. Not all versions have those that are new."""

    function: Callable[..., Any]
    results: int
    is_new: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__


def check_signature(operator: Operator, schema: Any) -> None:
    """Refuses torch's schema where its arguments or results are not those of our function.

    Ours may have more keyword arguments, which an older torch lacks.
    """
    torchs = [(a.name, a.kwarg_only) for a in schema.arguments]
    ours = [(p.name, p.kind is p.KEYWORD_ONLY) for p in inspect.signature(operator.function).parameters.values()]
    if [x for x in ours if x in torchs or not x[1]] != torchs or len(schema.returns) != operator.results:
        expected = f"({', '.join(name for name, _ in ours)}) -> {operator.results} results"
        fail("register", operator.name, expected, f"{schema} in torch {torch.__version__}")


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    op = "_flash_attention_forward"
    _check_rest(op, return_debug_mask, alibi_slopes, block_table, num_splits)
    boundaries = _boundaries(op, query, cum_seq_q, cum_seq_k)
    window = _window(window_size_left, window_size_right)
    options = _check(op, query, key, value, boundaries, dropout_p, is_causal, scale, window)
    if seqused_k is not None:
        if boundaries is None:
            fail(op, "seqused_k", "None without cum_seq_q and cum_seq_k", "a tensor")
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            fail(op, "seqused_k", "None where gradients are wanted, as torch does not hand it to the backward", "a tensor")
        check_tensor(op, "seqused_k", seqused_k, (boundaries[0].shape[0] - 1,), dtype=torch.int32, like=query)
        cu_q, cu_k, _ = used_keys(op, "seqused_k", *boundaries, seqused_k, (query.shape[0], key.shape[0]))
        boundaries = cu_q, cu_k
    out, lse = _forward(query, key, value, boundaries, options)
    return _in_layout_of(query, out), lse, *_no_dropout(query)


def _flash_attention_forward_no_dropout_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    check_tensor("_flash_attention_forward_no_dropout_inplace", "out", out, tuple(query.shape), dtype=query.dtype, like=query)
    result, lse, *_ = _flash_attention_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale,
        window_size_left=window_size_left, window_size_right=window_size_right, seqused_k=seqused_k, alibi_slopes=alibi_slopes,
        block_table=block_table, num_splits=num_splits,
    )  # fmt: skip
    out.copy_(result)
    return lse


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    op = "_flash_attention_backward"
    boundaries = _boundaries(op, query, cum_seq_q, cum_seq_k)
    window = _window(window_size_left, window_size_right)
    options = _check(op, query, key, value, boundaries, dropout_p, is_causal, scale, window)
    return _backward(op, grad_out, query, key, value, out, logsumexp, boundaries, options)


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    op = "_scaled_dot_product_flash_attention"
    q, k, v = _tokens_first(op, query=query, key=key, value=value)
    _check_rest(op, return_debug_mask)
    options = _check(op, q, k, v, None, dropout_p, is_causal, scale)
    out, lse = _forward(q, k, v, None, options)
    out = _in_layout_of(query, out.transpose(1, 2))
    return out, lse, None, None, query.shape[2], key.shape[2], *_no_dropout(query)


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    op = "_scaled_dot_product_flash_attention_backward"
    q, k, v, out, grad_out = _tokens_first(op, query=query, key=key, value=value, out=out, grad_out=grad_out)
    options = _check(op, q, k, v, None, dropout_p, is_causal, scale)
    grads = _backward(op, grad_out, q, k, v, out, logsumexp, None, options)
    return tuple(_in_layout_of(x, grad.transpose(1, 2)) for x, grad in zip((query, key, value), grads, strict=True))


OPERATORS = (
    Operator(_flash_attention_forward, 5),
    Operator(_flash_attention_forward_no_dropout_inplace, 1, is_new=True),
    Operator(_flash_attention_backward, 3),
    Operator(_scaled_dot_product_flash_attention, 9),
    Operator(_scaled_dot_product_flash_attention_backward, 3),
)

Boundaries = tuple[Tensor, Tensor] | None


def _boundaries(op: str, query: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Boundaries:
    check_tensor(op, "query", query, ("B", "S", "H", "d") if cu_q is None else ("N", "H", "d"), dtype=DTYPES)
    if cu_q is None or cu_k is None:
        if cu_q is not cu_k:
            missing, other = ("cum_seq_q", "cum_seq_k") if cu_q is None else ("cum_seq_k", "cum_seq_q")
            fail(op, missing, f"boundaries beside {other}", "None")
        return None
    check_cu_seqlens(op, "cum_seq_q", cu_q, query)
    check_cu_seqlens(op, "cum_seq_k", cu_k, query, cu_q.shape[0])
    return cu_q, cu_k


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    """flash_attn's: None, too, is a side without a limit."""
    return -1 if left is None else left, -1 if right is None else right


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    dropout_p: float,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] = (-1, -1),
) -> Options:
    batch = q.shape[0] if boundaries is None else boundaries[0].shape[0] - 1
    options = check_options(op, q, k, v, batch, dropout_p, scale, causal, window, 0.0, None, _NAMES)
    if v.shape[-1] != q.shape[-1]:
        fail(op, "value", f"a head dim of {q.shape[-1]}", f"{v.shape[-1]}")
    return options


def _check_rest(
    op: str, debug_mask: bool, alibi_slopes: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None
) -> None:
    """What only some callers want: num_splits has no effect, as numbers never depend on it; the others are refused."""
    if debug_mask:
        fail(op, "return_debug_mask", "False, as there is no dropout", "True")
    if alibi_slopes is not None:
        fail(op, "alibi_slopes", "None, as torch does not hand them to the backward", "a tensor")
    check_unpaged(op, block_table, num_splits)


def _tokens_first(op: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, S, d] -> [B, S, H, d]."""
    for name, x in tensors.items():
        check_tensor(op, name, x, ("B", "H", "S", "d"), dtype=DTYPES)
    return tuple(x.transpose(1, 2) for x in tensors.values())


def _forward(q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, options: Options) -> tuple[Tensor, Tensor]:
    cu_q, cu_k = boundaries or (None, None)
    with torch.no_grad():  # torch's formulas of autograd are around this
        return run(q, k, v, cu_q, cu_k, options)


def _backward(
    op: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, boundaries: Boundaries, options: Options
) -> tuple[Tensor, ...]:
    for name, x in (("grad_out", dout), ("out", out)):
        check_tensor(op, name, x, tuple(q.shape), dtype=q.dtype, like=q)
    sizes = (q.shape[0], q.shape[2], q.shape[1]) if boundaries is None else (q.shape[1], q.shape[0])
    check_tensor(op, "logsumexp", lse, sizes, dtype=torch.float32, like=q)
    alibi, scale, *rest = options
    cu_q, cu_k = boundaries or (None, None)
    with torch.no_grad():
        (out,) = rows(out)
        statistics = statistics_of_lse(lse, scale)
        grads = attention_backward(dout, None, q, k, v, out, statistics, cu_q, cu_k, None, alibi, scale, *rest, *Longest())
        return tuple(_in_layout_of(x, grad) for x, grad in zip((q, k, v), grads, strict=True))


def _no_dropout(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rng_state, offset and debug mask, as torch's operators have them without dropout."""
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return state, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def _in_layout_of(like: Tensor, x: Tensor) -> Tensor:
    """x with the strides of `torch.empty_like(like)`, on which code relies that torch.compile makes."""
    strides = zip(x.shape, x.stride(), torch.empty_like(like, device="meta").stride(), strict=True)
    if all(n == 1 or a == b for n, a, b in strides):
        return x
    return torch.empty_like(like).copy_(x)
