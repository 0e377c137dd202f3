"""Makes a markdown table and a plot of the benchmarks' results.

pytest benchmarks --benchmark-only --benchmark-json=results.json
python -m benchmarks.report results.json                              ->  the table alone, printed
python -m benchmarks.report results.json --out docs/benchmarks        ->  docs/benchmarks/<processor>/README.md, benchmarks.png and
                                                                          ratios.json, which benchmarks.gate compares with
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.cells import UNITS, group, mark, milliseconds, percentiles, rate
from benchmarks.gate import folder_of, lowest, machine_of, processor_of
from benchmarks.race import OURS

HEADER = """\
| op | dtype | pass | implementation | useful work | ms p20 / p50 / p80 | ours is faster by |
|---|---|---|---|---:|---:|---:|"""
RATIOS = (0.5, 1, 2, 4, 8, 16, 32)
# By a word of the peer's name.
COLORS = {"compile": "#00798c", "no window": "#edae49", "padded": "#8d96a3", "copy": "#c8c8c8", "": "#30638e"}


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat dict for each row, skipped ones at the end of their group; rows that were interrupted are left out.

    A row's own unit is the first that it has; memory-bound products have both.
    """
    rows = []
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        units = [key for key in UNITS if key in info]
        if not units:
            continue
        ms = percentiles(benchmark["stats"]["data"])
        rows.append({**info, "work": info[units[0]], "unit": UNITS[units[0]], "ms": ms})
    order = {group(row): i for i, row in reversed(list(enumerate(rows)))}
    return sorted(rows + results["skipped"], key=lambda row: order.get(group(row), len(order)))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [HEADER]
    for row in rows:
        name = f"**{mark(row)}**" if row["implementation"] == OURS else mark(row)
        cells = [*group(row), name]
        if "reason" in row:
            cells += ["not supported", row["reason"].replace("|", "\\|"), ""]
        else:
            speedup = f"{row['speedup']:.2f}x" if "speedup" in row else ""
            cells += [rate(row), " / ".join(milliseconds(t) for t in row["ms"]), speedup]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Two columns, by unit; in each, a group per op, dtype and pass with a bar per peer: how much faster ours is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "reason" not in row]
    columns = [[row for row in rows if row["unit"] == unit] for unit in UNITS.values()]
    height = max(len(column) + 0.6 * len(list(groupby(column, group))) for column in columns)
    figure, axes = plt.subplots(1, 2, figsize=(16, 0.2 * height + 1), layout="constrained", sharex=True)
    for axis, column, unit in zip(axes, columns, UNITS.values(), strict=True):
        y = 0.0
        for key, members in groupby(column, group):
            title = " · ".join(key)
            for row in members:
                if row["implementation"] == OURS:
                    axis.text(1.04, y, f"{title}    {row['work']:.3g} {unit}", weight="bold", va="center", fontsize=9)
                else:
                    ratio, name = row["speedup"], row["implementation"]
                    fill = next(value for word, value in COLORS.items() if word in name)
                    axis.barh(y, ratio - 1, left=1, height=0.85, color=fill)
                    axis.text(max(ratio, 1) * 1.04, y, f"{ratio:.2f}x {name}", va="center", fontsize=8)
                y += 1
            y += 0.6
        axis.axvline(1, color="black", linewidth=1)
        axis.set(
            xscale="log", xlim=(0.35, 60), ylim=(height, -1), yticks=[], xticks=RATIOS, xticklabels=[f"{r:g}x" for r in RATIOS]
        )
        axis.set_xlabel(f"how many times faster {OURS} is than each peer", loc="left")
        axis.minorticks_off()
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what --benchmark-json wrote; earlier runs after the last")
    parser.add_argument(
        "--out", type=Path, help="where a folder of the table, the plot and the ratios goes; default: prints the table"
    )
    arguments = parser.parse_args()
    results, *earlier = (json.loads(path.read_text()) for path in arguments.results)
    rows = rows_of(results)
    if arguments.out is None:
        print(table(rows))
        return
    summary = (
        f"{machine_of(results)}, {results['datetime'][:10]}. Peers alternate with ours; the last "
        "column is the median of their ratios. How work is counted: `benchmarks/race.py`."
    )
    out = arguments.out / folder_of(processor_of(results))
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(f"# Benchmarks\n\n{summary}\n\n![](benchmarks.png)\n\n{table(rows)}\n")
    plot(rows, out / "benchmarks.png")
    (out / "ratios.json").write_text(json.dumps(lowest(results, *earlier), indent=1) + "\n")


if __name__ == "__main__":
    main()
