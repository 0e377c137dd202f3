"""Patch embedding of videos of mixed sizes, and its inverse."""

from functools import partial

import pytest
import torch
from contract import OpContract
from tolerance import (
    LARGE_WIDTHS,
    Case,
    Target,
    assert_bit_equal,
    check_accuracy,
    check_rejected,
    check_threads,
    large_lengths,
    run,
)
from torch import Tensor
from torch.nn.functional import conv3d

from sora_kernels import backends
from sora_kernels import patch_embed as ops
from sora_kernels.layout import PackedLayout, Span
from sora_kernels.reference import patch_embed as reference

FUNCTION = "patch_embed_3d_forward"
CASES = {
    "dit": {"patch_size": (1, 2, 2), "grids": [(3, 4, 5), (1, 9, 2), (2, 1, 1)]},
    "tubes": {"patch_size": (2, 4, 1), "grids": [(2, 3, 4), (1, 1, 7)]},
    "pixels": {"patch_size": (1, 1, 1), "grids": [(1, 7, 11), (2, 5, 5)], "channels": 16},
    "one_token": {"patch_size": (2, 2, 2), "grids": [(1, 1, 1)], "channels": 1, "d": 40},
    "wide": {"patch_size": (1, 2, 2), "grids": [(2, 5, 7)], "channels": 16, "d": 200},
    "odd": {"patch_size": (3, 1, 5), "grids": [(1, 4, 3), (2, 2, 2)], "channels": 5, "d": 37},
    "rows": {"patch_size": (1, 2, 8), "grids": [(2, 3, 4), (1, 2, 5)], "channels": 3},
    "many": {"patch_size": (1, 2, 2), "grids": [(1, h, w) for h in range(1, 5) for w in range(1, 5)]},
    "empty_video": {"patch_size": (1, 2, 2), "grids": [(2, 3, 2), (0, 3, 2), (1, 2, 2)]},
}


def make_videos(target: Target, patch_size, grids, channels=4, **_) -> list[Tensor]:
    sizes = [[n * p for n, p in zip(grid, patch_size, strict=True)] for grid in grids]
    return [target.randn(channels, *size) for size in sizes]


def make_weights(target: Target, patch_size, channels=4, d=24, **_) -> tuple[Tensor, Tensor]:
    return target.randn(d, channels, *patch_size, scale=0.2), target.randn(d)


def plain_embed(videos: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Conv3d on each video, which takes none without frames."""
    patch_size = weight.shape[2:]
    maps = [conv3d(video[None], weight, bias, patch_size)[0] for video in videos if video.numel()]
    return torch.cat([x.flatten(1).T for x in maps])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_patch_embed(target: Target, case: str, has_bias: bool) -> None:
    """Tokens and the gradients of the videos, the weight and the bias obey the rule; the layout is that of the grids."""
    patch_size, grids = CASES[case]["patch_size"], CASES[case]["grids"]
    videos, (weight, bias) = make_videos(target, **CASES[case]), make_weights(target, **CASES[case])
    inputs = {"weight": weight, **({"bias": bias} if has_bias else {})}
    inputs |= {f"videos[{i}]": video for i, video in enumerate(videos)}

    def bind(function):
        def call(weight: Tensor, *rest: Tensor) -> Tensor:
            bias, videos = (rest[0], rest[1:]) if has_bias else (None, rest)
            return function(list(videos), weight, bias)

        return call

    def op(videos: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        tokens, layout = ops.patch_embed_3d(videos, weight, bias, patch_size=patch_size)
        assert layout == PackedLayout.from_grids(grids)
        assert layout.device == tokens.device
        return tokens

    check_accuracy(bind(op), bind(plain_embed), bind(partial(reference.patch_embed_3d, patch_size=patch_size)), inputs)


def test_videos_without_gradient(target: Target) -> None:
    """Leaving out the videos' gradients changes no bit of the weights'."""
    case = CASES["dit"]
    videos, weights = make_videos(target, **case), make_weights(target, **case)

    def embed(weight: Tensor, bias: Tensor, *clips: Tensor) -> Tensor:
        return ops.patch_embed_3d(clips or videos, weight, bias, patch_size=case["patch_size"])[0]

    alone, together = run(embed, weights), run(embed, [*weights, *videos])
    assert_bit_equal(alone[0] + alone[1], together[0] + together[1][:2])


def test_packed_equals_separate(target: Target) -> None:
    """Each video's tokens have the bits of that video alone, and the gradients agree."""
    case = CASES["many"]
    videos, (weight, bias) = make_videos(target, **case), make_weights(target, **case)

    def embed(*clips: Tensor) -> Tensor:
        return ops.patch_embed_3d(clips, weight, bias, patch_size=case["patch_size"])[0]

    together, apart = run(embed, videos, torch.clone), [run(embed, [video], torch.clone) for video in videos]
    assert_bit_equal(together[0], [torch.cat([tokens for (tokens,), _ in apart])])
    assert_bit_equal(together[1], [gradient for _, (gradient,) in apart])


def test_batch(target: Target) -> None:
    """One [B, C, T, H, W] is the list of its videos."""
    videos = target.randn(3, 4, 2, 6, 4)
    for function in (partial(ops.patch_embed_3d, weight=target.randn(8, 4, 1, 2, 2), bias=None), ops.patchify_3d):
        tokens, layout = function(videos, patch_size=(1, 2, 2))
        assert layout == PackedLayout.from_grids([(2, 3, 2)] * 3)
        assert_bit_equal([tokens], [function(list(videos), patch_size=(1, 2, 2))[0]])


def embed(patch_size, weight: Tensor, bias: Tensor, *videos: Tensor) -> Tensor:
    return ops.patch_embed_3d(videos, weight, bias, patch_size=patch_size)[0]


def embed_case(target: Target) -> Case:
    inputs = [*make_weights(target, **CASES["dit"]), *make_videos(target, **CASES["dit"])]
    return Case(embed, (1, 2, 2), inputs, {"patch_embed_3d_forward", "patch_embed_3d_backward"})


OPS = {"patch_embed": embed_case}

V, W, P = [torch.zeros(4, 2, 4, 6), torch.zeros(4, 1, 2, 2)], torch.zeros(8, 4, 1, 2, 2), (1, 2, 2)
LAYOUT = PackedLayout.from_grids([(2, 2, 3), (1, 1, 1)])
GOOD = {
    "patch_embed_3d": {"videos": V, "weight": W, "bias": torch.zeros(8), "patch_size": P},
    "patchify_3d": {"videos": V, "patch_size": P},
    "unpatchify_3d": {"tokens": torch.zeros(13, 16), "layout": LAYOUT, "patch_size": P},
}
VIDEOS = [
    ({"videos": []}, "videos: expected at least one video, got none"),
    ({"videos": [V[0], 3]}, "videos[1]: expected a torch.Tensor, got int"),
    ({"videos": [V[0][0]]}, "videos[0]: expected shape [~, T, H, W], got [2, 4, 6]"),
    ({"videos": [V[0], V[1][:3]]}, "videos[1]: expected shape [4, T, H, W], got [3, 1, 2, 2]"),
    ({"videos": [V[0], V[1].half()]}, "videos[1]: expected dtype float32, got float16"),
    ({"videos": [V[0][..., 1:]]}, "videos[0]: expected (T, H, W) divisible by patch_size (1, 2, 2), got (2, 4, 5)"),
    ({"videos": V[0]}, "videos: expected a list of videos [C, T, H, W], or shape [B, C, T, H, W], got [4, 2, 4, 6]"),
    ({"videos": 3}, "videos: expected ~, got ~int~"),
    ({"patch_size": 2}, "patch_size: expected three ints (T, H, W), got 2"),
    ({"patch_size": (1, 2)}, "patch_size: expected three ints (T, H, W), got (1, 2)"),
    ({"patch_size": (0, 2, 2)}, "patch_size: expected three sizes >= 1, got (0, 2, 2)"),
    ({"videos": torch.tensor(1.0)}, "videos: expected a list of videos [C, T, H, W], or shape [B, C, T, H, W], got []"),
]
BAD = {
    "patchify_3d": [
        *VIDEOS,
        ({"patch_size": (2**40, 2, 2)}, "patch_size: expected three sizes below 2**31, got (1099511627776, 2, 2)"),
    ],
    "patch_embed_3d": [
        *VIDEOS,
        ({"weight": W[0]}, "weight: expected shape [D, C, pt, ph, pw], got [4, 1, 2, 2]"),
        ({"patch_size": (2, 2, 2)}, "weight: expected shape [D, C, 2, 2, 2], got [8, 4, 1, 2, 2]"),
        ({"weight": W[:, :0], "videos": [V[0][:0]]}, "videos[0]: expected at least one channel, got none"),
        ({"bias": torch.zeros(7)}, "bias: expected shape [8], got [7]"),
        ({"bias": torch.zeros(8).half()}, "bias: expected dtype float32, got float16"),
        ({"layout": 3}, "layout: expected a PackedLayout, got int"),
        ({"layout": PackedLayout.from_grids([(2, 2, 3)])}, "layout: expected one span per video, with the grids ~, got ~"),
        (
            {"layout": PackedLayout.from_grids([(2, 3, 2), (1, 1, 1)])},
            "layout: expected one span per video, with the grids ~, got ~",
        ),
    ],
    "unpatchify_3d": [
        ({"tokens": torch.zeros(16)}, "tokens: expected shape [N, pt*ph*pw*C], got [16]"),
        ({"tokens": torch.zeros(12, 16)}, "layout: expected at most 12 tokens, got 13"),
        ({"tokens": torch.zeros(13, 15)}, "tokens: expected a width divisible by 4~, got 15"),
        ({"layout": 3}, "layout: expected a PackedLayout, got int"),
        ({"layout": PackedLayout([[Span.text(2), Span.text(2)]])}, "layout: expected one span per sample, got ~2 spans"),
        ({"patch_size": (1, 2)}, "patch_size: expected three ints (T, H, W), got (1, 2)"),
    ],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(name, *row) for name, rows in BAD.items() for row in rows])
def test_bad_input(name: str, wrong: dict, message: str) -> None:
    check_rejected(getattr(ops, name), {**GOOD[name], **wrong}, f"{name}: {message}")


def test_a_layout_with_positions_of_its_own_is_returned() -> None:
    layout = PackedLayout.from_spans([[Span((2, 2, 3), step=(1, 0.5, 0.5))], [Span((1, 1, 1))]])
    tokens, returned = ops.patch_embed_3d(**GOOD["patch_embed_3d"], layout=layout)
    assert returned is layout
    assert_bit_equal([tokens], [ops.patch_embed_3d(**GOOD["patch_embed_3d"])[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", LARGE_WIDTHS)
def test_large(d: int, dtype: torch.dtype) -> None:
    """Large outputs, which pass the caches by, have the bits of small ones, and of any number of threads."""
    target, (tokens, _) = Target("cpu", "cpu", dtype), large_lengths(d, dtype)
    case = {"patch_size": (1, 2, 2), "grids": [(1, 1, tokens)] * 2, "d": d}
    videos, weights = make_videos(target, **case), make_weights(target, **case)

    def embed(weight: Tensor, bias: Tensor, *clips: Tensor) -> Tensor:
        return ops.patch_embed_3d(clips, weight, bias, patch_size=case["patch_size"])[0]

    (together,), _ = check_threads(embed, [*weights, *videos])
    assert_bit_equal([together], [torch.cat([embed(*weights, video) for video in videos])])


class TestContract(OpContract):
    """What every op is held to, for each of OPS."""


def test_gradients_of_many_tokens_are_exact_sums() -> None:
    """Beside a large sum in float32, equal summands would all be rounded the same way."""
    video, cotangent = torch.ones(1, 1 << 20, 1, 1), torch.tensor(1.1)
    weight, bias = torch.ones(1, 1, 1, 1, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    tokens, _ = ops.patch_embed_3d([video], weight, bias, patch_size=(1, 1, 1))
    tokens.backward(cotangent.expand_as(tokens))
    exact = len(tokens) * cotangent.double()
    for gradient in (weight.grad, bias.grad):
        assert abs(gradient.double().item() / exact - 1) < 1e-5


def test_gradients_of_videos_are_sums_in_parts() -> None:
    """One float32 sum over a width of 5120 is off by 1e-6."""
    torch.manual_seed(0)
    video, weight = torch.rand(16, 2, 16, 16, requires_grad=True), torch.rand(5120, 16, 1, 2, 2)
    tokens, _ = ops.patch_embed_3d([video], weight, None, patch_size=(1, 2, 2))
    cotangent = torch.rand(tokens.shape)
    tokens.backward(cotangent)
    patches = (cotangent.double() @ weight.double().flatten(1)).unflatten(0, (2, 8, 8)).unflatten(3, (16, 2, 2))
    exact = patches.permute(3, 0, 1, 4, 2, 5).reshape(video.shape)
    bound = 2e-6 if backends.BACKENDS["cpu"].load().isa() == "amx" else 3e-7  # tiles have one sum
    assert (video.grad.double() - exact).norm() < bound * exact.norm()
