"""Blocks that are left out where the first one changes little from one step of sampling to the next: `StepCache`.

    r  = b_1(x) - x                           what the first block adds
    d  = b_n(...b_2(b_1(x))) - b_1(x)         what the others add
    |r - r'|_1 < threshold |r'|_1             decides, for each sample, that b_1(x) + d' is near enough

where r' and d' are of the last step at which all blocks ran. Sources: Liu et al., Timestep Embedding Tells: It's Time to Cache for
Video Diffusion Model (TeaCache, 2024); ParaAttention's first-block cache (2024).
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block import Residual, Window
from .conditioning import Samples
from .dit import DiT


class _Kept(NamedTuple):
    """Of a sample's last step with all blocks: its transformer, r' and d'."""

    dit: DiT
    first: Tensor
    others: Tensor


class StepCache:
    """What is kept from step to step of one run of sampling, two [N, D] of each sample, and how much was left out.

    >>> cache = StepCache(0.1)
    >>> with torch.no_grad():
    ...     for sigma in (1.0, 0.99):                                       # steps of sampling
    ...         velocities = dit(latents, torch.full((len(latents),), 1000 * sigma), text, cache=cache.of(range(len(latents))))
    >>> cache.passes, cache.reused                                          # of samples
    (4, 2)

    What is left out is an error of the result. `errors` has what can be known of it without running all blocks: each time they do
    run again, |d - d'|_1 / |d|_1.

    Args:
        threshold: a larger one leaves out more; 0 nothing.
    """

    def __init__(self, threshold: float) -> None:
        if not isinstance(threshold, int | float) or not 0 <= threshold < 1:
            raise ValueError(f"StepCache: threshold: expected a number from 0 to below 1, got {threshold!r}")
        self.threshold, self.passes, self.reused = threshold, 0, 0
        self.errors: list[float] = []
        self.kept: dict[Hashable, _Kept] = {}
        self.left_out: set[Hashable] = set()  # samples that lack the blocks since they ran last

    def of(self, samples: Sequence[Hashable], groups: Sequence[Hashable] | None = None) -> CachedSamples:
        """As `DiT.forward` takes it.

        samples: which ones a batch has, by names that stay the same from step to step. groups: of each sample; those of one group
        leave out blocks together, as halves of guidance should, whose difference is enlarged. Default: each by itself.
        """
        names = tuple(samples)
        of_each = names if groups is None else tuple(groups)
        if len(set(names)) != len(names) or len(of_each) != len(names):
            raise ValueError(f"StepCache.of: samples: expected different names, and a group for each, got {names} and {of_each}")
        return CachedSamples(self, names, of_each)

    def report(self) -> str:
        """What was left out, and how much the blocks had changed when they ran again, in one line."""
        text = f"step cache {self.threshold:g}: {self.reused} of {self.passes} passes of samples without most blocks"
        if not self.errors:
            return text
        mean = sum(self.errors) / len(self.errors)
        return f"{text}; when they ran again, what they add had changed by {mean:.1%} (at most {max(self.errors):.1%})"

    def clear(self) -> None:
        """Forgets what is kept, for another run of sampling; the counts go on."""
        self.kept.clear()
        self.left_out.clear()

    def keep(self, name: Hashable, kept: _Kept) -> None:
        """After all blocks have run."""
        if name in self.left_out:
            before = self.kept[name].others
            if self.kept[name].dit is kept.dit and before.shape == kept.others.shape:
                self.errors.append(float(_share(kept.others, before)))
            self.left_out.remove(name)
        self.kept[name] = kept


@contextlib.contextmanager
def fresh(cache: StepCache | None) -> Iterator[None]:
    """Within it a cache begins with nothing, and afterwards it holds no memory."""
    try:
        if cache is not None:
            cache.clear()
        yield
    finally:
        if cache is not None:
            cache.clear()


class CachedSamples(NamedTuple):
    """A `StepCache` for the samples of one batch."""

    cache: StepCache
    names: tuple[Hashable, ...]
    groups: tuple[Hashable, ...]

    def select(self, which: Sequence[int]) -> CachedSamples:
        return CachedSamples(self.cache, tuple(self.names[i] for i in which), tuple(self.groups[i] for i in which))

    def run(self, dit: DiT, samples: Samples, window: Window | None) -> list[Tensor]:
        """The outputs of a transformer, each sample with all blocks or the first alone."""
        if len(self.names) != len(samples.latents):
            raise ValueError(f"DiT: cache: expected names of {len(samples.latents)} samples, got {list(self.names)}")
        begun = dit.begin(samples, window)
        cu_rows, layout = begun.context.cu_rows, begun.context.layout
        x = dit.run_blocks(begun, Residual(begun.x), 0, 1).sum(cu_rows)
        first = layout.unpack(x - begun.x)
        near = self._near(dit, first)
        if any(near) and not all(near):  # each kind by itself, where the first block runs again
            outputs: list[Any] = [None] * len(near)
            for kind in (True, False):
                which = [i for i, one in enumerate(near) if one == kind]
                found = self.select(which).run(dit, samples.select(which, dit.config.patch_size[0]), window)
                for i, output in zip(which, found, strict=True):
                    outputs[i] = output
            return outputs
        self.cache.passes += len(near)
        if all(near):
            self.cache.reused += len(near)
            self.cache.left_out.update(self.names)
            return dit.end(begun, Residual(x, torch.cat([self.cache.kept[name].others for name in self.names])))
        last = dit.run_blocks(begun, Residual(x), 1).sum(cu_rows)
        for name, r, others in zip(self.names, first, layout.unpack(last - x), strict=True):
            self.cache.keep(name, _Kept(dit, r.detach().clone(), others.detach().clone()))  # not all of the batch with each
        return dit.end(begun, Residual(last))

    def _near(self, dit: DiT, first: Sequence[Tensor]) -> list[bool]:
        """Of each sample, whether its group's first blocks add nearly the same as at the last step with all blocks."""
        kept = [self.cache.kept.get(name) for name in self.names]
        shares = [
            torch.full((), torch.inf, device=r.device)
            if k is None or k.dit is not dit or k.first.shape != r.shape
            else _share(k.first, r)
            for r, k in zip(first, kept, strict=True)
        ]
        near = (torch.stack(shares) < self.cache.threshold).tolist()
        far = {group for group, one in zip(self.groups, near, strict=True) if not one}
        return [group not in far for group in self.groups]


def _share(before: Tensor, after: Tensor) -> Tensor:
    """|after - before|_1 / |before|_1, 0 of nothing."""
    changed, whole = (torch.linalg.vector_norm(x, 1, dtype=torch.float32) for x in (after - before, before))
    return changed / whole.clamp(min=1e-30)
