"""`sora demo`, cut short: everything it promises is made, named in what it prints, and mixed in size."""

from typer.testing import CliRunner

from sora_model.cli import app
from sora_model.data import read_video
from sora_model.demo import SIZES, WANTED


def test_demo_makes_what_it_promises(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--minutes", "0.05"])
    assert result.exit_code == 0, result.output
    text = result.output.replace("\n", "")
    made = [*sorted((tmp_path / "videos").iterdir()), tmp_path / "loss.png", *tmp_path.glob("run-*/checkpoint")]
    assert len(made) == len(WANTED) + 3, made
    assert all(str(path) in text for path in made)
    assert "(T, H, W) of " + str(sorted(SIZES)) in result.output.replace("\n", " ").replace("  ", " ")
    shapes = [tuple(read_video(path)[0].shape[1:]) for path in made if path.suffix == ".mp4"]
    assert shapes == [(t, 8 * h, 8 * w) for *_, (t, h, w) in WANTED if t > 1]
    for peer in ("SDPA per sample", "3D RoPE / torch", "Conv3d", "of 36"):
        assert peer in text
