"""Patch embedding of a list of videos [C, T, H, W]: a matrix product whose operand is gathered from the videos as it is loaded.

A program owns BLOCK_N tokens of one video, counted from that video's first token, so that a result does not depend on what else is
in the list. Up to GROUP videos share a launch, their pointers and sizes being kernel arguments: nothing is copied to the device,
and a CUDA graph can hold it. Element k of token n lies at offset(k) + offset(n), which saves divisions per element.

Patches are tiles [k, n] with threads along n: neighbouring tokens lie side by side in the video, so that a warp reads whole sectors
whatever the size of a patch.

    embed_kernel      tokens = patches . weight^T + bias, k in the order of weight (C pt ph pw). Where all k fit one block, the
                      patches are read once for all D; writing N D elements is most of what it does then
    scatter_kernel    dvideos = dtokens . weight, straight into the videos
    copy_kernel       patchify and unpatchify: N K elements in and out

Products are summed in float32. dweight is cuBLAS's product of dtokens and copied patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, input_precision, power_of_2

GROUP = 8
PROGRAMS = 512  # enough to fill a GPU


class Video(NamedTuple):
    """Where a video's programs and tokens begin in a launch, its number of tokens, sizes in patches, and strides in elements."""

    first_program: Any
    first_token: Any
    num_tokens: Any
    height: Any
    width: Any
    s_c: Any
    s_t: Any
    s_h: Any
    s_w: Any


class Patches(NamedTuple):
    """A program's patches: their video and its strides; of each, its offset there, whether it exists, its row among all tokens."""

    p_video: Any
    s_c: Any
    s_t: Any
    s_h: Any
    s_w: Any
    offset: Any
    inside: Any
    token: Any


# Triton compiles a kernel anew for an integer that is 1 or that 16 divides, inside tuples also where it is asked not to. So the
# integers n >= 0 of a Video travel as odd numbers above 1.


def _odd(n: int) -> int:
    return 2 * n + 3


@triton.jit
def _from_odd(n):
    return n.to(tl.int64) // 2 - 1


@triton.jit
def _video(odd):
    return Video(*[_from_odd(n) for n in odd])


@triton.jit
def _locate(
    pointers, videos, program, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, RUN: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A program's patches, BLOCK_N of one video."""
    p_video = pointers[0]
    video = _video(videos[0])
    for i in tl.static_range(1, len(pointers)):
        later = _video(videos[i])
        if program >= later.first_program:
            p_video = pointers[i]
            video = later
    n = ((program - video.first_program) * BLOCK_N).to(tl.int32) + tl.arange(0, BLOCK_N)
    height = video.height.to(tl.int32)
    width = video.width.to(tl.int32)
    s_w = video.s_w
    if RUN > 1:
        s_w = 1
    offset = n // (height * width) * (PT * video.s_t) + n // width % height * (PH * video.s_h) + n % width * (PW * s_w)
    inside = n < video.num_tokens
    return Patches(p_video, video.s_c, video.s_t, video.s_h, s_w, tl.multiple_of(offset, RUN), inside, video.first_token + n)


@triton.jit
def _elements(
    k, patches, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Offsets of the elements k of a patch, in the order (C pt ph pw) or (pt ph pw C), and whether there are such."""
    if CHANNELS_LAST:
        c = k % C
        inner = k // C
    else:
        c = k // (PT * PH * PW)
        inner = k % (PT * PH * PW)
    offset = c * patches.s_c + inner // (PH * PW) * patches.s_t + inner // PW % PH * patches.s_h
    return tl.multiple_of(offset, RUN) + inner % PW * patches.s_w, k < C * PT * PH * PW


@triton.jit
def _pointers(patches, offset):
    """[k, n] of the elements at these offsets of a patch."""
    return patches.p_video + offset[:, None] + patches.offset[None, :]


@triton.jit(do_not_specialize=["splits", "blocks"])
def embed_kernel(
    pointers, videos, p_weight, p_bias, p_tokens, splits, blocks, D: tl.constexpr, C: tl.constexpr, PT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, RUN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (tokens, split of D): `blocks` blocks of D."""
    K: tl.constexpr = C * PT * PH * PW
    patches = _locate(pointers, videos, tl.program_id(0) // splits, PT, PH, PW, RUN, BLOCK_N)
    in_n = patches.inside
    first_block = tl.program_id(0) % splits * blocks
    if K <= BLOCK_K:
        k = tl.arange(0, BLOCK_K)
        o_k, in_k = _elements(k, patches, C, PT, PH, PW, RUN, False)
        x = tl.load(_pointers(patches, o_k), mask=in_k[:, None] & in_n[None, :], other=0.0)
    for block in range(first_block, tl.minimum(first_block + blocks, tl.cdiv(D, BLOCK_D))):
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = d < D
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            o_k, in_k = _elements(k, patches, C, PT, PH, PW, RUN, False)
            if K > BLOCK_K:
                x = tl.load(_pointers(patches, o_k), mask=in_k[:, None] & in_n[None, :], other=0.0)
            weight = tl.load(p_weight + d[:, None].to(tl.int64) * K + k[None, :], mask=in_d[:, None] & in_k[None, :], other=0.0)
            acc = tl.dot(tl.trans(x), tl.trans(weight), acc, input_precision=PRECISION)
        if p_bias is not None:
            acc += tl.load(p_bias + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        p_out = p_tokens + patches.token[:, None] * D + d[None, :]
        tl.store(p_out, acc.to(p_tokens.dtype.element_ty), mask=in_n[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["blocks"])
def scatter_kernel(
    pointers, videos, p_dtokens, p_weight, s_dtokens, blocks, D: tl.constexpr, C: tl.constexpr, PT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, RUN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (tokens, block of k): each element of a video belongs to one patch."""
    K: tl.constexpr = C * PT * PH * PW
    patches = _locate(pointers, videos, tl.program_id(0) // blocks, PT, PH, PW, RUN, BLOCK_N)
    in_n = patches.inside
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    o_k, in_k = _elements(k, patches, C, PT, PH, PW, RUN, False)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_d = d < D
        weight = tl.load(p_weight + d[:, None].to(tl.int64) * K + k[None, :], mask=in_d[:, None] & in_k[None, :], other=0.0)
        p_rows = p_dtokens + patches.token[:, None] * s_dtokens + d[None, :]
        dtokens = tl.load(p_rows, mask=in_n[:, None] & in_d[None, :], other=0.0)
        acc = tl.dot(tl.trans(weight), tl.trans(dtokens), acc, input_precision=PRECISION)
    tl.store(_pointers(patches, o_k), acc.to(patches.p_video.dtype.element_ty), mask=in_k[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["blocks"])
def copy_kernel(
    pointers, videos, p_tokens, s_tokens, blocks, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    RUN: tl.constexpr, CHANNELS_LAST: tl.constexpr, TO_VIDEOS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tokens, block of k)."""
    patches = _locate(pointers, videos, tl.program_id(0) // blocks, PT, PH, PW, RUN, BLOCK_N)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    o_k, in_k = _elements(k, patches, C, PT, PH, PW, RUN, CHANNELS_LAST)
    mask = in_k[:, None] & patches.inside[None, :]
    p_element = _pointers(patches, o_k)
    p_row = p_tokens + patches.token[None, :] * s_tokens + k[:, None]
    if TO_VIDEOS:
        tl.store(p_element, tl.load(p_row, mask=mask), mask=mask)
    else:
        tl.store(p_row, tl.load(p_element, mask=mask), mask=mask)


def _launches(videos: Sequence[Tensor], patch_size: Sequence[int], block: int) -> Iterator[tuple[int, dict[str, tuple]]]:
    """(programs, the arguments that name the videos) of each launch."""
    first_token = 0
    for start in range(0, len(videos), GROUP):
        group = list(videos[start : start + GROUP])
        sizes, programs = [], 0
        for video in group:
            t, h, w = (n // p for n, p in zip(video.shape[1:], patch_size, strict=True))
            sizes.append(Video(programs, first_token, t * h * w, h, w, *video.stride()))
            programs += triton.cdiv(t * h * w, block)
            first_token += t * h * w
        missing = power_of_2(len(group)) - len(group)  # few lengths of tuples to compile for
        sizes += [Video(programs, 0, 0, 1, 1, 0, 0, 0, 0)] * missing
        if programs:
            odd = tuple(tuple(map(_odd, video)) for video in sizes)
            yield programs, {"pointers": (*group, *group[:1] * missing), "videos": odd}


def _constants(videos: Sequence[Tensor], patch_size: Sequence[int]) -> dict[str, Any]:
    """RUN: of how many elements the rows of every patch consist, that can be moved at once; 16 bytes of them or one."""
    run = 16 // videos[0].element_size()
    aligned = all(
        video.stride(3) == 1 and video.data_ptr() % 16 == 0 and all(n % run == 0 for n in video.stride()[:3]) for video in videos
    )
    run = run if aligned and patch_size[2] % run == 0 else 1
    return {"C": videos[0].shape[0], **dict(zip(("PT", "PH", "PW"), patch_size, strict=True)), "RUN": run}


def _matmul_tile(dtype: torch.dtype, inner: int, outer: int, vectors: bool) -> tuple[int, int, int, int]:
    """Tokens, block of the axis summed over, block of the other one, warps: the same whatever the videos, and so are the sums."""
    outer = max(power_of_2(outer), 16)
    if dtype == torch.float32:  # without tensor cores whole operands are held in registers
        return 64, 16, min(outer, 64), 4
    if inner <= 128:
        return 64, max(power_of_2(inner), 16), min(outer, 128), 4
    inner = 64 if vectors else 32  # elements gathered one by one go through registers
    return (128, inner, 128, 8) if outer >= 128 else (64, inner, outer, 4)


def _copy(videos: Sequence[Tensor], patch_size: Sequence[int], tokens: Tensor, *, channels_last: bool, to_videos: bool) -> None:
    constants = _constants(videos, patch_size)
    block_k = min(power_of_2(tokens.shape[1]), 64)
    blocks = triton.cdiv(tokens.shape[1], block_k)
    for programs, group in _launches(videos, patch_size, 64):
        copy_kernel[(programs * blocks,)](
            **group, p_tokens=tokens, s_tokens=tokens.stride(0), blocks=blocks, **constants, CHANNELS_LAST=channels_last,
            TO_VIDEOS=to_videos, BLOCK_N=64, BLOCK_K=block_k, **OPTIONS,
        )  # fmt: skip


def patch_embed_3d_forward(
    videos: Sequence[Tensor], weight: Tensor, bias: Tensor | None, patch_size: Sequence[int], tokens: Tensor
) -> None:
    d, k = weight.shape[0], weight[0].numel()
    constants = {"D": d, **_constants(videos, patch_size), "PRECISION": input_precision(weight.dtype)}
    block_n, block_k, block_d, num_warps = _matmul_tile(weight.dtype, k, d, patch_size[2] % 8 == 0)
    d_blocks = max(triton.cdiv(d, block_d), 1)
    for programs, group in _launches(videos, patch_size, block_n):
        # All blocks of D to a program that keeps its patches, unless that leaves the GPU idle.
        blocks = min(max(d_blocks * programs // PROGRAMS, 1), d_blocks) if k <= block_k else 1
        splits = triton.cdiv(d_blocks, blocks)
        embed_kernel[(programs * splits,)](
            **group, p_weight=weight, p_bias=bias, p_tokens=tokens, splits=splits, blocks=blocks, **constants,
            BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=num_warps, **OPTIONS,
        )  # fmt: skip


def patch_embed_3d_backward(
    dtokens: Tensor, videos: Sequence[Tensor], weight: Tensor, patch_size: Sequence[int], dvideos: Sequence[Tensor] | None,
    dweight: Tensor, dbias: Tensor | None,
) -> None:  # fmt: skip
    d, k = weight.shape[0], weight[0].numel()
    patches = weight.new_empty((dtokens.shape[0], k))
    _copy(videos, patch_size, patches, channels_last=False, to_videos=False)
    torch.mm(dtokens.T, patches, out=dweight.view(d, k))
    if dbias is not None:
        torch.sum(dtokens, dim=0, out=dbias)
    if dvideos is not None:
        constants = {"D": d, **_constants(dvideos, patch_size), "PRECISION": input_precision(weight.dtype)}
        # Blocks of 64: the address of each element scattered takes two registers.
        block_n, block_d, block_k, num_warps = _matmul_tile(weight.dtype, d, min(k, 64), True)
        blocks = triton.cdiv(k, block_k)
        for programs, group in _launches(dvideos, patch_size, block_n):
            scatter_kernel[(programs * blocks,)](
                **group, p_dtokens=dtokens, p_weight=weight, s_dtokens=dtokens.stride(0), blocks=blocks, **constants,
                BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=num_warps, **OPTIONS,
            )  # fmt: skip


def patchify_3d(videos: Sequence[Tensor], patch_size: Sequence[int], tokens: Tensor) -> None:
    _copy(videos, patch_size, tokens, channels_last=True, to_videos=False)


def unpatchify_3d(tokens: Tensor, patch_size: Sequence[int], videos: Sequence[Tensor]) -> None:
    _copy(videos, patch_size, tokens, channels_last=True, to_videos=True)
