"""Checkpoints, batch files, prompts and paths that somebody has damaged or made up: python -m tests.reliability.documents 500

COUNT cases are checkpoints (`checkpoints.py`), and COUNT what a command line may be given (`arguments.py`). Each is a command of
`sora` in a process of its own. It must end well or with one line that names the file or option and exit status 2, within 10 seconds
and 1 GiB more than the process began with. It must not start another process, open a connection, read a pickle, run code of the
checkpoint or write outside its folder. Case i of a seed is always the same: --first i with a count of 1 repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import transformers

from tests.reliability.arguments import Call, Inputs, draw_call
from tests.reliability.checkpoints import Original, damage, make_originals
from tests.reliability.child import Ended, in_a_process, sora
from tests.reliability.outcome import Outcome

MODULES = (
    "sora_model.cli", "sora_model.pipeline.pipeline", "sora_model.training.dit", "sora_model.training.recipes.dit",
    "sora_model.pipeline.tasks", "sora_model.caption.chat", "sora_model.data", "diffusers", "transformers.models.llama",
    "transformers.models.t5", "transformers.models.umt5", "transformers.models.gpt2", "transformers.generation",
)  # fmt: skip


def run_checkpoint(originals: list[Original], work: Path, seed: int, number: int) -> tuple[str, list[Ended], list[str]]:
    """What was damaged, how the commands on it ended, and what is wrong with that."""
    rng = np.random.default_rng((seed, number))
    original = originals[number % len(originals)]
    place = work / "case"
    shutil.copytree(original.folder, place / original.name)
    folder = place / original.name
    what = f"{original.name}: {damage(folder, rng)}"
    command = original.commands[int(rng.integers(len(original.commands)))]
    ended = _ended(original, command, folder, work)
    faults = ended.faults([original.option, "checkpoint:", "the loss is", "tokenizer", *_names_in(place)], more=True)
    faults += ["code ran"] if any(place.rglob("ran")) else []
    return f"sora {' '.join(command)}: {what}", [ended], faults


def _ended(original: Original, command: Sequence[str], folder: Path, work: Path) -> Ended:
    words = [word.format(folder=folder, out=work / "out") for word in command]
    # A run that is resumed is written to; its code and its files are as foreign as those of others.
    writable = folder if original.name == "run" else work / "out"
    return in_a_process(sora(words), writable=writable, untrusted=folder)


def check_originals(originals: list[Original], work: Path) -> None:
    """Raises RuntimeError for a command that fails on a sound folder: damage would show nothing."""
    for number, (original, command) in enumerate((one, command) for one in originals for command in one.commands):
        place = work / f"sound {number}"
        (place / "out").mkdir(parents=True)
        shutil.copytree(original.folder, place / original.name)
        ended = _ended(original, command, place / original.name, place)
        if ended.code or ended.events:
            raise RuntimeError(f"sora {' '.join(command)} on a sound {original.name}: {ended}")


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".txt", ".jinja", ".model")]


def run_call(inputs: Inputs, work: Path, seed: int, number: int) -> tuple[str, list[Ended], list[str]]:
    call: Call = draw_call(inputs, work, np.random.default_rng((seed, number, 1)))
    with contextlib.chdir(work / "out") if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        ended = in_a_process(sora(call.words), writable=work / "out", untrusted=work / "case")
    return call.what, [ended], ended.faults(call.named, well=call.may_end_well, more=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", choices=["checkpoints", "calls"])
    options = parser.parse_args()
    for name in MODULES:
        import_module(name)  # once, for all the forks
    failed = 0
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        originals, inputs = make_originals(base / "originals"), Inputs.make(base / "inputs")
        check_originals(originals, base / "sound")
        for kind, title in (("checkpoints", "checkpoints"), ("calls", "batch files, prompts and paths")):
            if options.only not in (None, kind):
                continue
            endings, wrong = [], 0
            for number in range(options.first, options.first + options.count):
                work = base / "work" / str(number)
                (work / "out").mkdir(parents=True)
                (work / "case").mkdir()
                if kind == "checkpoints":
                    what, ended, faults = run_checkpoint(originals, work, options.seed, number)
                else:
                    what, ended, faults = run_call(inputs, work, options.seed, number)
                endings += ended
                if faults:
                    wrong += 1
                    shown = "\n".join(one.text[-1500:] for one in ended).encode("ascii", "backslashreplace").decode()
                    head = ascii(f"{kind}, seed {options.seed}, number {number}: {what}")[1:-1]
                    print(head, f"  {'; '.join(faults)}", shown, sep="\n", flush=True)
                shutil.rmtree(work, ignore_errors=True)
            failed += wrong
            print(f"{sum(not one.code for one in endings)} commands end well")
            most, longest = max(one.more for one in endings), max(one.seconds for one in endings)
            print(Outcome(title, options.count, wrong, seconds=longest, memory=max(most, 0)), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    os.environ["COLUMNS"] = "10000"  # lines of usage errors are not wrapped
    sys.exit(main())
