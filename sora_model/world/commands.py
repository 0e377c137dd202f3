"""Commands of the world: eval, gallery and demo show what a checkpoint can do, scaling what training compute does."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..cli.app import (
    Loaded,
    Overwrite,
    app,
    check_file,
    check_folder,
    check_new,
    check_values,
    command,
    console,
    one_line_errors,
    say,
    to_path,
)
from ..cli.run import errors_by_option

if TYPE_CHECKING:
    from ..pipeline.pipeline import SoraPipeline
    from .evaluate import Judge, Measurement


@dataclass(frozen=True)
class Measuring(Loaded):
    """The options of eval and gallery."""

    task: Annotated[list[str] | None, typer.Option(help="One of them alone; repeat for several. Default: all.")] = None
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 3.0
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of scenes and noise.")] = 2026

    def pipeline(self, *, captioner: bool = False) -> SoraPipeline:
        from .evaluate import MEASUREMENTS

        for name in self.task or []:
            if name not in MEASUREMENTS:
                raise ValueError(f"--task: expected names out of {', '.join(MEASUREMENTS)}, got {name}")
        return super().pipeline(captioner=captioner)

    def tasks(self, pipeline: SoraPipeline) -> list[str]:
        """The measurements asked for, or all that the checkpoint can take part in; which it cannot is said."""
        from .evaluate import MEASUREMENTS, possible

        able = possible(pipeline)
        for name in self.task or []:
            if name not in able:
                raise ValueError(f"--task: expected tasks that this checkpoint can do, {', '.join(able)}, got {name}")
        left_out = [name for name in MEASUREMENTS if name not in able]
        if not self.task and left_out:
            say(f"left out, as the checkpoint cannot: {', '.join(left_out)}")
        return self.task or able


@command(Measuring, name="eval")
def evaluate(
    count: Annotated[int, typer.Option(min=16, help="Prompts of text to video; other tasks take a share of it.")] = 200,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures; a table in Markdown goes beside it.")] = None,
    overwrite: Overwrite = False,
    *,
    measuring: Measuring,
) -> None:
    """Judge what a checkpoint generates by the ground truth of the procedural world, task by task."""
    if out is not None:
        check_file(out, ".json")
        check_file(out.with_suffix(".md"), ".md")
        for path in (out, out.with_suffix(".md")):
            check_new(path, overwrite)
    from .evaluate import MEASUREMENTS, Judge

    pipeline = measuring.pipeline()
    names = measuring.tasks(pipeline)
    judge = Judge(pipeline, count, measuring.steps, measuring.guidance, measuring.seed)
    measured, began = [], time.perf_counter()
    for name in names:
        measured.append(MEASUREMENTS[name](judge))
        console.print(_table([measured[-1]]))
        if out is not None:
            _write(out, json.dumps({one.task: {k: asdict(v) for k, v in one.figures.items()} for one in measured}, indent=1) + "\n")
            _write(out.with_suffix(".md"), _markdown(measured, judge))
    say(f"{len(names)} tasks in {time.perf_counter() - began:.0f} s")


@command(Measuring)
def gallery(
    out: Annotated[Path, typer.Option(help="Folder for the contact sheets.")] = Path("docs/gallery"),
    overwrite: Overwrite = False,
    *,
    measuring: Measuring,
) -> None:
    """Make a contact sheet of every task."""
    check_folder(out)
    from .evaluate import MEASUREMENTS
    from .gallery import make

    for name in measuring.task or MEASUREMENTS:
        check_new(out / f"{name}.png", overwrite)
    pipeline = measuring.pipeline()
    for path in make(pipeline, measuring.tasks(pipeline), out, measuring.steps, measuring.guidance, measuring.seed):
        say(str(path))


@command(Loaded)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("outputs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of everything random.")] = 0,
    overwrite: Overwrite = False,
    *,
    loaded: Loaded,
) -> None:
    """Generate videos with the checkpoint that comes with the package, every task once, and compare the kernels with torch."""
    for folder in (out, out / "first", out / "videos"):
        check_folder(folder)
    check_new(out / "tasks.png", overwrite)
    from .demo import run

    run(loaded.pipeline(), out, seed, console, overwrite=overwrite)


@app.command()
def scaling(
    out: Annotated[Path, typer.Argument(parser=to_path, help="Folder of the study.")],
    compute: Annotated[float, typer.Option(min=1, help="Floating-point operations that each model is trained with.")] = 2e13,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of everything random.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train models of four sizes with the same compute, in at most 15,000 steps, and plot their losses against it."""
    with one_line_errors(), errors_by_option():
        check_values({"compute": compute}, {"compute": "--compute"})
        check_folder(out, "OUT")
        for name in ("scaling.json", "scaling.png"):
            check_new(out / name, overwrite, "OUT")
        from .scaling import study

        out.mkdir(parents=True, exist_ok=True)
        study(
            out, compute, seed, lambda p: console.print(f"{p.model}  step {p.step}  {p.compute:.2e} operations  loss {p.loss:.4f}")
        )
        say(str(out / "scaling.png"))


def _table(measured: list[Measurement]) -> Table:
    table = Table("task", "figure", "measured", "held to", "")
    colors = {"holds": "[green]holds[/]", "missed": "[red]missed[/]", "": ""}
    for one in measured:
        for name, figure in one.figures.items():
            table.add_row(one.task, name, f"{figure.value:.3g}", figure.bound, colors[figure.verdict])
    return table


def _markdown(measured: list[Measurement], judge: Judge) -> str:
    options = f"--count {judge.count} --steps {judge.steps} --guidance {judge.guidance:g} --seed {judge.seed}"
    lines = [f"`sora eval {options}`", "", "| task | figure | measured | held to | |", "|---|---|---:|---:|---|"]
    for one in measured:
        for name, figure in one.figures.items():
            lines.append(f"| {one.task} | {name} | {figure.value:.3g} | {figure.bound} | {figure.verdict} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    from ..storage.files import whole_file

    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
