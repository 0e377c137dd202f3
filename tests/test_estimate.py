"""What is said of memory and time before the work: estimates, and what is refused by them."""

import pytest
from command_line import sora

from sora_model.cli import estimate, terminal
from sora_model.pipeline.checkpoint import read_outline
from sora_model.pipeline.parts import EMBEDDED, Outline, Weights
from sora_model.sizes import Timing


def test_memory_grows_with_what_is_asked() -> None:
    """As measured with the checkpoint of the package: 1.28 GB and 0.83 GB at the most."""
    outline = read_outline(EMBEDDED)
    assert estimate.tokens(outline, [(13, 48, 48), (1, 60, 64)]) == 36 + 16
    assert 1.28e9 < estimate.memory(outline, [(13, 512, 512)]) < 1.6e9
    assert 0.83e9 < estimate.memory(outline, [(49, 256, 256)]) < 1.4e9
    assert estimate.memory(outline, [(1, 2048, 2048)]) > estimate.memory(outline, [(1, 1024, 1024)])


GB = 10**9


LARGE = Outline(  # as of Wan 2.1 14B
    (81, 480, 832), (4, 16, 16), Timing(1, 4), 5120, Weights(11 * GB, (57 * GB,), GB / 2),
    Weights(11 * GB, (29 * GB,), GB / 2), "AutoencoderKLWan",
)  # fmt: skip


def test_memory_of_files(monkeypatch, unloaded, tmp_path) -> None:
    """Enlarged frames wait for H.264 alone; weights that go to a GPU are not in the host's memory."""
    made, plain = [(61, 100, 200)], estimate.How()
    one, large = (estimate.written(LARGE, made, plain, scale, "mp4", "cuda") for scale in (1, 100))
    assert large - one == pytest.approx((30 + 4.5 * 40) * (100**2 - 1) * 100 * 200)
    assert estimate.written(LARGE, made, plain, 100, "gif", "cuda") < large / 5
    assert estimate.written(LARGE, made, plain, 1, "mp4", "cpu") - one == 68.5 * GB
    assert estimate.written(LARGE, made, plain._replace(offload=True), 1, "mp4", "cuda") - one == 68.5 * GB
    monkeypatch.setattr(estimate, "installed", lambda _: 24 * GB)
    said = sora("generate", "x", "--size", "60x24x24", "--scale", 600, "--out", tmp_path / "out", code=2)
    assert (
        "error: --scale: expected files that the memory of 24 GB can hold while they are written, got ones that take about" in said
    )


def test_memory_of_large_checkpoints(monkeypatch) -> None:
    """bfloat16 halves weights and more than halves the work; offloading leaves the largest part."""
    size, plain, bf16 = [LARGE.size], estimate.How(), estimate.How(bf16=True)
    assert estimate.working(LARGE, size, bf16).transformer < estimate.working(LARGE, size).transformer / 2
    whole, half, cut = (estimate.memory(LARGE, size, how=how) / 1e9 for how in (plain, bf16, bf16._replace(offload=True)))
    assert (round(whole), round(half), round(cut)) == (105, 57, 45)

    def refused(there: float, size: tuple[int, int, int] = LARGE.size, how: estimate.How = plain, device: str = "cuda") -> str:
        monkeypatch.setattr(estimate, "installed", lambda _: there)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (its message is what is tested)
            estimate.check_memory("--size", LARGE, [size], (), how, device)
        return str(caught.value)

    assert "; --precision bf16 --offload --size 81x720x1280 takes about " in refused(80e9, (161, 720, 1280))
    assert refused(60e9).startswith(
        "--checkpoint: expected weights that cuda of 60 GB can hold, got 68.5 GB, and 105 GB with the work"
    )
    assert "--precision bf16 takes about 56.9 GB; --precision bf16 --offload takes about 45.4 GB" in refused(60e9)
    assert refused(40e9, how=bf16, device="cpu").startswith("--checkpoint: expected weights that the memory of 40 GB can hold")
    assert "got ones that take about 56.9 GB; --precision bf16 --offload takes about 45.4 GB" in refused(48e9, how=bf16)
    assert ";" not in refused(1e9, how=bf16), "nothing is enough"
    monkeypatch.setattr(estimate, "installed", lambda device: 30e9 if device == "cpu" else 80e9)
    with pytest.raises(ValueError, match="--offload: expected weights that the memory of the CPU can hold, 30 GB, got 41 GB"):
        estimate.check_memory("--size", LARGE, size, (), bf16._replace(offload=True), "cuda")
    monkeypatch.setattr(estimate, "installed", lambda _: 58e9)
    estimate.check_memory("--size", LARGE, size, (), bf16, "cpu")


def test_the_time_of_long_work_is_estimated_after_two_steps(monkeypatch, capsys) -> None:
    from rich.console import Console

    clock = iter([10.0, 14.0, 18.0])
    console = Console(width=200, force_terminal=False)
    with terminal.denoising(console, 100) as bars:
        monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
        for _ in range(3):
            bars(1)
        monkeypatch.undo()
        bars.coded("decoding", 5, 20)
    said = capsys.readouterr().out
    assert said.count("up to 7 min left") == 1
    assert "decoding" in said
    assert [terminal.duration(s) for s in (3, 89, 600, 7200)] == ["3 s", "89 s", "10 min", "2.0 h"]
