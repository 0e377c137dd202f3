"""Memory of large CPU outputs: reused once nobody holds it, never before, never more of it than allowed, and ordinary tensors."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from sora_kernels import memory
from sora_kernels.layout import PackedLayout
from sora_kernels.rope import rope_3d

LARGE = torch.zeros(1500, 1024)


@pytest.fixture(autouse=True)
def nothing_cached():
    memory.empty_cache()
    yield
    memory.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_memory_serves_the_next_output(dtype):
    like = torch.zeros(3000, 1024, dtype=dtype)
    first = memory.empty_like(like)
    assert first.shape == like.shape
    assert first.dtype == dtype
    assert first.is_contiguous()
    place = first.data_ptr()
    second = memory.empty_like(like)
    assert second.data_ptr() != place
    view = first[10:20]
    del first
    assert memory.cached_bytes() == 0, "a view still holds it"
    del view
    assert memory.cached_bytes() >= like.nbytes
    assert memory.empty(like, (2990, 1024)).data_ptr() == place, "a slightly smaller output fits"


def test_outputs_of_other_sizes_get_their_own():
    del_me = memory.empty(LARGE, (4000, 1024))
    place = del_me.data_ptr()
    del del_me
    assert memory.empty_like(LARGE).data_ptr() != place
    memory.empty_cache()
    assert memory.cached_bytes() == 0


def test_small_outputs_are_torchs_own():
    memory.empty(LARGE, (16, 16))
    assert memory.cached_bytes() == 0


def test_an_ordinary_tensor():
    tensor = memory.empty_like(LARGE).fill_(2.0).requires_grad_()
    (tensor * 3).sum().backward()
    assert torch.equal(tensor.grad, torch.full_like(tensor, 3.0))
    copy = tensor.detach().clone()
    assert torch.equal(copy.share_memory_(), tensor.detach())
    assert tensor.detach().numpy().sum() == 2 * tensor.numel()
    with torch.inference_mode():
        assert memory.empty_like(LARGE).is_inference()


def test_traced_and_meta_tensors_keep_their_kind():
    assert memory.empty_like(LARGE.to("meta")).is_meta
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(LARGE)
        assert type(memory.empty_like(fake)) is type(fake)


def test_outputs_of_an_op_are_not_overwritten_by_the_next():
    layout = PackedLayout.from_grids([(8, 16, 16)])
    x = torch.randn(layout.num_tokens, 8, 128)
    first, second = rope_3d(x, layout), rope_3d(2 * x, layout)
    torch.testing.assert_close(2 * first, second)
    del second
    assert memory.cached_bytes() > 0


def test_threads_share_it():
    failures = []

    def work(value):
        for _ in range(50):
            tensor = memory.empty_like(LARGE).fill_(value)
            if not bool((tensor == value).all()):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def in_a_process(limit: str) -> subprocess.CompletedProcess:
    code = (
        "import torch; from sora_kernels import memory; x = torch.zeros(1500, 1024)\n"
        "a, b = memory.empty_like(x), memory.empty_like(x); del a, b; print(memory.cached_bytes() >> 20)"
    )
    environment = {"SORA_KERNELS_CACHE_MB": limit, "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("limit", "kept"), [("0", "0"), ("7", "6"), ("100", "12"), ("9" * 30, "12"), ("", "12")])
def test_the_limit(limit, kept):
    result = in_a_process(limit)
    assert result.stdout.strip() == kept, result.stderr


def test_a_wrong_limit_is_named():
    result = in_a_process("lots")
    expected = "SORA_KERNELS_CACHE_MB: expected a whole number of MiB of at least 0, got 'lots'"
    assert expected in result.stderr


@pytest.mark.parametrize(("allowed", "expected"), [("max\n", None), ("4000000000\n", 1000000000), (None, None)])
def test_a_quarter_of_the_machine_is_kept(allowed, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("SORA_KERNELS_CACHE_MB", raising=False)
    file = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMIT_FILES", (file, tmp_path / "absent"))
    if allowed is not None:
        file.write_text(allowed)
    quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    assert memory.cache_limit() == (quarter if expected is None else min(quarter, expected))


def test_sizes_that_never_come_back_do_not_pile_up():
    code = (
        "import torch; from sora_kernels import memory; x = torch.zeros(1)\n"
        "for rows in range(2000, 4000, 100): memory.empty(x, (rows, 4096))\n"
        "print(memory.cached_bytes() <= 2 * 64 * 2**20)"  # the largest is 62 MiB
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def limit_in_a_process(**environment: str) -> subprocess.CompletedProcess:
    code = "from sora_kernels import cache_limit; print(cache_limit())"
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("limit", "divisor"), [("", 4), ("7", None)])
def test_processes_of_torchrun_share_the_machine(limit, divisor):
    done = limit_in_a_process(LOCAL_WORLD_SIZE="4", SORA_KERNELS_CACHE_MB=limit)
    expected = 7 << 20 if divisor is None else memory._machine_bytes() // 4 // divisor
    assert done.stdout == f"{expected}\n", done.stderr


def test_a_wrong_number_of_processes_is_named():
    done = limit_in_a_process(LOCAL_WORLD_SIZE="none", SORA_KERNELS_CACHE_MB="")
    assert "sora_kernels: LOCAL_WORLD_SIZE: expected a whole number of processes of at least 1, got 'none'" in done.stderr


class Outputs(torch.utils.data.Dataset):
    """(the limit, whether what is kept after 200 MiB of outputs is below it), where it is read."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        many = [memory.empty(LARGE, (5000, 1024)) for _ in range(10)]
        del many
        return memory.cache_limit(), memory.cached_bytes() <= memory.cache_limit()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_keeps_little(workers, monkeypatch):
    monkeypatch.delenv("SORA_KERNELS_CACHE_MB", raising=False)
    memory.empty_like(LARGE)  # so that a worker that is forked finds the limit of this process
    ((limit, is_kept),) = torch.utils.data.DataLoader(Outputs(), batch_size=None, num_workers=workers)
    assert is_kept
    assert limit == (64 << 20 if workers else memory._machine_bytes() // 4)
