"""PackedLayout: boundaries, positions, packing, and its complaints."""

import pytest
import torch

from sora_kernels.layout import PackedLayout, Span


@pytest.fixture
def layout():
    return PackedLayout.from_spans(
        [[Span.text(3), Span((2, 2, 3), origin=(4, 0, -1), step=(1, 0.5, 2))], [], [Span((1, 1, 4)), Span((0, 5, 5))]]
    )


def test_boundaries(layout):
    assert layout.cu_seqlens.tolist() == [0, 15, 15, 19]
    assert layout.cu_spans.tolist() == [0, 3, 15, 19, 19]
    assert layout.cu_frames.tolist() == [0, 3, 9, 15, 19]
    assert layout.grid.tolist() == [[1, 1, 3], [2, 2, 3], [1, 1, 4], [0, 5, 5]]
    assert (layout.num_samples, layout.num_spans, layout.num_frames, layout.num_tokens, layout.max_seqlen) == (3, 4, 4, 19, 15)
    for name in ("cu_seqlens", "cu_spans", "cu_frames", "grid"):
        assert getattr(layout, name).dtype == torch.int32
    for name in ("origin", "step"):
        assert getattr(layout, name).dtype == torch.float32


def test_spans_without_tokens_cost_nothing():
    """Whatever their other sides: no frames, and no tables for them."""
    layout = PackedLayout.from_grids([(2**31 - 1, 0, 0), (2, 1, 2), (2**31 - 1, 0, 2**31 - 1)])
    assert layout.cu_frames.tolist() == [0, 2, 4]
    assert layout.cu_seqlens.tolist() == [0, 0, 4, 4]
    assert [sample[0].num_frames for sample in layout.spans] == [0, 2, 0]
    assert layout.positions().tolist() == [[t, 0, w] for t in range(2) for w in range(2)]


def test_positions_follow_origin_and_step(layout):
    expected = [(0.0, 0.0, 0.0)] * 3
    expected += [(4.0 + t, 0.5 * h, -1.0 + 2 * w) for t in range(2) for h in range(2) for w in range(3)]
    expected += [(0.0, 0.0, float(w)) for w in range(4)]
    assert [tuple(row) for row in layout.positions().tolist()] == expected


def test_pack_and_unpack_are_inverse(layout):
    samples = [torch.randn(n, 5) for n in (15, 0, 4)]
    tokens = layout.pack(samples)
    assert all(torch.equal(a, b) for a, b in zip(samples, layout.unpack(tokens), strict=True))
    with_slack = torch.cat([tokens, torch.full((2, 5), torch.nan)])
    views = layout.unpack(with_slack)
    assert [len(view) for view in views] == [15, 0, 4]
    assert views[2].data_ptr() == with_slack[15:].data_ptr(), "unpack must not copy"


def test_select_and_concat_keep_the_samples(layout):
    assert layout.select([2, 0]) == PackedLayout.from_spans([layout.spans[2], layout.spans[0]])
    assert layout.select([-1, -1]).cu_seqlens.tolist() == [0, 4, 8]
    assert PackedLayout.concat([layout.select([0]), layout.select([1, 2])]) == layout
    assert PackedLayout.concat([layout, layout.select([0])]) != layout
    assert len({layout, layout.select([0, 1, 2])}) == 1, "equal layouts hash alike"


def test_no_samples():
    empty = PackedLayout.from_grids([])
    assert empty.cu_seqlens.tolist() == [0]
    assert empty.positions().shape == (0, 3)
    assert (empty.max_seqlen, empty.num_tokens, empty.unpack(torch.empty(0, 2))) == (0, 0, [])


def test_to_moves_every_tensor_and_nothing_is_read_back(layout):
    assert vars(layout.to("cpu")).keys() == vars(layout).keys()
    moved = layout.to("meta")  # reading a value of a meta tensor raises
    assert all(
        getattr(moved, name).device.type == "meta" for name in ("cu_seqlens", "cu_spans", "cu_frames", "grid", "origin", "step")
    )
    assert layout.device.type == "cpu"
    assert moved.num_tokens == 19
    assert moved.positions().shape == (19, 3)
    assert [part.shape for part in moved.unpack(torch.empty(20, 2, device="meta"))] == [(15, 2), (0, 2), (4, 2)]
    assert moved.select([0]).device.type == "meta"


def test_repr_is_readable(layout):
    expected = (
        "PackedLayout(3 samples, 19 tokens, longest 15, cpu: text 3 + 2x2x3 from (4, 0, -1) step (1, 0.5, 2), empty, 1x1x4 + 0x5x5)"
    )
    assert repr(layout) == expected
    assert repr(PackedLayout.from_grids([(1, 1, 1)] * 10)).endswith("1x1x1, ... 2 more)")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Span((1, 2)), ValueError, r"Span: grid: expected three ints \(T, H, W\), got \(1, 2\)"),
        (lambda: Span((1, 2, 2.5)), ValueError, r"Span: grid: expected three ints .* got \(1, 2, 2.5\)"),
        (lambda: Span((True, 1, 1)), ValueError, r"Span: grid: expected three ints .* got \(True, 1, 1\)"),
        (lambda: Span((2**31, 0, 0)), ValueError, r"Span: grid: expected sizes below 2\*\*31, got \(2147483648, 0, 0\)"),
        (lambda: Span((1, 1, 1), origin=(1e39, 0, 0)), ValueError, "Span: origin: expected numbers that float32 has"),
        (lambda: Span((1, 1, 1), step=(0, -1e39, 0)), ValueError, "Span: step: expected numbers that float32 has"),
        (lambda: Span((1, 1, 1), origin=(0, float("inf"), 0)), ValueError, "Span: origin: expected three floats"),
        (lambda: Span((1, -2, 2)), ValueError, r"Span: grid: expected sizes >= 0, got \(1, -2, 2\)"),
        (lambda: Span((1, 1, 1), origin="abc"), ValueError, "Span: origin: expected three floats"),
        (lambda: Span((1, 1, 1), step=(1, float("nan"), 1)), ValueError, "Span: step: expected three floats"),
        (lambda: PackedLayout([Span((1, 1, 1))]), TypeError, "PackedLayout: spans: expected a list of Spans for each sample, got"),
        (lambda: PackedLayout.from_grids(5), TypeError, r"PackedLayout.from_grids: grids: expected a list of \(T, H, W\), got 5"),
        (
            lambda: PackedLayout.from_grids([5]),
            ValueError,
            r"PackedLayout.from_grids: grids\[0\]: expected three ints \(T, H, W\), got 5",
        ),
        (lambda: PackedLayout.concat([1]), TypeError, "PackedLayout.concat: layouts: expected PackedLayouts, got int"),
        (
            lambda: PackedLayout.from_grids([(1, 1, 2)]).select([0.0]),
            TypeError,
            "PackedLayout.select: samples: expected an int, got 0.0",
        ),
        (
            lambda: PackedLayout.from_grids([(1, 1, 2)]).pack([2]),
            TypeError,
            r"PackedLayout.pack: samples\[0\]: expected a torch.Tensor",
        ),
        (
            lambda: PackedLayout.from_grids([(1, 1, 2)]).unpack([2]),
            TypeError,
            "PackedLayout.unpack: tokens: expected a torch.Tensor",
        ),
        (
            lambda: PackedLayout.from_spans([[(1, 2, 3)]]),
            TypeError,
            "PackedLayout.from_spans: spans: expected Span objects, got tuple",
        ),
        (lambda: PackedLayout.from_grids([(-(2**16), -(2**16), 1)]), ValueError, "Span: grid: expected sizes >= 0, got"),
        (lambda: PackedLayout.from_grids([(2**15, 2**15, 2)]), ValueError, r"fewer than 2\*\*31 tokens, got 2147483648"),
        (lambda: PackedLayout.concat([]), ValueError, "PackedLayout.concat: layouts: expected at least one layout, got none"),
        (lambda: PackedLayout.concat(1), TypeError, "PackedLayout.concat: layouts: expected a list of layouts, got 1"),
        (
            lambda: PackedLayout.from_grids([]).select(1),
            TypeError,
            "PackedLayout.select: samples: expected a list of indices, got 1",
        ),
        (lambda: PackedLayout.from_grids([]).pack(3), TypeError, "PackedLayout.pack: samples: expected a list of tensors, got 3"),
        (lambda: PackedLayout.from_grids([]).pack([]), ValueError, "PackedLayout.pack: samples: expected at least one sample"),
        (
            lambda: PackedLayout.from_grids([(1, 1, 1)] * 2).pack([torch.zeros(1, 3), torch.zeros(1, 4)]),
            ValueError,
            r"PackedLayout.pack: samples\[1\]: expected shape \[n, 3\], got \[1, 4\]",
        ),
        (
            lambda: PackedLayout.from_grids([]).to(torch.float32),
            TypeError,
            "PackedLayout.to: device: expected a device, got torch.float32",
        ),
        (lambda: PackedLayout.from_grids([]).to("cup"), ValueError, "PackedLayout.to: device: expected a device, got 'cup'"),
        (lambda: PackedLayout.from_grids([]).to(2**70), ValueError, f"PackedLayout.to: device: expected a device, got {2**70}"),
        (lambda: PackedLayout.from_grids([(1, 1, 2)]).select([1]), IndexError, "PackedLayout.select: samples: .* got 1"),
        (lambda: PackedLayout.from_grids([(1, 1, 2)]).pack([torch.zeros(3)]), ValueError, r"expected lengths \[2\], got \[3\]"),
        (lambda: PackedLayout.from_grids([(1, 1, 2)]).unpack(torch.zeros(1)), ValueError, "expected at least 2 rows, got shape"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
