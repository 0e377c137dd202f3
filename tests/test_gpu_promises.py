"""The promises that benchmarks/gpu/promises.py asks a GPU's backends about: ours keeps them, and one that does not is found out."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import promises, table
from sora_kernels import backends, flash


@pytest.fixture(autouse=True)
def short(monkeypatch):
    batches = zip(promises.BATCHES.items(), ((40, 1, 0, 23), (40, 40)), strict=True)
    monkeypatch.setattr(promises, "BATCHES", {suffix: batch._replace(lengths=lengths) for (suffix, batch), lengths in batches})


def kept(backend="cpu"):
    return {row["promise"]: row["kept"] for row in promises.promises(backend, "cpu", torch.float32)}


def test_ours_keeps_them():
    assert set(kept().values()) == {True}


def test_a_run_ends_with_those_that_were_broken():
    rows = [{"promise": "right", "kept": kept, "backend": name} for name, kept in (("triton", True), ("torch_cudnn", False))]
    rows.append({"promise": "all", "kept": None, "backend": "flash_attn_3", "reason": "needs flash_attn_3"})
    assert "promises not kept: 1 of 2\ntorch_cudnn: right\n" in table.summary(rows, [], 1.0) + "\n"


@pytest.mark.parametrize(
    ("promise", "spoil"),
    [
        ("right", lambda x, cu, calls: x.mul_(1.1)),
        ("right", lambda x, cu, calls: x[0].fill_(torch.nan)),
        ("zeros in rows of no sample", lambda x, cu, calls: x[int(cu[-1]) :].fill_(1)),
        ("the same from run to run", lambda x, cu, calls: x[0].mul_(1 + 1e-6 * calls)),
        ("a sample as alone", lambda x, cu, calls: x[0].mul_(1 + 1e-6 * len(cu))),
        ("NaNs stay in their sample", lambda x, cu, calls: x.add_(0 * x.sum())),
        ("NaNs show in their sample", lambda x, cu, calls: x.nan_to_num_()),
        ("right in a dense batch", lambda x, cu, calls: x.mul_(1.1)),
        ("a sample as alone in a dense batch", lambda x, cu, calls: x[0].mul_(1 + 1e-6 * len(x))),
    ],
)
def test_who_breaks_one_is_found_out(monkeypatch, promise, spoil):
    calls = []

    class Broken(backends.Backend):
        def load(self):
            module = super().load()

            def attention_forward(**call):
                module.attention_forward(**call)
                calls.append(None)
                if (call["cu_q"] is None) == promise.endswith("in a dense batch"):
                    spoil(call["out"], call["cu_q"], len(calls))

            return type("Broken", (), {"attention_forward": attention_forward, "attention_backward": module.attention_backward})

    monkeypatch.setitem(backends.BACKENDS, "cpu", Broken("cpu", "._cpu", ("cpu",), (torch.float32,)))
    found = kept()
    assert found[promise] is False
    assert found["right"] is (promise != "right")


def test_who_refuses_a_batch_says_why(monkeypatch):
    class Picky(backends.Backend):
        def load(self):
            functions = {name: getattr(super(Picky, self).load(), name) for name in flash.FUNCTIONS}
            return SimpleNamespace(**functions, refuses=lambda _, call: None if call["cu_q"] is None else "has no packed batches")

    monkeypatch.setitem(backends.BACKENDS, "cpu", Picky("cpu", "._cpu", ("cpu",), (torch.float32,)))
    packed, *dense = promises.promises("cpu", "cpu", torch.float32)
    assert (packed["promise"], packed["kept"]) == ("all", None)
    assert packed["reason"].endswith("no backend can do this call: cpu has no packed batches")
    assert len(dense) == 5
    assert all(row["kept"] for row in dense)
