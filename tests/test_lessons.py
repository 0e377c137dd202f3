"""Clips that teach a task: what is given is the world's own, and what follows is what the caption says."""

import numpy as np
import pytest
import torch

from sora_model.sizes import Timing
from sora_model.world.config import COLORS, WorldConfig
from sora_model.world.judge import judge
from sora_model.world.lessons import Closeup, closeup, drift, link, morph, turn
from sora_model.world.source import WorldSource
from sora_model.world.world import World

SIZE = (13, 48, 48)
WORLD = World(WorldConfig.studio(3))


def center(frame: torch.Tensor, color: str) -> torch.Tensor:
    """(x, y) of the pixels of that colour in [3, H, W], in pixels."""
    near = (((frame + 1) / 2 - torch.tensor(COLORS[color])[:, None, None]).square().sum(0) < 0.05).float()
    grid = torch.arange(frame.shape[1]) + 0.5
    return torch.stack([(near.sum(0) * grid).sum(), (near.sum(1) * grid).sum()]) / near.sum()


@pytest.mark.parametrize("lesson", [drift, turn, link, morph])
@pytest.mark.parametrize("number", range(6))
def test_something_is_given_and_something_is_not(lesson, number) -> None:
    scene = WORLD.sample(number)
    video, caption, _, given = lesson(scene, SIZE, Timing(1, 4), WORLD, np.random.default_rng(number))
    assert tuple(video.shape) == (3, *SIZE)
    assert scene.things[0].name in caption
    latent = torch.cat([given[:1], given[1:].unflatten(0, (3, 4)).all(1)])
    assert torch.equal(torch.cat([latent[:1], latent[1:].repeat_interleave(4)]), given), "whole latent frames"
    assert not latent.all()
    assert latent.any()
    steps = video.diff(dim=1).abs().mean((0, 2, 3))
    assert steps.max() <= (0.25 if lesson is morph else 0.15), "it never jumps"


def test_a_turn_is_what_its_caption_says() -> None:
    right = 0
    for number in range(20):
        scene = WORLD.sample(number)
        video, caption, detailed, given = turn(scene, SIZE, Timing(1, 4), WORLD, np.random.default_rng(number))
        start = int(given.sum())
        moves = {name for name in WORLD.config.motions if caption.endswith("stays still" if name == "stay" else f"moves {name}")}
        motion = max(moves, key=len)
        assert f"{'stays still' if motion == 'stay' else 'moves ' + motion}" in detailed
        clip = video[:, start - 1 :]
        truth = WORLD.sample(0, color=scene.things[0].color, shape=scene.things[0].shape, motion=motion).truth(*clip.shape[1:])
        right += judge(clip, truth)["motion"]
    assert right >= 19


def test_a_link_ends_as_it_should() -> None:
    """Both ends move steadily, and the passage between them is smooth."""
    for number in range(8):
        scene = WORLD.sample(number)
        video, _, _, given = link(scene, (21, 48, 48), Timing(1, 4), WORLD, np.random.default_rng(number))
        path = torch.stack([center(video[:, t], scene.things[0].color) for t in range(21)])
        steps = path.diff(dim=0)
        bend = steps.diff(dim=0).norm(dim=1)
        inside = ~(given[:-2] & given[1:-1] & given[2:])
        assert bend[inside].max() < 8, "no corner sharper than a bounce"


def test_a_morph_is_one_scene_and_then_the_other() -> None:
    for number in range(8):
        scene = WORLD.sample(number)
        video, caption, _, given = morph(scene, (21, 48, 48), Timing(1, 4), WORLD, np.random.default_rng(number))
        first, last = caption.removeprefix("a ").removeprefix("an ").split(" becomes ")
        assert first == scene.things[0].name
        start, end = int((~given).int().argmax()), int(given.flip(0).int().argmin())
        color, shape = last.split()[1:]
        there = video[:, 21 - end :]
        assert judge(there, WORLD.sample(0, color=color, shape=shape).truth(*there.shape[1:]))["shape"]
        here = video[:, :start]
        assert judge(here, scene.truth(*here.shape[1:]))["shape"]
        changes = video.diff(dim=1).abs().mean((0, 2, 3))[start - 1 : 21 - end]
        assert changes.max() < 0.5 * changes.sum(), "no cut"


def test_a_clip_too_short_for_both_ends_does_not_morph() -> None:
    for number in range(8):
        scene = WORLD.sample(number)
        _, caption, _, given = morph(scene, (5, 48, 48), Timing(1, 4), WORLD, np.random.default_rng(number))
        assert given.tolist() == [True] + [False] * 4
        assert caption == scene.caption(motion=False)


def test_a_closeup_is_a_part_of_a_larger_frame() -> None:
    for number in range(4):
        scene = World(WorldConfig.studio(1)).sample(number)
        near = Closeup(**vars(scene), zoom=4.0, centre=(0.375, 0.5))
        whole = scene.render(5, 4 * 32, 4 * 48)
        torch.testing.assert_close(near.render(5, 32, 48), whole[:, :, 48:80, 48:96], atol=1e-4, rtol=0)


def test_closeups_show_the_object_or_what_is_plain() -> None:
    plain = 0
    for number in range(40):
        rng = np.random.default_rng(number)
        video, caption, _, given = closeup(WORLD.sample(number), SIZE, Timing(1, 4), WORLD, rng)
        assert tuple(video.shape) == (3, *SIZE)
        assert caption == ""
        assert not given.any()
        plain += bool(video[:, 6].std(dim=(1, 2)).max() < 0.01)
    assert 1 <= plain <= 20


def test_a_closeup_is_centred_on_the_object() -> None:
    class Centred:
        """Draws the middle of every range, so that nothing is put aside."""

        def uniform(self, low: float, high: float, size: int | None = None) -> np.ndarray:
            return np.full(size or (), (low + high) / 2)

        def integers(self, high: int) -> int:
            return high // 2

    for number in range(20):
        scene = WORLD.sample(number, shape="circle")
        video, *_ = closeup(scene, (13, 48, 49), (1, 4), WORLD, Centred())  # type: ignore[arg-type]
        middle = (video[:, 6, 24, 24] + 1) / 2
        assert torch.allclose(middle, torch.tensor(COLORS[scene.things[0].color]), atol=0.02)


def test_a_scene_goes_on() -> None:
    scene = World(WorldConfig.rich(5)).sample(4)
    for start in (3, 11, 40.5):
        later = scene.advanced(start)
        torch.testing.assert_close(later.render(4, 24, 32), scene.render(4, 24, 32, start=start), atol=1e-4, rtol=0)
        names = [thing.motion for thing in later.things]
        assert all(name in scene.config.motions for name in names)
    turned = scene.turned("up")
    torch.testing.assert_close(turned.render(1, 24, 32), scene.render(1, 24, 32))
    assert turned.things[0].motion == "up"
    with pytest.raises(ValueError, match=r"Scene\.turned: motion must be out of"):
        scene.turned("sideways")


def test_captions_may_leave_out_the_motion() -> None:
    scene = WORLD.sample(2)
    assert scene.caption(motion=False) == scene.caption(frames=1)


def test_held_out_combinations_are_never_trained() -> None:
    from sora_model.world.world import held_out

    training, kept = World(WORLD.config, split="training"), World(WORLD.config, split="held out")
    for i in range(200):
        a, b = training.sample(i).things[0], kept.sample(i).things[0]
        assert not held_out(a.color, a.shape, a.motion)
        assert held_out(b.color, b.shape, b.motion)
    with pytest.raises(ValueError, match="split must be"):
        World(split="test")
    source = WorldSource(training, [SIZE], lessons={"turn": 1.0}, timing=Timing(1, 4))
    for i in range(200):
        caption, thing = source.load(i).caption, training.sample(i).things[0]
        said = [n for n in WORLD.config.motions if caption.endswith("stays still" if n == "stay" else f"moves {n}")]
        assert not held_out(thing.color, thing.shape, max(said, key=len)), caption


def test_lessons_come_in_their_shares() -> None:
    source = WorldSource(WORLD, [SIZE, (1, 48, 48)], lessons={"drift": 0.3, "turn": 0.2, "link": 0.1}, timing=Timing(1, 4))
    samples = [source.load(i) for i in range(200)]
    clips = [sample for sample in samples if sample.video.shape[1] > 1]
    share = sum(sample.clean_mask is not None for sample in clips) / len(clips)
    assert 0.5 < share < 0.7
    assert all(sample.clean_mask is None for sample in samples if sample.video.shape[1] == 1)
    assert torch.equal(source.load(5).video, source.load(5).video)
