"""The promises that benchmarks/gpu/promises.py asks a GPU's backends about: ours keeps them, and one that does not is found out."""

import pytest
import torch

from benchmarks.gpu import promises, table
from sora_kernels import backends


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(promises, "LENGTHS", (40, 1, 0, 23))


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
        ("a packed sample as alone", lambda x, cu, calls: x[0].mul_(1 + 1e-6 * len(cu))),
        ("NaNs stay in their sample", lambda x, cu, calls: x.add_(0 * x.sum())),
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
                spoil(call["out"], call["cu_q"], len(calls))

            return type("Broken", (), {"attention_forward": attention_forward, "attention_backward": module.attention_backward})

    monkeypatch.setitem(backends.BACKENDS, "cpu", Broken("cpu", "._cpu", ("cpu",), (torch.float32,)))
    found = kept()
    assert found[promise] is False
    assert found["right"] is (promise != "right")
