"""Attention by blocks, against the mask of tokens written out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contract import PackedContract
from test_attention import plain_sample
from tolerance import Case, Target, assert_bit_equal, assert_zero, check_accuracy, check_rejected, check_threads, error, run
from torch import Tensor

from sora_kernels import BlockMask, PackedLayout, Span, TokenBlocks, backends, block_sparse_attention
from sora_kernels.reference import block_sparse_attention as reference

FUNCTION = "block_sparse_attention_forward"
SPANS = [[Span((2, 5, 6))], [Span.text(7), Span((1, 5, 8))], [], [Span((2, 2, 2)), Span.text(2)]]
BLOCKS = {
    "runs": lambda layout: TokenBlocks.runs(layout, 16),
    "tiles": lambda layout: TokenBlocks.tiles(layout, (2, 4, 3)),
    "uneven": lambda layout: TokenBlocks.runs(layout, 90),  # more tokens than the kernels' blocks have, and no multiple of any
}


def random_tables(
    blocks: TokenBlocks, heads: int, seed: int = 0, kept: float = 0.4, keys: TokenBlocks | None = None
) -> list[Tensor]:
    """For each sample bool [heads, R, C], of which some rows are empty."""
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(blocks.num_blocks, (keys or blocks).num_blocks, strict=True)
    return [(torch.rand(heads, r, c, generator=generator) < kept).to(blocks.device) for r, c in sizes]


def token_mask(tables: list[Tensor], queries: TokenBlocks, keys: TokenBlocks) -> Tensor:
    """bool [heads, tokens, tokens]: who sees whom, from the tables and the sizes of the blocks."""
    heads = max((len(table) for table in tables), default=1)
    blocks = torch.stack([torch.block_diag(*(table[h].int() for table in tables)) for h in range(heads)]).bool()
    rows, columns = (torch.repeat_interleave(b.cu_blocks.cpu().diff()) for b in (queries, keys))
    return blocks.cpu()[:, rows][:, :, columns]


@pytest.mark.parametrize(("kind", "heads"), [("runs", 4), ("tiles", 1), ("uneven", 4)])
def test_block_sparse(target: Target, kind: str, heads: int) -> None:
    """Blocks of several kinds, of one mask for all heads and of one for each, with NaNs past the last token."""
    layout = PackedLayout.from_spans(SPANS, target.device)
    n, slack, d = layout.num_tokens, 4, 24
    blocks = BLOCKS[kind](layout)
    tables = random_tables(blocks, heads)
    mask = BlockMask.from_dense(tables, blocks)
    visible = token_mask(tables, blocks, blocks).to(target.device)
    inputs = {name: target.randn(n + slack, h, d) for name, h in (("q", 4), ("k", 2), ("v", 2))}
    for x in inputs.values():
        x[n:] = torch.nan

    def op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = plain_sample(q[:n], k[:n], v[:n], visible)
        pad = torch.nn.functional.pad
        return pad(out, (0, 0, 0, 0, 0, slack)), pad(lse.masked_fill(lse.isinf(), 0), (0, slack))

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        tables = blocks.cu_blocks, blocks.cu_blocks, blocks.cu_samples, blocks.cu_samples, *mask.lists
        out, lse, _ = reference.block_sparse_attention(q, k, v, *tables, d**-0.5)
        return out, lse.masked_fill(lse.isinf(), 0)

    (out, _), gradients = check_accuracy(op, plain, exact, inputs)
    assert_zero(*(x[n:] for x in (out, *gradients)))


def test_cross_attention(target: Target) -> None:
    """Queries and keys of different layouts, one sample without keys; a negative scale."""
    queries = TokenBlocks.runs(PackedLayout.from_grids([(2, 5, 5), (1, 4, 6), (1, 1, 0), (1, 3, 3)], target.device), 8)
    keys = TokenBlocks.runs(PackedLayout.from_grids([(1, 1, 9), (1, 1, 0), (1, 1, 7), (3, 6, 4)], target.device), 20)
    tables = random_tables(queries, 2, kept=0.6, keys=keys)
    mask = BlockMask.from_dense(tables, queries, keys)
    visible = token_mask(tables, queries, keys).to(target.device)
    q, k, v = target.randn(83, 2, 16), target.randn(88, 2, 16), target.randn(88, 2, 16)
    actual = run(lambda q, k, v: block_sparse_attention(q, k, v, mask, softmax_scale=-0.3), (q, k, v))
    exact = run(lambda q, k, v: plain_sample(q * (-0.3 * 4), k, v, visible)[0], [x.double() for x in (q, k, v)])
    bound = {8: 1e-12, 4: 3e-6, 2: 3e-2}[target.dtype.itemsize]
    for got, right in zip(actual[0] + actual[1], exact[0] + exact[1], strict=True):
        assert error(got, right) < bound * right.abs().max()


# (grid, tokens of a block, head dim, kept): more than one stack of panels; blocks of more tokens than a stack has panels for, or
# than become operands at once; and more operands than there are at once.
LONG = {
    "stacks": ((1, 60, 60), 64, 64, 0.3),
    "large": ((1, 64, 70), 2300, 128, 0.7),
    "wide": ((1, 30, 40), 300, 256, 0.5),
    "small": ((1, 30, 30), 6, 64, 0.2),
    "odd": ((1, 40, 41), 33, 40, 0.4),
    "single": ((1, 12, 12), 1, 16, 0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LONG)
def test_long(case: str, dtype: torch.dtype) -> None:
    grid, size, d, kept = LONG[case]
    target = Target("cpu", "cpu", dtype)
    blocks = TokenBlocks.runs(PackedLayout.from_grids([grid]), size)
    tables = random_tables(blocks, 2, kept=kept)
    mask, visible = BlockMask.from_dense(tables, blocks), token_mask(tables, blocks, blocks)
    inputs = [target.randn(blocks.layout.num_tokens, h, d) for h in (2, 1, 1)]
    actual = check_threads(lambda q, k, v: block_sparse_attention(q, k, v, mask), inputs, counts=(1, 3))
    exact = run(lambda q, k, v: plain_sample(q, k, v, visible)[0], [x.double() for x in inputs])
    for got, right in zip(actual[0] + actual[1], exact[0] + exact[1], strict=True):
        assert error(got, right) < (4e-6 if dtype == torch.float32 else 2e-2) * right.abs().max()


def test_sees_everything() -> None:
    """With all blocks it is attention, and a NaN in a block that nobody sees is harmless."""
    layout = PackedLayout.from_grids([(2, 8, 8), (1, 10, 10)])
    blocks = TokenBlocks.runs(layout, 32)
    q, k, v = torch.randn(3, layout.num_tokens, 2, 32)
    tables = [torch.ones(n, n, dtype=torch.bool) for n in blocks.num_blocks]
    whole = block_sparse_attention(q, k, v, BlockMask.from_dense(tables, blocks))
    visible = torch.block_diag(*(torch.ones(n, n) for n in layout.seqlens)).bool()
    torch.testing.assert_close(whole, plain_sample(q, k, v, visible)[0], rtol=1e-5, atol=1e-5)
    tables[0][:, 1] = False
    mask = BlockMask.from_dense(tables, blocks)
    expected = block_sparse_attention(q, k, v, mask)
    k[32:64] = v[32:64] = torch.nan
    assert_bit_equal([block_sparse_attention(q, k, v, mask)], [expected])


def test_leftovers_do_not_matter(target: Target) -> None:
    """What a call of NaNs leaves in the kernels' scratch memory changes no bit of the next call."""
    make = case(target)
    expected = run(make, make.arguments)
    blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 20, 20)], target.device), 90)
    mask = BlockMask.from_dense(random_tables(blocks, 2), blocks)
    run(partial(masked, mask), [target.randn(400, h, 24).fill_(torch.nan) for h in (2, 1, 1)])
    actual = run(make, make.arguments)
    assert_bit_equal(actual[0] + actual[1], expected[0] + expected[1])


def masked(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return block_sparse_attention(q, k, v, mask)


def case(target: Target) -> Case:
    layout = PackedLayout.from_spans(SPANS, target.device)
    blocks = BLOCKS["tiles"](layout)
    tables = random_tables(blocks, 2)
    inputs = [layout.unpack(target.randn(layout.num_tokens, h, 24)) for h in (2, 1, 1)]
    parts = []
    for b, sample in enumerate(zip(*inputs, strict=True)):
        alone = BLOCKS["tiles"](layout.select([b]))
        parts.append((BlockMask.from_dense([tables[b]], alone), list(sample)))
    operators = {"block_sparse_attention_forward", "block_sparse_attention_backward"}
    return Case.of_samples(masked, BlockMask.from_dense(tables, blocks), parts, operators)


OPS = {"block_sparse": case}


def test_masks_are_made_in_the_graph() -> None:
    """A mask that a model makes as it runs, and its blocks: one graph, and the bits of the eager run."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 16, 16), (1, 8, 8)]), 32)
        means = [torch.stack([x.mean(0) for x in sample.split(32)], 1) for sample in blocks.layout.unpack(q)]
        best = [torch.topk(m @ m.mT, min(2, m.shape[1])).indices for m in means]
        return block_sparse_attention(q, k, v, BlockMask.from_indices(best, blocks))

    inputs = [torch.randn(320, 2, 16) for _ in range(3)]
    torch.compiler.reset()
    actual, expected = run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs), run(model, inputs)
    assert_bit_equal(actual[0] + actual[1], expected[0] + expected[1])


def test_wrong_lists(target32: Target) -> None:
    """Wrong numbers are errors on the CPU; elsewhere they are clamped, and touch nothing outside."""
    blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 4, 8), (1, 4, 8)], target32.device), 16)
    mask = BlockMask.from_dense([torch.ones(2, 2, dtype=torch.bool, device=target32.device)] * 2, blocks)
    q = target32.randn(64, 1, 16)
    block_sparse_attention(q, q, q, mask)
    wrongs = {"indices": [([0, 9], "got 9"), ([1, 0], "got 0"), ([-1, 1], "got -1"), ([0, 2], "got 2")]}
    wrongs["offsets"] = [([0, 2, 1], "entries that never fall"), ([0, 2, 99], "a last entry of at most 8")]
    for name, cases in wrongs.items():
        for numbers, message in cases:
            lists = mask.lists._asdict()
            lists[name] = lists[name].clone()
            lists[name][: len(numbers)] = torch.tensor(numbers)
            if name == "offsets":
                lists[name][len(numbers) :] = numbers[-1]
            bad = BlockMask(blocks, blocks, 1, type(mask.lists)(**lists))
            if backends.forced_backend() == "cpu":
                with pytest.raises(ValueError, match=rf"block_sparse_attention_forward: {name}: expected .*{message}"):
                    block_sparse_attention(q, q, q, bad)
            elif backends.forced_backend() == "triton":
                assert block_sparse_attention(q, q, q, bad).isfinite().all()


P = torch.zeros(12, 4, 8)
GRIDS = PackedLayout.from_grids([(1, 2, 3), (1, 2, 3)])
GOOD = {"q": P, "k": P, "v": P, "mask": BlockMask.from_dense([torch.ones(1, 1, dtype=torch.bool)] * 2, TokenBlocks.runs(GRIDS))}
BAD = [
    ({"mask": P}, "mask: expected a BlockMask, got Tensor"),
    ({"q": P[1:]}, "q: expected at least the 12 tokens of the mask, got 11"),
    ({"k": P[1:], "v": P[1:]}, "k: expected at least the 12 tokens of the mask, got 11"),
    ({"k": P[..., 1:]}, "k: expected shape [Nk, Hk, 8], got [12, 4, 7]"),
    (
        {"mask": BlockMask.from_dense([torch.ones(3, 1, 1).bool()] * 2, TokenBlocks.runs(GRIDS))},
        "mask: expected 1 or 4 heads, got 3",
    ),
    ({"softmax_scale": "1"}, "softmax_scale: expected a number, got '1'"),
    ({"return_lse": 2}, "return_lse: expected a bool, got 2"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input(wrong: dict, message: str) -> None:
    check_rejected(block_sparse_attention, {**GOOD, **wrong}, f"block_sparse_attention: {message}")


class TestContract(PackedContract):
    """What every op is held to, for each of OPS."""
