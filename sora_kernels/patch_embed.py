"""Videos and images of any sizes cut into spacetime patches, straight into packed tokens, and back.

    patch_embed_3d    tokens[n] = weight . patch[n] + bias         a Conv3d whose stride is its kernel, as one matrix product
    patchify_3d       tokens[n] = patch[n], channels in the order (pt ph pw C)
    unpatchify_3d     its inverse

A patch is the block of (pt, ph, pw) latent positions at token (t, h, w) of its video's (T/pt, H/ph, W/pw) grid.

Source: Dosovitskiy et al., ViT (2020); tubelets: Arnab et al., ViViT (2021); the (pt ph pw C) order is DiT's unpatchify.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .checks import check_tensor, fail, triple
from .layout import Grid, PackedLayout
from .library import Context, Grads, autocast, register, rows
from .memory import empty, empty_like

Videos = Sequence[Tensor] | Tensor


def patch_embed_3d(
    videos: Videos,
    weight: Tensor,
    bias: Tensor | None,
    *,
    patch_size: tuple[int, int, int],
    layout: PackedLayout | None = None,
) -> tuple[Tensor, PackedLayout]:
    """Embeds every patch of every video -> packed tokens and their layout.

    >>> videos = [torch.randn(16, 4, 32, 32), torch.randn(16, 1, 64, 36)]          # a video and an image, 16 channels
    >>> weight, bias = torch.randn(1152, 16, 1, 2, 2), torch.zeros(1152)
    >>> tokens, layout = patch_embed_3d(videos, weight, bias, patch_size=(1, 2, 2))
    >>> tokens.shape, layout
    (torch.Size([1600, 1152]), PackedLayout(2 samples, 1600 tokens, longest 1024, cpu: 4x16x16, 1x32x18))

    Args:
        videos: a list of [C, T, H, W] of any sizes, or one [B, C, T, H, W]; any strides.
        weight: [D, C, pt, ph, pw], as Conv3d's.
        bias: [D] or None.
        patch_size: (pt, ph, pw); must divide each video's (T, H, W).
        layout: of the tokens, where it exists already or has positions of its own: one span per video, with the grid
            (T/pt, H/ph, W/pw). Default: a new one.

    Returns:
        tokens [N, D] in the videos' dtype (under autocast in its lower one, as of a Conv3d), and `layout`, or a new layout of the
        N = sum of T/pt * H/ph * W/pw tokens on their device. While a CUDA graph is captured a new layout stays on the host, so
        pass one that was built beforehand.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = "patch_embed_3d"
    check_tensor(op, "weight", weight, ("D", "C", "pt", "ph", "pw"))
    patch = _check_patch(op, patch_size)
    if patch != list(weight.shape[2:]):
        fail(op, "weight", f"shape [D, C, {', '.join(map(str, patch))}]", str(list(weight.shape)))
    weight, bias, *clips = autocast(weight, bias, *_clips(op, videos))
    grids = _check_videos(op, clips, patch, weight)
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.shape[0],), dtype=weight.dtype, like=weight)
    return _embed(clips, weight, bias, patch), _layout(clips, grids) if layout is None else _check_layout(op, layout, grids)


def patchify_3d(videos: Videos, *, patch_size: tuple[int, int, int]) -> tuple[Tensor, PackedLayout]:
    """Cuts videos into patches without embedding them: tokens [N, pt*ph*pw*C], channels in the order (pt ph pw C).

    >>> tokens, layout = patchify_3d([torch.randn(16, 4, 32, 32)], patch_size=(1, 2, 2))
    >>> tokens.shape
    torch.Size([1024, 64])
    """
    op = "patchify_3d"
    patch = _check_patch(op, patch_size)
    clips = _clips(op, videos)
    grids = _check_videos(op, clips, patch, None)
    return _patchify(clips, patch), _layout(clips, grids)


def unpatchify_3d(tokens: Tensor, layout: PackedLayout, *, patch_size: tuple[int, int, int]) -> list[Tensor]:
    """Puts patches back together: tokens [N, pt*ph*pw*C] -> a list of [C, T, H, W], the inverse of `patchify_3d`.

    >>> layout = PackedLayout.from_grids([(4, 16, 16), (1, 32, 18)])
    >>> [tuple(video.shape) for video in unpatchify_3d(torch.randn(1600, 64), layout, patch_size=(1, 2, 2))]
    [(16, 4, 32, 32), (16, 1, 64, 36)]

    Args:
        tokens: [N, pt*ph*pw*C]; rows past the layout's end are left out.
        layout: each sample must be one span.
        patch_size: (pt, ph, pw).
    """
    op = "unpatchify_3d"
    check_tensor(op, "tokens", tokens, ("N", "pt*ph*pw*C"))
    patch = _check_patch(op, patch_size)
    if not isinstance(layout, PackedLayout):
        fail(op, "layout", "a PackedLayout", type(layout).__name__, TypeError)
    if layout.num_tokens > tokens.shape[0]:
        fail(op, "layout", f"at most {tokens.shape[0]} tokens", f"{layout.num_tokens}")
    volume = patch[0] * patch[1] * patch[2]
    if tokens.shape[1] == 0 or tokens.shape[1] % volume:
        fail(op, "tokens", f"a width divisible by {volume} (patch_size {tuple(patch)})", f"{tokens.shape[1]}")
    sizes: list[int] = []
    for sample in layout.spans:
        if len(sample) != 1:
            fail(op, "layout", "one span per sample", f"a sample of {len(sample)} spans")
        sizes += [n * p for n, p in zip(sample[0].grid, patch, strict=True)]
    return _unpatchify(tokens, sizes, patch)


def _check_patch(op: str, patch_size: tuple[int, int, int]) -> list[int]:
    patch = triple(op, "patch_size", patch_size, int)
    if min(patch) < 1:
        fail(op, "patch_size", "three sizes >= 1", repr(patch_size))
    if max(patch) >= 2**31:
        fail(op, "patch_size", "three sizes below 2**31", repr(patch_size))
    return patch


def _clips(op: str, videos: Videos) -> list[Tensor]:
    if not isinstance(videos, Tensor | list | tuple):
        fail(op, "videos", "a list of tensors [C, T, H, W] or one [B, C, T, H, W]", type(videos).__name__, TypeError)
    if isinstance(videos, Tensor) and videos.ndim != 5:
        fail(op, "videos", "a list of videos [C, T, H, W], or shape [B, C, T, H, W]", str(list(videos.shape)))
    return list(videos)


def _check_videos(op: str, clips: list[Tensor], patch: list[int], weight: Tensor | None) -> list[Grid]:
    """Returns the grid of each video's tokens."""
    if not clips:
        fail(op, "videos", "at least one video", "none")
    check_tensor(op, "videos[0]", clips[0])
    first = clips[0]
    like = first if weight is None else weight
    channels: int | str = "C" if weight is None else weight.shape[1]
    pt, ph, pw = patch
    for i, clip in enumerate(clips):
        name = f"videos[{i}]"
        check_tensor(op, name, clip, (channels, "T", "H", "W"), dtype=like.dtype, like=like)
        channels, t, h, w = clip.shape
        if channels == 0:
            fail(op, name, "at least one channel", "none")
        if t % pt or h % ph or w % pw:
            fail(op, name, f"(T, H, W) divisible by patch_size {tuple(patch)}", f"{tuple(clip.shape[1:])}")
    if (tokens := _num_tokens(clips, patch)) >= 2**31:
        fail(op, "videos", "fewer than 2**31 tokens", str(tokens))
    return [(clip.shape[1] // pt, clip.shape[2] // ph, clip.shape[3] // pw) for clip in clips]


def _layout(clips: list[Tensor], grids: list[Grid]) -> PackedLayout:
    # Nothing of pageable memory can be copied to a GPU while a graph is captured.
    capturing = clips[0].is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
    return PackedLayout.from_grids(grids, device=None if capturing else clips[0].device)


def _check_layout(op: str, layout: PackedLayout, grids: list[Grid]) -> PackedLayout:
    if not isinstance(layout, PackedLayout):
        fail(op, "layout", "a PackedLayout", type(layout).__name__, TypeError)
    if [[span.grid for span in sample] for sample in layout.spans] != [[grid] for grid in grids]:
        fail(op, "layout", f"one span per video, with the grids {grids}", repr(layout))
    return layout


def _num_tokens(clips: Sequence[Tensor], patch: Sequence[int]) -> int:
    return sum((c.shape[1] // patch[0]) * (c.shape[2] // patch[1]) * (c.shape[3] // patch[2]) for c in clips)


def _run_embed(videos: list[Tensor], weight: Tensor, bias: Tensor | None, patch_size: list[int]) -> Tensor:
    tokens = _fake_embed(videos, weight, bias, patch_size)
    (bias,) = rows(bias)
    backends.call(
        "patch_embed_3d_forward",
        weight,
        videos=videos,
        weight=weight.contiguous(),
        bias=bias,
        patch_size=patch_size,
        tokens=tokens,
    )
    return tokens


def _fake_embed(videos: list[Tensor], weight: Tensor, bias: Tensor | None, patch_size: list[int]) -> Tensor:
    return empty(weight, (_num_tokens(videos, patch_size), weight.shape[0]))


def _run_embed_backward(
    dtokens: Tensor, videos: list[Tensor], weight: Tensor, patch_size: list[int], videos_need_grad: bool, has_bias: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    dvideos, dweight, dbias = _fake_embed_backward(dtokens, videos, weight, patch_size, videos_need_grad, has_bias)
    (dtokens,) = rows(dtokens)
    backends.call(
        "patch_embed_3d_backward",
        weight,
        dtokens=dtokens,
        videos=videos,
        weight=weight.contiguous(),
        patch_size=patch_size,
        dvideos=dvideos or None,
        dweight=dweight,
        dbias=dbias if has_bias else None,
    )
    return dvideos, dweight, dbias


def _fake_embed_backward(
    dtokens: Tensor, videos: list[Tensor], weight: Tensor, patch_size: list[int], videos_need_grad: bool, has_bias: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    dvideos = [empty_like(video) for video in videos] if videos_need_grad else []
    return dvideos, empty_like(weight), weight.new_empty(weight.shape[0] if has_bias else 0)


def _save_embed(ctx: Context, inputs: tuple, output: Tensor) -> None:
    videos, weight, bias, ctx.patch_size = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(weight, *videos)


def _grad_embed(ctx: Context, dtokens: Tensor) -> tuple:
    weight, *videos = ctx.saved_tensors
    # The latents of a first layer need no gradient, which saves a third of the work.
    needed = any(video.requires_grad for video in videos)
    dvideos, dweight, dbias = _embed_backward(dtokens, videos, weight, ctx.patch_size, needed, ctx.has_bias)
    return dvideos if needed else [None] * len(videos), dweight, dbias if ctx.has_bias else None, None


_embed_backward = register(
    "patch_embed_3d_backward(Tensor dtokens, Tensor[] videos, Tensor weight, SymInt[] patch_size, bool videos_need_grad, "
    "bool has_bias) -> (Tensor[], Tensor, Tensor)",
    _run_embed_backward,
    _fake_embed_backward,
)
_embed = register(
    "patch_embed_3d_forward(Tensor[] videos, Tensor weight, Tensor? bias, SymInt[] patch_size) -> Tensor",
    _run_embed,
    _fake_embed,
    _grad_embed,
    _save_embed,
)


def _run_patchify(videos: list[Tensor], patch_size: list[int]) -> Tensor:
    tokens = _fake_patchify(videos, patch_size)
    backends.call("patchify_3d", tokens, videos=videos, patch_size=patch_size, tokens=tokens)
    return tokens


def _fake_patchify(videos: list[Tensor], patch_size: list[int]) -> Tensor:
    volume = patch_size[0] * patch_size[1] * patch_size[2]
    return empty(videos[0], (_num_tokens(videos, patch_size), volume * videos[0].shape[0]))


def _run_unpatchify(tokens: Tensor, sizes: list[int], patch_size: list[int]) -> list[Tensor]:
    videos = _fake_unpatchify(tokens, sizes, patch_size)
    (tokens,) = rows(tokens)
    backends.call("unpatchify_3d", tokens, tokens=tokens, patch_size=patch_size, videos=videos)
    return videos


def _fake_unpatchify(tokens: Tensor, sizes: list[int], patch_size: list[int]) -> list[Tensor]:
    channels = tokens.shape[1] // (patch_size[0] * patch_size[1] * patch_size[2])
    return [empty(tokens, (channels, *sizes[i : i + 3])) for i in range(0, len(sizes), 3)]


def _save_patchify(ctx: Context, inputs: tuple, output: Tensor) -> None:
    videos, ctx.patch_size = inputs
    ctx.sizes = [n for video in videos for n in video.shape[1:]]


def _grad_patchify(ctx: Context, dtokens: Tensor) -> tuple:
    return _unpatchify(dtokens, ctx.sizes, ctx.patch_size), None


def _save_unpatchify(ctx: Context, inputs: tuple, output: list[Tensor]) -> None:
    tokens, _, ctx.patch_size = inputs
    ctx.num_tokens = tokens.shape[0]


def _grad_unpatchify(ctx: Context, dvideos: list[Tensor]) -> Grads:
    dtokens = _patchify(dvideos, ctx.patch_size)
    slack = ctx.num_tokens - dtokens.shape[0]
    return torch.nn.functional.pad(dtokens, (0, 0, 0, slack)), None, None


_patchify = register(
    "patchify_3d(Tensor[] videos, SymInt[] patch_size) -> Tensor",
    _run_patchify,
    _fake_patchify,
    _grad_patchify,
    _save_patchify,
)
_unpatchify = register(
    "unpatchify_3d(Tensor tokens, SymInt[] sizes, SymInt[] patch_size) -> Tensor[]",
    _run_unpatchify,
    _fake_unpatchify,
    _grad_unpatchify,
    _save_unpatchify,
)
