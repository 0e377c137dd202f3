"""The checkpoint that comes with the package: small, in float16, and able to do what the README says, on a few prompts."""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sora_model import SoraPipeline
from sora_model.pipeline.parts import EMBEDDED
from sora_model.world.evaluate import MEASUREMENTS, Judge


@pytest.fixture(scope="module")
def pipeline() -> SoraPipeline:
    return SoraPipeline.from_pretrained()


def test_it_is_small() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    for path in EMBEDDED.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert dtypes == {torch.float16}, path


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video", "extend", "join", "join-others", "caption"])
def test_it_does_what_it_is_for(pipeline: SoraPipeline, task: str) -> None:
    """Sixteen prompts or fewer: a wide margin below what `sora eval` holds it to on two hundred."""
    measured = MEASUREMENTS[task](Judge(pipeline, 32 if task.startswith("join") else 16, steps=12))
    assert all(math.isfinite(one.value) for one in measured.figures.values()), measured.figures
    shares = {name: one.value for name, one in measured.figures.items() if not re.search("PSNR|worst|seam", name)}
    assert shares
    assert min(shares.values()) >= 0.5, measured.figures
    assert sum(shares.values()) / len(shares) >= 0.8, measured.figures


def test_the_python_of_the_readme(monkeypatch):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    block = text[text.index("## Model") :].split("```python")[1].split("```")[0]
    monkeypatch.setitem(SoraPipeline.__call__.__wrapped__.__kwdefaults__, "num_inference_steps", 2)
    names = {}
    exec(block, names)
    shapes = [tuple(video.shape[1:]) for video in (*names["videos"], names["longer"], names["joined"], names["animated"])]
    assert shapes == [(13, 48, 80), (1, 64, 64), (21, 48, 80), (34, 48, 80), (13, 64, 64)]
