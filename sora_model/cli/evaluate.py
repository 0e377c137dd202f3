"""Commands that show what a checkpoint can do: eval, gallery, demo."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .app import app, console, load_pipeline, one_line_errors
from .data import CheckpointOption, DeviceOption

if TYPE_CHECKING:
    from ..evaluate import Measurement

Tasks = Annotated[list[str] | None, typer.Option("--task", help="One of them alone; repeat for several. Default: all.")]
StepsOption = Annotated[int, typer.Option("--steps", help="Denoising steps.")]
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

        names = _chosen(task, MEASUREMENTS)
        judge = Judge(load_pipeline(checkpoint, device), count, steps, guidance, seed)
        measured, began = [], time.perf_counter()
        for name in names:
            measured.append(MEASUREMENTS[name](judge))
            console.print(_table([measured[-1]]))
        console.print(f"{len(names)} tasks in {time.perf_counter() - began:.0f} s")
        if out is not None:
            _write(out, json.dumps({one.task: one.figures for one in measured}, indent=1) + "\n")
            _write(out.with_suffix(".md"), _markdown(measured, count, steps, guidance))


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
        from ..evaluate import MEASUREMENTS
        from ..gallery import make

        names = _chosen(task, MEASUREMENTS)
        for path in make(load_pipeline(checkpoint, device), names, out, steps, guidance, seed):
            console.print(str(path), highlight=False, soft_wrap=True)


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


def _chosen(task: list[str] | None, known: dict) -> list[str]:
    unknown = [name for name in task or [] if name not in known]
    if unknown:
        raise ValueError(f"--task: expected names out of {', '.join(known)}, got {', '.join(unknown)}")
    return task or list(known)


def _table(measured: list[Measurement]) -> Table:
    table = Table("task", "figure", "measured", "held to", "")
    for one in measured:
        for name, (value, target) in one.figures.items():
            bound = "" if target is None else f"at most {-target:g}" if target < 0 else f"{target:g}"
            mark = "" if target is None else "[red]missed[/]" if name in one.missed else "[green]yes[/]"
            table.add_row(one.task, name, f"{value:.3g}", bound, mark)
    return table


def _markdown(measured: list[Measurement], count: int, steps: int, guidance: float) -> str:
    command = f"sora eval --count {count} --steps {steps} --guidance {guidance:g}"
    lines = [
        f"`{command}`, on combinations of colour, shape and motion that were kept from training.",
        "",
        "| task | figure | measured | held to | |",
        "|---|---|---:|---:|---|",
    ]
    for one in measured:
        for name, (value, target) in one.figures.items():
            bound = "" if target is None else f"at most {-target:g}" if target < 0 else f"at least {target:g}"
            mark = "" if target is None else "missed" if name in one.missed else "holds"
            lines.append(f"| {one.task} | {name} | {value:.3g} | {bound} | {mark} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)
