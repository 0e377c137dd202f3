"""What the build says of the CUDA toolkit that it finds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from tests.reliability import sdist

ROOT = Path(__file__).parent.parent


def build(tmp_path, release="11.8", gpus="", command=("setup.py", "--name"), **environment):
    """setup.py, building nothing, where CUDA_HOME has an nvcc of that release for compute capabilities 7.5, 8.0, 8.9 and 9.0."""
    known, version = "compute_75 compute_80 compute_89 compute_90", f"Cuda compilation tools, release {release}, V1"
    tools = {
        "nvcc": f"[ $1 = --list-gpu-arch ] && echo {known} || echo {version}",
        "nvidia-smi": f"printf '{gpus}'" if gpus else "exit 9",
    }
    (tmp_path / "bin").mkdir()
    for name, script in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "SORA_KERNELS_CUDA"}
    env |= {"CUDA_HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{env['PATH']}", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_old_nvcc_is_named_and_passed_over(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0
    assert f"without the CUDA kernels: {tmp_path}/bin/nvcc is version 11.8, and 12.0 or newer is needed" in done.stderr


def test_old_nvcc_fails_where_cuda_is_demanded(tmp_path):
    done = build(tmp_path, SORA_KERNELS_CUDA="1")
    assert done.returncode == 1
    assert "SORA_KERNELS_CUDA=1, but " in done.stderr
    assert "12.0 or newer is needed" in done.stderr


def test_new_nvcc_is_silent(tmp_path):
    assert "CUDA" not in build(tmp_path, release="12.4").stderr


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [("", ["80", "90a"]), ("8.9\\n8.9\\n9.0\\n", ["89", "90"]), ("12.0\\n", ["90"]), ("8.6\\n", ["80"]), ("7.0\\n8.0\\n", ["80"])],
)
def test_architectures_are_those_of_the_gpus_that_nvcc_knows(tmp_path, gpus, archs):
    """A newer GPU runs what its driver compiles from the newest that there is."""
    code = "import sys; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read()); print(architectures(NVCC))"
    done = build(tmp_path, "12.4", gpus, ("-c", f"__file__ = 'setup.py'; {code}"), SORA_KERNELS_CUDA_ARCHS="")
    assert done.stdout.splitlines()[-1] == str(archs), done.stderr


def test_gpus_that_nvcc_no_longer_knows_leave_cuda_out(tmp_path):
    done = build(tmp_path, "12.4", "7.0\\n", SORA_KERNELS_CUDA_ARCHS="")
    assert done.returncode == 0
    assert f"without the CUDA kernels: {tmp_path}/bin/nvcc no longer compiles for this machine's GPUs (70)" in done.stderr


def test_leaving_cuda_out_is_silent(tmp_path):
    done = build(tmp_path, SORA_KERNELS_CUDA="0")
    assert (done.returncode, "CUDA" in done.stderr) == (0, False)


def test_unknown_wish(tmp_path):
    done = build(tmp_path, SORA_KERNELS_CUDA="yes")
    assert done.returncode == 1
    assert "SORA_KERNELS_CUDA: expected 0 or 1, got 'yes'" in done.stderr


@pytest.mark.parametrize(
    ("value", "sanitized"),
    [("", ""), ("0", ""), ("1", "address,undefined"), ("address", "address,undefined"), ("thread", "thread")],
)
def test_sanitizers_are_asked_for(tmp_path, value, sanitized):
    code = "import sys; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read()); print(cpu_graph(ROOT / 'o', ROOT).text())"
    done = build(tmp_path, command=("-c", f"__file__ = 'setup.py'; {code}"), SORA_KERNELS_SANITIZE=value)
    assert set(re.findall(r"-fsanitize=(\S+)", done.stdout)) == ({sanitized} if sanitized else set()), done.stderr


def test_another_word_for_sanitizers_is_named(tmp_path):
    code = "import sys; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read()); cpu_graph(ROOT / 'o', ROOT)"
    done = build(tmp_path, command=("-c", f"__file__ = 'setup.py'; {code}"), SORA_KERNELS_SANITIZE="yes")
    assert "SORA_KERNELS_SANITIZE: expected one of 0, 1, address, thread, got 'yes'" in done.stderr


def test_an_editable_install_compiles_for_later_builds(tmp_path):
    """In the folder of in-place builds, with commands that name nothing of the environment in which it compiles."""
    code = (
        "__file__, sys.argv = 'setup.py', ['setup.py', '--name']; exec(open('setup.py').read())\n"
        "def folder(**options):\n"
        "    command = NinjaBuild(Distribution())\n"
        "    vars(command).update(options)\n"
        "    command.ensure_finalized()\n"
        "    return ROOT / command.build_temp\n"
        "print(folder(inplace=True), folder(editable_mode=True, build_temp='/gone'), cpu_graph(ROOT / 'o', ROOT).text())"
    )
    done = build(tmp_path, command=("-c", f"import sys; {code}"), SORA_KERNELS_CUDA="0")
    _, usual, editable, *graph = done.stdout.split()
    assert usual == editable, done.stderr
    assert not [word for word in graph if pybind11.get_include() in word]


def test_an_sdist_has_what_the_tests_need(tmp_path):
    """Helpers and fixtures among them, which no pattern of names of tests finds."""
    packed = sdist.packed(sdist.made(tmp_path))
    assert {"Makefile", "constraints.txt", "examples/dit_step.py", "tests/conftest.py", "tests/simt/build.py"} <= packed
    tracked = sdist.tracked()
    if tracked is None:
        pytest.skip("only git knows what belongs to the repository")
    assert set(tracked) > sdist.LEFT_OUT
    assert set(tracked) - packed == sdist.LEFT_OUT
