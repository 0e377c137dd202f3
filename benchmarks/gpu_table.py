"""Writes README's table of GPU results: python -m benchmarks.gpu_table

From what was really measured, benchmarks/results/<gpu>-<date>.json as `benchmarks/run_gpu.sh` makes them, the latest of each GPU.
It stands between two markers in README; a test compares.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from benchmarks.report import group, mark, rate, rows_of

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- GPU results: python -m benchmarks.gpu_table -->", "<!-- end of GPU results -->"
HEADER = """\
| op | dtype | pass | ours | of copy bandwidth | best peer | ours is faster by |
|---|---|---|---:|---:|---|---:|"""


def table() -> str:
    """The text between the markers."""
    latest = {path.name.rpartition("-20")[0]: path for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))}
    if not latest:
        return "Not measured yet."
    return "\n\n".join(of_gpu(path) for path in latest.values())


def of_gpu(path: Path) -> str:
    """One file's rows: ours of each op, dtype and pass, beside the copy and the best of the rows that compute the same."""
    results = json.loads(path.read_text())
    machine = results["machine_info"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {results['datetime'][:10]} ([all rows](benchmarks/results/{path.name})):"
    ]
    lines += ["", HEADER]
    for key, members in groupby(rows_of(results), group):
        rows = {row["implementation"]: row for row in members if "reason" not in row}
        ours, copy = rows.pop("sora_kernels", None), rows.pop("copy", None)
        peers = [row for name, row in rows.items() if "sora_kernels" not in name]
        if ours is None or not (peers or copy):
            continue
        # A copy moves as many bytes as the op must, so that the share of its bandwidth is the ratio of the times.
        cells = [*key, rate(ours), f"{copy['speedup']:.0%}" if copy else ""]
        best = min(peers, key=lambda row: row["speedup"], default=None)
        cells += [mark(best), f"{best['speedup']:.2f}x"] if best else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def updated(readme: str) -> str:
    """README with the table in its place."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
