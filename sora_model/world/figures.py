"""What a measurement of generated videos is made of: figures, what they are held to, and how pixels and texts are judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .judge import judge
from .scene import Scene, Truth


@dataclass(frozen=True)
class Figure:
    """A measured value and what it is held to, if anything; shares are from 0 to 1, PSNR is in dB."""

    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> float | None:
        return self.at_most if self.at_least is None else self.at_least

    @property
    def bound(self) -> str:
        """What it is held to, in words."""
        if self.target is None:
            return ""
        return f"at {'most' if self.at_least is None else 'least'} {self.target:g}"

    @property
    def verdict(self) -> str:
        """Whether it holds or is missed; nothing for a figure that is held to nothing."""
        if self.target is None:
            return ""
        holds = self.value <= self.target if self.at_least is None else self.value >= self.target  # NaN holds nothing
        return "holds" if holds else "missed"


Figures = dict[str, Figure]


@dataclass
class Measurement:
    """What a task gave: figures by name, and videos with their labels, the first of which make a contact sheet."""

    task: str
    figures: Figures
    videos: list[Tensor] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    @property
    def missed(self) -> list[str]:
        return [name for name, figure in self.figures.items() if figure.verdict == "missed"]


def share(rights: Iterable[Any]) -> float:
    values = [bool(right) for right in rights]
    return sum(values) / len(values)


def judged(videos: Sequence[Tensor], truths: Sequence[Truth]) -> list[dict[str, Any]]:
    return [judge(video, truth) for video, truth in zip(videos, truths, strict=True)]


def shares(seen: Sequence[dict[str, Any]], target: float, motion: bool = True) -> Figures:
    """Shares of verdicts that name the right colour, shape and motion."""
    wanted = {"colour": "color", "shape": "shape", **({"motion": "motion"} if motion else {})}
    figures = {name: Figure(share(one[key] for one in seen), target) for name, key in wanted.items()}
    return {**figures, "all of these": Figure(share(all(one[key] for key in wanted.values()) for one in seen))}


def scene_shares(
    seen: Sequence[dict[str, Any]], backgrounds: Sequence[str], scales: Sequence[float] | None = None, target: float = 0.9
) -> Figures:
    """Shares of verdicts with these backgrounds, and with objects of the right size, give or take 15%."""
    right = [0.85 < object_scale(one) / scale < 1.15 for one, scale in zip(seen, scales or [1.0] * len(seen), strict=True)]
    named = [one["background"] == name for one, name in zip(seen, backgrounds, strict=True)]
    return {"background": Figure(share(named), target), "size": Figure(share(right), target)}


def object_scale(seen: dict[str, Any]) -> float:
    """Size of the object as a share of the truth's; 0 where there is none."""
    return seen["objects"][0]["scale"]


def kept_figures(ratios: Sequence[float]) -> Figures:
    """PSNR of keyframes: the mean is held to 30 dB, the worst is reported too."""
    return {"given frames, PSNR in dB": Figure(sum(ratios) / len(ratios), 30.0), "the worst of them": Figure(min(ratios))}


def changes_of(video: Tensor) -> Tensor:
    """Mean absolute change from each frame to the next [T - 1]."""
    return video.diff(dim=1).abs().mean((0, 2, 3))


def jump(video: Tensor, first: int, last: int | None = None) -> float:
    """The largest change at frames `first` to `last` (default: `first` alone), in units of the video's median change.

    Changes below a hundredth of the range count as that: a still object's are the noise of the VAE.
    """
    changes = changes_of(video)
    return float(changes[first - 1 : last or first].max() / changes.median().clamp(min=0.02))


def names_word(text: str, word: str) -> bool:
    """Whether the first sentence, which is about the object, names it."""
    return f" {word} " in f" {_first_sentence(text)} "


def says_motion(text: str, scene: Scene) -> bool:
    """Whether the first sentence says exactly the motion of the scene's object: "moves up" is not "moves up and left"."""
    motion = scene.things[0].motion
    verb = "stays still" if motion == "stay" else f"moves {motion}"
    _, found, after = _first_sentence(text).partition(verb)
    return bool(found) and not after.startswith(" and ")


def _first_sentence(text: str) -> str:
    return text.lower().split(".")[0].replace(",", " ")
