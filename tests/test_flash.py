"""Kernels of others as backends: every call is what their signature means, and gives what this package promises."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from types import ModuleType
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from test_dit import small
from torch import Tensor

from sora_kernels import backends, flash, reference
from sora_kernels.attention import flash_attn_func, flash_attn_varlen_func
from sora_kernels.checks import UNBOUNDED
from sora_kernels.kv_cache import flash_attn_with_kvcache
from sora_kernels.layout import PackedLayout
from sora_kernels.signatures import SIGNATURES
from sora_kernels.spatiotemporal_attention import spatiotemporal_attention
from sora_model.model.dit import DiT
from sora_model.text.words import WordEncoder

VERSIONS = [*foreign.SIGNATURES, *((name, version) for name in ("torch_flash", "torch_cudnn") for version in ("2.11", "present"))]
SELF = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
ONE = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
CROSS = torch.tensor([0, 3, 7, 9], dtype=torch.int32)  # its second sample has keys and no queries; its others fewer of them


def call_of(
    function: str, *, dtype: torch.dtype = torch.bfloat16, d: int = 16, kv_heads: int = 2, **options: Any
) -> dict[str, Any]:
    """Of 14 tokens, of which a packed batch has 12."""
    torch.manual_seed(0)
    cu_q, cu_k = options.pop("cu", (None, None))
    heads = 2
    shape_q, shape_k = ((14,), (14,)) if cu_q is not None else ((2, 7), (2, options.pop("keys", 7)))
    q = torch.randn(*shape_q, heads, d).to(dtype)
    k, v = (torch.randn(*shape_k, kv_heads, d).to(dtype) for _ in range(2))
    packed = cu_q is not None
    call = {
        "q": q, "k": k, "v": v, "cu_q": cu_q, "cu_k": cu_k, "bias": None, "alibi": None, "scale": 0.3, "left": UNBOUNDED,
        "right": UNBOUNDED, "softcap": 0.0, "max_q": 7 if packed else None, "max_k": 7 if packed else None, **options,
    }  # fmt: skip
    lse = torch.empty(heads, 14) if packed else torch.empty(2, heads, 7)
    statistics = torch.empty(2, *lse.shape)
    if function == "attention_forward":
        return {**call, "out": torch.full_like(q, foreign.NAN), "lse": lse, "statistics": statistics}
    forward = {**call, "out": torch.empty_like(q), "lse": lse, "statistics": statistics}
    dlse = forward.pop("dlse", None)
    reference.attention_forward(**without_hints(forward))
    grads = {f"d{name}": torch.full_like(call[name], foreign.NAN) for name in "qkv"}
    return {"dout": torch.randn(q.shape).to(dtype), "dlse": dlse, **call, "out": forward["out"], "statistics": statistics, **grads}


def without_hints(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in SIGNATURES["attention_forward"].hints}


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"right": 0},
    "more keys, causal": {"keys": 9, "right": 0},
    "fewer keys, causal": {"keys": 4, "right": 0},
    "window": {"left": 2, "right": 1},
    "to the left": {"left": 2, "right": 0},
    "to the right": {"left": UNBOUNDED, "right": 1},
    "grouped": {"kv_heads": 1},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": torch.rand(2, 2)},
    "packed": {"cu": (SELF, SELF)},
    "packed, causal": {"cu": (SELF, SELF), "right": 0},
    "cross": {"cu": (CROSS, SELF)},
    "cross, causal": {"cu": (SELF, CROSS), "right": 0},
    "cross, window": {"cu": (CROSS, SELF), "left": 1, "right": 1},
    "wider than the keys": {"keys": 4, "right": 5},
    "to the left, fewer keys": {"keys": 4, "left": 2},
    "packed, grouped": {"cu": (SELF, SELF), "kv_heads": 1},
    "one query, grouped": {"cu": (ONE, SELF), "kv_heads": 1, "max_q": 1},
    "packed, softcap": {"cu": (SELF, SELF), "softcap": 1.5},
    "packed, alibi": {"cu": (SELF, SELF), "alibi": torch.rand(3, 2)},
}
# Which of them each backend refuses.
REFUSED = {
    "flash_attn_2": {"wider than the keys", "to the left, fewer keys"},
    "flash_attn_3": {"alibi", "packed, alibi"},
    "flash_attn_4": {"alibi", "packed, alibi", "softcap", "packed, softcap"},
    "torch_flash": {"alibi", "packed, alibi", "softcap", "packed, softcap", "wider than the keys", "to the left, fewer keys"},
    "torch_cudnn": set(CASES) - {"dense", "causal"},
}


def run(backend: ModuleType, function: str, call: dict[str, Any]) -> list[Tensor]:
    getattr(backend, function)(**call)
    return [call[name] for name in SIGNATURES[function].outputs]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", ["attention_forward", "attention_backward"])
@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_results_are_the_reference_s(monkeypatch: pytest.MonkeyPatch, name: str, version: str, function: str, case: str) -> None:
    """Out, lse and statistics; or gradients, from the statistics of another backend. Rows of no sample are zeros."""
    calls = foreign.install(monkeypatch, name, version)
    backend = importlib.import_module(f"sora_kernels.flash.{name}")
    call = call_of(function, **CASES[case])
    assert (backend.refuses(function, call) is not None) == (case in REFUSED[name])
    if case in REFUSED[name]:
        return
    expected = call_of(function, **CASES[case])
    right = run(reference, function, without_hints(expected))
    found = run(backend, function, call)
    assert len(calls) == 1
    if function == "attention_forward":
        # Any maximum will do, with the sum that goes with it.
        plain = call["softcap"] == 0 and call["alibi"] is None
        for results in (found, right):
            maximum, total = results.pop()
            results.append((maximum * 0.3 if plain else maximum) + total.log())
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    if call["cu_q"] is not None:
        assert not found[0][int(call["cu_q"][-1]) :].any()


@pytest.mark.parametrize(("name", "version"), VERSIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_nans_stay_nans(monkeypatch: pytest.MonkeyPatch, name: str, version: str, packed: bool) -> None:
    """Of a query, in its own row, and their statistics are no query's without keys."""
    foreign.install(monkeypatch, name, version)
    backend = importlib.import_module(f"sora_kernels.flash.{name}")
    call = call_of("attention_forward", cu=(SELF, SELF) if packed else (None, None))
    if backend.refuses("attention_forward", call) is not None:
        assert (name, packed) == ("torch_cudnn", True)
        return
    place = (6,) if packed else (1, 6)
    call["q"][place] = torch.nan
    out, lse, (_, total) = run(backend, "attention_forward", call)
    is_nan = out.isnan().any(-1)
    assert is_nan[place].all()
    assert is_nan.sum() == 2
    assert torch.equal(lse.isnan(), is_nan.mT)
    assert total.mT[place].all()


@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_a_gradient_of_lse(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    foreign.install(monkeypatch, name, version)
    backend = importlib.import_module(f"sora_kernels.flash.{name}")
    call = call_of("attention_backward", dlse=torch.rand(2, 2, 7))
    if name != "flash_attn_4":
        assert backend.refuses("attention_backward", call) == "has no gradient of lse"
        return
    right = run(reference, "attention_backward", without_hints(call_of("attention_backward", dlse=call["dlse"])))
    for got, want in zip(run(backend, "attention_backward", call), right, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_a_backward_adds_in_order_unless_speed_is_preferred(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    calls = foreign.install(monkeypatch, name, version)
    backend = importlib.import_module(f"sora_kernels.flash.{name}")
    seen = []
    for preference in ("default", "fastest"):
        monkeypatch.setattr(backends, "_preferred", preference)
        backend.attention_backward(**call_of("attention_backward"))
        seen.append(calls[-1][1].get("deterministic"))
    assert seen == ([None, None] if name.startswith("torch") else [True, False])


def test_backwards_without_a_deterministic_way_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.install(monkeypatch, "torch_cudnn", "present")
    flash_attn_3, cudnn = (importlib.import_module(f"sora_kernels.flash.{name}") for name in ("flash_attn_3", "torch_cudnn"))
    large, small_ = (call_of("attention_backward", d=d) for d in (200, 64))
    reason = "has a deterministic backward for head dims of at most 192, not 200"
    assert flash_attn_3.refuses("attention_backward", large) == reason
    monkeypatch.setattr(backends, "_preferred", "fastest")
    assert flash_attn_3.refuses("attention_backward", large) is None
    assert cudnn.refuses("attention_backward", small_) is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert flash_attn_3.refuses("attention_backward", large) == reason
    assert cudnn.refuses("attention_backward", small_) == "has no deterministic backward"
    assert cudnn.refuses("attention_forward", call_of("attention_forward", d=64)) is None


def test_what_torch_keeps_from_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.install(monkeypatch, "torch_cudnn", "present")
    cudnn = importlib.import_module("sora_kernels.flash.torch_cudnn")
    assert cudnn.refuses("attention_forward", call_of("attention_forward", keys=1)) == "needs more than one query and one key"
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda _: False)
    assert "by torch.backends.cuda.can_use_cudnn_attention" in cudnn.refuses("attention_forward", call_of("attention_forward"))


def test_keys_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("flash_attn_3", "old"), ("flash_attn_3", "new"), ("flash_attn_4", "4.0.0b36")):
        calls = foreign.install(monkeypatch, name, version)
        importlib.import_module(f"sora_kernels.flash.{name}").attention_forward(**call_of("attention_forward"))
        assert calls[0][1]["num_splits"] == 1


REASONS = {
    "takes a negative side of a window for one without an end": {"keys": 9, "right": -2},
    "has no mask": {"bias": torch.zeros(1)},
    "needs a softmax_scale of at least 1e-30": {"scale": -0.3},
    "needs max_seqlen_q and max_seqlen_k as numbers on the host": {"cu": (SELF, SELF), "max_q": None},
    "needs a head dim of at most [0-9]+ that 8 divides, not 12": {"d": 12},
    "needs a head dim of at most [0-9]+ that 8 divides, not 264": {"d": 264},
    r"needs queries and keys; k has shape \[2, 0, 2, 16\]": {"keys": 0},
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("name", flash.FOREIGN)
def test_what_no_kernel_can_do(name: str, reason: str) -> None:
    backend = importlib.import_module(f"sora_kernels.flash.{name}")
    expected = "has no packed batches" if (name, "cu" in REASONS[reason]) == ("torch_cudnn", True) else reason
    assert re.fullmatch(expected, backend.refuses("attention_forward", call_of("attention_forward", **REASONS[reason])))


@pytest.mark.parametrize("name", flash.FOREIGN)
def test_rows_that_kernels_cannot_read(name: str) -> None:
    backend = importlib.import_module(f"sora_kernels.flash.{name}")
    call = call_of("attention_forward")
    odd = torch.zeros(2, 7, 2, 17, dtype=torch.bfloat16)
    for x in (odd[..., :16], odd.flatten()[1 : 1 + call["q"].numel()].view_as(call["q"])):
        reason = backend.refuses("attention_forward", {**call, "k": x})
        assert reason.startswith(("needs rows of k at multiples of 16 bytes", "needs k contiguous"))
    fused = torch.zeros(2, 7, 3, 2, 16, dtype=torch.bfloat16)[:, :, 1]
    assert (backend.refuses("attention_forward", {**call, "k": fused}) is not None) == (name == "torch_cudnn")


def test_torch_s_kernels_that_others_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("sora_kernels.flash.torch_flash")
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
    assert backend.refuses("attention_forward", call_of("attention_forward")) == "needs torch's own kernels, which FA4 replaces"


@pytest.mark.parametrize(
    ("name", "version", "installed", "reason"),
    [
        ("flash_attn_2", "2.6.3", None, "needs flash_attn 2.7 or above, not 2.6.3"),
        ("flash_attn_2", "2.8.4+sora", "2.8.3", "needs flash_attn itself, not the stand-in for it that is installed"),
        ("flash_attn_2", "unknown", None, "needs flash_attn 2.7 or above, not unknown"),
        ("flash_attn_2", (2, 8), None, None),
        ("flash_attn_2", "2.8.3", None, None),
        ("flash_attn_3", None, None, None),
        ("flash_attn_4", "2.6.3", "4.0.0b4", "needs flash-attn-4 4.0.0b20 or above, not 4.0.0b4"),
        ("flash_attn_4", "2.6.3", "4.0.0b20", None),
        ("flash_attn_4", None, None, None),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, name: str, version: object, installed: str | None, reason: str | None) -> None:
    """By the package's own number, or else that of its distribution; without any it was built in place."""
    foreign.install(monkeypatch, name, {"flash_attn_2": "2.8.3", "flash_attn_3": "new", "flash_attn_4": "4.0.0b20"}[name])
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    sys.modules["flash_attn"].__version__ = version

    def of_distribution(_: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(importlib.metadata, "version", of_distribution)
    assert importlib.import_module(f"sora_kernels.flash.{name}").unavailable() == reason


def test_a_package_without_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 alone has a package flash_attn, too, which is not FlashAttention-2."""
    foreign.install(monkeypatch, "flash_attn_4", "4.0.0b20")
    reason = importlib.import_module("sora_kernels.flash.flash_attn_2").unavailable()
    assert reason.startswith("needs flash_attn, which cannot be imported: ModuleNotFoundError")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    reason = importlib.import_module("sora_kernels.flash.flash_attn_3").unavailable()
    assert reason == "needs flash_attn_3 3.0.0b1 or above, with flash_attn_interface._flash_attn_forward"


@pytest.mark.parametrize("name", flash.FOREIGN)
def test_what_is_absent_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with (
        backends.use_backend(name),
        pytest.raises(ValueError, match=f"attention_forward: backend '{name}' was forced but takes cuda"),
    ):
        flash_attn_func(*torch.zeros(3, 1, 4, 2, 16).bfloat16())
    if name == "torch_flash" and torch.backends.cuda.is_flash_attention_available():
        pytest.skip("this torch is built with it")
    reason = backends.BACKENDS[name].unavailable("attention_forward", "cuda", torch.bfloat16, 64)
    assert re.search("cannot be imported: ModuleNotFoundError|built with", reason)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("flash_attn_3", (8, 0)),
        ("flash_attn_3", (10, 0)),
        ("flash_attn_4", (8, 0)),
        ("flash_attn_2", (7, 5)),
        ("torch_cudnn", (12, 0)),
    ],
)
def test_gpus_without_kernels(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    for namespace in ("cudnn.is_available", "cuda.is_flash_attention_available"):
        monkeypatch.setattr(f"torch.backends.{namespace}", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    reason = importlib.import_module(f"sora_kernels.flash.{name}").unavailable()
    assert reason.endswith(f"this GPU has {capability[0]}.{capability[1]}")


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int | None]]:
    """What each call of attention on the CPU is told of the longest sample."""
    loaded = backends.BACKENDS["cpu"].load()
    seen: list[tuple[str, int | None, int | None]] = []

    class Asking(backends.Backend):
        def load(self) -> Any:
            module = ModuleType("asking")
            module.__dict__.update(vars(loaded), TAKES_HINTS=True)
            for function in ("attention_forward", "attention_backward"):

                def ask(function: str = function, **call: Any) -> None:
                    seen.append((function, call["max_q"], call["max_k"]))
                    getattr(reference, function)(**without_hints(call))

                setattr(module, function, ask)
            return module

    monkeypatch.setitem(backends.BACKENDS, "cpu", Asking("cpu", "", ("cpu",), None))
    return seen


def test_the_longest_sample_reaches_the_backend(hints: list) -> None:
    """From flash_attn's arguments and from layouts, in both passes; not to backends that have no use for it."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 12, 2, 16))
    flash_attn_varlen_func(q, k, v, SELF, SELF, 8, 9).sum().backward()
    flash_attn_varlen_func(q, k, v, SELF, SELF).sum().backward()
    flash_attn_varlen_func(q, k, v, SELF, SELF, torch.tensor(7), -1)
    spatiotemporal_attention(q, k, v, PackedLayout.from_grids([(1, 2, 2), (1, 2, 4)])).sum().backward()
    names = ("attention_forward", "attention_backward")
    assert hints == [(f, *n) for n in ((8, 9), (None, None)) for f in names] + [(names[0], None, None)] + [(f, 8, 8) for f in names]
    hints.clear()
    flash_attn_varlen_func(q.detach(), k, v, SELF, SELF, np.int64(8), 10**30)
    flash_attn_with_kvcache(torch.randn(2, 3, 2, 16), *torch.randn(2, 2, 9, 2, 16), cache_seqlens=torch.tensor([4, 5]).int())
    assert hints == [(names[0], 8, None), (names[0], 3, 9)]


def test_a_longest_sample_that_depends_on_data_can_be_compiled() -> None:
    def longest(q: Tensor, cu: Tensor) -> Tensor:
        most = cu.diff().max().item()
        return flash_attn_varlen_func(q, q, q, cu, cu, most, most)

    q = torch.randn(12, 2, 16)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = torch.compile(longest, fullgraph=True, backend="aot_eager")(q, SELF)
    torch.testing.assert_close(found, longest(q, SELF))


def test_the_dit_says_how_long_samples_are(hints: list) -> None:
    """In self-attention and in attention to text."""
    text = WordEncoder(32)(["a red circle", ""])
    hints.clear()
    DiT(small())([torch.randn(4, 2, 4, 4), torch.randn(4, 1, 8, 8)], torch.tensor([1.0, 2.0]), text)
    assert len(hints) == 2 * 3
    assert {(q, k) for _, q, k in hints} == {(16, 16), (16, 4)}


def test_tables_are_in_order() -> None:
    for table in (flash.PUBLISHED, flash.MEASURED):
        for figures in table.values():
            speeds = [figure.forward for figure in figures if figure.forward is not None]
            assert speeds == sorted(speeds, reverse=True)
            assert all(figure.backend in backends.BACKENDS and figure.source for figure in figures)
            assert len({figure.backend for figure in figures}) == len(figures)


OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {}, "packed": {"cu": (SELF, SELF)}, "cross": {"cu": (CROSS, SELF)}, "causal": {"cu": (SELF, SELF), "right": 0},
    "window": {"left": 2, "right": 1}, "softcap": {"softcap": 1.0}, "alibi": {"alibi": torch.rand(2, 2)},
    "grouped": {"kv_heads": 1}, "no longest": {"cu": (SELF, SELF), "max_q": None}, "mask": {"bias": torch.zeros(2, 2, 7, 7)},
}  # fmt: skip
H, B = "hopper", "triton"
FA2_, FA3, FA4, CUDNN = "flash_attn_2", "flash_attn_3", "flash_attn_4", "torch_cudnn"
# By the major number of the compute capability and the option: at head dims 64, 128 and 256.
CHOSEN = {
    9: {
        "dense": (CUDNN, CUDNN, FA3), "packed": (FA3, FA3, FA3), "cross": (FA3, FA3, FA3), "causal": (FA3, FA3, FA3),
        "window": (FA3, FA3, FA3), "softcap": (FA3, FA3, FA3), "alibi": (FA2_, FA2_, FA2_), "grouped": (FA3, FA3, FA3),
        "no longest": (H, H, B), "mask": (B, B, B),
    },
    10: {
        "dense": (CUDNN, CUDNN, B), "packed": (FA4, FA4, B), "cross": (FA4, FA4, B), "causal": (FA4, FA4, B),
        "window": (FA4, FA4, B), "softcap": (B, B, B), "alibi": (B, B, B), "grouped": (FA4, FA4, B), "no longest": (B, B, B),
        "mask": (B, B, B),
    },
    8: {option: (FA2_, FA2_, FA2_) for option in OPTIONS if option not in ("no longest", "mask")} | {
        "no longest": (B, B, B), "mask": (B, B, B),
    },
    12: dict.fromkeys(OPTIONS, (B, B, B)),
}  # fmt: skip


@pytest.mark.parametrize("major", CHOSEN)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_who_is_chosen(monkeypatch: pytest.MonkeyPatch, major: int, option: str, dtype: torch.dtype) -> None:
    """Where everything is installed, for every dtype, head dim and option."""
    monkeypatch.setattr(backends, "_preferred", "fastest")
    monkeypatch.setattr(flash, "fastest", lambda: flash.order(major))
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda _: True)
    for name in (*flash.FOREIGN, "hopper"):
        monkeypatch.setattr(backends.BACKENDS[name].load(), "unavailable", lambda: None)
    select = backends._select.__wrapped__
    for d, expected in zip((64, 128, 256), CHOSEN[major][option], strict=True):
        call = call_of("attention_forward", dtype=dtype, d=d, **OPTIONS[option])
        able = select("attention_forward", torch.device("cuda", 0), dtype, d, None, "fastest")
        chosen = backends._choose(able, "attention_forward", call).backend
        assert chosen == (B if dtype == torch.float32 else expected), d
