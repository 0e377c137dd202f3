"""Folders of real files: native sizes, captions beside them, bad files named and left out; reading and writing."""

import logging
import os
import re
import shutil
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from media_files import TURNS, encode, numbered
from PIL import Image

from sora_model.data import FolderSource, MediaError, PackedSampler, contact_sheet, probe, read_video, write_video
from sora_model.limits import raised_limits
from sora_model.world.config import WorldConfig
from sora_model.world.world import World


def clip(frames: int, height: int, width: int, index: int = 0) -> torch.Tensor:
    return World(WorldConfig(sizes=("large",), texture=0.05)).sample(index).render(frames, height, width)


def write_mpeg4(path, video: torch.Tensor, fps: int) -> None:
    """An MP4 that our writer had no part in."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *video.shape[2:], "yuv420p", 4_000_000
        for frame in ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "sub").mkdir()
    write_mpeg4(folder / "a.mp4", clip(12, 64, 96), fps=12)
    write_mpeg4(folder / "b.MP4", clip(20, 96, 64), fps=24)
    write_mpeg4(folder / "sub" / "c.mp4", clip(7, 50, 70), fps=8)
    write_video(folder / "d.png", clip(1, 48, 48))
    for name in ("a", "b", "sub/c", "d"):
        (folder / f"{name}.txt").write_text(f"caption of\n {name}\n", encoding="utf-8")
    (folder / "broken.mp4").write_bytes(b"no video at all" * 50)
    (folder / "broken.txt").write_text("a caption")
    write_video(folder / "speechless.mp4", clip(4, 32, 32))
    write_video(folder / "blank.mp4", clip(4, 32, 32))
    (folder / "blank.txt").write_text(" \n")
    (folder / "notes.md").write_text("not media")
    (folder / "._a.mp4").write_bytes(b"a file that macOS leaves behind")
    return folder


@pytest.fixture
def folder(made_once, tmp_path):
    """Three videos and a picture of different sizes, one in a subfolder, and files that cannot be used."""
    return shutil.copytree(made_once, tmp_path / "clips")


def test_native_sizes_and_captions(folder):
    source = FolderSource(folder)
    assert {source.captions[i]: source.size(i) for i in range(len(source))} == {
        "caption of a": (12, 64, 96),
        "caption of b": (20, 96, 64),
        "caption of sub/c": (7, 50, 70),
        "caption of d": (1, 48, 48),
    }
    for i in range(len(source)):
        video, caption, _, _ = source.load(i)
        assert caption == source.captions[i]
        assert tuple(video.shape) == (3, *source.size(i))
        assert video.dtype == torch.float32
        assert video.is_contiguous()
    video, *_ = source.load(source.captions.index("caption of d"))
    torch.testing.assert_close(video, clip(1, 48, 48), rtol=0, atol=0.005)  # PNG: exact but for 8 bits
    video, *_ = source.load(source.captions.index("caption of a"))
    assert (video - clip(12, 64, 96)).abs().mean() < 0.06  # lossy


def test_bad_files_are_named_once_and_the_others_train(folder, caplog):
    with caplog.at_level(logging.WARNING):
        source = FolderSource(folder, multiple_of=(1, 2, 2))
    lines = sorted(record.getMessage() for record in caplog.records)
    assert len(lines) == 3
    assert "\n" not in "".join(lines)
    assert f"{folder / 'blank.mp4'} has no caption: blank.txt is empty" in lines[0]
    assert f"{folder / 'speechless.mp4'} has no caption: speechless.txt is not beside it" in lines[1]
    assert f"cannot read {folder / 'broken.mp4'}: invalid data" in lines[2]
    sampler = PackedSampler(source, (1, 2, 2), 40_000)
    assert {i for step in range(4) for i in sampler.batch(step).indices} == {0, 1, 2, 3}


def test_file_with_ruined_frames_is_left_out_of_its_batches(folder, caplog):
    source = FolderSource(folder)
    ruined = source.captions.index("caption of b")
    data = bytearray((folder / "b.MP4").read_bytes())
    media = data.index(b"mdat") + 4
    data[media + 2000 : media + 8000] = bytes(6000)  # the header stays whole: found out only when decoding
    (folder / "b.MP4").write_bytes(data)
    with pytest.raises(MediaError, match=r"cannot read .*b\.MP4: invalid data"):
        source.load(ruined)
    caplog.clear()
    sampler = PackedSampler(source, (1, 1, 1), 400_000)
    for step in range(6):
        batch = sampler.batch(step)
        assert 0 < batch.tokens == sum(video[0].numel() for video in batch.videos)
        assert ruined not in batch.indices
    assert len(caplog.records) == 1
    assert "b.MP4" in caplog.text


def test_file_with_fewer_frames_than_it_said(folder):
    source = FolderSource(folder, multiple_of=(2, 1, 1))
    shorter = source.captions.index("caption of b")
    write_mpeg4(folder / "b.MP4", clip(9, 96, 64), fps=24)
    assert source.size(shorter) == (20, 96, 64)
    assert source.load(shorter)[0].shape == (3, 8, 96, 64)
    (folder / "b.MP4").unlink()
    with pytest.raises(MediaError, match=r"cannot read .*b\.MP4: it does not exist"):
        source.load(shorter)


def test_file_whose_frames_have_become_smaller(folder):
    source = FolderSource(folder)
    smaller = source.captions.index("caption of d")
    write_video(folder / "d.png", clip(1, 48, 32))
    with pytest.raises(MediaError, match=r"d\.png was 48x48 or larger when its folder was read, and is 48x32 now"):
        source.load(smaller)


@pytest.mark.parametrize("after", ["gone", "smaller", "cut", "garbage", "a folder"])
def test_whatever_becomes_of_a_file_the_others_train(folder, caplog, after):
    """One warning that names it, and batches of the rest, alike each time."""
    source, path = FolderSource(folder), folder / "b.MP4"
    odd, data = source.captions.index("caption of b"), path.read_bytes()
    path.unlink()
    if after == "smaller":
        write_mpeg4(path, clip(20, 32, 32), fps=24)
    elif after == "a folder":
        path.mkdir()
    elif after != "gone":
        path.write_bytes(data[: len(data) // 2] if after == "cut" else bytes(len(data)))
    caplog.clear()
    runs = [[batch.indices for batch in map(PackedSampler(source, (1, 1, 1), 400_000).batch, range(6))] for _ in range(2)]
    assert runs[0] == runs[1]
    assert {index for indices in runs[0] for index in indices} == {0, 1, 2, 3} - {odd}
    assert len(caplog.records) == 2  # one of each run
    assert str(path) in caplog.text


def test_clip_that_no_batch_holds_is_named(folder, caplog):
    source = FolderSource(folder)
    caplog.clear()
    sampler = PackedSampler(source, (1, 1, 1), 100_000)
    assert [record.getMessage()[: record.getMessage().index(" at")] for record in caplog.records] == [
        f"left out: {folder / 'b.MP4'} of size (T, H, W) = (20, 96, 64) is 122880 tokens"
    ]
    assert sampler.usable == [i for i in range(4) if source.captions[i] != "caption of b"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_other_encodings(folder, encoding):
    (folder / "d.txt").write_text("un café à Paris", encoding=encoding)
    (folder / "d.detailed.txt").write_text("çedilla", encoding=encoding)
    source = FolderSource(folder)
    index = [path.name for path in source.paths].index("d.png")
    assert source.load(index)[1:3] == ("un café à Paris", "çedilla")


@pytest.mark.parametrize("data", ["un café".encode("latin-1"), b"\xff\xfea", b"\xef\xbb\xbf"])
def test_captions_that_cannot_be_read(folder, caplog, data):
    (folder / "d.txt").write_bytes(data)
    assert "d.png" not in [path.name for path in FolderSource(folder).paths]
    assert f"left out: {folder / 'd.png'} has no caption: d.txt " in caplog.text


def test_captions_over_the_limit_say_so(folder, caplog):
    """Whatever a character takes, and not that the bytes end within one; the limit that is named is enough."""
    for text in ("x" * 20_001, "ж" * 50_001, "x" + "😀" * 20_001):
        caplog.clear()
        (folder / "d.txt").write_text(text)
        assert "d.png" not in [path.name for path in FolderSource(folder).paths]
        assert "d.txt: expected at most 20000 characters, got" in caplog.text
        with raised_limits(text=int(re.search(r"'sora --limit text=(\d+) ", caplog.text)[1])):
            assert "d.png" in [path.name for path in FolderSource(folder).paths]


@pytest.mark.parametrize("name", ["d.txt", "d.detailed.txt"])
def test_captions_that_would_be_waited_for(folder, caplog, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert "d.png" not in [path.name for path in FolderSource(folder).paths]
    assert (
        f"{name} cannot be read ({folder / name}: expected a file, got a pipe or a device, which might be waited for)"
        in caplog.text
    )


@pytest.mark.parametrize("name", ["d.txt", "d.png"])
def test_files_of_the_kernel_are_not_waited_for(folder, caplog, name):
    """/proc/kmsg never ends. Such files have no size, whatever they hold."""
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/status")
    assert "d.png" not in [path.name for path in FolderSource(folder).paths]
    assert f"{name} is empty" in caplog.text or f"{name}: it is empty" in caplog.text


def test_a_name_that_leaves_no_room_for_that_of_a_detailed_caption(folder):
    name = "x" * 251
    shutil.copy(folder / "d.png", folder / f"{name}.png")
    (folder / f"{name}.txt").write_text("a long name")
    source = FolderSource(folder)
    assert source.captions[source.paths.index(folder / f"{name}.png")] == "a long name"


def test_hidden_folders_are_not_looked_at(folder, caplog):
    for hidden in (".ipynb_checkpoints", "sub/.cache/deep"):
        shutil.copytree(folder / "sub", folder / hidden, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    assert len(FolderSource(folder)) == 4
    assert "cache" not in caplog.text
    renamed = folder.rename(folder.with_name(".clips"))  # which is asked for by its name
    assert len(FolderSource(renamed)) == 4


def test_links_are_followed_once(folder, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    write_video(tmp_path / "elsewhere" / "e.png", clip(1, 16, 16))
    (tmp_path / "elsewhere" / "e.txt").write_text("linked")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "f.png").symlink_to(tmp_path / "elsewhere" / "e.png")
    (folder / "f.txt").write_text("a linked file")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "gone.txt").write_text("a broken link")
    os.mkfifo(folder / "pipe.mp4")
    source = FolderSource(folder)
    assert sorted(str(path.relative_to(folder)) for path in source.paths) == [
        "a.mp4", "again/e.png", "b.MP4", "d.png", "f.png", "sub/c.mp4",
    ]  # fmt: skip
    assert f"left out: cannot read {folder / 'gone.png'}: it does not exist" in caplog.text


def test_odd_files_are_planned_as_they_are_loaded(tmp_path):
    """Turned, mirrored, of pixels that are not square, of an uneven rate: one function decides for both."""
    image = Image.linear_gradient("L").resize((64, 32))
    for orientation in (0, 1, 6, 7, 9, 300):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"{orientation}.jpg", exif=exif)
    encode(tmp_path / "turned.mp4", numbered(9), matrix=TURNS[5], aspect=Fraction(4, 3))
    encode(tmp_path / "garbage.mp4", numbered(9), matrix=(0.3, -7, 0, 0))
    encode(tmp_path / "pause.mp4", numbered(90), stamps=[i if i < 40 else i + 200 for i in range(90)])
    source = FolderSource(tmp_path, captions=False, max_pixels=30 * 30, max_frames=5)
    assert len(source) == 9
    for epoch in range(6):
        for index in range(9):
            assert tuple(source.load(index, epoch).video.shape) == (3, *source.size(index))


@pytest.mark.parametrize("make", ["missing", "empty", "useless"])
def test_folder_with_nothing_to_train_on(tmp_path, make):
    folder = tmp_path / "clips"
    if make != "missing":
        folder.mkdir()
    if make == "useless":
        (folder / "x.mp4").write_bytes(b"?")
        (folder / "x.txt").write_text("caption")
    with pytest.raises(ValueError, match=r"clips.*\.mp4 .*\.png .*\.txt") as error:
        FolderSource(folder)
    reason = {"missing": "there is no such folder", "empty": "it has none", "useless": "none of its 1 video and image files"}
    assert reason[make] in str(error.value)


def test_sizes_are_cut_to_multiples_around_the_centre(folder):
    source = FolderSource(folder, multiple_of=(4, 16, 32), first=1)
    sizes = {source.captions[i][-1]: source.size(i) for i in range(len(source))}
    assert sizes == {"a": (9, 64, 96), "b": (17, 96, 64), "c": (5, 48, 64), "d": (1, 48, 32)}
    whole = FolderSource(folder).load(3)[0]
    cut = source.load(3)[0]
    torch.testing.assert_close(cut, whole[:, :5, 1:49, 3:67], rtol=0, atol=0)


def test_too_small_for_the_multiple(folder, caplog):
    with caplog.at_level(logging.WARNING):
        source = FolderSource(folder, multiple_of=(8, 64, 64))
    assert len(source) == 2
    text = caplog.text
    assert "c.mp4 has 7 frames, less than 8" in text
    assert "d.png has 1 frames, less than 8" in text


def test_max_pixels_scales_down_and_keeps_the_aspect_ratio(folder):
    source = FolderSource(folder, max_pixels=32 * 48, multiple_of=(1, 2, 2))
    sizes = {source.captions[i][-1]: source.size(i) for i in range(len(source))}
    assert sizes == {"a": (12, 32, 48), "b": (20, 48, 32), "c": (7, 32, 46), "d": (1, 38, 38)}
    video, *_ = source.load(0)
    assert (video - clip(12, 32, 48)).abs().mean() < 0.06


def test_clip_is_drawn_anew_each_epoch(folder):
    source = FolderSource(folder, max_frames=4, frame_stride=2)
    index = source.captions.index("caption of b")
    assert source.size(index) == (4, 96, 64)
    whole, _ = read_video(folder / "b.MP4", normalize=True)
    starts = []
    for epoch in range(8):
        video = source.load(index, epoch)[0]
        starts += [s for s in range(14) if torch.equal(video, whole[:, s : s + 7 : 2])]
        assert torch.equal(video, source.load(index, epoch)[0])
    assert len(starts) == 8
    assert len(set(starts)) > 3


def test_read_a_part(tmp_path):
    write_video(tmp_path / "long.mp4", clip(110, 16, 24), fps=24)
    whole, fps = read_video(tmp_path / "long.mp4")
    assert (tuple(whole.shape), whole.dtype, fps) == ((3, 110, 16, 24), torch.uint8, 24.0)
    for start in (0, 40, 70, 107):  # 70 and 107 are reached by seeking
        part, fps = read_video(tmp_path / "long.mp4", start=start, max_frames=4, frame_stride=3)
        assert torch.equal(part, whole[:, start::3][:, :4])
        assert fps == 8.0
    part, _ = read_video(tmp_path / "long.mp4", max_frames=5, random_clip=np.random.default_rng(1))
    assert part.shape[1] == 5
    with pytest.raises(MediaError, match="it has no frame 200"):
        read_video(tmp_path / "long.mp4", start=200)
    with pytest.raises(ValueError, match="max_frames=0"):
        read_video(tmp_path / "long.mp4", max_frames=0)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_written_video_reads_back(tmp_path, suffix):
    video = clip(6, 32, 48)
    path = write_video(tmp_path / "new" / f"v{suffix}", video, fps=10)
    back, fps = read_video(path, normalize=True)
    assert fps == 10.0
    assert probe(path) == (6, 32, 48)
    assert (back - video).abs().mean() < 0.04
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary stays


def test_odd_size_is_padded_and_scale_repeats_pixels(tmp_path):
    write_video(tmp_path / "odd.mp4", clip(3, 31, 45))
    assert probe(tmp_path / "odd.mp4") == (3, 32, 46)
    video = clip(1, 5, 7)
    write_video(tmp_path / "big.png", video, scale=4)
    back, _ = read_video(tmp_path / "big.png")
    assert back.shape == (3, 1, 20, 28)
    assert torch.equal(back[:, :, ::4, ::4], back[:, :, 3::4, 3::4])


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", clip(2, 32, 32))
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, clip(2, 48, 48))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "video", "message"),
    [
        ("v.mpg", torch.zeros(3, 2, 8, 8), r"must end in .mp4, .gif or .png, got 'v.mpg'"),
        ("v.png", torch.zeros(3, 2, 8, 8), "a .png holds 1 frame, video has 2"),
        ("v.mp4", torch.zeros(2, 3, 8, 8), r"must be \[3, T, H, W\], got \[2, 3, 8, 8\]"),
        ("v.mp4", torch.tensor([0.0, torch.nan]).view(1, 2, 1, 1).expand(3, 2, 8, 8), "must be numbers in .*, got NaN in frame 1"),
        ("v.mp4", torch.zeros(3, 2, 8, 8, dtype=torch.int64), "must be uint8 or floating point .*int64"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, video, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, video)


def test_video_of_a_turned_phone_is_read_upright(tmp_path):
    path = write_video(tmp_path / "v.mp4", clip(2, 32, 48))
    upright, _ = read_video(path)
    data = path.read_bytes()
    track = data.index(b"tkhd")
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # show turned clockwise by 90 degrees
    at = data.index(plain, track)
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])
    assert probe(path) == (2, 48, 32)
    video, _ = read_video(path)
    assert torch.equal(video, upright.rot90(-1, (2, 3)))


def test_picture_with_exif_orientation_is_read_upright(tmp_path):
    picture = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned clockwise by 90 degrees
    picture.save(tmp_path / "p.png", exif=exif)
    assert probe(tmp_path / "p.png") == (1, 30, 20)
    video, fps = read_video(tmp_path / "p.png")
    assert fps == 0.0
    assert torch.equal(video[:, 0], torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).rot90(-1, (1, 2)))


def test_contact_sheet_shows_each_frame(tmp_path):
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1, 1).expand(3, 4, 16, 32)
    blue = torch.tensor([-1.0, -1.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 300, 200)
    path = contact_sheet(tmp_path / "sheet.png", [red, blue], ["red " * 60, "blue"], columns=3, cell=64)
    pixels = np.asarray(Image.open(path))
    assert (pixels == [255, 0, 0]).all(-1).sum() == 3 * 32 * 64  # three frames, each pixel twice as wide and high
    assert (pixels == [0, 0, 255]).all(-1).sum() == 64 * 43
    assert (pixels[:60] < 60).any()  # the caption
    with pytest.raises(ValueError, match="as many captions as videos, got 1 and 2"):
        contact_sheet(path, [red, blue], ["one"])
