"""Packing by token budget: full batches, mixed sizes, every sample once, and the same batches after resuming."""

from collections import Counter
from itertools import islice

import pytest
import torch

from sora_model.data import MediaError, PackedSampler, Repeated, Sample
from sora_model.data.budget import Wording
from sora_model.data.sampler import _fill
from sora_model.world.config import WorldConfig
from sora_model.world.source import WorldSource
from sora_model.world.world import World

# Tokens at patch (1, 2, 2): 2048, 1920, 1920, 640, 256, 1024
MIXED = [(8, 32, 32), (8, 24, 40), (8, 40, 24), (4, 20, 32), (1, 32, 32), (16, 16, 16)]


class Sizes:
    """A source of blank clips of given sizes; those in `broken` cannot be decoded."""

    def __init__(self, sizes, broken=()):
        self.sizes, self.broken, self.loaded = sizes, set(broken), 0

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def load(self, index, epoch=0):
        if index in self.broken:
            raise MediaError(f"cannot read clip {index}: it is broken")
        self.loaded += 1
        return Sample(torch.zeros(3, *self.sizes[index]), f"clip {index}")


def world_source(**options) -> WorldSource:
    return WorldSource(World(WorldConfig.simple()), MIXED, **options)


def sizes_of(batch):
    return [tuple(video.shape[1:]) for video in batch.videos]


@pytest.mark.parametrize("budget", [2048, 4096, 6000, 9999, 20_000])
@pytest.mark.parametrize("finite", [True, False])
def test_batches_are_full_and_within_the_budget(budget, finite):
    sampler = PackedSampler(Sizes(MIXED * 30) if finite else world_source(), (1, 2, 2), budget)
    fill = []
    for batch in islice(sampler.stream(), 60):
        assert batch.tokens == sum(t * h * w // 4 for t, h, w in sizes_of(batch)) <= budget
        assert len(batch.videos) == len(batch.captions) == len(batch.indices)
        fill.append(batch.tokens / budget)
    assert min(fill) >= 0.9, min(fill)
    assert sum(fill) / len(fill) >= 0.96


def test_awkward_sizes_still_fill():
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(3, 30, (500, 3), generator=generator).tolist()
    sampler = PackedSampler(Sizes([tuple(s) for s in sides]), (1, 1, 1), 40_000)
    assert min(sampler.batch(step).tokens for step in range(60)) >= 0.95 * 40_000


def test_every_sample_is_used_once_per_epoch():
    sampler = PackedSampler(Sizes(MIXED * 50), (1, 2, 2), 5000)
    used = Counter()
    for batch in sampler.stream():
        used.update(batch.indices)
        if used.total() <= 300 - sampler.lookahead:
            assert max(used.values()) == 1
        if used.total() >= 10 * 300:
            break
    assert set(used) == set(range(300))
    assert min(used.values()) >= 9
    assert max(used.values()) <= 11


def test_each_epoch_has_its_own_order():
    sampler = PackedSampler(Sizes([(1, 8, 8)] * 20), (1, 2, 2), 16, lookahead=1)
    order = [sampler.batch(step).indices[0] for step in range(40)]
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:]


@pytest.mark.parametrize("step", [0, 7, 23])
@pytest.mark.parametrize("finite", [True, False])
def test_resuming_gives_the_same_batches(step, finite):
    def stream(start):
        return PackedSampler(Sizes(MIXED * 9) if finite else world_source(), (1, 2, 2), 4096).stream(start)

    for a, b in zip(islice(stream(0), step, 30), islice(stream(step), 30 - step), strict=True):
        assert a.indices == b.indices
        assert a.captions == b.captions
        assert all(torch.equal(u, v) for u, v in zip(a.videos, b.videos, strict=True))


@pytest.mark.parametrize("source", [Sizes(MIXED * 9), world_source()])
def test_batches_depend_on_seed_and_step_not_on_the_order_of_asking(source):
    sampler = PackedSampler(source, (1, 2, 2), 4096)
    forward = [sampler.batch(step).indices for step in range(10)]
    assert [sampler.batch(step).indices for step in reversed(range(10))] == forward[::-1]
    other = PackedSampler(source, (1, 2, 2), 4096, seed=1)
    assert other.batch(0).indices != forward[0]


def test_skipping_ahead_decodes_nothing():
    source = Sizes(MIXED * 50)
    batch = PackedSampler(source, (1, 2, 2), 5000).batch(500)
    assert source.loaded == len(batch.videos)


@pytest.mark.parametrize("weights", [None, [3, 2, 2, 1, 1, 1], [100, 1, 100, 1, 100, 1]])
@pytest.mark.parametrize("budget", [4096, 6400, 16_384])
def test_every_batch_holds_the_sizes_asked_for(weights, budget):
    sampler = PackedSampler(world_source(weights=weights), (1, 2, 2), budget, min_sizes=4)
    for batch in islice(sampler.stream(), 40):
        assert len(set(sizes_of(batch))) >= 4
        assert 0.9 * budget <= batch.tokens <= budget


def test_sizes_asked_for_but_not_there():
    source = WorldSource(World(), [(1, 8, 8), (2, 8, 8)])
    with pytest.raises(ValueError, match=r"min_sizes = 3 different sizes .*\(2, 8, 8\): 32"):
        PackedSampler(source, (1, 2, 2), 400, min_sizes=3).batch(0)
    with pytest.raises(ValueError, match=r"min_sizes = 4 different sizes within tokens_per_batch = 3000; .*16, 16, 16.: 1024"):
        PackedSampler(world_source(), (1, 2, 2), 3000, min_sizes=4).batch(0)
    with pytest.raises(ValueError, match="min_sizes = 2 needs an endless source, but source has 6"):
        PackedSampler(Sizes(MIXED), (1, 2, 2), 3000, min_sizes=2)


def test_sample_too_large_for_the_budget_is_left_out_and_named(caplog):
    """Before anything is decoded, wherever it stands; the others are used as ever."""
    sampler = PackedSampler(Sizes([(1, 32, 32), (8, 32, 32), (1, 16, 32)]), (1, 2, 2), 2047)
    assert [record.getMessage() for record in caplog.records] == [
        "left out: sample 1 of size (T, H, W) = (8, 32, 32) is 2048 tokens at patch_size (1, 2, 2), more than "
        "tokens_per_batch = 2047; it takes a larger budget, or smaller or shorter samples"
    ]
    assert sampler.usable == [0, 2]
    assert {index for step in range(9) for index in sampler.batch(step).indices} == {0, 2}
    with pytest.raises(
        ValueError, match=r"none of the source's 2 samples fits: sample 1 of size .*\(8, 32, 32\) is 2048 tokens .*; it"
    ):
        PackedSampler(Sizes([(1, 64, 66), (8, 32, 32)]), (1, 2, 2), 1023)


def test_samples_that_change_do_not_end_the_training(caplog):
    """Found out only when they are loaded: one is now too large, one cannot be cut into patches, one is smaller."""
    source, then = Sizes([(1, 8, 8)] * 5), [(1, 8, 8), (1, 32, 32), (1, 8, 7), (1, 4, 4), (1, 8, 8)]
    source.load = lambda index, epoch: Sample(torch.zeros(3, *then[index]), "")
    sampler = PackedSampler(source, (1, 2, 2), 32)
    for step in range(12):
        batch = sampler.batch(step)
        assert batch.tokens == sum(t * h * w // 4 for t, h, w in sizes_of(batch))
        assert not {1, 2} & set(batch.indices)
    assert sorted(record.getMessage()[:39] for record in caplog.records) == [
        "left out of its batch: sample 1 of size",
        "left out of its batch: sample 2 of size",
    ]


def test_a_folder_that_goes_away_ends_the_training_with_one_error():
    """However many files it had: no limit of Python's is met first."""
    with pytest.raises(ValueError, match="none of the source's samples can be decoded"):
        PackedSampler(Sizes([(1, 8, 8)] * 3000, broken=range(3000)), (1, 2, 2), 16).batch(0)


def test_size_that_patches_do_not_divide():
    with pytest.raises(ValueError, match=r"\(8, 33, 32\) does not divide by patch_size \(1, 2, 2\)"):
        PackedSampler(Sizes([(8, 33, 32)]), (1, 2, 2), 4096).batch(0)


def test_latent_sizes_count_tokens():
    def latent(size):
        return (size[0] - 1) // 4 + 1, size[1] // 8, size[2] // 8

    batch = PackedSampler(Sizes([(9, 64, 96)]), (1, 2, 2), 3 * 24 * 5, latent_size=latent).batch(0)
    assert batch.tokens == 3 * 24 * 5
    assert len(batch.videos) == 5


def test_ranks_share_the_samples():
    whole = PackedSampler(world_source(), (1, 2, 2), 4096)
    ranks = [PackedSampler(world_source(), (1, 2, 2), 4096, rank=r, num_ranks=2) for r in (0, 1)]
    assert [ranks[n % 2].batch(n // 2).indices for n in range(8)] == [whole.batch(n).indices for n in range(8)]


def test_broken_sample_is_left_out_with_one_line(caplog):
    sampler = PackedSampler(Sizes([(1, 8, 8)] * 4, broken=[2]), (1, 2, 2), 32)
    for step in range(12):
        batch = sampler.batch(step)
        assert batch.videos
        assert 2 not in batch.indices
        assert batch.tokens == 16 * len(batch.videos)
    assert [record.getMessage() for record in caplog.records] == [
        "left out of its batch: cannot read clip 2: it is broken",
    ]
    with pytest.raises(ValueError, match="none of the source's samples can be decoded"):
        PackedSampler(Sizes([(1, 8, 8)], broken=[0]), (1, 2, 2), 32).batch(0)


def test_prefetching_changes_nothing():
    plain = islice(PackedSampler(world_source(), (1, 2, 2), 4096).stream(3), 10)
    ahead = PackedSampler(world_source(), (1, 2, 2), 4096).stream(3, prefetch=3)
    assert [a.indices for a in plain] == [b.indices for b in islice(ahead, 10)]
    ahead.close()


def test_world_source_keeps_its_proportions():
    source = world_source(weights=[5, 1, 1, 1, 1, 1])
    for first in (0, 10**12):
        counts = Counter(source.size(first + i) for i in range(1000))
        assert [counts[size] for size in MIXED] == pytest.approx([500, 100, 100, 100, 100, 100], abs=3)
    samples = [source.load(i) for i in range(100)]
    assert all((" starts " if source.size(i)[0] > 1 else " is ") in s.detailed for i, s in enumerate(samples))
    assert all("move" not in s.caption for i, s in enumerate(samples) if source.size(i)[0] == 1)
    video, caption, detailed, given = source.load(7)
    assert given is None
    assert tuple(video.shape[1:]) == source.size(7)
    assert torch.equal(video, world_source().world.sample(7).render(*source.size(7)))
    assert (caption, detailed) == source.load(7)[1:3]


def test_long_samples_count_for_more_where_attention_is_counted():
    sampler = PackedSampler(world_source(), (1, 2, 2), 8192, attention_width=128)

    def cost(size):
        tokens = size[0] * size[1] * size[2] // 4
        return tokens * (1 + tokens / (6 * 128))

    costs = [sum(cost(size) for size in sizes_of(batch)) for batch in islice(sampler.stream(), 40)]
    assert min(costs) >= 0.9 * 8192
    assert max(costs) <= 8192 + 10
    with pytest.raises(ValueError, match=r"2048 tokens that count as 7509 at patch_size \(1, 2, 2\), more than .* 4096"):
        PackedSampler(world_source(), (1, 2, 2), 4096, attention_width=128).batch(0)


def test_a_repeated_source_is_finite_and_always_the_same():
    source = Repeated(world_source(), 30)
    sampler = PackedSampler(source, (1, 2, 2), 8192)
    used = Counter()
    for batch in islice(sampler.stream(), 40):
        used.update(batch.indices)
    assert set(used) == set(range(30))
    assert torch.equal(source.load(3, epoch=0).video, source.load(3, epoch=5).video)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Repeated(world_source(), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": [1, 2]}, "a weight above 0 for each of 6 sizes"), ({"lessons": {"turn": 0.7, "swim": 0.1}}, "drift, turn, link")],
)
def test_world_source_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        world_source(**options)


@pytest.mark.parametrize("options", [{"tokens_per_batch": 0}, {"min_sizes": 0}, {"rank": 2, "num_ranks": 2}])
def test_sampler_that_cannot_be(options):
    with pytest.raises(ValueError, match="PackedSampler"):
        PackedSampler(world_source(), **{"patch_size": (1, 2, 2), "tokens_per_batch": 4096, **options})


@pytest.mark.parametrize("tokens", [10**7, 10**20])
def test_a_budget_larger_than_all_that_there_is(tokens):
    """It holds what is there, in no more memory than that takes."""
    sampler = PackedSampler(WorldSource(World(), [(2, 16, 16)]), (1, 8, 8), tokens)
    assert sampler.batch(0).tokens == 8 * sampler.lookahead


def test_large_samples_fill_a_large_budget():
    """Whose sums are not counted one by one."""
    counts = [3 * 10**9, 5 * 10**9, 4 * 10**9 + 1, 2 * 10**9]
    places = _fill(91 * 10**8, 4 * 10**8, counts)
    assert 87 * 10**8 <= sum(counts[i] for i in places) <= 91 * 10**8


def test_sizes_that_fit_no_batch_are_told_of_at_once():
    with pytest.raises(ValueError, match=r"sample 0 of size .* is 8 tokens at patch_size .*, more than --tokens 7; a larger one"):
        PackedSampler(WorldSource(World(), [(2, 16, 16)]), (1, 8, 8), 7, wording=Wording("--tokens", "a larger one takes it"))
