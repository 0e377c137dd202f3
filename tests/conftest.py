"""Fixtures: what a test runs on, and the proof that it ran there."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _pytest.mark.structures import ParameterSet

# Where there is no GPU, its kernels are emulated: Triton's one operation at a time in numpy (read when they are defined), those of
# CUDA C++ one thread at a time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter
import simt.build
from tolerance import DTYPES, EMULATED, Target

from sora_kernels import backends


class Simt(backends.Backend):
    """The CUDA kernels, run on CPU tensors by the harness of tests/simt."""

    def load(self) -> ModuleType:
        try:
            return simt.build.load()
        except ImportError as error:  # which would only make it unavailable, and its tests vanish
            raise RuntimeError("the SIMT harness cannot be built") from error


# What plain PyTorch computes in float32 is the measure of ours; on GPUs its convolutions would round to TF32 by default.
torch.backends.cudnn.allow_tf32 = False

if backends.INTERPRETED:
    interpreter.prepare()
if shutil.which(simt.build.COMPILER) and not torch.cuda.is_available():
    backends.BACKENDS["simt"] = Simt("simt", "", ("cpu",), backends.BACKENDS["cuda"].dtypes)
    backends.ORDER["cpu"] = (*backends.ORDER["cpu"][:-1], "simt", "reference")


def targets(function: str, dtypes: tuple[torch.dtype, ...], emulated: bool) -> Iterator[ParameterSet]:
    """Everything that can run `function` here. Interpreted kernels, which are slow, leave float16 out."""
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for dtype in dtypes:
            for name, reason in backends.candidates(function, device, dtype):
                slow = device == "cpu" and name in EMULATED
                if reason is None and not (slow and (not emulated or (name, dtype) == ("triton", torch.float16))):
                    target = Target(device, name, dtype)
                    marks = [pytest.mark.emulated] * slow + [pytest.mark.gpu] * (device == "cuda")
                    yield pytest.param(target, id=str(target), marks=marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`target` runs over every backend and dtype, `make_case` over OPS. `target16` has the dtypes of 2 bytes only.

    `target32` runs over every backend in float32 but emulated ones: what it tests lies above the backends, in many runs.
    """
    for fixture, dtypes in (("target", DTYPES), ("target16", (torch.bfloat16, torch.float16)), ("target32", (torch.float32,))):
        if fixture in metafunc.fixturenames:
            found = targets(metafunc.module.FUNCTION, dtypes, emulated=fixture != "target32")
            metafunc.parametrize(fixture, list(found), indirect=True)
    if "make_case" in metafunc.fixturenames:
        cases = metafunc.module.OPS
        metafunc.parametrize("make_case", cases.values(), ids=cases.keys())


def forced(target: Target) -> Iterator[Target]:
    """Runs a test on its backend alone, and fails it if anything of it ran on another or nothing ran at all."""
    torch.manual_seed(0)
    with backends.use_backend(target.backend), backends.record() as calls:
        yield target
    assert {name for _, name in calls} == {target.backend}, f"expected {target.backend} to run, recorded {calls}"


@pytest.fixture(autouse=True)
def _backend_of_diffusers() -> Iterator[None]:
    """`set_attention_backend` of one model holds for all of diffusers' models from then on: here for one test."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    before = dispatch and dispatch._AttentionBackendRegistry.get_active_backend()[0]
    yield
    if before:
        dispatch._AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    yield from forced(request.param)


@pytest.fixture
def target16(request: pytest.FixtureRequest) -> Iterator[Target]:
    yield from forced(request.param)


@pytest.fixture
def target32(request: pytest.FixtureRequest) -> Iterator[Target]:
    yield from forced(request.param)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A checkpoint of a pipeline that is trained in no time."""
    from small_pipeline import small_pipeline  # not where only kernels are tested

    folder = tmp_path_factory.mktemp("small") / "pipeline"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Files of several sizes, and one of more frames per second."""
    from sora_model.data import write_video

    folder = tmp_path_factory.mktemp("media")
    torch.manual_seed(0)
    for name, size in {"a.mp4": (4, 16, 16), "b.mp4": (4, 16, 24), "large.png": (1, 120, 90), "fast.mp4": (4, 16, 16)}.items():
        write_video(folder / name, torch.rand(3, *size), fps=60 if name == "fast.mp4" else 8)
    return folder


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing is loaded, nothing is made."""

    def loaded(*_, **__):
        raise AssertionError("a model was loaded before everything was checked")

    monkeypatch.setattr("sora_model.SoraPipeline.from_pretrained", loaded)
    monkeypatch.setattr("sora_model.SoraPipeline.from_preset", loaded)
    monkeypatch.setattr("sora_model.codec.vae.VideoVAE.from_pretrained", loaded)
    monkeypatch.setattr("sora_model.codec.vae.VideoVAE.small", loaded)
    monkeypatch.setattr("sora_model.caption.captioner.Captioner.from_pretrained", loaded)
