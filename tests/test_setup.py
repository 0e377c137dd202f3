"""What the build says of the CUDA toolkit that it finds."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(tmp_path, release="11.8", **environment):
    """setup.py, building nothing, where CUDA_HOME has an nvcc of that release."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.0\n")
    nvcc.chmod(0o755)
    env = {**os.environ, "CUDA_HOME": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


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


def test_leaving_cuda_out_is_silent(tmp_path):
    done = build(tmp_path, SORA_KERNELS_CUDA="0")
    assert (done.returncode, "CUDA" in done.stderr) == (0, False)


def test_unknown_wish(tmp_path):
    done = build(tmp_path, SORA_KERNELS_CUDA="yes")
    assert done.returncode == 1
    assert "SORA_KERNELS_CUDA: expected 0 or 1, got 'yes'" in done.stderr
