"""Keeps what a GPU measured, and writes the table of it in docs/performance.md: python -m benchmarks.gpu.results [OUT]

OUT is a run's folder; its rows become benchmarks/results/<gpu>-<date>.json. The table, between two markers, is made of the latest
file of each GPU; a test compares.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.cells import group, mark, rate
from benchmarks.gpu import NAME

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- GPU results: python -m benchmarks.gpu.results -->", "<!-- end of GPU results -->"
HEADER = """\
| op | dtype | pass | ours | of copy bandwidth | best peer | ours is faster by |
|---|---|---|---:|---:|---|---:|"""


def kept(out: Path, folder: Path) -> Path:
    """The file that has a run's measurements: rows of ceilings, races, blocks, checks and promises, and the machine."""
    path = out / "rows.jsonl"
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # the last one, of a run that was killed
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict)]
    machine = next((row["machine"] for row in rows if isinstance(row.get("machine"), dict)), {})
    device = machine.get("device") or "a machine without one"
    if "device" not in machine or device == NAME:
        raise ValueError(f"{path}: expected rows of a GPU, got those of {device}")
    date = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).date().isoformat()
    wanted = [
        row for row in rows if any(key in row for key in ("ceiling", "implementation", "blocks", "check", "result", "promise"))
    ]
    name = re.sub(r"[^a-z0-9]+", "-", str(device).lower()).strip("-") or "gpu"
    results = {"machine": machine, "date": date, "rows": wanted}
    try:
        of_gpu(results, name)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a row or the machine lacks {error}") from error
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-{date}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    return file


def table() -> str:
    """The text between the markers."""
    latest = {re.sub(r"-\d{4}-\d\d-\d\d$", "", path.stem): path for path in sorted(FOLDER.glob("*.json"))}
    if not latest:
        return "Not measured yet."
    return "\n\n".join(of_gpu(json.loads(path.read_text()), path.name) for path in latest.values())


def of_gpu(results: dict[str, Any], name: str) -> str:
    """One file's rows: ours of each op, dtype and pass, beside the copy and the best of the rows that compute the same."""
    machine = results["machine"]
    lines = [f"{machine['device']}, torch {machine['torch']}, {results['date']} ([all rows](../benchmarks/results/{name})):"]
    lines += ["", HEADER]
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        if "implementation" in row and "ms" in row:
            groups.setdefault(group(row), {})[row["implementation"]] = row
    for key, rows in groups.items():
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


def updated(page: str) -> str:
    """The page with the table in its place."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return 2 * (len(sys.argv) > 2)
    if len(sys.argv) == 2:
        try:
            print(kept(Path(sys.argv[1]), FOLDER).relative_to(ROOT))
        except (OSError, ValueError) as error:
            print(f"OUT: {error}", file=sys.stderr)
            return 2
    PAGE.write_text(updated(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
