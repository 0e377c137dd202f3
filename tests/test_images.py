"""Pictures as they are meant to be seen: depths, transparency, turns; pictures that move; what is not opened."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from media_files import encode, numbered
from PIL import Image

from sora_model.data import MediaError, probe, read_video, write_video
from sora_model.limits import Limits, raised_limits


def read(path) -> np.ndarray:
    """The picture, uint8 [H, W, 3]; its size must be the one that `probe` says."""
    video, fps = read_video(path)
    assert (fps, tuple(video.shape[1:])) == (0.0, probe(path))
    return video[:, 0].permute(1, 2, 0).numpy()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, rows: np.ndarray, depth: int, colour: int, extra: bytes = b"") -> None:
    """A PNG of any kind. rows: [H, bytes of a row]. colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    height, width = rows.shape[0], rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_grey_of_16_bits(tmp_path):
    values = np.array([[0, 100, 129, 20000, 40000, 65406, 65407, 65535]], np.uint16)
    right = np.round(values * 255.0 / 65535).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == right[..., None]).all()
    write_png(tmp_path / "hidden.png", values.astype(">u2").view(np.uint8), 16, 0, png_chunk(b"tRNS", struct.pack(">H", 40000)))
    assert read(tmp_path / "hidden.png")[0, :, 1].tolist() == [0, 0, 1, 78, 255, 254, 255, 255]


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_colours_of_16_bits(tmp_path, colour):
    channels = {2: 3, 4: 2, 6: 4}[colour]
    values = np.array([[0, 300, 20000, 40000, 65535]], np.uint16)[..., None].repeat(channels, 2)
    if colour != 2:
        values[..., -1] = 65535  # opaque
    write_png(tmp_path / "a.png", values.astype(">u2").reshape(1, -1).view(np.uint8), 16, colour)
    right = np.round(values[..., :1] * 255.0 / 65535).astype(int)
    assert abs(read(tmp_path / "a.png") - right).max() <= 1


def test_other_modes(tmp_path):
    bits = np.array([[0, 1, 1, 0]], bool)
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert read(tmp_path / "bits.png")[0, :, 0].tolist() == [0, 255, 255, 0]
    red = Image.new("RGB", (16, 16), (200, 30, 60))
    for name, image in {"palette.png": red.quantize(4), "bmp.bmp": red, "palette.bmp": red.quantize(4)}.items():
        image.save(tmp_path / name)
        assert (read(tmp_path / name) == (200, 30, 60)).all()
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    red.convert("L").save(tmp_path / "grey.jpg", quality=95)
    assert abs(read(tmp_path / "cmyk.jpg").astype(int) - (200, 30, 60)).max() <= 3
    assert abs(read(tmp_path / "grey.jpg").astype(int) - np.asarray(red.convert("L"))[0, 0]).max() <= 1


def test_what_is_transparent_is_white(tmp_path):
    hidden = np.zeros((2, 3, 4), np.uint8)
    hidden[..., :3] = (10, 200, 40)
    hidden[:, 1, 3], hidden[:, 2, 3] = 255, 51  # hidden, opaque, a fifth
    right = np.array([(255, 255, 255), (10, 200, 40), (206, 244, 212)])
    image = Image.fromarray(hidden)
    for name in ("a.png", "a.webp"):
        image.save(tmp_path / name, lossless=True, exact=True)
        assert (read(tmp_path / name) == right).all()
    Image.new("LA", (1, 1), (90, 0)).save(tmp_path / "la.png")
    assert (read(tmp_path / "la.png") == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 200, 40, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "index.png", transparency=0)
    assert read(tmp_path / "index.png")[0].tolist() == [[255, 255, 255], [1, 2, 3]]
    palette.save(tmp_path / "table.png", transparency=bytes([0, 255]))
    assert read(tmp_path / "table.png")[0].tolist() == [[255, 255, 255], [1, 2, 3]]
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(tmp_path / "colour.png", transparency=(1, 2, 3))
    assert read(tmp_path / "colour.png")[0].tolist() == [[255, 255, 255], [4, 5, 6]]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientations(tmp_path, orientation, suffix):
    """As the standard has them; 0 and 9 mean nothing."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8], stored[8:, 16:] = (250, 20, 20), (20, 20, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE, 6: turn.ROTATE_270,
             7: turn.TRANSVERSE, 8: turn.ROTATE_90}  # fmt: skip
    with Image.open(path) as image:
        image = image.convert("RGB")
        right = np.asarray(image.transpose(turns[orientation]) if orientation in turns else image)
    assert (read(path) == right).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_max_pixels_of_a_turned_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.linear_gradient("L").resize((640, 320)).save(tmp_path / "a.jpg", exif=exif)
    whole, small = read_video(tmp_path / "a.jpg")[0], read_video(tmp_path / "a.jpg", max_pixels=80 * 40)[0]
    assert tuple(small.shape[2:]) == ((40, 80) if orientation == 1 else (80, 40))
    right = torch.nn.functional.interpolate(whole[:, 0:1].float().transpose(0, 1), tuple(small.shape[2:]), mode="area")
    assert (small[:, 0].float() - right[0]).abs().mean() < 2


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_pictures_that_move_are_videos(tmp_path, name):
    """Each with its own time; the last one is transparent."""
    colours = [(250, 20, 20, 255), (20, 250, 20, 255), (20, 20, 250, 255), (9, 9, 9, 0)]
    images = [Image.new("RGBA", (24, 16), colour) for colour in colours]
    options = {"lossless": True} if name == "a.webp" else {"disposal": 1, "blend": 0}
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=[100, 100, 400, 200], **options)
    assert probe(tmp_path / name) == (4, 16, 24)
    video, fps = read_video(tmp_path / name)
    assert fps == 5.0
    assert video[:, :, 8, 8].T.tolist() == [[250, 20, 20], [20, 20, 250], [20, 20, 250], [255, 255, 255]]  # at 67, 267, ... ms
    part, fps = read_video(tmp_path / name, start=1, frame_stride=2, max_pixels=8 * 12)
    assert (fps, tuple(part.shape)) == (2.5, (3, 2, 8, 12))
    assert part[:, :, 4, 4].T.tolist() == [[20, 20, 250], [255, 255, 255]]


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif", "a.avi"])
def test_frames_are_counted_to_the_limit(tmp_path, name):
    """Of each format; the limit that is named is enough where the number is known, and twice as high where it is not."""
    path = write_video(tmp_path / "a.gif", torch.rand(3, 8, 16, 24) * 2 - 1)
    if name == "a.avi":
        encode(tmp_path / name, numbered(8))
    elif name != "a.gif":
        with Image.open(path) as image:
            image.save(tmp_path / name, save_all=True)
    with raised_limits(frames=5):
        expected, limit = ("got 8", 8) if name == "a.webp" else ("got more", 10)
        with pytest.raises(MediaError, match=rf"its length: expected at most 5 frames, {expected}; 'sora --limit frames={limit} "):
            probe(tmp_path / name)
        with raised_limits(frames=limit):
            assert probe(tmp_path / name)[0] == 8


def test_delays_that_no_browser_keeps(tmp_path):
    images = [Image.new("RGB", (24, 16), (shade, 0, 0)) for shade in (0, 100, 200)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=0)
    assert read_video(tmp_path / "a.webp")[1] == 10.0


def test_only_named_formats_are_opened(tmp_path):
    """Postscript would be run, and other formats have their own weaknesses."""
    image = Image.new("RGB", (8, 8))
    for kind in ("EPS", "TIFF", "GIF", "PPM", "ICO", "PCX", "TGA"):
        image.save(tmp_path / "a.png", format=kind)
        with pytest.raises(MediaError, match=r"cannot read .*a\.png: cannot identify image file"):
            read_video(tmp_path / "a.png")


def bomb(kind: str, height: int, width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L" if kind == "JPEG" else "1", (width, height)).save(stream, kind)
    return stream.getvalue()


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    (tmp_path / "a.png").write_bytes(bomb("PNG", 240, 150_000))
    for call in (probe, read_video):
        with pytest.raises(
            MediaError, match=rf"a\.png: its frames of 150000x240 .* more than the limit of {Limits().picture_pixels} pixels"
        ):
            call(tmp_path / "a.png")
    assert probe(tmp_path / "a.png", pixel_limit=2**26) == (1, 240, 150_000)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    (tmp_path / "a.jpg").write_bytes(bomb("JPEG", 8000, 6000))
    assert probe(tmp_path / "a.jpg") == (1, 8000, 6000)
    assert tuple(read_video(tmp_path / "a.jpg", max_pixels=800 * 600)[0].shape) == (3, 1, 800, 600)
    with pytest.raises(MediaError, match=r"a\.jpg: its frames of 6000x8000"):
        read_video(tmp_path / "a.jpg")
    Image.new("L", (6000, 8000)).save(tmp_path / "b.jpg", progressive=True)  # would need all its coefficients in memory
    with pytest.raises(MediaError, match=r"b\.jpg: its frames of 6000x8000"):
        read_video(tmp_path / "b.jpg", max_pixels=800 * 600)


def test_max_pixels_below_one():
    with pytest.raises(ValueError, match="read_video: max_pixels must be at least 1, got 0"):
        read_video("a.png", max_pixels=0)
