"""What is written is read back right, by our reader and by anyone's: colours and their tags, delays, names."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sora_model.data import probe, read_video, write_video

COLOURS = torch.tensor([(200, 30, 60), (20, 180, 90), (40, 60, 230), (255, 255, 255), (0, 0, 0)], dtype=torch.uint8)


def bars(frames: int, height: int) -> torch.Tensor:
    """uint8 [3, T, height, 80]."""
    return COLOURS.T.repeat_interleave(16, 1)[:, None, None].expand(3, frames, height, 80)


@pytest.mark.parametrize("height", [64, 480, 720, 1080])
def test_mp4_has_its_colours_at_any_size(tmp_path, height):
    """BT.709 and tagged, for players that read tags and for those that go by the size of HD."""
    path = write_video(tmp_path / "a.mp4", bars(2, height))
    video, _ = read_video(path)
    assert (video[:, 0, height // 2, 8::16].T.int() - COLOURS.int()).abs().max() <= 3
    with av.open(path) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
    luma = frame.to_ndarray()[height // 2, 8:80:16]
    right = 16 + 219 / 255 * (COLOURS.float() @ torch.tensor([0.2126, 0.7152, 0.0722]))  # of BT.709
    assert np.abs(luma - right.numpy()).max() <= 2


def test_gif_keeps_every_frame_and_its_time(tmp_path):
    """Frames that are equal, too, and delays that are no whole hundredths of a second."""
    video = bars(8, 32).clone()
    video[:, 4:] = video[:, 4:].flip(3)
    path = write_video(tmp_path / "a.gif", video, fps=8)
    back, fps = read_video(path)
    assert (fps, probe(path)) == (8.0, (8, 32, 80))
    assert torch.equal(back, video)
    with Image.open(path) as image:
        delays = []
        for number in range(image.n_frames):
            image.seek(number)
            delays.append(image.info["duration"])
    assert sum(delays) == 1000
    assert set(delays) == {120, 130}


@pytest.mark.parametrize(("fps", "frames"), [(24, 24), (50, 10), (30, 60), (0.5, 3)])
def test_gif_at_other_rates(tmp_path, fps, frames):
    back, rate = read_video(write_video(tmp_path / "a.gif", bars(frames, 16), fps=fps))
    assert (rate, back.shape[1]) == (fps, frames)


def test_gif_of_one_frame(tmp_path):
    assert torch.equal(read_video(write_video(tmp_path / "a.gif", bars(1, 16)))[0], bars(1, 16))


@pytest.mark.parametrize("loop", [True, False])
def test_gif_repeats_or_not(tmp_path, loop):
    with Image.open(write_video(tmp_path / "a.gif", bars(2, 16), loop=loop)) as image:
        assert image.info.get("loop") == (0 if loop else None)


@pytest.mark.parametrize(
    ("name", "fps", "highest"),
    [
        ("a.gif", 120, 50),
        ("a.gif", 51, 50),
        ("a.mp4", 1e9, 1000),
        ("a.mp4", 0, 1000),
        ("a.gif", float("nan"), 50),
        ("a.gif", -8, 50),
    ],
)
def test_rates_that_cannot_be_written(tmp_path, name, fps, highest):
    with pytest.raises(ValueError, match=rf"write_video: fps of a {name[1:]} must be from 0.01 to {highest}, got {fps}"):
        write_video(tmp_path / name, bars(2, 16), fps=fps)


@pytest.mark.parametrize("name", ["clip:1.mp4", "clip:1.gif", "http:.png", "pipe:1.mp4"])
def test_names_with_a_colon(tmp_path, name):
    path = write_video(tmp_path / name, bars(1, 32))
    assert path.is_file()
    assert probe(path) == (1, 32, 80)


def test_a_colon_in_a_relative_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert probe(write_video("run:1.mp4", bars(1, 32))) == (1, 32, 80)
