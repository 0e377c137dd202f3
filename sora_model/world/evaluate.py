"""Generated videos judged by the world's ground truth: one measurement per task, with what it is held to.

Every measurement takes scenes of the held-out part of the studio world, whose combinations of colour, shape and motion no caption
of the training named, generates in packed batches, and lets a program look at the pixels (`judge.py`). Tasks that change a scene
(other colours, turns) or name no motion ask for other combinations of the same names. Nothing that was generated is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..codec.codec import psnr
from ..diffusion.noise import prediction_type
from ..diffusion.schedulers import FLOW, flow_scheduler
from ..pipeline.pipeline import SoraPipeline
from ..pipeline.request import Request, extend, image_to_video, join, text_to_video, video_to_video
from ..pipeline.stitch import Stitch
from ..pipeline.tasks import Simulation, close, long_video, refined, turned
from ..sizes import Size
from .config import WorldConfig
from .figures import (
    Figure,
    Figures,
    Measurement,
    changes_of,
    judged,
    jump,
    kept_figures,
    names_word,
    object_scale,
    says_motion,
    scene_shares,
    share,
    shares,
)
from .judge import judge
from .scene import Scene
from .world import World

SHAPES: tuple[Size, ...] = ((13, 48, 48), (13, 48, 80), (13, 80, 48))  # three aspect ratios
AT_ONCE = 24  # samples of a packed batch


@dataclass(frozen=True)
class Judge:
    """A pipeline and the scenes it is asked for.

    count: how many prompts for text to video; other tasks take fewer. seed: of the scenes and of the noise.
    """

    pipeline: SoraPipeline
    count: int = 200
    steps: int = 30
    guidance: float = 3.0
    seed: int = 2026

    def scenes(self, count: int, first: int = 0) -> list[Scene]:
        world = World(WorldConfig.studio(self.seed), split="held out")
        return [world.sample(first + i) for i in range(count)]

    def cases(self, count: int, first: int = 0) -> list[tuple[Scene, Size]]:
        """Scenes and sizes to show them in, three aspect ratios in turn."""
        return [(scene, SHAPES[i % len(SHAPES)]) for i, scene in enumerate(self.scenes(count, first))]

    @property
    def options(self) -> dict[str, Any]:
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance}

    def run(self, requests: Sequence[Request]) -> list[Tensor]:
        videos: list[Tensor] = []
        for start in range(0, len(requests), AT_ONCE):
            videos += self.pipeline(requests[start : start + AT_ONCE], generator=self.seed + start, **self.options)
        return [video.cpu() for video in videos]


def text_to_videos(judge_: Judge) -> Measurement:
    """Prompts short and detailed in turn, in three aspect ratios."""
    cases = judge_.cases(judge_.count)
    prompts = [scene.caption(_detailed(i), size[0]) for i, (scene, size) in enumerate(cases)]
    videos = judge_.run([text_to_video(prompt, size) for prompt, (_, size) in zip(prompts, cases, strict=True)])
    seen = judged(videos, [scene.truth(*size) for scene, size in cases])
    long = [i for i in range(len(cases)) if _detailed(i)]
    named = scene_shares([seen[i] for i in long], [cases[i][0].background for i in long])
    figures = {**shares(seen, 0.9), **{f"{name}, where named": figure for name, figure in named.items()}}
    return Measurement("text to video", figures, videos, prompts)


def text_to_images(judge_: Judge) -> Measurement:
    """Images in three aspect ratios; colour and shape."""
    images: list[tuple[Scene, Size]] = [(scene, (1, *size[1:])) for scene, size in judge_.cases(judge_.count // 4)]
    prompts = [scene.caption(_detailed(i), 1) for i, (scene, _) in enumerate(images)]
    videos = judge_.run([text_to_video(prompt, size) for prompt, (_, size) in zip(prompts, images, strict=True)])
    truths = [scene.truth(*size) for scene, size in images]
    return Measurement("text to image", shares(judged(videos, truths), 0.9, motion=False), videos, prompts)


def large_images(judge_: Judge) -> Measurement:
    """Images of 4,096 tokens or so, a megapixel with the checkpoint of the package, by way of small drafts; colour and shape."""
    count, (_, uh, uw) = judge_.count // 16, judge_.pipeline.unit
    scenes, grids = judge_.scenes(count, 500), [((64, 64), (45, 80), (80, 45))[i % 3] for i in range(count)]
    sizes: list[Size] = [(1, h * uh, w * uw) for h, w in grids]
    prompts = [scene.caption(_detailed(i), 1) for i, scene in enumerate(scenes)]
    made = refined(judge_.pipeline, prompts, sizes, 16 * min(uh, uw), seed=judge_.seed, **judge_.options)
    images = [image.cpu() for image in made]
    truths = [scene.truth(*size) for scene, size in zip(scenes, sizes, strict=True)]
    return Measurement("large image", shares(judged(images, truths), 0.9, motion=False), images, prompts)


def images_to_videos(judge_: Judge) -> Measurement:
    """The first frame of a scene, animated as its caption says."""
    cases = judge_.cases(judge_.count // 4, 1000)
    images, prompts = [scene.render(1, *size[1:]) for scene, size in cases], [scene.caption(frames=13) for scene, _ in cases]
    frames, timing = SHAPES[0][0], judge_.pipeline.timing
    videos = judge_.run([image_to_video(p, image, frames, timing) for p, image in zip(prompts, images, strict=True)])
    kept = [psnr(video[:, :1], image) for video, image in zip(videos, images, strict=True)]
    seen = judged(videos, [scene.truth(*size) for scene, size in cases])
    figures = {**kept_figures(kept), **shares(seen, 0.9), **scene_shares(seen, [scene.background for scene, _ in cases])}
    return Measurement("image to video", figures, videos, prompts)


def videos_to_videos(judge_: Judge, strength: float = 0.85) -> Measurement:
    """A scene in another colour before another background: is the new colour there, and did shape and motion stay?"""
    cases = judge_.cases(judge_.count // 4, 2000)
    colors, backgrounds = list(cases[0][0].config.colors), list(cases[0][0].config.backgrounds)
    others = []
    for i, (scene, size) in enumerate(cases):
        thing = scene.things[0]
        color = colors[(colors.index(thing.color) + 1 + i % (len(colors) - 1)) % len(colors)]
        background = backgrounds[(backgrounds.index(scene.background) + 1) % len(backgrounds)]
        others.append((replace(scene, things=(replace(thing, color=color),), background=background), size))
    prompts = [other.caption(True, 13) for other, _ in others]
    videos = judge_.run([video_to_video(p, scene.render(*size), strength) for p, (scene, size) in zip(prompts, cases, strict=True)])
    seen = judged(videos, [other.truth(*size) for other, size in others])
    figures = {**shares(seen, 0.9), **scene_shares(seen, [other.background for other, _ in others])}
    return Measurement("video to video", figures, videos, [f"-> {prompt}" for prompt in prompts])


def extensions(judge_: Judge, backward: bool = False) -> Measurement:
    """Eight frames or so more, in the direction that the clip has, judged alone; the given frames as the model gives them back."""
    timing = judge_.pipeline.timing
    known = timing.first + timing.stride  # five frames of our own VAE
    made = max(min(8, 13 - known), 1)  # a scene goes on for 13 frames before it meets a border
    cases = judge_.cases(judge_.count // 4, 3000)
    given = [scene.render(known, *size[1:], start=made if backward else 0) for scene, size in cases]
    prompts = [scene.caption(frames=13) for scene, _ in cases]
    asked = [extend(prompt, part, made, timing, overlap=1, backward=backward) for prompt, part in zip(prompts, given, strict=True)]
    whole, kept, jumps = _gone_on(judge_, asked)
    fresh = [video[:, :made] if backward else video[:, known:] for video in whole]
    seen = judged(fresh, [scene.truth(made, *size[1:], start=0 if backward else known) for scene, size in cases])
    figures = {**kept_figures(kept), **shares(seen, 0.9), **scene_shares(seen, [scene.background for scene, _ in cases])}
    figures["seams that are continuous"] = Figure(share(j <= 2 for j in jumps), 0.9)
    return Measurement("extend backward" if backward else "extend forward", figures, whole, prompts)


def joins(judge_: Judge) -> Measurement:
    """Two clips of one object, elsewhere and moving otherwise, and eight frames or so between them."""
    cases = judge_.cases(judge_.count // 8, 4000)
    firsts = [scene.render(*size) for scene, size in cases]
    lasts = [scene.advanced(20).render(*size) for scene, size in cases]
    prompts = [scene.caption(motion=False) for scene, _ in cases]
    whole, figures = _joined(judge_, firsts, lasts, prompts)
    passages = [video[:, 13:-13] for video in whole]
    seen = judged(passages, [scene.truth(*passage.shape[1:]) for (scene, _), passage in zip(cases, passages, strict=True)])
    figures |= {**shares(seen, 0.9, motion=False), **scene_shares(seen, [scene.background for scene, _ in cases])}
    return Measurement("join", figures, whole, prompts)


def morphs(judge_: Judge) -> Measurement:
    """Two clips of different objects before different backgrounds; between them one becomes the other, without a cut."""
    cases, others = judge_.cases(judge_.count // 8, 4000), judge_.cases(judge_.count // 8, 4500)
    firsts, lasts = ([scene.render(*size) for scene, size in some] for some in (cases, others))
    pairs = zip(cases, others, strict=True)
    prompts = [f"{scene.caption(motion=False)} becomes {other.caption(motion=False)}" for (scene, _), (other, _) in pairs]
    whole, figures = _joined(judge_, firsts, lasts, prompts)
    changes = [changes_of(video[:, 12:-12]) for video in whole]
    figures["passages without a cut"] = Figure(share(steps.max() < 0.5 * steps.sum() for steps in changes), 0.9)
    return Measurement("join others", figures, whole, prompts)


def _joined(
    judge_: Judge, firsts: Sequence[Tensor], lasts: Sequence[Tensor], prompts: Sequence[str]
) -> tuple[list[Tensor], Figures]:
    """Clips joined, how well what is given comes back, and how many ends of passages are continuous."""
    timing = judge_.pipeline.timing
    made = -(-8 // timing.stride) * timing.stride
    asked = [join(p, a, b, made, timing) for p, a, b in zip(prompts, firsts, lasts, strict=True)]
    whole, kept, jumps = _gone_on(judge_, asked)
    return whole, {**kept_figures(kept), "ends that are continuous": Figure(share(j <= 2 for j in jumps), 0.9)}


def _gone_on(judge_: Judge, asked: Sequence[Request]) -> tuple[list[Tensor], list[float], list[float]]:
    """What goes on from videos, put together with them; PSNR of what was given, as it came back; the jumps where they meet.

    Where they meet is all of the fade from the one into the other.
    """
    raw = judge_.run([replace(request, stitch=None) for request in asked])
    whole, kept, jumps = [], [], []
    for request, clip in zip(asked, raw, strict=True):
        kept += [psnr(clip[:, at : at + part.shape[1]], part) for at, part in request.keyframes.items()]
        whole.append(request.finish(clip))
        frames, stitch = whole[-1].shape[1], request.stitch or Stitch()
        start, end = stitch.overlap
        if stitch.before is not None:
            seam = stitch.before.shape[1]
            jumps.append(jump(whole[-1], max(seam - start, 1), seam))
        if stitch.after is not None:
            seam = frames - stitch.after.shape[1]
            jumps.append(jump(whole[-1], seam, min(seam + end, frames - 1)))
    return whole, kept, jumps


def loops(judge_: Judge) -> Measurement:
    """Both ends of the way back, fades included, and, as the file is played, the step from its last frame to its first."""
    cases = judge_.cases(judge_.count // 16, 5000)
    prompts = [scene.caption(frames=13) for scene, _ in cases]
    timing, jumps, seams, videos = judge_.pipeline.timing, [], [], []
    for i, (prompt, (scene, size)) in enumerate(zip(prompts, cases, strict=True)):
        back = scene.caption(frames=13, motion=False)
        closed = close(judge_.pipeline, prompt, size, passage_prompt=back, seed=judge_.seed + i, **judge_.options).cpu()
        frames, around = closed.shape[1], torch.cat([closed, closed[:, : timing.stride + 1]], dim=1)
        jumps += [
            jump(around, max(size[0] - timing.first - timing.stride, 1), size[0]),
            jump(around, frames, frames + timing.stride),
        ]
        videos.append(turned(closed))
        changes = changes_of(torch.cat([videos[-1], videos[-1][:, :1]], dim=1))
        seams.append(float(changes[-1] / changes.median().clamp(min=1e-6)))
    truths = [scene.truth(*video.shape[1:]) for (scene, _), video in zip(cases, videos, strict=True)]
    figures: Figures = {
        "seam / median change, the worst": Figure(max(seams), at_most=1.0),
        "ends of the way back that are continuous": Figure(share(j <= 2 for j in jumps), 0.9),
        **shares(judged(videos, truths), 0.9, motion=False),
    }
    return Measurement("loop", figures, videos, prompts)


def long_videos(judge_: Judge, frames: int = 480) -> Measurement:
    """60 s at 8 frames per second, in windows of 13 frames: is the object still what it was, its background too?"""
    scenes = judge_.scenes(2, 6000)
    prompts = [scene.caption(frames=13, motion=False) for scene in scenes]
    videos = [
        long_video(judge_.pipeline, prompt, frames, seed=judge_.seed + i, **judge_.options).cpu()
        for i, prompt in enumerate(prompts)
    ]
    seen, firsts = [], []
    for scene, video in zip(scenes, videos, strict=True):
        windows = [video[:, start : start + 13] for start in range(0, video.shape[1] - 12, 13)]
        seen += judged(windows, [scene.truth(*window.shape[1:]) for window in windows])
        firsts += [seen[-len(windows)]] * len(windows)
    scene_stays = scene_shares(
        seen, [first["background"] for first in firsts], [max(object_scale(first), 0.01) for first in firsts]
    )
    labels = [f"{prompt}, 60 s" for prompt in prompts]
    return Measurement("long video", {**shares(seen, 0.9, motion=False), **scene_stays}, videos, labels)


def simulations(judge_: Judge) -> Measurement:
    """Four actions, a chunk each: does the object move as the action says?"""
    count, actions = judge_.count // 8, ("right", "down", "left", "up")
    scenes = judge_.scenes(count, 7000)
    obeyed, videos, labels = [], [], []
    for i, scene in enumerate(scenes):
        thing = scene.things[0]
        still = replace(scene, things=(replace(thing, u=(0.5, 0.5), v=(0.0, 0.0), motion="stay"),))
        turns = [still.turned(actions[(i + k) % 4]) for k in range(4)]
        # In the centre, so that there is room to move.
        world = Simulation(judge_.pipeline, still.caption(True, 13), seed=judge_.seed + i, **judge_.options)
        for turn in turns:
            new = world.act(turn.caption()).cpu()
            obeyed.append(judge(new, turn.truth(*new.shape[1:])))
        videos.append(world.video.cpu())
        labels.append(", then ".join(scene_.caption() for scene_ in (still, *turns)))
    figures: Figures = {
        "actions obeyed": Figure(share(seen["motion"] for seen in obeyed), 0.9),
        "colour": Figure(share(seen["color"] for seen in obeyed), 0.9),
        "shape": Figure(share(seen["shape"] for seen in obeyed), 0.9),
    }
    return Measurement("simulated world", figures, videos, labels)


def captions(judge_: Judge) -> Measurement:
    """Captions of held-out clips, short and detailed, and detailed prompts made of short ones: do they name what is there?"""
    pipeline = judge_.pipeline
    cases = judge_.cases(judge_.count, 8000)
    videos = [scene.render(*size) for scene, size in cases]
    short, detailed = pipeline.caption(videos, detailed=False), pipeline.caption(videos)
    prompts = [scene.caption(frames=13) for scene, _ in cases]
    figures: Figures = {}
    for name, texts in (("", short), ("detailed ", detailed), ("expanded ", pipeline.expand(prompts))):
        pairs = [(text, scene) for text, (scene, _) in zip(texts, cases, strict=True)]
        figures[f"{name}colour"] = Figure(share(names_word(text, scene.things[0].color) for text, scene in pairs), 0.95)
        figures[f"{name}shape"] = Figure(share(names_word(text, scene.things[0].shape) for text, scene in pairs), 0.95)
        figures[f"{name}motion"] = Figure(share(says_motion(text, scene) for text, scene in pairs), 0.95)
    return Measurement("caption", figures, videos, detailed)


def schedulers(judge_: Judge) -> Measurement:
    """The same prompts and weights by every scheduler of `schedulers.FLOW`."""
    cases = judge_.cases(max(judge_.count // 8, 3), 9000)
    prompts = [scene.caption(frames=13) for scene, _ in cases]
    truths = [scene.truth(*size) for scene, size in cases]
    requests = [text_to_video(prompt, size) for prompt, (_, size) in zip(prompts, cases, strict=True)]
    figures: Figures = {}
    videos, labels = [], []
    for name in FLOW:
        pipeline = judge_.pipeline.with_scheduler(flow_scheduler(name, like=judge_.pipeline.scheduler))
        made = replace(judge_, pipeline=pipeline).run(requests)
        figures |= {f"{name}, {kind}": figure for kind, figure in shares(judged(made, truths), 0.9).items()}
        videos.append(made[0])
        labels.append(f"{name}: {prompts[0]}")
    return Measurement("schedulers", figures, videos, labels)


def possible(pipeline: SoraPipeline) -> list[str]:
    """The measurements that a pipeline can take part in: not all have a captioner, or learned flow matching."""
    flow = prediction_type(pipeline.scheduler) == "flow_prediction"
    lacking = {"caption": pipeline.captioner is None, "schedulers": not flow}
    return [name for name in MEASUREMENTS if not lacking.get(name, False)]


MEASUREMENTS: dict[str, Callable[[Judge], Measurement]] = {
    "text-to-video": text_to_videos,
    "text-to-image": text_to_images,
    "large-image": large_images,
    "image-to-video": images_to_videos,
    "video-to-video": videos_to_videos,
    "extend": extensions,
    "extend-backward": lambda judge_: extensions(judge_, backward=True),
    "join": joins,
    "join-others": morphs,
    "loop": loops,
    "long": long_videos,
    "simulate": simulations,
    "schedulers": schedulers,
    "caption": captions,
}


def _detailed(i: int) -> bool:
    """Whether prompt i is a detailed one: three short ones and three detailed ones in turn, one of each aspect ratio."""
    return i // 3 % 2 == 1
