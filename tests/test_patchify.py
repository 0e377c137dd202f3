"""Patches cut out of videos of mixed sizes, and put together again."""

import itertools

import pytest
import torch
from contract import OpContract
from test_patch_embed import CASES, make_videos
from tolerance import (
    Case,
    Target,
    assert_bit_equal,
    assert_zero,
    run,
)
from torch import Tensor

from sora_kernels import patch_embed as ops
from sora_kernels.layout import PackedLayout

FUNCTION = "patchify_3d"
MORE_CASES = CASES | {
    "videos": {"patch_size": (1, 2, 2), "grids": [(1, 1, 1)] * 33},  # more than a launch takes
    "cubes": {"patch_size": (2, 8, 8), "grids": [(1, 1, 2)], "channels": 40},  # a line of a patch at a time
    "lines": {"patch_size": (1, 1, 16), "grids": [(1, 3, 7)]},  # a tile wider than a block
}


def written_out(videos: list[Tensor], patch_size: tuple[int, int, int]) -> Tensor:
    """Patches in raster order, t slowest, each with channels in the order (pt ph pw C), by slicing."""
    rows = []
    for video in videos:
        starts = [range(0, n, p) for n, p in zip(video.shape[1:], patch_size, strict=True)]
        for corner in itertools.product(*starts):
            t, h, w = (slice(i, i + p) for i, p in zip(corner, patch_size, strict=True))
            rows.append(video[:, t, h, w].permute(1, 2, 3, 0).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("case", MORE_CASES)
def test_patchify(target: Target, case: str) -> None:
    """Patches and the gradient through them are exact copies, and unpatchify takes them back to the same videos."""
    patch_size, videos = MORE_CASES[case]["patch_size"], make_videos(target, **MORE_CASES[case])
    layout = PackedLayout.from_grids(MORE_CASES[case]["grids"], target.device)

    def patchify(*clips: Tensor) -> Tensor:
        tokens, found = ops.patchify_3d(clips, patch_size=patch_size)
        assert found == layout
        return tokens

    (tokens,), gradients = run(patchify, videos, torch.clone)
    assert_bit_equal([tokens], [written_out(videos, patch_size)])
    assert_bit_equal(gradients, videos)

    back, (dtokens,) = run(lambda x: ops.unpatchify_3d(x, layout, patch_size=patch_size), [tokens], torch.clone)
    assert_bit_equal(back, videos)
    assert_bit_equal([dtokens], [tokens])


def test_unpatchify_slack(target: Target) -> None:
    """Tokens past the layout's end are left out and have zero gradients."""
    layout, tokens = PackedLayout.from_grids([(1, 2, 2)], target.device), target.randn(7, 12)
    tokens[4:] = torch.nan
    (video,), (gradient,) = run(lambda x: ops.unpatchify_3d(x, layout, patch_size=(1, 2, 2)), [tokens])
    assert video.shape == (3, 1, 4, 4)
    assert video.isfinite().all()
    assert_zero(gradient[4:])


def cut(patch_size, *videos: Tensor) -> Tensor:
    return ops.patchify_3d(videos, patch_size=patch_size)[0]


def join(layout: PackedLayout, tokens: Tensor) -> list[Tensor]:
    return ops.unpatchify_3d(tokens, layout, patch_size=(1, 2, 2))


def cut_case(target: Target) -> Case:
    return Case(cut, (1, 2, 2), make_videos(target, **CASES["dit"]), {"patchify_3d", "unpatchify_3d"})


def join_case(target: Target) -> Case:
    layout = PackedLayout.from_grids(CASES["dit"]["grids"], target.device)
    return Case(join, layout, [target.randn(layout.num_tokens, 16)], {"patchify_3d", "unpatchify_3d"})


OPS = {"patchify": cut_case, "unpatchify": join_case}


class TestContract(OpContract):
    """What every op is held to, for each of OPS."""
