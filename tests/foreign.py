"""Stand-ins for the kernels of others: their exact signatures, of two versions each, and their semantics in float64.

As the real ones do, they leave rows alone that belong to no sample: NaNs stand there. FlashAttention-2 calls the lse of a query
without keys +inf, later ones -inf, and that of NaNs the same. FlashAttention-2 takes a window for one without an end that is as
wide as the longest sample's keys, and with grouped heads ruins the gradients of rows of no sample. A backward checks that it gets
the lse that its own forward gives. Sources: csrc/flash_attn/flash_api.cpp and hopper/flash_api.cpp of Dao-AILab/flash-attention.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels.checks import UNBOUNDED
from sora_kernels.reference.attention import attention, cut

NAN = float("nan")
Arguments = dict[str, Any]

FA2 = "dropout_p, softmax_scale, causal, window_size_left{0}, window_size_right{0}, softcap{1}, alibi_slopes{2}"
CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
CU_NONE = "cu_seqlens_q=None, cu_seqlens_k=None, {}max_seqlen_q=None, max_seqlen_k=None"
GRADS = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
FA2_VARLEN = (
    f"q, k, v, {CU}, {FA2.format('=-1', '=0.0', '=None')}, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None"
)
FA2_VARLEN_BACKWARD = f"{GRADS}, {CU}, {FA2.format('', '', '')}, deterministic, rng_state=None"
FA3_MIDDLE = "kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale"
FA3_END = "rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
FA4_SIDES = "window_size_left=None, window_size_right=None"
FA4 = (
    f"q, k, v, qv=None, {CU_NONE.format('seqused_q=None, seqused_k=None, ')}, min_seqlen_k=None, page_table=None, "
    f"softmax_scale=None, causal=False, softcap=None, {FA4_SIDES}, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
    "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, "
    "block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, "
    "k_descale=None, v_descale=None, gather_kv_indices=None"
)
FA4_BACKWARD = (
    f"q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, {FA4_SIDES}, m_block_size=64, n_block_size=128, "
    "num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, "
    "AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, "
    f"{CU_NONE.format('seqused_q=None, seqused_k=None, ')}, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, "
    "score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None"
)
# By package, version and function. FlashAttention-3 has no version numbers: "old" is that of flash_attn 2.8.3's repository.
SIGNATURES: dict[tuple[str, str], dict[str, str]] = {
    ("flash_attn_2", "2.7.0"): {
        "_flash_attn_forward": f"q, k, v, {FA2.format('', '', '')}, return_softmax",
        "_flash_attn_backward": f"{GRADS}, {FA2.format('', '', '')}, deterministic, rng_state=None",
        "_flash_attn_varlen_forward": FA2_VARLEN,
        "_flash_attn_varlen_backward": FA2_VARLEN_BACKWARD,
    },
    ("flash_attn_2", "2.8.3"): {
        "_flash_attn_forward": f"q, k, v, {FA2.format('', '', '')}, return_softmax",
        "_flash_attn_backward": f"{GRADS}, {FA2.format('', '', '')}, deterministic, rng_state=None",
        "_flash_attn_varlen_forward": f"{FA2_VARLEN}, zero_tensors=False",
        "_flash_attn_varlen_backward": f"{FA2_VARLEN_BACKWARD}, zero_tensors=False",
    },
    ("flash_attn_3", "old"): {
        "_flash_attn_forward": "q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, "
        f"seqused_k, max_seqlen_q, max_seqlen_k, page_table, {FA3_MIDDLE}, softmax_scale, causal, window_size=(-1, -1), "
        f"attention_chunk=0, softcap=0.0, {FA3_END}",
        "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, "
        "max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0",
    },
    ("flash_attn_3", "new"): {
        "_flash_attn_forward": "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
        "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, "
        + FA3_MIDDLE.replace(",", "=None,")
        + "=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, "
        + FA3_END,
        "_flash_attn_backward": f"dout, q, k, v, out, softmax_lse, {CU_NONE.format('sequed_q=None, sequed_k=None, ')}, dq=None, "
        "dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, "
        "deterministic=False, sm_margin=0",
    },
    ("flash_attn_4", "4.0.0b20"): {"_flash_attn_fwd": FA4, "_flash_attn_bwd": FA4_BACKWARD},
    ("flash_attn_4", "4.0.0b36"): {
        "_flash_attn_fwd": f"{FA4}, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False, "
        "gather_bwd_recompute_p=False",
        "_flash_attn_bwd": f"{FA4_BACKWARD}, learnable_sink=None",
    },
}
MODULES = {
    "flash_attn_2": ("flash_attn", "flash_attn.flash_attn_interface"),
    "flash_attn_3": ("flash_attn_interface",),
    "flash_attn_4": ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"),
}
# Of torch: the signatures of 2.11, and those of the torch at hand. Only FlashAttention's forward differs.
ATEN_2_11 = {
    "_flash_attention_forward": "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
    "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> "
    "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
}
ATEN = (
    "_flash_attention_forward", "_flash_attention_backward",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
)  # fmt: skip


class StandIn:
    """Binds a call to a signature, writes it down and hands its arguments to `body`, by name."""

    def __init__(self, name: str, signature: inspect.Signature, body: Callable[[Arguments], Any], calls: list) -> None:
        self.name, self.__signature__, self.body, self.calls = name, signature, body, calls

    def __call__(self, *args: object, **kwargs: object) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        self.calls.append((self.name, dict(bound.arguments)))
        return self.body(bound.arguments)


class Operator:
    """As `torch.library.custom_op` leaves a function: its signature is hidden."""

    def __init__(self, function: StandIn) -> None:
        self._init_fn = function

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self._init_fn(*args, **kwargs)


def install(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> list[tuple[str, Arguments]]:
    """Puts stand-ins where the backend of this name finds its kernels; returns the list that their calls go to."""
    calls: list[tuple[str, Arguments]] = []
    if package.startswith("torch"):
        for name in ATEN:
            text = ATEN_2_11.get(name) if version == "2.11" else None
            schema = torch._C.parse_schema(text) if text else getattr(torch.ops.aten, name).default._schema
            body = functools.partial(cudnn if "cudnn" in name else aten_flash, name)
            monkeypatch.setattr(torch.ops.aten, name, StandIn(name, of_schema(schema), body, calls))
        monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda _: True)
        return calls
    modules = [ModuleType(name) for name in MODULES[package]]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if package == "flash_attn_2":
            module.__version__ = version
    for name, text in SIGNATURES[package, version].items():
        signature = inspect.signature(eval(f"lambda {text}: None"))
        function = StandIn(name, signature, functools.partial(flash_attn, package, name), calls)
        setattr(modules[-1], name, Operator(function) if version == "new" else function)
    return calls


def of_schema(schema: Any) -> inspect.Signature:
    kinds, none = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY), inspect.Parameter.empty
    return inspect.Signature([
        inspect.Parameter(a.name, kinds[a.kwarg_only], default=a.default_value if a.has_default_value() else none)
        for a in schema.arguments
    ])  # fmt: skip


def flash_attn(package: str, name: str, a: Arguments) -> Any:
    """FlashAttention 2 to 4."""
    left, right = a["window_size"] if "window_size" in a else (a["window_size_left"], a["window_size_right"])
    causal = a["is_causal"] if "is_causal" in a else a["causal"]
    samples = [a.get(key) for key in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    of_masked = math.inf if package == "flash_attn_2" else -math.inf
    is_grouped = a["q"].shape[-2] != a["k"].shape[-2]
    if package == "flash_attn_2":
        assert a["alibi_slopes"] is None or a["alibi_slopes"].stride(-1) == 1
        left, right = clipped(a["k"], samples, is_grouped, left, 0 if causal else right)
    if package == "flash_attn_3" and a.get("deterministic"):
        assert a["q"].shape[-1] <= 192, "Deterministic backward not supported for hdim 256."
    rule = Rule(*samples, a["softmax_scale"], causal, left, right, of_masked, a["softcap"] or 0.0, a.get("alibi_slopes"))
    if name.endswith(("forward", "fwd")):
        out, lse = rule.forward(a["q"], a["k"], a["v"])
        if package == "flash_attn_4":
            rule.write(a["out"], out, samples[0])
            a["lse"].copy_(lse)
        return out, lse, None, None
    tensors = (a[key] for key in ("dout", "q", "k", "v", "lse" if "lse" in a else "softmax_lse"))
    grads = rule.backward(*tensors, a.get("dlse"))
    for key, grad, cu in zip(("dq", "dk", "dv"), grads, (samples[0], *samples[1:2] * 2), strict=True):
        rule.write(a[key], grad, cu)
        if package == "flash_attn_2" and is_grouped and cu is not None:
            a[key][int(cu[-1]) :] = NAN
    return None


def clipped(k: Tensor, samples: list[Any], is_grouped: bool, left: int | None, right: int | None) -> tuple[int, int]:
    """The window that FlashAttention-2's kernel gets."""
    cu_q, _, max_q, max_k = samples
    max_k = k.shape[1] if cu_q is None else max_k
    left, right = (-1 if side is None or not 0 <= side < max_k else side for side in (left, right))
    assert cu_q is None or max_q > 1 or not is_grouped or (left, right) != (-1, -1), "row b would be sample b"
    if left >= 0 > right:
        right = max_k
    return left, right


def aten_flash(name: str, a: Arguments) -> Any:
    samples = [a[key] for key in ("cum_seq_q", "cum_seq_k", "max_q", "max_k")]
    is_grouped = a["query"].shape[-2] != a["key"].shape[-2]
    window = clipped(a["key"], samples, is_grouped, a["window_size_left"], 0 if a["is_causal"] else a["window_size_right"])
    rule = Rule(*samples, a["scale"], a["is_causal"], *window, math.inf)
    assert a["dropout_p"] == 0
    if name.endswith("forward"):
        return *rule.forward(a["query"], a["key"], a["value"]), None, None, None
    return rule.backward(*(a[key] for key in ("grad_out", "query", "key", "value", "logsumexp")))


def cudnn(name: str, a: Arguments) -> Any:
    """Of dense batches: heads come first, and lse is [B, H, S, 1]."""
    rule = Rule(None, None, a.get("max_q"), a.get("max_k"), a["scale"], a["is_causal"], None, None, -math.inf)
    assert a["attn_bias"] is None
    assert a["dropout_p"] == 0
    q, k, v = (a[key].transpose(1, 2) for key in ("query", "key", "value"))
    if "backward" not in name:
        assert a["compute_log_sumexp"] is True
        out, lse = rule.forward(q, k, v)
        return out.transpose(1, 2), lse[..., None], *(None,) * 7
    assert a["logsumexp"].shape == (*a["query"].shape[:3], 1)
    return [x.transpose(1, 2) for x in rule.backward(a["grad_out"].transpose(1, 2), q, k, v, a["logsumexp"].squeeze(-1))]


class Rule:
    """Attention as flash_attn defines it, of one call."""

    def __init__(
        self, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, scale: float, causal: bool, left: int | None,
        right: int | None, of_masked: float, softcap: float = 0.0, alibi: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.cu, self.scale, self.of_masked, self.softcap, self.alibi = (cu_q, cu_k), scale, of_masked, softcap, alibi
        left, right = (UNBOUNDED if side is None or side < 0 else side for side in (left, right))
        self.window = left, 0 if causal else right
        for cu, most in ((cu_q, max_q), (cu_k, max_k)):
            assert cu is None or most >= max(len(x) for x in cut(torch.zeros(int(cu[-1])), cu))

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        inside = slice(None) if self.cu[0] is None else slice(0, int(self.cu[0][-1]))
        out, lse, _ = attention(q, k, v, *self.cu, None, self.alibi, self.scale, *self.window, self.softcap)
        return out[inside], lse[..., inside] if self.cu[0] is not None else lse

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self.exact(q.double(), k.double(), v.double())
        lse = lse.masked_fill((lse == -math.inf) | lse.isnan(), self.of_masked)
        return self.with_slack(out, len(q)).to(q.dtype), self.with_slack(lse.mT, len(q)).mT.float().contiguous()

    def with_slack(self, x: Tensor, rows: int) -> Tensor:
        return x if self.cu[0] is None else torch.cat([x, x.new_full((rows - len(x), *x.shape[1:]), NAN)])

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dlse: Tensor | None = None) -> list[Tensor]:
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out, right = self.exact(*leaves)
            total = (out * dout.double()[: len(out)]).sum()
            if dlse is not None:
                total = total + (right * dlse[..., : right.shape[-1]]).masked_fill(right.isinf(), 0).sum()
        expected = right.detach().masked_fill(right == -math.inf, self.of_masked)
        torch.testing.assert_close(lse[..., : right.shape[-1]].double(), expected, rtol=1e-2, atol=1e-2, equal_nan=True)
        return [x.to(q.dtype) for x in torch.autograd.grad(total, leaves)]

    def write(self, into: Tensor, found: Tensor, cu: Tensor | None) -> None:
        inside = slice(None) if cu is None else slice(0, int(cu[-1]))
        into[inside] = found[inside]
