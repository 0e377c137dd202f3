"""Checkpoints, batch files, prompts and paths that somebody has damaged or made up: python -m tests.reliability.documents 500

COUNT cases are checkpoints (`checkpoints.py`), and COUNT what a command line may be given (`arguments.py`). Each is a command of
`sora` in a process of its own. It must end well or with one line that names the file or option and exit status 2, within 10 seconds
and 1 GiB more than the process began with. It must not start another process, open a connection, read a pickle, run code of the
checkpoint or write outside its folder. Case i of a seed is always the same: --first i with a count of 1 repeats it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers

from tests.reliability.arguments import Inputs, draw_call
from tests.reliability.checkpoints import Original, damage, make_originals
from tests.reliability.guarded import Ended, in_a_process, sora
from tests.reliability.outcome import Outcome

MODULES = (
    "sora_model.cli", "sora_model.pipeline.pipeline", "sora_model.training.dit", "sora_model.training.recipes.dit",
    "sora_model.pipeline.tasks", "sora_model.caption.chat", "sora_model.data", "diffusers", "transformers.models.llama",
    "transformers.models.t5", "transformers.models.umt5", "transformers.models.gpt2", "transformers.generation",
)  # fmt: skip
KINDS = {"checkpoints": "checkpoints", "calls": "batch files, prompts and paths"}  # as their outcomes are called


class Case(NamedTuple):
    """What was tried, how the command ended, and what is wrong with that."""

    what: str
    ended: Ended
    faults: list[str]


def run_checkpoint(originals: list[Original], base: Path, work: Path, seed: int, number: int) -> Case:
    """base: the folder of all cases and originals. work: that of this one."""
    rng = np.random.default_rng((seed, number))
    original = originals[number % len(originals)]
    place = work / "case"
    shutil.copytree(original.folder, place / original.name)
    folder = place / original.name
    what = f"{original.name}: {damage(folder, rng)}"
    command = original.commands[int(rng.integers(len(original.commands)))]
    ended = _ended(original, command, folder, base, work)
    # A loss that is not finite, and ids without a vector, show only once it trains: these errors do not name the file.
    named = [f"{original.option}: ", str(folder), "Trainer: the loss is ", "tokenizer: expected ids from "]
    faults = ended.faults(named, more=True)
    faults += ["code ran"] if any(place.rglob("ran")) else []
    return Case(f"sora {' '.join(command)}: {what}", ended, faults)


def _ended(original: Original, command: Sequence[str], folder: Path, base: Path, work: Path) -> Ended:
    words = [word.format(folder=folder, out=work / "out") for word in command]
    # A run that is resumed is written to; its code and its files are as foreign as those of others.
    writable = folder if original.name == "run" else work / "out"
    return in_a_process(sora(words), writable=writable, untrusted=folder, protected=base)


def check_originals(originals: list[Original], base: Path) -> None:
    """Raises RuntimeError for a command that fails on a sound folder: damage would show nothing."""
    for number, (original, command) in enumerate((one, command) for one in originals for command in one.commands):
        place = base / "sound" / str(number)
        (place / "out").mkdir(parents=True)
        shutil.copytree(original.folder, place / original.name)
        ended = _ended(original, command, place / original.name, base, place)
        if ended.code or ended.events:
            raise RuntimeError(f"sora {' '.join(command)} on a sound {original.name}: {ended}")


def run_call(inputs: Inputs, base: Path, work: Path, seed: int, number: int) -> Case:
    call = draw_call(inputs, work, np.random.default_rng((seed, number, 1)))
    out = work / "out"
    ended = in_a_process(sora(call.words, out), writable=out, untrusted=work / "case", protected=base)
    return Case(call.what, ended, ended.faults(call.named, well=call.may_end_well, more=True))


class Documents:
    """Originals and sound inputs in a folder, and the cases on them."""

    def __init__(self, base: Path) -> None:
        for name in MODULES:
            import_module(name)  # once, for all the forks
        transformers.utils.logging.disable_progress_bar()
        self.base = base
        self.originals, self.inputs = make_originals(base / "originals"), Inputs.make(base / "inputs")
        check_originals(self.originals, base)

    def run(self, kind: str, seed: int, number: int) -> Case:
        """One of KINDS; what fails is printed with the command that repeats it."""
        work = self.base / "work" / f"{kind}-{number}"
        (work / "out").mkdir(parents=True)
        (work / "case").mkdir()
        run = partial(run_checkpoint, self.originals) if kind == "checkpoints" else partial(run_call, self.inputs)
        case = run(self.base, work, seed, number)
        if case.faults:
            again = f"python -m tests.reliability.documents 1 --only {kind} --seed {seed} --first {number}"
            shown = case.ended.text[-1500:].encode("ascii", "backslashreplace").decode()
            print(again, f"  {ascii(case.what)[1:-1]}", f"  {ascii('; '.join(case.faults))[1:-1]}", shown, sep="\n", flush=True)
        shutil.rmtree(work, ignore_errors=True)
        return case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=500, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", choices=list(KINDS), help="this kind alone")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        documents = Documents(Path(name))
        for kind in [options.only] if options.only else KINDS:
            cases = [documents.run(kind, options.seed, options.first + number) for number in range(options.count)]
            wrong = sum(bool(case.faults) for case in cases)
            failed += wrong
            print(f"commands that end well: {sum(not case.ended.code for case in cases)}")
            most = max((case.ended.more for case in cases), default=0)
            longest = max((case.ended.seconds for case in cases), default=0.0)
            print(Outcome(KINDS[kind], options.count, wrong, seconds=longest, memory=max(most, 0)), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
