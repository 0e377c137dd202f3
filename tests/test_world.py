"""The world of shapes: exact at any size, true to its captions, and judged rightly from pixels."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sora_model.world.config import BACKGROUNDS, COLORS, MOTIONS, WorldConfig
from sora_model.world.judge import judge
from sora_model.world.scene import Scene, Thing
from sora_model.world.shapes import SHAPES, moments
from sora_model.world.world import World

SIZES = [(8, 32, 32), (8, 24, 48), (8, 48, 28)]


def scene_of(*things: Thing, background: str = "black", camera: str = "still", texture: float = 0.0) -> Scene:
    return Scene(things, background, camera, (0.1, 0.2, 0.3, 0.4), WorldConfig(texture=texture))


def thing(shape="circle", color="red", u=(0.5, 0.5), v=(0.0, 0.0), radius=0.2, motion="stay", change="none") -> Thing:
    return Thing(color, shape, motion, "medium", change, radius, u, v, float(np.hypot(*v)))


def coverage(video: torch.Tensor, color: str) -> np.ndarray:
    """[T, H, W] share of each pixel that has `color`, in a clip of that one colour on black."""
    black, full = BACKGROUNDS["black"], COLORS[color]
    channel = int(np.argmax(np.subtract(full, black)))
    return ((video[channel].numpy() + 1) / 2 - black[channel]) / (full[channel] - black[channel])


def centroid(mask: np.ndarray) -> np.ndarray:
    """[T, 2] (x, y) in fractions of the width and height."""
    _, height, width = mask.shape
    x = (mask.sum(1) * (np.arange(width) + 0.5)).sum(1) / mask.sum((1, 2)) / width
    y = (mask.sum(2) * (np.arange(height) + 0.5)).sum(1) / mask.sum((1, 2)) / height
    return np.stack([x, y], 1)


def right(config: WorldConfig, size: tuple[int, int, int], count: int) -> dict[str, float]:
    """Share of clean renders that `judge` calls right."""
    scenes = [World(config).sample(i) for i in range(count)]
    verdicts = [judge(scene.render(*size), scene.truth(*size)) for scene in scenes]
    return {key: float(np.mean([verdict[key] for verdict in verdicts])) for key in ("correct", "color", "motion", "shape")}


@pytest.mark.parametrize("config", [WorldConfig.simple(), WorldConfig.rich()])
def test_scene_depends_on_seed_and_index_alone(config):
    first, again = World(config), World(WorldConfig(**json.loads(json.dumps(asdict(config)))))
    again.sample(99)
    assert first.sample(5) == again.sample(5)
    assert torch.equal(first.sample(5).render(4, 32, 40), again.sample(5).render(4, 32, 40))
    assert first.sample(5) != first.sample(6)
    assert first.sample(5) != World(replace(config, seed=1)).sample(5)


def test_scenes_cover_the_vocabulary_evenly():
    things = [World().sample(i).things[0] for i in range(600)]
    for field, names in (("color", ("red", "green", "blue")), ("shape", ("circle", "square", "triangle"))):
        counts = [sum(getattr(t, field) == name for t in things) for name in names]
        assert min(counts) > 160, counts
    rich = {t.shape for i in range(300) for t in World(WorldConfig.rich()).sample(i).things}
    assert rich == set(SHAPES)


@pytest.mark.parametrize(("frames", "height", "width"), [(8, 32, 32), (1, 17, 50), (3, 40, 9), (16, 24, 36)])
def test_render_is_a_clip_of_that_size(frames, height, width):
    for i in range(20):
        video = World(WorldConfig.rich()).sample(i).render(frames, height, width)
        assert video.shape == (3, frames, height, width)
        assert video.dtype == torch.float32
        assert video.is_contiguous()
        assert video.min() >= -1
        assert video.max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_larger_render_is_the_same_picture(size):
    frames, height, width = size
    for i in range(20):
        scene = World(WorldConfig.rich()).sample(i)
        small, large = scene.render(*size), scene.render(frames, 2 * height, 2 * width)
        error = (F.avg_pool2d(large, 2) - small).abs()
        half_a_pixel_off = (F.avg_pool2d(large.roll(1, -1), 2) - small).abs()
        assert error.mean() < 0.006
        assert error.mean() < half_a_pixel_off.mean() / 5
        assert error.flatten().quantile(0.999) < 0.4  # out of a range of 2: corners within one pixel


def test_longer_clip_continues_the_shorter():
    for i in range(5):
        scene = World(WorldConfig.rich()).sample(i)
        long = scene.render(20, 24, 32)
        torch.testing.assert_close(long[:, :8], scene.render(8, 24, 32), rtol=0, atol=0)
        torch.testing.assert_close(long[:, 8:], scene.render(12, 24, 32, start=8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_keeps_its_area_at_every_aspect_ratio(shape):
    area, center = moments(shape)
    assert np.hypot(*center) < 0.22
    for height, width in ((64, 64), (48, 96), (120, 40)):
        mask = coverage(scene_of(thing(shape)).render(1, height, width), "red")
        expected = area * (0.2 * min(height, width)) ** 2
        assert abs(mask.sum() / expected - 1) < 0.03
        rows, cols = np.flatnonzero(mask[0].max(1) > 0.5), np.flatnonzero(mask[0].max(0) > 0.5)
        assert max(np.ptp(rows), np.ptp(cols)) <= 2.1 * 0.2 * min(height, width)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("motion", [m for m in MOTIONS if m != "stay"])
def test_pixels_move_as_the_truth_says(motion, size):
    world = World(WorldConfig(shapes=("circle", "square"), motions=(motion,)))
    for i in range(6):
        scene = world.sample(i)
        truth = scene.truth(*size).objects[0]
        path = centroid(coverage(scene.render(*size), truth.color))
        np.testing.assert_allclose(path * [size[2], size[1]], truth.path * [size[2], size[1]], atol=0.08)  # pixels
        moved = path[-1] - path[0]
        assert tuple(np.sign(np.where(np.abs(moved) < 0.02, 0, moved))) == MOTIONS[motion]
        assert motion in scene.caption()


def test_objects_bounce_and_stay_in_view():
    for i in range(20):
        scene = World(WorldConfig(motions=("right",))).sample(i)
        truth = scene.truth(40, 32, 48).objects[0]
        steps = np.sign(np.diff(truth.path[:, 0]))
        assert (steps[:7] == 1).all()
        assert -1 in steps
        assert truth.visible.min() > 0.95
        assert "right edge" not in scene.caption(detailed=True, frames=8)
        assert "then bounces off the right edge" in scene.caption(detailed=True, frames=40)


def test_front_object_hides_the_one_behind():
    red, blue = thing("square", "red"), thing("circle", "blue", u=(0.5, 0.5))
    for things in ((red, blue), (blue, red)):
        scene = scene_of(*things)
        center = (scene.render(1, 33, 33)[:, 0, 16, 16] + 1) / 2
        torch.testing.assert_close(center, torch.tensor(COLORS[things[1].color]), rtol=0, atol=1e-5)
        behind, front = scene.truth(1, 33, 33).objects
        assert front.visible[0] > 0.97
        assert behind.visible[0] == pytest.approx(max(1 - moments(front.shape)[0] / moments(behind.shape)[0], 0), abs=0.06)
        assert f"the {things[1].name} starts" in scene.caption(detailed=True).lower()
        assert f"the {things[0].name} and is in front of it" in scene.caption(detailed=True)


def test_passing_behind_and_coming_out_again():
    moving = thing("circle", "red", u=(0.0, 0.5), v=(0.1, 0.0), radius=0.1, motion="right")
    visible = scene_of(moving, thing("square", "blue", radius=0.2)).truth(11, 48, 48).objects[0].visible
    assert visible[0] > 0.97
    assert visible[-1] > 0.97
    assert visible[5] < 0.02


def test_camera_moves_everything_the_other_way():
    scene = scene_of(thing(color="red"), camera="right", texture=0.08)
    truth = scene.truth(8, 32, 48)
    assert (np.diff(truth.pan[:, 0]) > 0).all()
    np.testing.assert_allclose(truth.objects[0].path + truth.pan, np.full((8, 2), 0.5), atol=1e-9)
    wide = scene.render(8, 64, 96)
    shift = round((truth.pan[4, 0] - truth.pan[0, 0]) * 96)
    assert shift >= 3
    still_rows = slice(0, 12)  # above the object: background only
    moved = (wide[:, 4, still_rows, :-shift] - wide[:, 0, still_rows, shift:]).abs().mean()
    unmoved = (wide[:, 4, still_rows, :-shift] - wide[:, 0, still_rows, :-shift]).abs().mean()
    assert moved < 0.2 * unmoved
    assert "The camera pans right." in scene.caption(detailed=True)


def test_spin_and_growth_are_seen():
    spinning = scene_of(thing("cross", change="spin")).render(4, 48, 48)
    assert (spinning[:, 0] - spinning[:, 2]).abs().mean() > 0.01
    for change, order in (("grow", 1), ("shrink", -1)):
        scene = scene_of(thing("circle", change=change))
        area = coverage(scene.render(8, 48, 48), "red").sum((1, 2))
        assert (order * np.diff(area) > 0).all()
        assert f"while {change}ing" in scene.caption(detailed=True)


def test_captions():
    still, moving = thing("5", "orange", u=(0.1, 0.9)), thing("star", "blue", u=(0.9, 0.8), motion="up and left")
    scene = scene_of(still, moving, background="navy")
    assert scene.caption() == "an orange digit 5 stays still and a blue star moves up and left"
    assert scene.caption(frames=1) == "an orange digit 5 and a blue star"
    assert scene.caption(detailed=True) == (
        "A medium orange digit 5 starts at the bottom left and stays still. A medium blue star starts at the bottom right and "
        "moves up and left. The blue star starts to the right of the orange digit 5 and is in front of it. The background is "
        "navy. The camera stays still."
    )
    picture = scene.caption(detailed=True, frames=1)
    assert not any(word in picture for word in ("move", "stays", "starts", "camera"))


def test_sample_for_one_caption():
    world = World(WorldConfig.rich())
    for i in range(30):
        scene = world.sample(i, color="cyan", shape="star", motion="down")
        assert scene.caption().startswith("a cyan star moves down")
        assert len({t.color for t in scene.things}) == len(scene.things)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colors": ("red", "mauve")}, r"colors must be names out of .*got \['red', 'mauve'\]"),
        ({"shapes": ()}, "shapes must be names out of"),
        ({"objects": (2, 4)}, r"objects must be 1 <= fewest <= most <= 3 .*got \(2, 4\)"),
        ({"speed": (0.0, 0.1)}, r"speed=\(0.0, 0.1\)"),
        ({"texture": 0.5}, "texture=0.5"),
    ],
)
def test_config_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**fields)


def test_bad_arguments_are_named():
    scene = World().sample(0)
    with pytest.raises(ValueError, match="at least 1, got 0, 32, 32"):
        scene.render(0, 32, 32)
    with pytest.raises(ValueError, match="unknown color, shape or motion in 'red', 'blob', 'left'"):
        World().sample(0, color="red", shape="blob", motion="left")
    with pytest.raises(ValueError, match=r"video must be \[3, T, H, W\], got \[1, 8, 32, 32\]"):
        judge(torch.zeros(1, 8, 32, 32), scene.truth(8, 32, 32))
    with pytest.raises(ValueError, match="truth is of 8 frames, but video has 4"):
        judge(torch.zeros(3, 4, 32, 32), scene.truth(8, 32, 32))


@pytest.mark.parametrize("size", [*SIZES, (4, 32, 32), (16, 32, 48)])
def test_judge_agrees_with_clean_renders(size):
    shares = right(WorldConfig.simple(seed=3), size, 100)
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.parametrize("size", [(8, 32, 32), (8, 40, 72), (8, 72, 40)])
def test_judge_agrees_with_clean_renders_of_the_rich_world(size):
    shares = right(WorldConfig.rich(seed=3), size, 60)
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.parametrize("size", [(13, 48, 48), (13, 48, 80), (1, 64, 64)])
def test_judge_tells_the_background_and_how_large_an_object_is(size):
    for i in range(40):
        scene = World(WorldConfig.studio()).sample(i)
        truth, larger = scene.truth(*size), replace(scene, things=(replace(scene.things[0], radius=1.25 * scene.things[0].radius),))
        seen, seen_larger = judge(scene.render(*size), truth), judge(larger.render(*size), truth)
        assert seen["background"] == scene.background
        assert seen["objects"][0]["scale"] == pytest.approx(1, abs=0.05)
        assert seen_larger["objects"][0]["scale"] == pytest.approx(1.25, abs=0.06)


def test_judge_of_a_picture_asks_no_motion():
    scene = World().sample(0)
    verdict = judge(scene.render(1, 32, 32), scene.truth(1, 32, 32))
    assert verdict["correct"] is True
    assert verdict["motion"] is None


def test_judge_is_near_chance_on_wrong_captions():
    world, size = World(WorldConfig.simple()), (8, 32, 32)
    verdicts, same = [], []
    for i in range(240):
        shown, asked = world.sample(i), world.sample(i + 5000)
        verdicts.append(judge(shown.render(*size), asked.truth(*size)))
        a, b = shown.things[0], asked.things[0]
        same.append({"color": a.color == b.color, "correct": shown.caption() == asked.caption()})
    for key in ("color", "correct"):
        assert np.mean([v[key] for v in verdicts]) == np.mean([s[key] for s in same])
    assert np.mean([v["correct"] for v in verdicts]) < 0.08  # 1/36 expected


@pytest.mark.parametrize(("wrong", "value"), [("color", "green"), ("shape", "triangle"), ("motion", "left")])
def test_judge_tells_which_part_is_wrong(wrong, value):
    world, size = World(), (8, 32, 32)
    caption = {"color": "red", "shape": "circle", "motion": "right"}
    for i in range(10):
        video = world.sample(i, **caption).render(*size)
        verdict = judge(video, world.sample(i + 100, **{**caption, wrong: value}).truth(*size))
        assert not verdict["correct"]
        assert not verdict[wrong]
        if wrong != "color":  # what does not show the colour has no shape or motion of that colour
            assert all(verdict[key] for key in caption if key != wrong)


def test_judge_stands_noise_and_blur():
    world, size = World(), (8, 32, 32)
    generator = torch.Generator().manual_seed(0)
    noisy, blurred = [], []
    for i in range(60):
        scene = world.sample(i)
        video, truth = scene.render(*size), scene.truth(*size)
        noisy.append(judge(video + 0.2 * torch.randn(video.shape, generator=generator), truth)["correct"])
        blurred.append(judge(F.avg_pool2d(video, 3, 1, 1, count_include_pad=False), truth)["correct"])
    assert np.mean(noisy) >= 0.95
    assert np.mean(blurred) >= 0.95


@pytest.mark.parametrize("video", [torch.zeros(3, 8, 32, 32), torch.full((3, 8, 32, 32), torch.nan), torch.ones(3, 8, 32, 32)])
def test_judge_finds_nothing_in_nothing(video):
    assert not judge(video, World().sample(0).truth(8, 32, 32))["color"]


def test_noise_shows_no_colour():
    """Pixels of every colour are not one of them."""
    generator = torch.Generator().manual_seed(0)
    truths = [World(WorldConfig.studio()).sample(i).truth(5, 48, 48) for i in range(20)]
    noise = [torch.randn(3, 5, 48, 48, generator=generator).clamp(-1, 1) for _ in truths]
    assert sum(judge(video, truth)["color"] for video, truth in zip(noise, truths, strict=True)) <= 6
