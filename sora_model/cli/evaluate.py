"""Commands that show what a checkpoint can do: eval, gallery, demo."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .app import app, console, load_pipeline, one_line_errors, say
from .data import CheckpointOption, DeviceOption

if TYPE_CHECKING:
    from ..evaluate import Judge, Measurement
    from ..pipeline import SoraPipeline

Tasks = Annotated[list[str] | None, typer.Option("--task", help="One of them alone; repeat for several. Default: all.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")]
GuidanceOption = Annotated[float, typer.Option("--guidance", help="Classifier-free guidance; 1 is none.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of scenes and noise.")]


@app.command(name="eval")
def evaluate(
    task: Tasks = None,
    count: Annotated[int, typer.Option(min=16, help="Prompts of text to video; other tasks take a share of it.")] = 200,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures; a table in Markdown goes beside it.")] = None,
    steps: StepsOption = 30,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 2026,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Judge what a checkpoint generates by the ground truth of the procedural world, task by task."""
    with one_line_errors():
        from ..evaluate import MEASUREMENTS, Judge

        if out is not None and (out.suffix != ".json" or out.is_dir()):
            raise ValueError(f"--out: expected a file that ends in .json, got {out}")
        pipeline = load_pipeline(checkpoint, device)
        names = _chosen(task, pipeline)
        judge = Judge(pipeline, count, steps, guidance, seed)
        measured, began = [], time.perf_counter()
        for name in names:
            measured.append(MEASUREMENTS[name](judge))
            console.print(_table([measured[-1]]))
            if out is not None:
                _write(out, json.dumps({one.task: one.figures for one in measured}, indent=1) + "\n")
                _write(out.with_suffix(".md"), _markdown(measured, judge))
        say(f"{len(names)} tasks in {time.perf_counter() - began:.0f} s")


@app.command()
def gallery(
    out: Annotated[Path, typer.Option(help="Folder for the contact sheets.")] = Path("docs/gallery"),
    task: Tasks = None,
    steps: StepsOption = 30,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 2026,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Make a contact sheet of every task."""
    with one_line_errors():
        from ..gallery import make

        pipeline = load_pipeline(checkpoint, device)
        for path in make(pipeline, _chosen(task, pipeline), out, steps, guidance, seed):
            say(str(path))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("outputs/demo"),
    seed: SeedOption = 0,
    checkpoint: CheckpointOption = None,
) -> None:
    """Generate videos with the checkpoint that comes with the package, every task once, and compare the kernels with torch."""
    with one_line_errors():
        from ..demo import run

        run(load_pipeline(checkpoint, "cpu"), out, seed, console)


def _chosen(task: list[str] | None, pipeline: SoraPipeline) -> list[str]:
    """The measurements asked for, or all that the checkpoint can take part in, which is said."""
    from ..evaluate import MEASUREMENTS, possible

    able = possible(pipeline)
    for name in task or []:
        if name not in MEASUREMENTS:
            raise ValueError(f"--task: expected names out of {', '.join(MEASUREMENTS)}, got {name}")
        if name not in able:
            raise ValueError(f"--task: expected tasks that this checkpoint can do, {', '.join(able)}, got {name}")
    left_out = [name for name in MEASUREMENTS if name not in able]
    if not task and left_out:
        say(f"left out, as the checkpoint cannot: {', '.join(left_out)}")
    return task or able


def _table(measured: list[Measurement]) -> Table:
    table = Table("task", "figure", "measured", "held to", "")
    for one in measured:
        for name, (value, target) in one.figures.items():
            bound = "" if target is None else f"at most {-target:g}" if target < 0 else f"{target:g}"
            mark = "" if target is None else "[red]missed[/]" if name in one.missed else "[green]yes[/]"
            table.add_row(one.task, name, f"{value:.3g}", bound, mark)
    return table


def _markdown(measured: list[Measurement], judge: Judge) -> str:
    options = f"--count {judge.count} --steps {judge.steps} --guidance {judge.guidance:g} --seed {judge.seed}"
    lines = [f"`sora eval {options}`", "", "| task | figure | measured | held to | |", "|---|---|---:|---:|---|"]
    for one in measured:
        for name, (value, target) in one.figures.items():
            bound = "" if target is None else f"at most {-target:g}" if target < 0 else f"at least {target:g}"
            mark = "" if target is None else "missed" if name in one.missed else "holds"
            lines.append(f"| {one.task} | {name} | {value:.3g} | {bound} | {mark} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    from ..checkpoint import whole_file

    with whole_file(path) as partial:
        partial.write_text(text)
