"""How a packed batch is laid out: which tokens belong together, and where each one sits in space and time.

A packed batch is N tokens laid end to end. A *sample* is the tokens that attend to each other; it is one or more *spans*; a span
is a run of tokens on one (T, H, W) grid in raster order, t slowest. One layout serves attention (sample boundaries), RoPE (span
boundaries, grids and positions), adaLN (frame boundaries), patching, the loss and the sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checks import FLOAT32_MAX, check_device, check_int, check_list, check_tensor, fail, triple
from .library import define

Grid = tuple[int, int, int]
Position = tuple[float, float, float]

_MOST = 2**31 - 1  # int32's


@dataclass(frozen=True)
class Span:
    """A run of tokens on one grid: token (t, h, w) has position `origin + step * (t, h, w)`.

    >>> Span((4, 8, 8)).num_tokens
    256
    >>> later = Span((4, 8, 8), origin=(4, 0, 0))             # the next four frames of the same video
    >>> finer = Span((4, 16, 16), step=(1, 0.5, 0.5))         # twice the resolution over the same field of view
    >>> text = Span.text(77)                                  # text in a joint sequence: no rotation

    Args:
        grid: tokens along T, H and W, each below 2**31; zero is allowed.
        origin: position of token (0, 0, 0) along T, H and W, in tokens. Negative and fractional values are fine, as long as float32
            has them; from some 1e10 on, Triton's rotation loses digits, as angles are float64 there.
        step: distance between neighbours along T, H and W. An axis of step 0 and origin 0 is not rotated.
    """

    grid: Grid
    origin: Position = (0.0, 0.0, 0.0)
    step: Position = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name, kind in (("grid", int), ("origin", float), ("step", float)):
            numbers = triple("Span", name, getattr(self, name), kind)
            object.__setattr__(self, name, tuple(numbers))
            if kind is float and (max(numbers) > FLOAT32_MAX or min(numbers) < -FLOAT32_MAX):
                fail("Span", name, "numbers that float32 has", repr(getattr(self, name)))
        if min(self.grid) < 0:
            fail("Span", "grid", "sizes >= 0", repr(self.grid))
        if max(self.grid) > _MOST:
            fail("Span", "grid", "sizes below 2**31", repr(self.grid))

    @property
    def num_tokens(self) -> int:
        """T * H * W."""
        t, h, w = self.grid
        return t * h * w

    @property
    def num_frames(self) -> int:
        """Latent frames: T, or none where they hold no tokens."""
        return self.grid[0] if self.num_tokens else 0

    @property
    def is_text(self) -> bool:
        """Whether all tokens share one position."""
        return self.step == (0.0, 0.0, 0.0)

    @staticmethod
    def text(length: int, origin: Position = (0.0, 0.0, 0.0)) -> Span:
        """`length` tokens that all sit at `origin`: text next to video in a joint sequence."""
        op = "Span.text"
        x, y, z = triple(op, "origin", origin, float)
        return Span((1, 1, check_int(op, "length", length, 0, _MOST)), (x, y, z), (0.0, 0.0, 0.0))


class PackedLayout:
    """Boundaries and positions of a packed batch. Build one with `from_grids` or `from_spans`.

    >>> layout = PackedLayout.from_grids([(4, 8, 8), (1, 16, 9)])      # a video and an image
    >>> layout.num_tokens, layout.cu_seqlens.tolist()
    (400, [0, 256, 400])
    >>> tokens = layout.pack([torch.randn(256, 64), torch.randn(144, 64)])      # [256, D], [144, D] -> [400, D]
    >>> video_tokens, image_tokens = layout.unpack(tokens)

    Everything is computed on the host when the layout is built; `.to(device)` copies it, and nothing here reads back from the
    device afterwards.

    Attributes:
        cu_seqlens: int32 [B+1], sample boundaries.
        cu_spans: int32 [S+1], span boundaries.
        cu_frames: int32 [F+1], boundaries of the latent frames: the H*W tokens that share one t of one span. A span without tokens
            has no frames, so that their number is at most that of the tokens.
        grid: int32 [S, 3], tokens along T, H, W of each span.
        origin, step: float32 [S, 3], position of token (t, h, w) of a span = origin + step * (t, h, w).
        max_seqlen: tokens of the longest sample.
        spans: the same on the host, a tuple of `Span`s for each sample.
    """

    cu_seqlens: Tensor
    cu_spans: Tensor
    cu_frames: Tensor
    grid: Tensor
    origin: Tensor
    step: Tensor
    _constants = ("spans", "seqlens", "num_tokens", "max_seqlen")
    _tensors = ("cu_seqlens", "cu_spans", "cu_frames", "grid", "origin", "step")

    def __init__(self, spans: Iterable[Iterable[Span]], device: torch.device | str | None = None) -> None:
        self.spans: tuple[tuple[Span, ...], ...] = _check_spans("PackedLayout", spans)
        flat = [span for sample in self.spans for span in sample]
        seqlens = [sum(span.num_tokens for span in sample) for sample in self.spans]
        self.seqlens: tuple[int, ...] = tuple(seqlens)
        self.num_tokens = sum(seqlens)
        self.max_seqlen = max(seqlens) if seqlens else 0  # torch.compile takes no default
        _check_tokens("PackedLayout", "spans", self.num_tokens)
        sizes = [n for span in flat for n in span.grid]
        # Each a tensor of its own, not rows of another: Triton compiles anew for other alignments.
        positions = [x for span in flat for x in span.origin], [x for span in flat for x in span.step]
        if torch.compiler.is_compiling():
            tables = torch.ops.sora_kernels.layout_tables.default(seqlens, sizes)
            self.origin, self.step = (torch.tensor(x, dtype=torch.float32, device="cpu").reshape(-1, 3) for x in positions)
        else:
            tables = _tables(seqlens, sizes)
            self.origin, self.step = (_rows(x, np.float32) for x in positions)
        self.cu_seqlens, self.cu_spans, self.cu_frames, self.grid = tables
        if device is not None:
            self._move(check_device("PackedLayout", "device", device))

    @classmethod
    def from_grids(cls, grids: Iterable[Sequence[int]], device: torch.device | str | None = None) -> PackedLayout:
        """One sample per (T, H, W) grid, positions counted from zero."""
        op = "PackedLayout.from_grids"
        listed = check_list(op, "grids", "a list of (T, H, W)", grids)
        sizes = [triple(op, f"grids[{i}]", grid, int) for i, grid in enumerate(listed)]
        samples = [[Span((t, h, w))] for t, h, w in sizes]
        _check_tokens(op, "grids", sum([t * h * w for t, h, w in sizes]))
        return cls(samples, None if device is None else check_device(op, "device", device))

    @classmethod
    def from_spans(cls, spans: Iterable[Iterable[Span]], device: torch.device | str | None = None) -> PackedLayout:
        """One sample per inner list of spans."""
        op = "PackedLayout.from_spans"
        samples = _check_spans(op, spans)
        _check_tokens(op, "spans", sum([span.num_tokens for sample in samples for span in sample]))
        return cls(samples, None if device is None else check_device(op, "device", device))

    @classmethod
    def concat(cls, layouts: Sequence[PackedLayout]) -> PackedLayout:
        """The samples of several layouts, one after the other, on the first one's device."""
        layouts = check_list("PackedLayout.concat", "layouts", "a list of layouts", layouts)
        if not layouts:
            fail("PackedLayout.concat", "layouts", "at least one layout", "none")
        for layout in layouts:
            if not isinstance(layout, PackedLayout):
                fail("PackedLayout.concat", "layouts", "PackedLayouts", type(layout).__name__, TypeError)
        _check_tokens("PackedLayout.concat", "layouts", sum([layout.num_tokens for layout in layouts]))
        return cls(itertools.chain.from_iterable(layout.spans for layout in layouts), layouts[0].device)

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.spans)

    @property
    def num_spans(self) -> int:
        """S, of all samples."""
        return self.grid.shape[0]

    @property
    def num_frames(self) -> int:
        """F, the latent frames of all spans."""
        return self.cu_frames.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.cu_seqlens.device

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on `device`."""
        moved = object.__new__(PackedLayout)
        for name in (*self._constants, *self._tensors):  # not of __dict__, which torch.compile of torch 2.11 cannot read
            setattr(moved, name, getattr(self, name))
        moved._move(check_device("PackedLayout.to", "device", device))
        return moved

    def _move(self, device: torch.device) -> None:
        for name in self._tensors:
            setattr(self, name, getattr(self, name).to(device, non_blocking=device.type != "cpu"))

    def select(self, samples: Sequence[int]) -> PackedLayout:
        """The layout of some samples, in the order given; an index may be negative or repeated."""
        wanted = check_list("PackedLayout.select", "samples", "a list of indices", samples)
        indices = [check_int("PackedLayout.select", "samples", index) for index in wanted]
        for index in indices:
            if not -self.num_samples <= index < self.num_samples:
                fail("PackedLayout.select", "samples", f"indices of {self.num_samples} samples", str(index), IndexError)
        return PackedLayout([self.spans[index] for index in indices], self.device)

    def pack(self, samples: Sequence[Tensor]) -> Tensor:
        """Lays samples [n_i, ...] end to end -> [N, ...]."""
        samples = check_list("PackedLayout.pack", "samples", "a list of tensors", samples)
        if not samples:
            fail("PackedLayout.pack", "samples", "at least one sample", "none")
        for i, sample in enumerate(samples):
            name, first = f"samples[{i}]", samples[0]
            check_tensor("PackedLayout.pack", name, sample, dtype=None)
            if sample.ndim < 1:
                fail("PackedLayout.pack", name, "at least one axis", "none")
            check_tensor("PackedLayout.pack", name, sample, ("n", *first.shape[1:]), dtype=first.dtype, like=first)
        lengths = tuple(sample.shape[0] for sample in samples)
        if lengths != self.seqlens:
            fail("PackedLayout.pack", "samples", f"lengths {list(self.seqlens)}", str(list(lengths)))
        return torch.cat(samples)

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        """Cuts [N, ...] into one view [n_i, ...] per sample; tokens past the last boundary are left out."""
        check_tensor("PackedLayout.unpack", "tokens", tokens, dtype=None)
        if tokens.ndim < 1 or tokens.shape[0] < self.num_tokens:
            fail("PackedLayout.unpack", "tokens", f"at least {self.num_tokens} rows", f"shape {tuple(tokens.shape)}")
        return list(tokens[: self.num_tokens].split(list(self.seqlens)))

    def positions(self) -> Tensor:
        """Position of every token along T, H and W: float32 [N, 3]."""
        device = self.device
        lengths = self.cu_spans.diff()
        span = torch.repeat_interleave(torch.arange(self.num_spans, device=device), lengths, output_size=self.num_tokens)
        index = torch.arange(self.num_tokens, device=device) - self.cu_spans[:-1][span]
        _, h, w = self.grid[span].unbind(1)
        thw = torch.stack([index // (h * w), index // w % h, index % w], dim=1)
        return self.origin[span] + self.step[span] * thw

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedLayout) and self.spans == other.spans

    def __hash__(self) -> int:
        return hash(self.spans)

    def __repr__(self) -> str:
        shown = [" + ".join(_describe(span) for span in sample) or "empty" for sample in self.spans[:8]]
        if self.num_samples > 8:
            shown.append(f"... {self.num_samples - 8} more")
        return (
            f"PackedLayout({self.num_samples} samples, {self.num_tokens} tokens, longest {self.max_seqlen}, "
            f"{self.device}: {', '.join(shown)})"
        )


def _check_tokens(op: str, argument: str, num_tokens: int) -> None:
    """Boundaries are int32."""
    if num_tokens > _MOST:
        fail(op, argument, "fewer than 2**31 tokens", str(num_tokens))


def _check_spans(op: str, spans: Iterable[Iterable[Span]]) -> tuple[tuple[Span, ...], ...]:
    expected = "a list of Spans for each sample"
    samples = tuple(tuple(check_list(op, "spans", expected, sample)) for sample in check_list(op, "spans", expected, spans))
    for span in itertools.chain.from_iterable(samples):
        if not isinstance(span, Span):
            fail(op, "spans", "Span objects", type(span).__name__, TypeError)
    return samples


def _tables(seqlens: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cu_seqlens, cu_spans, cu_frames and grid, of the samples' lengths and of three sizes for each span."""
    areas = [h * w for h, w in zip(sizes[1::3], sizes[2::3], strict=True)]
    frames = [t if area else 0 for t, area in zip(sizes[::3], areas, strict=True)]
    cu_frames = np.zeros(sum(frames) + 1, np.int32)  # these may be many: in NumPy
    np.array(areas, np.int64).repeat(frames).cumsum(out=cu_frames[1:])
    cu_spans = _boundaries(t * area for t, area in zip(frames, areas, strict=True))
    return _boundaries(seqlens), cu_spans, torch.from_numpy(cu_frames), _rows(sizes, np.int32)


def _boundaries(lengths: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.array([0, *itertools.accumulate(lengths)], np.int32))


def _rows(numbers: Sequence[float], dtype: type) -> Tensor:
    """Three for each span."""
    return torch.from_numpy(np.array(numbers, dtype).reshape(-1, 3))


def _fake_tables(seqlens: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spans = len(sizes) // 3
    frames = sum(t if t * h * w else 0 for t, h, w in zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
    boundaries = (torch.empty(n + 1, dtype=torch.int32, device="cpu") for n in (len(seqlens), spans, frames))
    return *boundaries, torch.empty(spans, 3, dtype=torch.int32, device="cpu")  # type: ignore[return-value]


# Opaque to torch.compile, so that sizes that change are numbers of its graph and not of its code.
define("layout_tables(SymInt[] seqlens, SymInt[] sizes) -> (Tensor, Tensor, Tensor, Tensor)", _tables, _fake_tables)


def _describe(span: Span) -> str:
    if span.is_text:
        return f"{span.num_tokens} at {_short(span.origin)}" if any(span.origin) else f"text {span.num_tokens}"
    text = "x".join(str(n) for n in span.grid)
    if any(span.origin):
        text += f" from {_short(span.origin)}"
    if span.step != (1.0, 1.0, 1.0):
        text += f" step {_short(span.step)}"
    return text


def _short(position: Position) -> str:
    return "(" + ", ".join(f"{x:g}" for x in position) + ")"
