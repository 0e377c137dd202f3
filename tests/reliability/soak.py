"""Training and kernels for a long time: python -m tests.reliability.soak 600 --seed 0

Three parts share the seconds, or one has them (--only). `steps`: a small DiT trains on clips of ever new sizes, is saved and
resumed and generates, and after each of its steps every op runs forward and backward on a batch of another layout. `threads`:
several Python threads call ops at once, and must get the bits that one thread got before. `forks`: children of a process with such
threads, and workers of a DataLoader, must get them too.

What must not happen: a bit that differs from the same call earlier, a result that is not finite, a cache beyond its limit, memory
that drifts by more than 2 % after a warm-up, or by 0.2 % of what malloc has handed out, files or threads that are left. The ops of
step n follow from the seed and n: --step n repeats them alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from sora_kernels import memory
from sora_kernels.bias_gelu import bias_gelu
from sora_model import SoraPipeline
from sora_model.data import PackedSampler, Sample
from sora_model.sizes import Size
from sora_model.training.config import TrainConfig
from sora_model.training.dit import DiffusionObjective
from sora_model.training.trainer import Trainer
from tests.reliability.entries import workload
from tests.reliability.outcome import Outcome
from tests.reliability.random_works import DTYPES, Probe, run_ops
from tests.reliability.resources import Usage, drifted, reported, usage
from tests.reliability.together import soak_forks, soak_threads
from tests.small_pipeline import small_pipeline

PATCH = (1, 8, 8)
ROUND = 100  # steps between two saves, and between two looks at the probe
LOOKS = 200  # at what is used, at most
SHARES = {"steps": 0.7, "threads": 0.15, "forks": 0.15}  # of the seconds
WORDS = 1000  # of captions
CACHE_MB = 32  # of memory that is kept for outputs: less than fill_cache gives back


class Noise:
    """An endless source of clips of random sizes. The text encoder keeps the words that it has seen, so captions have few."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def size(self, index: int) -> Size:
        chance = random.Random(f"{self.seed} clip {index}")
        return chance.randint(1, 4), 8 * chance.randint(1, 4), 8 * chance.randint(1, 4)

    def load(self, index: int, epoch: int = 0) -> Sample:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return Sample(torch.rand(3, *self.size(index), generator=generator) * 2 - 1, f"noise number {index % WORDS}")


def training(folder: Path, seed: int) -> Iterator[int]:
    """Trains for ever, yielding the step; every so many steps it is saved, resumed from what was saved, and generates."""
    sampler = PackedSampler(Noise(seed), PATCH, tokens_per_batch=64, lookahead=8)
    pipeline = small_pipeline()
    for count in itertools.count(1):
        config = TrainConfig(steps=count * ROUND, seed=seed, optimizer="muon" if seed % 2 else "adamw")
        trainer = Trainer(DiffusionObjective(pipeline), sampler, config, folder, resume=count > 1)
        for done in trainer.train():
            yield done.step
        learned = trainer.averaged_model().state_dict()
        pipeline = SoraPipeline.from_pretrained(folder / "checkpoint")
        for name, value in DiffusionObjective(pipeline).model.state_dict().items():
            if not torch.equal(value, learned[name]):
                raise AssertionError(f"{name} of the checkpoint is not what was saved")
        first, second = (pipeline("noise", num_inference_steps=2, generator=0)[0] for _ in range(2))
        if not torch.equal(first, second) or not first.isfinite().all():
            raise AssertionError("two videos of one seed differ, or are not finite")


def fill_cache(chance: random.Random) -> list[str]:
    """Outputs that are large enough to be kept, of ever new sizes: 40 to 80 MiB."""
    outputs = [bias_gelu(torch.ones(1, 1).expand(chance.randint(1 << 20, 1 << 21), 1), None) for _ in range(10)]
    total = sum(x.nbytes for x in outputs)
    del outputs
    kept, limit = memory.cached_bytes(), memory.cache_limit()
    return [] if 0 < kept <= limit else [f"{kept} bytes of {total} are kept, with a limit of {limit}"]


def soak_steps(seconds: float, seed: int) -> Outcome:
    chance, probe = random.Random(seed), Probe()
    failures: list[str] = []
    used: list[Usage] = []
    begin, step = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            for step in training(Path(folder) / "run", seed):
                failures += run_ops(seed, step)
                if step % 20 == 0:
                    failures += fill_cache(chance)
                    workload(chance.choice(DTYPES))
                if step % ROUND == 0:
                    failures += probe.wrong()
                elapsed = time.monotonic() - begin
                if step % 10 == 5 and elapsed > len(used) * seconds / LOOKS:  # apart from saving
                    used.append(usage())
                if elapsed > seconds and len(used) > 1:
                    break
        except AssertionError as error:
            failures.append(f"seed {seed}, behind step {step}: {error}")
    failures += drifted("steps", used, "resident") if len(used) > 1 else []
    return reported(Outcome("soak, steps", step, len(failures), memory=max((x.resident for x in used), default=0)), failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SHARES, help="all the time for this part")
    parser.add_argument("--step", type=int, help="run the ops of this step only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.step is not None:
        failures = run_ops(options.seed, options.step)
        print(reported(Outcome("soak, steps", 1, min(len(failures), 1)), failures))
        return int(len(failures) > 0)
    os.environ["SORA_KERNELS_CACHE_MB"] = str(CACHE_MB)
    parts = {"steps": soak_steps, "threads": soak_threads, "forks": soak_forks}
    failed = 0
    for name in [options.only] if options.only else parts:
        outcome = parts[name](options.seconds * (1 if options.only else SHARES[name]), options.seed)
        print(outcome, flush=True)
        failed += outcome.failed
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
