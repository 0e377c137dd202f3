"""Every task as a request: what is given where, and how the result is put together."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from sora_model.pipeline.clips import as_video
from sora_model.pipeline.request import Request, extend, image_to_video, join, text_to_image, text_to_video, video_to_video
from sora_model.pipeline.stitch import Stitch
from sora_model.sizes import Timing

CAUSAL = Timing(1, 4)


def clip(frames: int, first: float = 0.0) -> Tensor:
    """A video [3, T, 2, 2] whose frame t is first + t everywhere."""
    return (first + torch.arange(float(frames)))[None, :, None, None].expand(3, -1, 2, 2).clone()


def numbers(video: Tensor) -> list[float]:
    return video[0, :, 0, 0].tolist()


def test_whole_clips() -> None:
    assert [CAUSAL.whole(frames) for frames in (1, 2, 5, 6, 13)] == [1, 5, 5, 9, 13]
    assert [Timing(2, 2).whole(frames) for frames in (1, 2, 3)] == [2, 2, 4]
    assert [Timing(5, 8).whole(frames) for frames in (1, 5, 6, 13)] == [5, 5, 13, 13]


def test_text_and_images() -> None:
    assert text_to_video("a", (13, 48, 48), seed=3).seed == 3
    assert text_to_image("a", 40, 56).size == (1, 40, 56)
    request = image_to_video("a", clip(3), 13, Timing(1, 1))
    assert request.size == (13, 2, 2)
    assert numbers(request.keyframes[0]) == [0]
    assert numbers(request.finish(clip(13))) == list(range(13))


def test_images_and_arrays_are_taken_too() -> None:
    tensor = torch.randint(0, 256, (3, 2, 4, 6)) / 127.5 - 1
    array = ((tensor + 1) / 2).permute(1, 2, 3, 0).numpy()
    images = [Image.fromarray((frame * 255).round().astype("uint8")) for frame in array]
    torch.testing.assert_close(as_video(array), tensor)
    torch.testing.assert_close(as_video(images), tensor)
    torch.testing.assert_close(as_video((array * 255).round().astype("uint8")), tensor)
    assert as_video(tensor) is tensor
    for wrong, got in (
        (array[0], r"float32 \[4, 6, 3\]"),
        (array > 0.5, "bool"),
        ("clip.mp4", "str"),
        ([], "none"),
        ([array], "ndarray"),
    ):
        with pytest.raises(ValueError, match=f"as_video: expected .*, got {got}"):
            as_video(wrong)
    request = image_to_video("a", images[1], 5, Timing(1, 1))
    assert request.size == (5, 4, 6)
    torch.testing.assert_close(request.keyframes[0], tensor[:, 1:])


def test_video_to_video_begins_with_the_video() -> None:
    request = video_to_video("a", clip(5), 0.4)
    assert (request.size, request.strength) == ((5, 2, 2), 0.4)
    assert numbers(request.init_video) == list(range(5))


def fade(given: range, again: range) -> list[float]:
    """Frames that both have: the given ones, more and more as they come back."""
    steps = len(given) + 1
    return [a + (b - a) * k / steps for k, (a, b) in enumerate(zip(given, again, strict=True), start=1)]


def test_extension_goes_on_from_the_last_frames() -> None:
    request = extend("a", clip(20), 8, CAUSAL)
    assert request.size == (13, 2, 2)
    assert {at: numbers(part) for at, part in request.keyframes.items()} == {0: [15, 16, 17, 18, 19]}
    generated = clip(13, 100)
    shared = fade(range(15, 20), range(100, 105))
    assert numbers(request.finish(generated)) == pytest.approx([*range(15), *shared, *range(105, 113)])
    short = extend("a", clip(3), 6, CAUSAL, overlap=2)  # fewer than wanted: the last frame alone
    assert numbers(short.keyframes[0]) == [2]
    assert numbers(short.finish(clip(7, 100))) == [0, 1, 51, *range(101, 107)]


def test_extension_backward_leads_up_to_the_first_frames() -> None:
    request = extend("a", clip(20), 8, CAUSAL, backward=True)
    assert request.size == (13, 2, 2)
    assert {at: numbers(part) for at, part in request.keyframes.items()} == {9: [0, 1, 2, 3]}
    shared = fade(range(3, -1, -1), range(112, 108, -1))[::-1]
    made = numbers(request.finish(clip(13, 100)))
    assert made == pytest.approx([*range(101, 109), *shared, *range(4, 20)]), "9 were made, 8 wanted"


def test_joining_gives_both_ends() -> None:
    request = join("a", clip(20), clip(10, 50), 8, CAUSAL)
    assert request.size == (17, 2, 2)
    assert {at: numbers(part) for at, part in request.keyframes.items()} == {0: [15, 16, 17, 18, 19], 13: [50, 51, 52, 53]}
    first, last = fade(range(15, 20), range(100, 105)), fade(range(53, 49, -1), range(116, 112, -1))[::-1]
    made = numbers(request.finish(clip(17, 100)))
    assert made == pytest.approx([*range(15), *first, *range(105, 113), *last, *range(54, 60)])


def test_given_frames_that_come_back_as_they_were_stay() -> None:
    request, same = join("a", clip(9), clip(9, 9 + 8), 8, CAUSAL), clip(17, 4)
    torch.testing.assert_close(request.finish(same), clip(26))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request("a", (0, 8, 8)), r"Request: size: expected \(T, H, W\), each at least 1, got \(0, 8, 8\)"),
        (lambda: Request("a", (5, 2, 2), strength=0.0), "Request: strength: expected a number above 0 and up to 1, got 0.0"),
        (
            lambda: Request("a", (5, 2, 2), init_video=clip(4)),
            r"Request: init_video: expected floats \[3, 5, 2, 2\], got .* \[3, 4, 2, 2\]",
        ),
        (
            lambda: Request("a", (5, 2, 2), keyframes={3: clip(4)}),
            r"keyframes: expected clips of floats \[3, t, 2, 2\] within 5 frames, got",
        ),
        (
            lambda: Request("a", (5, 2, 2), keyframes={0: clip(1)[:1]}),
            r"keyframes: expected clips of floats .*, got .* \[1, 1, 2, 2\] at",
        ),
        (
            lambda: Request("a", (5, 2, 2), keyframes={0: clip(1).byte()}),
            r"keyframes: expected clips of floats .*, got torch.uint8",
        ),
        (
            lambda: Request("a", (5, 2, 2), stitch=Stitch(overlap=(3, 3))),
            r"overlap: expected two numbers >= 0, at most 5 in all, got \(3, 3\)",
        ),
        (
            lambda: Request("a", (5, 2, 2), stitch=Stitch(overlap=(-1, 0))),
            r"overlap: expected two numbers >= 0, at most 5 in all, got \(-1, 0\)",
        ),
        (
            lambda: Request("a", (5, 2, 2), stitch=Stitch(clip(2), None, (3, 0))),
            r"before: expected floats .* with the 3 frames .*, 2, 2, 2\]",
        ),
        (
            lambda: Request("a", (5, 2, 2), stitch=Stitch(None, clip(2), (0, 3))),
            r"after: expected floats .* with the 3 frames .*, 2, 2, 2\]",
        ),
        (
            lambda: Request("a", (5, 2, 2), stitch=Stitch(None, clip(2)[..., :1])),
            r"after: expected floats \[3, t, 2, 2\].*, got .* 2, 2, 1\]",
        ),
        (lambda: Request("a", (5, 2, 2), stitch=Stitch(clip(2).byte())), r"before: expected floats .*, got torch.uint8"),
        (lambda: Request("a", (5, 2.5, 2)), r"size: expected \(T, H, W\), each at least 1, got \(5, 2.5, 2\)"),
        (lambda: Request("a", 5), r"size: expected \(T, H, W\), each at least 1, got 5"),
        (lambda: Request("a", (5, 2, 2), seed="x"), r"seed: expected a whole number from 0 to 2\*\*64 - 1 or None, got 'x'"),
        (lambda: Request("a", (5, 2, 2), frame_step=0), "frame_step: expected a finite number above 0, got 0"),
        (lambda: extend("a", clip(8), 4, CAUSAL, overlap=-1), "extend: overlap: expected at least 0, got -1"),
        (lambda: join("a", clip(8), clip(8), 4, CAUSAL, overlap=-1), "join: overlap: expected at least 0, got -1"),
        (
            lambda: image_to_video("a", clip(0), 5, Timing(1, 1)),
            r"image_to_video: image: expected floats \[3, T, H, W\] with at least one frame, got",
        ),
        (lambda: extend("a", clip(0), 4, CAUSAL), r"extend: video: expected floats \[3, T, H, W\] with at least one frame, got"),
        (lambda: extend("a", clip(9), 0, CAUSAL), "extend: frames: expected at least 1, got 0"),
        (lambda: extend("a", clip(3), 4, CAUSAL, backward=True), "extend: video: expected at least 4 frames, got 3"),
        (lambda: extend("a", clip(3), 4, Timing(4, 4)), "extend: video: expected at least 4 frames, got 3"),
        (lambda: join("a", clip(9), clip(3), 8, CAUSAL), "join: last: expected at least 4 frames, got 3"),
        (lambda: join("a", clip(9), clip(9), 6, CAUSAL), "join: frames: expected a multiple of 4, got 6"),
        (
            lambda: join("a", clip(9), clip(9)[:, :, :1], 8, CAUSAL),
            r"join: last: expected frames of \[2, 2\] as in first, got \[1, 2\]",
        ),
    ],
)
def test_what_cannot_be_is_named(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prompt_that_is_no_text_is_named() -> None:
    with pytest.raises(TypeError, match="Request: prompt: expected text, got 3"):
        Request(3, (5, 2, 2))
