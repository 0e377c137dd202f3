"""The list of backends: order, forcing, recording, and what info says of it; instruction-set tiers."""

import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tolerance import WITHOUT_CPU_KERNEL

from sora_kernels import backends, flash
from sora_kernels.attention import flash_attn_func
from sora_kernels.backends import record, use_backend
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.info import report
from sora_kernels.layout import PackedLayout
from sora_kernels.rope import rope_3d

LAYOUT = PackedLayout.from_grids([(2, 3, 4)])


def rotate(dtype=torch.float32):
    return rope_3d(torch.ones(24, 2, 8, dtype=dtype), LAYOUT)


def run(code, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_every_function_is_in_the_backend(name):
    module = backends.BACKENDS[name].load()
    missing = {function for function in backends.FUNCTIONS if not hasattr(module, function)}
    assert missing == (set(WITHOUT_CPU_KERNEL) if name == "cpu" else set())


def test_cuda_tensors_have_backends_of_their_own():
    for function in backends.FUNCTIONS:
        assert [name for name, _ in backends.candidates(function, "cuda", torch.bfloat16)] == ["cuda", "triton", "reference"]


def test_what_is_preferred_is_asked_first():
    asked = partial(backends.candidates, "attention_forward", "cuda", torch.bfloat16)
    try:
        backends.prefer("fastest")
        assert [name for name, _ in asked()] == [*flash.order(9), "cuda", "triton", "reference"]
        assert "preferred: fastest" in report()
    finally:
        backends.prefer("default")
    assert [name for name, _ in asked()] == ["cuda", "triton", "reference"]
    with pytest.raises(ValueError, match="prefer: what: expected one of 'default', 'fastest', got 'best'"):
        backends.prefer("best")


class Choosy(backends.Backend):
    """Refuses long rows."""

    def load(self):
        def refuses(function, arguments):
            return "is for short rows" if arguments["x"].shape[0] > 4 else None

        return SimpleNamespace(bias_gelu_forward=backends.BACKENDS["reference"].load().bias_gelu_forward, refuses=refuses)


def test_a_call_that_is_refused_goes_to_the_next_backend(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "choosy", Choosy("choosy", "", ("cpu",), (torch.float32,)))
    monkeypatch.setitem(backends.ORDER, "cpu", ("choosy", "reference"))
    with record() as calls:
        bias_gelu(torch.ones(4, 8))
        bias_gelu(torch.ones(5, 8))
    assert calls == [("bias_gelu_forward", "choosy"), ("bias_gelu_forward", "reference")]
    message = "bias_gelu_forward: no backend can do this call: choosy is for short rows"
    with use_backend("choosy"), pytest.raises(ValueError, match=message):
        bias_gelu(torch.ones(5, 8))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="the CUDA kernels are built where there is an nvcc")
@pytest.mark.skipif(os.environ.get("SORA_KERNELS_CUDA") == "0", reason="SORA_KERNELS_CUDA=0 leaves the CUDA kernels out")
def test_cuda_module_loads_without_a_gpu_and_says_why_it_cannot_run():
    module = backends.BACKENDS["cuda"].load()
    assert module.archs()
    assert all(arch.startswith("sm_") for arch in module.archs())
    reason = module.unavailable()
    assert (reason is None) == torch.cuda.is_available()
    assert reason is None or "GPU" in reason
    x, tables = torch.ones(24, 2, 8), (LAYOUT.cu_spans, LAYOUT.grid, LAYOUT.origin, LAYOUT.step)
    with pytest.raises(ValueError, match=r"rope_3d: x: expected a tensor on the device of sora_kernels\._cuda"):
        module.rope_3d(x, *tables, [1e4] * 3, [4, 2, 2], True, False, torch.empty_like(x))


def test_long_heads_are_refused_with_the_reason(monkeypatch):
    """What a backend cannot do is served by the next one in the list, visibly; forced, it raises."""
    monkeypatch.setitem(backends.ORDER, "cpu", ("triton", "reference"))
    reason = "takes a last axis of at most 256, not 264"
    assert backends.candidates("attention_forward", "cuda", torch.bfloat16, 264)[1] == ("triton", reason)
    if backends.INTERPRETED:
        q = torch.randn(1, 5, 1, 264)
        with record() as calls:
            flash_attn_func(q, q, q)
        assert calls == [("attention_forward", "reference")]
        with use_backend("triton"), pytest.raises(ValueError, match=f"backend 'triton' was forced but {reason}"):
            flash_attn_func(q, q, q)


def test_first_able_backend_runs_and_is_recorded():
    with record() as calls:
        rotate()
        rotate(torch.float64)
        with use_backend("reference"):
            rotate()
    assert calls == [("rope_3d", "cpu"), ("rope_3d", "reference"), ("rope_3d", "reference")]


def test_backward_obeys_the_forced_backend_too():
    x = torch.randn(24, 2, 8, requires_grad=True)
    with use_backend("reference"), record() as calls:
        rope_3d(x, LAYOUT).sum().backward()
    assert calls == [("rope_3d", "reference")] * 2


def test_forcing_is_undone_after_an_error():
    with pytest.raises(ValueError, match="backend 'cpu' was forced but has no float64 kernels"), use_backend("cpu"):
        rotate(torch.float64)
    with record() as calls:
        rotate()
    assert calls == [("rope_3d", "cpu")]


def test_unknown_backend():
    with (
        pytest.raises(
            ValueError, match=r"use_backend: name: expected one of 'cpu', 'cuda', 'torch_cudnn', .*, 'reference'.*, got 'fast'"
        ),
        use_backend("fast"),
    ):
        pass


def test_environment_forces_a_backend():
    code = "from test_backends import *\nwith record() as calls: rotate()\nprint(calls)"
    assert (
        run(code, SORA_KERNELS_BACKEND="reference", PYTHONPATH=str(Path(__file__).parent)).stdout == "[('rope_3d', 'reference')]\n"
    )
    failed = run("import sora_kernels.rope", SORA_KERNELS_BACKEND="fast")
    assert re.search(r"SORA_KERNELS_BACKEND: expected one of 'cpu', 'cuda', .*, 'triton', 'reference', got 'fast'", failed.stderr)


def test_unavailable_backend_says_why(monkeypatch):
    broken = backends.Backend("cpu", "._no_such_module", ("cpu",), (torch.float32,))
    monkeypatch.setitem(backends.BACKENDS, "cpu", broken)
    (name, reason), *_, (other, none) = backends.candidates("rope_3d", "cpu", torch.float32)
    assert (name, other, none) == ("cpu", "reference", None)
    assert reason.startswith("cannot be imported: No module named")
    assert "cpu cannot be imported: No module named" in report()


def test_info_lists_every_function_and_the_tier():
    text = report()
    assert all(f"  {name} " in text for name in backends.FUNCTIONS)
    assert f"instruction set: {backends.BACKENDS['cpu'].load().isa()} (" in text
    assert f"threads: {torch.get_num_threads()} (torch: {torch.get_num_threads()};" in text


TIERS = [name for name, supported in backends.BACKENDS["cpu"].load().isa_tiers() if supported]


@pytest.mark.parametrize("tier", TIERS)
def test_forced_tier_runs(tier):
    assert run("import torch; from sora_kernels import _cpu; print(_cpu.isa())", SORA_KERNELS_ISA=tier).stdout == f"{tier}\n"


def test_uses_in_several_threads_end_when_they_end():
    first, second = backends.use_backend("cpu"), backends.use_backend("reference")
    before = backends.forced_backend()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.forced_backend() == "reference"
    second.__exit__(None, None, None)
    assert backends.forced_backend() == before


def test_records_end_each_for_its_own_list():
    x = torch.zeros(3, 4)
    with record() as outer:
        with record() as inner:
            pass
        bias_gelu(x)
    assert len(outer) == 1
    assert inner == []


def test_records_in_several_threads_end_each_for_its_own_list() -> None:
    """Those that are still open are equal lists, and go on."""
    x = torch.zeros(3, 4)
    opened, closed = threading.Barrier(3), threading.Barrier(3)
    found: list[int] = []

    def other(stays: bool) -> None:
        with record() as calls:
            opened.wait()
            if stays:
                closed.wait()
                bias_gelu(x)
                found.append(len(calls))
        if not stays:
            closed.wait()

    threads = [threading.Thread(target=other, args=(stays,)) for stays in (True, False)]
    for thread in threads:
        thread.start()
    opened.wait()
    closed.wait()
    for thread in threads:
        thread.join()
    assert found == [1]


def test_a_change_of_the_order_holds_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend() -> str:
        with record() as calls:
            rotate()
        return calls[0][1]

    assert backend() == "cpu"
    with monkeypatch.context() as patch:
        patch.setitem(backends.ORDER, "cpu", ("reference",))
        assert backend() == "reference"
    assert backend() == "cpu"
    with monkeypatch.context() as patch:
        patch.setitem(backends.BACKENDS, "cpu", backends.Backend("cpu", "._no_such_module", ("cpu",), (torch.float32,)))
        assert backend() != "cpu"
    assert backend() == "cpu"
    with mock.patch.dict(backends.ORDER, cpu=("reference",)):
        assert backend() == "reference"
    assert backend() == "cpu"


def test_a_backend_forced_here_is_not_forced_in_other_threads():
    found = []
    x = torch.zeros(3, 4)
    with backends.record() as calls, backends.only_here("reference"):
        thread = threading.Thread(target=lambda: found.append(bias_gelu(x)))
        thread.start()
        thread.join()
        bias_gelu(x)
    assert [name for _, name in calls] == [backends.forced_backend() or "cpu", "reference"]


# A little of everything that is compiled once per tier.
SAMPLE = (
    "test_long or see_all or cpu-cpu and "
    "(d72 or d256 or gqa or everything or test_spatiotemporal or test_patch_embed or qk_norm_rope or layer_norm_modulate "
    "or gate_residual or test_bias_gelu or masked or large_logits or test_sizes or layer_half) "
    "and not (registration or compiled)"  # what torch sees of an op is no tier's
)


@pytest.mark.parametrize("tier", TIERS[1:])
def test_other_tiers_pass_the_same_tests(tier):
    names = ["attention", "attention_edges", "spatiotemporal_attention", "patch_embed", "rope", "bias_gelu"]
    names += ["norm_rope", "adaln", "norm_gate_residual"]
    files = [f"tests/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not emulated", "-k", SAMPLE, *files]
    env = {**os.environ, "SORA_KERNELS_ISA": tier}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_best_tier_is_the_default():
    """Also where the environment of this process forces another one; an empty setting is none."""
    assert run("import torch; from sora_kernels import _cpu; print(_cpu.isa())", SORA_KERNELS_ISA="").stdout == f"{TIERS[0]}\n"


@pytest.mark.skipif("amx" not in TIERS, reason="needs a processor with AMX")
def test_pairs_of_bfloat16_come_last_where_there_are_tiles():
    """Their instruction is slow there: docs/performance.md has the figures."""
    assert TIERS.index("avx512") < TIERS.index("avx512bf16")


def test_unknown_tier_is_named():
    failed = run("import torch; from sora_kernels import _cpu", SORA_KERNELS_ISA="sse9")
    assert "SORA_KERNELS_ISA: expected one of" in failed.stderr
    assert "got 'sse9'" in failed.stderr


def test_a_wrong_setting_is_not_hidden_by_the_next_backend():
    code = "import torch; from sora_kernels.attention import flash_attn_func as f; q = torch.ones(1, 2, 1, 8); f(q, q, q)"
    failed = run(code, SORA_KERNELS_ISA="sse9")
    assert failed.stderr.endswith("got 'sse9'\n")
    assert failed.returncode


@pytest.mark.parametrize("variable", ["BACKEND", "ISA", "TORCH", "CACHE_MB"])
@pytest.mark.parametrize("program", [["sora_kernels.info"], ["sora_model.cli", "vocabulary"]], ids=["info", "sora"])
def test_a_wrong_setting_is_one_line(variable, program):
    """Of the programs, before any work; whoever imports the package gets a ValueError."""
    name = f"SORA_KERNELS_{variable}"
    command = [sys.executable, "-m", *program]
    told = subprocess.run(command, env={**os.environ, name: "sse9"}, capture_output=True, text=True, check=False)
    (line,) = " ".join(told.stderr.split()).split("\n")
    assert line.startswith("error: ")
    assert f"{name}: expected " in line
    assert line.endswith("got 'sse9'")
    assert told.returncode == 2
    assert not told.stdout


def test_threads_are_torchs():
    code = "import torch; torch.set_num_threads(1); from sora_kernels import _cpu; print(_cpu.num_threads())"
    assert run(code).stdout == "1\n"
