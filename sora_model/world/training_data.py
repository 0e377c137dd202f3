"""The world as something to learn from by name: `world:studio,lessons,large,clips=20000`.

First which world, simple, studio or rich; then how: `lessons` are clips that teach to go on, to obey and to join; `large` are
frames of up to 512x512, too; `clips=N` are N clips again and again instead of clips without end. A VAE and a captioner have clips
of their own kind, which `lessons` and `large` do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..data.sample import Repeated, Source
from ..sizes import Size, whole_size
from ..training.sources import Clips, FileLimits, Wanted, refuse
from .config import WorldConfig
from .source import WorldSource
from .world import World

WORLDS = ("simple", "studio", "rich")
# Of the clips; what is named twice comes twice as often.
SMALL = [(13, 48, 48), (13, 48, 80), (13, 80, 48)]
LONGER, STILLS = [(17, 48, 48), (17, 48, 80), (17, 80, 48), (21, 48, 48)], [(1, 48, 48), (1, 64, 64), (1, 128, 128)]
LARGER, LARGEST = [(9, 96, 96), (5, 96, 160), (5, 160, 96)], [(1, 256, 256), (5, 256, 256), (1, 512, 512)]
CLIP_SIZES = {
    "simple": [(6, 24, 24), (6, 16, 32), (6, 32, 16), (1, 24, 24)],
    "studio": [*4 * SMALL, *2 * LONGER, *STILLS, *LARGER],
    "rich": SMALL,
}
# A VAE is convolutional: what it learns of small frames holds for large ones, but for norms and attention over all of a frame.
VAE_SIZES = [*3 * SMALL, (5, 96, 96), (5, 160, 160), (1, 128, 128), (1, 256, 256)]
CAPTION_SIZES = [*4 * SMALL, *LONGER, *STILLS, LARGEST[0]]  # a larger frame says no more than a small one
# Of the clips, those that teach going on, obeying and joining.
LESSON_SHARES = {"drift": 0.2, "turn": 0.2, "link": 0.15, "morph": 0.12}
# Nearly all the rest are closeups for a VAE, which has no clean frames. A still one is the first frame of a clip.
VAE_LESSON_SHARES = {**LESSON_SHARES, "closeup": 0.3}
CAPTIONED = 4096  # clips whose captions a vocabulary is learned from
UNSEEN = range(10**6, 10**6 + 64)  # no run draws so many


def named(text: str) -> WorldData:
    """What follows "world:" in a name. Raises ValueError for words that are unknown, with those that there are."""
    world, *words = text.split(",")
    values = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    known = {"lessons": "", "large": "", "clips": values.get("clips", "")}
    count = values.get("clips")
    wrong = world not in WORLDS or len(values) < len(words) or any(known.get(name) != value for name, value in values.items())
    if wrong or (count is not None and not (count.isdecimal() and 0 < int(count[:10]) < 2**32)):
        expected = f"world: and one of {', '.join(WORLDS)}, then any of lessons, large, clips=N with commas between"
        raise ValueError(f"--data: expected {expected}; got world:{text}")
    return WorldData(world, "lessons" in values, "large" in values, None if count is None else int(count))


@dataclass(frozen=True)
class WorldData:
    """Clips of a world: the training part of studio, which keeps some for questions about what was never seen."""

    world: str = "simple"
    lessons: bool = False
    large: bool = False
    count: int | None = None

    @property
    def name(self) -> str:
        words = [self.world, *["lessons"] * self.lessons, *["large"] * self.large]
        return "world:" + ",".join(words if self.count is None else [*words, f"clips={self.count}"])

    def check(self, purpose: str, sizes: Sequence[Size], files: FileLimits) -> None:
        refuse("a world, whose clips have their own sizes", files._asdict())
        if purpose != "dit" and (self.lessons or self.large):
            raise ValueError(f"--data: expected a world without lessons and large, which only train knows, got {self.name}")
        if self.large and sizes:
            raise ValueError(f"--data: expected a world without large, as --size says all sizes, got {self.name}")

    def clips(self, wanted: Wanted, sizes: Sequence[Size], files: FileLimits, seed: int) -> Clips:
        config = getattr(WorldConfig, self.world)(seed)
        split = "training" if self.world == "studio" else None
        lessons = {"dit": LESSON_SHARES if self.lessons else {}, "vae": VAE_LESSON_SHARES}.get(wanted.purpose)
        sizes = list(sizes) or [whole_size(size, wanted.unit, wanted.timing) for size in self._sizes(wanted.purpose)]
        source = WorldSource(World(config, split=split), sizes, lessons=lessons, timing=wanted.timing)
        clips: Source = source if self.count is None else Repeated(source, self.count)

        def captions() -> Iterable[str]:
            samples = (source.load(i) for i in range(self.count or CAPTIONED))
            return (caption for sample in samples for caption in (sample.caption, sample.detailed) if caption)

        several = min(len(set(sizes)), 4) if self.count is None else 1
        return Clips(clips, sizes[0], captions, UNSEEN, repeated=self.count is not None, min_sizes=several)

    def _sizes(self, purpose: str) -> list[Size]:
        of_dit = [*CLIP_SIZES[self.world], *(LARGEST if self.large else [])]
        return {"vae": VAE_SIZES, "captioner": CAPTION_SIZES}.get(purpose, of_dit)
