"""Which table a GPU takes, and which GPUs are refused with which reason."""

from types import SimpleNamespace

import pytest
import torch

import sora_kernels.triton as room
from benchmarks.launches import ARCHS
from sora_kernels import backends, info
from sora_kernels.triton import configs, devices
from sora_kernels.triton.common import input_precision

NVIDIA = [
    ((8, 0), 163, "sm80"), ((8, 6), 99, "sm80"), ((8, 7), 163, "sm80"), ((8, 9), 99, "sm80"), ((9, 0), 227, "sm90"),
    ((10, 0), 227, "sm100"), ((10, 3), 227, "sm100"), ((11, 0), 227, "sm100"), ((12, 0), 99, "sm80"), ((12, 1), 99, "sm80"),
]  # fmt: skip
REFUSED = [
    ((7, 0), 96, "needs compute capability 8.0 or above; this GPU has 7.0"),
    ((7, 5), 64, "needs compute capability 8.0 or above; this GPU has 7.5"),
    ((13, 0), 227, "was compiled for compute capabilities 8.0 to 12.x and for nothing later; this GPU has 13.0"),
    ((8, 6), 64, "needs 80 KiB of shared memory a block (table sm80); this GPU has 64 KiB"),
    ((9, 0), 99, "needs 192 KiB of shared memory a block (table sm90); this GPU has 99 KiB"),
    ((10, 0), 99.5, "needs 160.8 KiB of shared memory a block (table sm100); this GPU has 99.5 KiB"),
]
AMD = [
    ("gfx90a:sramecc+:xnack-", 64, "gfx942"), ("gfx942:sramecc+:xnack-", 64, "gfx942"), ("gfx950", 64, "gfx942"),
    ("gfx1100", 32, "gfx1100"), ("gfx1151", 32, "gfx1100"), ("gfx1201", 32, "gfx1100"),
]  # fmt: skip
FAMILIES = "gfx90a*, gfx942*, gfx950*, gfx110*, gfx115*, gfx120*"
REFUSED_AMD = [
    ("gfx906:sramecc+", 64, f"was compiled for {FAMILIES} and for no other; this GPU is gfx906"),
    ("gfx1030", 32, f"was compiled for {FAMILIES} and for no other; this GPU is gfx1030"),
    ("gfx1250", 32, f"was compiled for {FAMILIES} and for no other; this GPU is gfx1250"),
    ("gfx1100", 64, "needs warps of 32 threads on gfx1100; this GPU's have 64"),
]


@pytest.fixture
def present(monkeypatch):
    """A function that makes torch see one GPU of this kind, as a machine would that does not interpret."""

    def see(capability: tuple[int, int] = (0, 0), kib: float = 0, gcn: str = "", warp_size: int = 32) -> None:
        properties = SimpleNamespace(
            name="a GPU", major=capability[0], minor=capability[1], shared_memory_per_block_optin=int(kib * 1024),
            gcnArchName=gcn, warp_size=warp_size, multi_processor_count=1,
        )  # fmt: skip
        monkeypatch.setattr(torch.version, "hip", "7.0" if gcn else None)
        for name, value in {
            "is_available": True, "current_device": 0, "device_count": 1, "get_device_capability": capability,
            "get_device_properties": properties,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(configs, "knobs", SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
        devices.fit.cache_clear()

    yield see
    devices.fit.cache_clear()


@pytest.mark.parametrize(("capability", "kib", "table"), NVIDIA)
def test_nvidia_gpus_take_the_table_of_their_architecture(capability, kib, table):
    assert devices.nvidia(capability, kib << 10, "3.9.0") == (table, None)


@pytest.mark.parametrize(("capability", "kib", "reason"), REFUSED)
def test_nvidia_gpus_that_no_table_fits_are_refused(capability, kib, reason):
    assert devices.nvidia(capability, int(kib * 1024)) == (None, reason)


def test_a_triton_that_cannot_compile_for_a_gpu_refuses_it():
    reason = "needs Triton 3.9 or above for compute capability 11.0; this is Triton 3.6.0"
    assert devices.nvidia((11, 0), 227 << 10, "3.6.0") == (None, reason)
    assert devices.nvidia((11, 0), 227 << 10, "3.10.0+git1234") == ("sm100", None)


@pytest.mark.parametrize(("name", "warp_size", "table"), AMD)
def test_amd_gpus_take_the_table_of_their_family(name, warp_size, table):
    assert devices.amd(name, warp_size) == (table, None)


@pytest.mark.parametrize(("name", "warp_size", "reason"), REFUSED_AMD)
def test_amd_gpus_of_other_families_are_refused(name, warp_size, reason):
    assert devices.amd(name, warp_size) == (None, reason)


def test_every_table_is_reported_and_measured():
    tables = {*devices.NVIDIA.values(), *devices.AMD.values()}
    assert tables == set(ARCHS)
    assert set(devices.NVIDIA.values()) == set(devices.SHARED_MEMORY)
    assert all(set(by_arch) == tables for by_arch in configs.CONFIGS.values())
    assert {name: ARCHS[name][0][2] for name in devices.WARP_SIZE} == devices.WARP_SIZE


def test_candidates_begin_with_the_present_blocks():
    for (kernel, arch), candidates in configs.CANDIDATES.items():
        for key, blocks in candidates.items():
            assert blocks[0] == configs.CONFIGS[kernel][arch][key]


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ({"capability": (8, 9), "kib": 99}, "sm80"),
        ({"capability": (9, 0), "kib": 227}, "sm90"),
        ({"gcn": "gfx942:sramecc+", "warp_size": 64}, "gfx942"),
        ({"gcn": "gfx1100", "capability": (11, 0)}, "gfx1100"),
    ],
)
def test_the_present_gpu_takes_its_table(present, kind, table):
    present(**kind)
    assert room.unavailable() is None
    assert configs.architecture(torch.device("cuda", 0)) == table


def test_a_gpu_that_is_refused_is_served_by_the_reference_and_info_says_why(present):
    present(capability=(7, 5), kib=64)
    reason = "needs compute capability 8.0 or above; this GPU has 7.5"
    assert backends.candidates("attention_forward", "cuda", torch.float16)[1:] == [("triton", reason), ("reference", None)]
    assert f"triton {reason}" in info.report()
    select = backends._select.__wrapped__
    with pytest.raises(ValueError, match=f"attention_forward: backend 'triton' was forced but {reason}"):
        select("attention_forward", torch.device("cuda", 0), torch.float16, 64, "triton", "default")
    with pytest.raises(RuntimeError, match=f"no blocks of attention for GPU 0: Triton backend {reason}"):
        configs.architecture(torch.device("cuda", 0))
    with configs.use_architecture("sm80"):
        assert room.unavailable() is None
        assert configs.architecture(torch.device("cuda", 0)) == "sm80"


def test_nothing_is_refused_without_a_gpu_or_where_triton_interprets(present, monkeypatch):
    present(capability=(7, 5), kib=64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert room.unavailable() is None
    present(capability=(7, 5), kib=64)
    configs.knobs.runtime.interpret = True
    assert room.unavailable() is None


def test_float32_is_never_rounded_to_tf32_on_amd(monkeypatch):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        monkeypatch.setattr(torch.version, "hip", None)
        assert input_precision(torch.float32) == "tf32"
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert input_precision(torch.float32) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
