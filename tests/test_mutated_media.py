"""Some damaged files of `reliability/media.py`, read as the commands do; the commands themselves, on files that are bombs."""

import numpy as np
import pytest
from command_line import refused, sora
from media_files import encode, numbered
from PIL import Image
from reliability.hostile import Listener
from reliability.media import drawn, make_mutants, make_seeds, run_all

from sora_model.data import FolderSource, MediaError, probe, read_video


def test_seeds_can_be_read(tmp_path):
    for path in make_seeds(tmp_path):
        assert tuple(read_video(path)[0].shape[1:]) == probe(path), path


def test_a_damaged_file_is_read_or_named(tmp_path, caplog):
    """Nothing but MediaError, and a folder of them still has its sound file."""
    read, refused = 0, {}
    for path in make_mutants(tmp_path / "media", 42):
        try:
            video, _ = read_video(path, max_frames=32, max_pixels=2**16)
            assert video.shape[2] * video.shape[3] <= 2**16
            read += 1
        except MediaError as error:
            refused[str(path)] = str(error)
    assert min(read, len(refused)) > 4
    source = FolderSource(tmp_path / "media", captions=False, max_frames=32, max_pixels=2**16)
    for index, path in enumerate(source.paths):
        try:
            assert source.load(index).video.shape[0] == 3
        except MediaError as error:
            refused[str(path)] = str(error)
    assert all(path in message and "\n" not in message for path, message in refused.items())


def make_bombs(folder) -> None:
    """Small files of large frames: one that is decoded at a fraction of its size, and one that no limit lets through."""
    Image.new("L", (8000, 6000)).save(folder / "large.jpg")
    Image.new("1", (240, 200_000)).save(folder / "long.png")
    encode(folder / "large.mp4", np.zeros((2, 1600, 1600, 3), np.uint8), options={"preset": "ultrafast"})


def test_commands_scale_what_they_read(tmp_path):
    """`sora caption`: frames of at most --max-pixels come to the captioner. `sora animate` says that it does so."""
    make_bombs(tmp_path)
    sora("caption", tmp_path / "large.jpg", tmp_path / "large.mp4")
    assert "long.png: its frames of 240x200000 (width x height)" in refused("caption", tmp_path / "long.png")
    options = ["--steps", 1, "--frames", 5, "--max-pixels", 1200, "--out", tmp_path / "out"]
    said = sora("animate", tmp_path / "large.jpg", "a cat", *options)
    (made,) = (tmp_path / "out").glob("*.mp4")
    assert probe(made) == (5, 30, 40)
    assert "6000x8000 are scaled down to 30x40" in " ".join(said.split())


@pytest.mark.parametrize("tokens", ["64", "512"])
def test_training_goes_on_without_bombs(tmp_path, tokens):
    """What is over the pixel limit is left out by its size alone; what no batch can hold is scaled as it is decoded."""
    make_bombs(tmp_path)
    encode(tmp_path / "sound.mp4", numbered(2))
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text(f"caption of {path.name}")
    said = sora("train", tmp_path / "run", "--data", tmp_path, "--steps", 1, "--model", "tiny", "--tokens", tokens)
    text = "".join(said.split())
    assert "long.png" in text
    assert "1videoiscutto2framesandscaledto" in text
    assert "1imageisscaledto" in text


@pytest.mark.parametrize(("kind", "first"), [("mutants", 0), ("mutants", 3), ("tricks", 0), ("tricks", 5)])
def test_guarded_commands_on_bad_files(kind, first, tmp_path) -> None:
    with Listener() as listener:
        (case,) = drawn(tmp_path, listener.port, 1, first, 0, kind)
        endings, faults = run_all(case.file.path, tmp_path, well=case.file.may_end_well)
        assert not listener.was_called()
    assert not faults
    assert len(endings) == 3


def test_a_bad_file_that_is_taken_is_a_fault(tmp_path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(4, 16, 16))
    assert run_all(path, tmp_path)[1] == []
    caption, animate, train = run_all(path, tmp_path, well=False)[1]
    assert caption.startswith("caption: ended well\n")
    assert animate.startswith("animate: ended well\n")
    assert train.startswith("train: takes the file\n")
