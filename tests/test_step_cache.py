"""The step cache: what it leaves out and what it says of it, each sample by itself."""

import pytest
import torch
from test_dit import CAPTIONS, SIZES, awake, latents_of, small
from torch import Tensor

from sora_model import SoraPipeline, text_to_video
from sora_model.model.block import Residual
from sora_model.model.conditioning import PackedText, Samples
from sora_model.model.dit import DiT
from sora_model.model.experts import Experts
from sora_model.model.step_cache import StepCache
from sora_model.text.words import WordEncoder

BATCH = len(SIZES)


@pytest.fixture(scope="module")
def dit() -> DiT:
    return awake(DiT(small())).eval()


@pytest.fixture(scope="module")
def latents() -> list[Tensor]:
    return latents_of(SIZES)


@pytest.fixture(scope="module")
def text() -> PackedText:
    with torch.no_grad():
        return awake(WordEncoder(32))(CAPTIONS)


def at(*levels: float) -> Tensor:
    return torch.tensor(levels if len(levels) > 1 else levels * BATCH)


@torch.no_grad()
def test_what_the_other_blocks_added_before_is_added_again(dit: DiT, latents: list[Tensor], text: PackedText) -> None:
    cache = StepCache(0.5)
    first = dit(latents, at(500.0), text, cache=cache.of(range(BATCH)))
    for one, whole in zip(first, dit(latents, at(500.0), text), strict=True):
        torch.testing.assert_close(one, whole)
    second = dit(latents, at(499.5), text, cache=cache.of(range(BATCH)))
    assert (cache.passes, cache.reused, cache.errors) == (2 * BATCH, BATCH, [])

    def streams(level: float) -> tuple:
        begun = dit.begin(Samples(latents, at(level), text))
        behind_first = dit.run_blocks(begun, Residual(begun.x), 0, 1).sum(begun.context.cu_rows)
        return begun, behind_first, dit.run_blocks(begun, Residual(behind_first), 1).sum(begun.context.cu_rows)

    _, x, last = streams(500.0)
    begun, y, new = streams(499.5)
    for one, expected in zip(second, dit.end(begun, Residual(y + last - x)), strict=True):
        torch.testing.assert_close(one, expected)
    whole = dit(latents, at(499.5), text, cache=cache.of(range(BATCH)))  # near, so still left out
    assert cache.reused == 2 * BATCH
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    cache.threshold = 0.0
    dit(latents, at(499.5), text, cache=cache.of(range(BATCH)))
    lengths = begun.context.layout.seqlens
    for error, before, after in zip(cache.errors, (last - x).split(lengths), (new - y).split(lengths), strict=True):
        assert error == pytest.approx(float((after - before).abs().sum() / after.abs().sum()), rel=1e-4)
    assert f"step cache 0: {2 * BATCH} of {4 * BATCH} passes of samples without most blocks; when they ran" in cache.report()
    cache.clear()
    assert (cache.passes, len(cache.errors)) == (4 * BATCH, BATCH)
    dit(latents, at(499.5), text, cache=cache.of(range(BATCH)))
    assert (cache.reused, len(cache.errors)) == (2 * BATCH, BATCH)


@torch.no_grad()
def test_each_sample_by_itself(dit: DiT, latents: list[Tensor], text: PackedText) -> None:
    """Of a batch in which some samples change much, those alone run all blocks; frames may have times of their own."""
    cache, near, far = StepCache(0.2), [0, 2], [1, 3]
    second = at(499.8, 100.0, 499.8, 20.0)
    dit(latents, at(500.0), text, cache=cache.of("abcd"))
    got = dit(latents, second, text, cache=cache.of("abcd"))
    assert (cache.passes, cache.reused) == (2 * BATCH, 2)
    whole = dit(latents, second, text)
    assert all((got[i] - whole[i]).abs().max() < 1e-5 for i in far)
    alone = StepCache(0.2)
    for level in (at(500.0), second):
        some = dit(*Samples(latents, level, text).select(near, 1), cache=alone.of("ac"))
    for i, output in zip(near, some, strict=True):
        torch.testing.assert_close(got[i], output)
    assert (got[2] - whole[2]).abs().max() > 1e-5
    frames = torch.cat([level.repeat(size[0]) for level, size in zip(second.split(1), SIZES, strict=True)])
    of_frames, cache = StepCache(0.2), StepCache(0.2)
    dit(latents, at(500.0).repeat_interleave(torch.tensor([t for t, _, _ in SIZES])), text, cache=of_frames.of("abcd"))
    for one, other in zip(dit(latents, frames, text, cache=of_frames.of("abcd")), got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_groups_decide_together(dit: DiT, latents: list[Tensor], text: PackedText) -> None:
    cache = StepCache(0.2)
    for level in (at(500.0), at(499.8, 100.0, 499.8, 499.8)):
        dit(latents, level, text, cache=cache.of("abcd", "xxyy"))
    assert (cache.passes, cache.reused) == (2 * BATCH, 2), "a would be near, but for b"


@torch.no_grad()
def test_experts_share_nothing(dit: DiT, latents: list[Tensor], text: PackedText) -> None:
    experts, cache = Experts(dit, DiT(dit.config).eval(), 500.0), StepCache(0.9)
    for level in (501.0, 501.0, 499.0, 499.0):
        experts(latents, at(level), text, cache=cache.of(range(BATCH)))
    assert (cache.passes, cache.reused, cache.errors) == (4 * BATCH, 2 * BATCH, [])


def test_in_a_pipeline() -> None:
    """A video is that of its request alone, and near the one of all blocks; guidance's halves are left out together."""
    pipeline = SoraPipeline.from_pretrained()
    requests = [text_to_video("a red circle moves right", (5, 32, 48)), text_to_video("a blue star", (1, 32, 32))]
    cache = StepCache(0.1)
    videos = pipeline(requests, generator=[3, 4], step_cache=cache)
    assert 0.2 < cache.reused / cache.passes < 0.6
    for i, request in enumerate(requests):
        (alone,) = pipeline(request, generator=3 + i, step_cache=StepCache(0.1))
        torch.testing.assert_close(videos[i], alone, rtol=0, atol=1e-3)
        (whole,) = pipeline(request, generator=3 + i)
        assert 1e-5 < (videos[i] - whole).square().mean() ** 0.5 < 0.05
    (again,) = pipeline(requests[:1], generator=3, step_cache=0.1)
    torch.testing.assert_close(again, videos[0], rtol=0, atol=1e-3)


def test_what_is_kept_has_no_gradient(dit: DiT, latents: list[Tensor], text: PackedText) -> None:
    cache = StepCache(0.5)
    for _ in range(2):
        sum(out.square().sum() for out in dit(latents, at(500.0), text, cache=cache.of(range(BATCH)))).backward()
    assert cache.reused == BATCH
    dit.zero_grad()


def test_names_that_do_not_fit(dit: DiT, latents: list[Tensor]) -> None:
    cache = StepCache(0.1)
    for samples, groups in (("aa", None), ("ab", "x")):
        with pytest.raises(ValueError, match=r"StepCache\.of: samples: expected different names, and a group for each"):
            cache.of(samples, groups)
    with pytest.raises(ValueError, match="DiT: cache: expected names of 4 samples, got \\[0, 1\\]"):
        dit(latents, at(500.0), cache=cache.of(range(2)))
    with pytest.raises(TypeError, match=r"DiT: cache: expected what StepCache\.of returns, got StepCache"):
        dit(latents, at(500.0), cache=cache)


def test_no_memory_is_kept_after_an_error() -> None:
    pipeline, cache = SoraPipeline.from_pretrained(), StepCache(0.1)

    def stop(step: int, *_: object) -> None:
        assert len(cache.kept) == 2
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline("a red circle", (5, 32, 32), step_cache=cache, callback=stop)
    assert not cache.kept


@pytest.mark.parametrize("threshold", [-0.1, 1, float("nan"), "0.1", True])
def test_thresholds_that_are_refused(threshold: object) -> None:
    with pytest.raises(ValueError, match="StepCache: threshold: expected a number from 0 to below 1, got"):
        StepCache(threshold)
