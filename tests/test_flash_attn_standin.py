"""The package that stands in for flash_attn: what it has, that it comes and goes without a trace, and its wheel."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from sora_kernels import attention, flash_attn_func
from sora_kernels.integrations import flash_attn as stand_in
from sora_kernels.integrations.flash_attn import __main__ as command
from sora_kernels.integrations.flash_attn import bert_padding, interface, rotary, stub

ROOT = Path(__file__).parent.parent


def modules() -> dict:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "flash_attn"}


@pytest.fixture
def clean() -> Iterator[None]:
    """A process in which nothing of flash_attn is imported; what comes in a test goes after it."""
    earlier = modules()
    if earlier or importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn itself is installed here")
    yield
    stand_in.uninstall()
    for name in modules():
        del sys.modules[name]


@pytest.fixture
def standing_in(clean: None) -> None:
    stand_in.install()


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "flash_attn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    importlib.invalidate_caches()
    return folder


def test_functions(standing_in: None) -> None:
    import flash_attn
    from flash_attn import bert_padding as padding
    from flash_attn import flash_attn_interface
    from flash_attn.layers import rotary as of_layers

    assert sorted(name for name in vars(flash_attn) if name.endswith("_func")) == sorted(
        name for name in vars(attention) if name.startswith("flash_attn") and name.endswith("_func")
    )
    assert flash_attn.flash_attn_func is flash_attn_interface.flash_attn_func is flash_attn_func
    assert flash_attn.flash_attn_with_kvcache is interface.flash_attn_with_kvcache
    assert flash_attn_interface._wrapped_flash_attn_backward is interface._flash_attn_backward
    assert padding.unpad_input is bert_padding.unpad_input
    assert of_layers.RotaryEmbedding is rotary.RotaryEmbedding
    assert Version(flash_attn.__version__) >= Version("2.6.3")
    assert Version(flash_attn.__version__).local == "sora"


def test_modules_are_found(standing_in: None) -> None:
    for name in stand_in.CONTENTS:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.name == name
        assert importlib.import_module(name).__package__ == (name if name in stand_in.PACKAGES else name.rpartition(".")[0])


def test_what_does_not_stand_in_is_missing(standing_in: None) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'flash_attn\.losses'"):
        importlib.import_module("flash_attn.losses")
    with pytest.raises(ImportError, match=r"cannot import name 'ApplyRotaryEmb' from 'flash_attn\.layers\.rotary'"):
        exec("from flash_attn.layers.rotary import ApplyRotaryEmb")


def test_it_goes_as_it_came(clean: None) -> None:
    stand_in.uninstall()
    stand_in.install()
    first = modules()
    stand_in.install()
    assert modules() == first
    assert list(first) == list(stand_in.CONTENTS)
    stand_in.uninstall()
    assert not modules()
    assert importlib.util.find_spec("flash_attn") is None


def test_beside_a_part_that_is_installed(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 is a folder `flash_attn/cute` in a namespace."""
    monkeypatch.syspath_prepend(package(tmp_path, {"cute/__init__.py": "four = 4\n"}))
    stand_in.install()
    from flash_attn import flash_attn_func as ours
    from flash_attn.cute import four

    assert (ours, four) == (flash_attn_func, 4)
    stand_in.uninstall()
    assert not modules()


def test_beside_a_part_that_is_imported(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(package(tmp_path, {"cute/__init__.py": "four = 4\n"}))
    import flash_attn.cute

    earlier = modules()
    stand_in.install()
    assert sys.modules["flash_attn"].cute is flash_attn.cute is earlier["flash_attn.cute"]
    assert sys.modules["flash_attn"].flash_attn_func is flash_attn_func
    stand_in.uninstall()
    assert modules() == earlier


REAL = {"__init__.py": "__version__ = '2.8.3'\n", "ops.py": "five = 5\n", "bert_padding.py": "unpad_input = None\n"}


def test_an_installed_one_stays_unless_it_is_to_be_replaced(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(package(tmp_path, REAL))
    with pytest.raises(
        ValueError, match=r"^install: replace: expected True, as flash_attn is installed at .*__init__\.py, got False$"
    ):
        stand_in.install()
    assert not modules()
    stand_in.install(replace=True)
    from flash_attn.bert_padding import unpad_input
    from flash_attn.ops import five

    assert (unpad_input, five) == (bert_padding.unpad_input, 5)
    stand_in.uninstall()
    import flash_attn

    assert flash_attn.__version__ == "2.8.3"
    for replace in (False, True):  # as others hold its functions
        with pytest.raises(
            ValueError, match=r"^install: flash_attn: expected a package that is not imported yet, got one imported"
        ):
            stand_in.install(replace=replace)
    assert sys.modules["flash_attn"] is flash_attn


def test_bad_arguments(clean: None) -> None:
    with pytest.raises(TypeError, match="install: replace: expected a bool, got 'yes'"):
        stand_in.install(replace="yes")  # type: ignore[arg-type]
    assert not modules()


def test_page() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/integrations/flash_attn.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [code.replace(".install()", ".install(replace=True)") for code in blocks]  # also where flash_attn itself is installed
    assert run("\n".join(lines)) == "torch.Size([2, 7, 4, 64])\n"


# The wheel.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    assert command.main(["build-stub", "--out", str(folder / "dist")]) == 0
    (wheel,) = (folder / "dist").iterdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    try:
        subprocess.run([*pip, "--target", str(folder / "site"), str(wheel)], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        if "No module named pip" in error.stderr:
            pytest.skip("needs pip")
        pytest.fail(error.stderr)
    return folder / "site"


def run(code: str, *paths: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_wheel(tmp_path: Path) -> None:
    wheel = stub.build(tmp_path / "new" / "folder")
    assert wheel.name == f"flash_attn-{stand_in.VERSION}-py3-none-any.whl"
    first = wheel.read_bytes()
    assert stub.build(wheel.parent).read_bytes() == first
    with zipfile.ZipFile(wheel) as archive:
        record = [line.split(",")[0] for line in archive.read(archive.namelist()[-1]).decode().split()]
        assert record == archive.namelist()
        assert archive.testzip() is None


def test_the_wheel_is_a_distribution(site: Path) -> None:
    """The package of flash_attn-4 lies in another folder here."""
    code = """
import importlib.metadata, sys
print(importlib.metadata.version("flash_attn"), importlib.metadata.packages_distributions()["flash_attn"])
import torch, flash_attn, flash_attn.cute
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward
from sora_kernels.integrations import flash_attn as stand_in
q = torch.randn(2, 5, 4, 16)
print(flash_attn.flash_attn_func(q, q, q).shape, flash_attn.__version__, flash_attn.cute.four)
before = dict(sys.modules)
stand_in.install()  # which finds that it is there already
assert sys.modules == before and stand_in.bert_padding.pad_input is pad_input
"""
    other = package(site.parent / "four", {"cute/__init__.py": "four = 4\n"})
    version = stand_in.VERSION
    assert run(code, site, other) == f"{version} ['flash_attn']\ntorch.Size([2, 5, 4, 16]) {version} 4\n"


def test_install_beside_the_wheel(site: Path) -> None:
    code = "from sora_kernels.integrations import flash_attn as s; s.install(); import flash_attn; print(type(flash_attn).__name__)"
    assert run(code, site) == "Part\n"


def test_diffusers_takes_the_wheel(site: Path) -> None:
    """Its backends flash and flash_varlen then run on the CPU."""
    pytest.importorskip("diffusers")
    code = """
import torch
from diffusers.models import attention_dispatch as dispatch
q, k, v = torch.randn(3, 2, 64, 2, 32).bfloat16()
out = {}
for name in ("native", "flash", "flash_varlen"):
    with dispatch.attention_backend(name):
        out[name] = dispatch.dispatch_attention_fn(q, k, v).float()
    torch.testing.assert_close(out[name], out["native"], rtol=2e-2, atol=2e-3)
print(dispatch._CAN_USE_FLASH_ATTN, dispatch.flash_attn_func.__module__, dispatch._wrapped_flash_attn_backward.__module__)
"""
    assert run(code, site) == "True sora_kernels.attention sora_kernels.integrations.flash_attn.interface\n"


def test_transformers_takes_the_wheel_where_there_is_a_gpu(site: Path) -> None:
    """It asks for one, so here it is made to believe in one. Its masks then go through the stand-in's padding."""
    pytest.importorskip("transformers", "5")  # which asks when a model is told to use it, and not when it is imported
    code = """
import torch, transformers
from transformers import modeling_flash_attention_utils as attention
from transformers.utils import import_utils
print(import_utils.is_flash_attn_2_available())
import_utils.is_torch_cuda_available = lambda: True
import_utils.is_flash_attn_2_available.cache_clear()
print(import_utils.is_flash_attn_2_available(), import_utils.is_flash_attn_greater_or_equal("2.6.3"))
print(*(f.__module__.partition(".")[0] for f in attention._lazy_imports("flash_attention_2")))
transformers.PreTrainedModel._flash_attn_can_dispatch = lambda self, *_, **__: True
torch.manual_seed(0)
sizes = dict(vocab_size=99, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).bfloat16()
ids, mask = torch.randint(0, 98, (3, 13)), torch.ones(3, 13, dtype=torch.long)
mask[1, :4] = mask[2, :9] = 0
logits = []
for name in ("sdpa", "flash_attention_2"):
    model.set_attn_implementation(name)
    logits.append(model(ids, attention_mask=mask).logits[mask.bool()].float())
torch.testing.assert_close(*logits, rtol=2e-2, atol=2e-2)
"""
    expected = f"False\nTrue True\n{' '.join(['sora_kernels'] * 5)}\n"
    found = run(code, site)
    assert found == (expected.replace("False", "True", 1) if torch.cuda.is_available() else expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build-stub", "--out"], " build-stub: --out: expected one argument"),
        (["build-stub", "--out", ""], " build-stub: --out: expected a folder, got nothing"),
        (["build-stub", "--out", "FILE"], " build-stub: --out: FILE: File exists"),
        (["build-stub", "--out", "FILE/folder"], " build-stub: --out: FILE/folder: Not a directory"),
        (["build-stub", "--ou", "x"], ": unrecognized arguments: --ou x"),
        (["build-stub", "x"], ": unrecognized arguments: x"),
        (["build"], ": build-stub: invalid choice: 'build'"),
        ([], ": the following arguments are required: build-stub"),
    ],
)
def test_bad_words(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and 2."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as error:
        command.main([word.replace("FILE", str(file)) for word in words])
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"python -m sora_kernels.integrations.flash_attn{message.replace('FILE', str(file))}")
    assert (out, err.count("\n")) == ("", 1)


def test_nothing_of_it_comes_with_the_kernels() -> None:
    code = "import sys; from sora_kernels import flash_attn_func; print([name for name in sys.modules if 'integrations' in name])"
    assert run(code) == "[]\n"
