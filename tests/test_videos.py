"""Videos as they are meant to be seen: which frames, which way up, which colours; what is not opened."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from media_files import TURNS, encode, number_of, numbered
from PIL import Image

from sora_model.data import MediaError, probe, read_video, videos
from sora_model.data.media import PixelLimit
from sora_model.data.timeline import Timeline

ENCODES_BT2020 = pytest.mark.skipif(int(av.__version__.partition(".")[0]) < 18, reason="PyAV 17 encodes BT.2020 as BT.709")
FAST_VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "40"}
FAST_VP8 = {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8", "g": "40"}  # with frames that are never shown
PAUSE = [number if number < 80 else number + 160 for number in range(160)]  # the 80th frame stays for 161 times as long
PAUSED = [*range(0, 80, 2), *[79] * 80, *range(80, 160, 2)]  # what is shown at half the rate


def numbers(video: torch.Tensor) -> list[int]:
    return [number_of(frame) for frame in video.permute(1, 2, 3, 0).numpy()]


@pytest.mark.parametrize(
    ("name", "how", "shown"),
    [
        ("b-frames.mp4", {"options": {"bf": "4", "g": "24"}}, range(160)),
        ("open-gop.mp4", {"options": {"x264-params": "open-gop=1:keyint=24:bframes=3:scenecut=0"}}, range(160)),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "open-gop=1:keyint=30:bframes=4:log-level=none"}}, range(160)),
        ("intra.mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, range(160)),
        ("late.mkv", {"options": {"bf": "3", "g": "20"}, "stamps": [1000 + number for number in range(160)]}, range(160)),
        ("early.mp4", {"options": {"g": "25"}, "stamps": [number - 5 for number in range(160)]}, range(5, 160)),
        ("hidden.webm", {"codec": "libvpx", "options": FAST_VP8}, range(160)),
        ("b-frames.avi", {"codec": "mpeg4", "options": {"bf": "2", "g": "20"}}, range(160)),
        ("fragments.mp4", {"options": {"g": "20", "movflags": "frag_keyframe+empty_moov"}}, range(160)),
        ("pause.mp4", {"options": {"g": "25"}, "stamps": PAUSE}, PAUSED),
        ("pause.webm", {"codec": "libvpx-vp9", "options": FAST_VP9, "stamps": PAUSE}, PAUSED),
    ],
)  # fmt: skip
def test_any_start_is_the_same_as_a_part_of_the_whole(tmp_path, name, how, shown):
    height, width = (64, 96) if how.get("codec") == "libx265" else (32, 48)  # x265 overruns its memory on very small frames
    path = encode(tmp_path / name, numbered(160, height, width), **how)
    whole, fps = read_video(path)
    assert numbers(whole) == list(shown)
    assert probe(path) == (len(shown), height, width)
    assert fps == pytest.approx(15 if "pause" in name else 30, rel=1e-3)
    for start in (0, 1, 63, 65, 66, 79, 80, 89, 119, 150, len(shown) - 2, len(shown) - 1):
        for stride, count in ((1, 3), (7, 4)):
            part, _ = read_video(path, start=start, frame_stride=stride, max_frames=count)
            assert torch.equal(part, whole[:, start::stride][:, :count]), (start, stride)
    with pytest.raises(MediaError, match=f"it has no frame {len(shown)}"):
        read_video(path, start=len(shown))


def test_seeking_decodes_little(tmp_path, monkeypatch):
    path, decoded = encode(tmp_path / "a.mp4", numbered(160), options={"g": "20", "bf": "0", "sc_threshold": "0"}), []
    monkeypatch.setattr(videos, "_rgb", lambda *arguments, rgb=videos._rgb: decoded.append(1) or rgb(*arguments))
    keys = [key.number for key in videos.Video(path, PixelLimit.of("video_pixels", None)).keys]
    assert keys[:3] == [0, 20, 40]
    seen = []
    monkeypatch.setattr(
        videos.Video, "_decoded", lambda self, key, decode=videos.Video._decoded: seen.append(key) or decode(self, key)
    )
    read_video(path, start=155, max_frames=3)
    assert [key.number for key in seen] == [140]
    assert len(decoded) == 3


@pytest.mark.parametrize(
    ("stamps", "last", "stated", "rate", "shown"),
    [
        ([0, 33, 67, 100, 133, 167], 33, Fraction(30), Fraction(30), [0, 1, 2, 3, 4, 5]),  # rounded to milliseconds
        ([0, 42], 41, Fraction(24), Fraction(24), [0, 1]),
        ([0, 100, 200], 0, None, Fraction(10), [0, 1, 2]),  # the last one's duration is not known
        ([-50, 50, 150], 100, Fraction(25), Fraction(10), [0, 1, 2]),  # what is stated is wrong
        ([0, 10, 20, 80], 20, None, Fraction(40), [0, 2, 2, 3]),
        ([7], 0, None, Fraction(1), [0]),
    ],
)
def test_timeline(stamps, last, stated, rate, shown):
    timeline = Timeline.of_stamps(stamps, last, Fraction(1, 1000), stated)
    assert timeline.rate == rate
    assert [timeline.shown(number) for number in range(len(stamps))] == shown


@pytest.mark.parametrize("orientation", TURNS)
def test_display_matrices(tmp_path, orientation):
    """All turns and mirrorings of phones and cameras, as EXIF's of the same number."""
    corner = np.full((1, 32, 64, 3), 100, np.uint8)
    corner[:, :16, :16], corner[:, 16:, 32:] = (220, 40, 40), (40, 40, 220)
    plain, _ = read_video(encode(tmp_path / "plain.mp4", corner))
    path = encode(tmp_path / "turned.mov", corner, matrix=TURNS[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(plain[:, 0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png", exif=exif)
    right, _ = read_video(tmp_path / "a.png")
    video, _ = read_video(path)
    assert torch.equal(video, right)
    assert probe(path) == tuple(video.shape[1:]) == (1, *((64, 32) if orientation >= 5 else (32, 64)))


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (0.7, 0.7, -0.7, 0.7), (30000, 1, 25000, -3), (1, 0, 0, 0)])
def test_a_matrix_that_is_no_turn_counts_as_upright(tmp_path, matrix):
    matrix = tuple(int(65536 * value) / 65536 for value in matrix)
    path = encode(tmp_path / "a.mp4", numbered(3), matrix=matrix)
    video, _ = read_video(path)
    assert probe(path) == tuple(video.shape[1:]) == (3, 32, 48)
    assert numbers(video) == [0, 1, 2]


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(4, 3), (32, 64)), (Fraction(8, 9), (32, 43)), (Fraction(1000), (32, 48))])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_pixels_become_square(tmp_path, aspect, size, name):
    path = encode(tmp_path / name, numbered(2), aspect=aspect)
    video, _ = read_video(path)
    assert probe(path) == tuple(video.shape[1:]) == (2, *size)
    assert numbers(video) == [0, 1]
    turned = encode(tmp_path / "turned.mp4", numbered(2), aspect=aspect, matrix=TURNS[6])
    assert probe(turned) == tuple(read_video(turned)[0].shape[1:]) == (2, *size[::-1])


@pytest.mark.parametrize(
    ("height", "colorspace", "color_range", "tagged"),
    [
        (64, 6, 1, False),
        (720, 1, 1, False),
        (64, 1, 1, True),
        (720, 5, 1, True),
        (64, 6, 2, True),
        (720, 1, 2, True),
        pytest.param(64, 9, 1, True, marks=ENCODES_BT2020),
    ],
)
def test_colours_follow_the_tags(tmp_path, height, colorspace, color_range, tagged):
    """Matrices BT.709 (1), BT.601 (5 and 6) and BT.2020 (9), limited (1) and full range (2)."""
    colours = np.array([(200, 30, 60), (20, 180, 90), (40, 60, 230), (255, 255, 255), (0, 0, 0)], np.uint8)
    frame = colours.repeat(16, 0)[None].repeat(height, 0)[None]
    path = encode(tmp_path / "a.mp4", frame, options={"crf": "4"}, colorspace=colorspace, color_range=color_range, tagged=tagged)
    video, _ = read_video(path)
    assert abs(video[:, 0, height // 2, 8::16].T.numpy().astype(int) - colours).max() <= 4


@pytest.mark.parametrize("name", ["a.webm", "a.gif", "a.mov"])
def test_what_is_transparent_is_white(tmp_path, name):
    frames = np.zeros((3, 32, 48, 4), np.uint8)
    frames[..., :3] = (200, 30, 60)
    frames[:, :, 24:, 3] = 255
    if name == "a.gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], disposal=2, duration=[100, 120, 100])
    else:
        codec, pix_fmt = {"a.webm": ("libvpx-vp9", "yuva420p"), "a.mov": ("qtrle", "argb")}[name]
        encode(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt)
    video, _ = read_video(tmp_path / name)
    assert (video[:, :, :, 4:20] >= 252).all()
    assert (video[:, :, :, 28:44].float() - torch.tensor([200.0, 30, 60]).view(3, 1, 1, 1)).abs().max() <= 4
    small, _ = read_video(tmp_path / name, max_pixels=16 * 24)
    assert (small[:, :, :, 2:10] >= 252).all()


def test_max_pixels_scales_while_decoding(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(80, 64, 96), matrix=TURNS[6])
    video, _ = read_video(path, max_pixels=32 * 48)
    assert tuple(video.shape) == (3, 80, 48, 32)
    assert numbers(video.transpose(2, 3)) == list(range(80))
    assert torch.equal(read_video(path, start=70, max_frames=2, max_pixels=32 * 48)[0], video[:, 70:72])


def test_too_many_pixels_are_refused(tmp_path):
    path = encode(tmp_path / "a.mp4", np.zeros((1, 64, 96, 3), np.uint8))
    assert probe(path) == (1, 64, 96)
    for call in (probe, read_video):
        with pytest.raises(MediaError, match=r"a\.mp4: its frames of 96x64 .* more than the limit of 5000 pixels"):
            call(path, pixel_limit=5000)


@pytest.mark.parametrize(("codec", "suffix"), [("h264", "mp4"), ("mpeg4", "avi"), ("libvpx-vp9", "webm")])
def test_frames_of_the_limit_are_read(tmp_path, codec, suffix):
    """Though decoders hold more pixels than a frame has. The limit that an error names is one that suffices."""
    path = encode(tmp_path / f"a.{suffix}", np.zeros((2, 482, 642, 3), np.uint8), codec=codec)
    assert read_video(path, pixel_limit=482 * 642)[0].shape == (3, 2, 482, 642)
    with pytest.raises(MediaError, match=r"its frames of 642x482 .* more than the limit of 309443 pixels"):
        read_video(path, pixel_limit=482 * 642 - 1)


def test_a_header_that_hides_large_frames(tmp_path):
    """The file says 16x16, the stream 96x64."""
    data = encode(tmp_path / "a.mkv", np.zeros((1, 64, 96, 3), np.uint8)).read_bytes()
    at = data.index(b"\xb0\x81\x60\xba\x81\x40")  # PixelWidth 96, PixelHeight 64
    (tmp_path / "a.mkv").write_bytes(data[:at] + b"\xb0\x81\x10\xba\x81\x10" + data[at + 6 :])
    for call in (probe, read_video):
        for limit in (3000, 5000):  # one that its decoder refuses, and one that the margin of decoders would let pass
            with pytest.raises(MediaError, match=r"a\.mkv: "):
                call(tmp_path / "a.mkv", pixel_limit=limit)


def test_a_long_header_raises_no_limit(tmp_path, monkeypatch):
    """The file says 255x1, the stream 96x64: its decoder refuses that, before there are frames to check."""
    data = encode(tmp_path / "a.mkv", np.zeros((1, 64, 96, 3), np.uint8)).read_bytes()
    at = data.index(b"\xb0\x81\x60\xba\x81\x40")  # PixelWidth 96, PixelHeight 64
    (tmp_path / "a.mkv").write_bytes(data[:at] + b"\xb0\x81\xff\xba\x81\x01" + data[at + 6 :])
    monkeypatch.setattr(videos, "check_pixels", lambda *_: None)
    with pytest.raises(MediaError, match=r"cannot read .*a\.mkv: "):
        read_video(tmp_path / "a.mkv", pixel_limit=3000)


@pytest.mark.parametrize("name", ["a.mp4", "list.mp4", "stream.mkv", "script.avi"])
def test_no_file_opens_another(tmp_path, name):
    """Playlists and scripts under the suffix of a video."""
    encode(tmp_path / "secret.mp4", numbered(2))
    texts = {
        "a.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "list.mp4": "ffconcat version 1.0\nfile secret.mp4\n",
        "stream.mkv": "v=0\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "script.avi": "# concat\nfile 'secret.mp4'\n",
    }
    (tmp_path / name).write_text(texts[name])
    with pytest.raises(MediaError, match="cannot read"):
        read_video(tmp_path / name)


def test_names_with_a_colon(tmp_path):
    path = encode(tmp_path / "clip:1.mp4", numbered(3))
    assert numbers(read_video(path)[0]) == [0, 1, 2]


def test_a_size_that_changes_is_an_error(tmp_path):
    small = encode(tmp_path / "small.mkv", numbered(4), codec="mjpeg", pix_fmt="yuvj420p")
    large = encode(tmp_path / "large.mkv", numbered(4, 48, 64), codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(small) as first, av.open(large) as second, av.open(tmp_path / "both.mkv", "w") as both:
        stream = both.add_stream_from_template(first.streams.video[0])
        for number, packet in enumerate(packet for file in (first, second) for packet in file.demux(video=0) if packet.size):
            packet.stream, packet.pts, packet.dts = stream, 33 * number, 33 * number
            both.mux(packet)
    with pytest.raises(MediaError, match=r"both\.mkv: its size changes from 32x48 to 48x64"):
        read_video(tmp_path / "both.mkv")
