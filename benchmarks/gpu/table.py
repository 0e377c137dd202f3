"""The table that a run ends with: what ran, what did not and why, what was wrong, what was measured; short enough for a log."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from benchmarks.cells import group, mark, milliseconds
from benchmarks.gpu.rows import of_kind, one_line

LARGEST = 11_800  # characters
LINES = 15  # at most, of what was wrong or failed

Rows = list[dict[str, Any]]


def wrong(rows: Rows) -> list[str]:
    bad = [row for row in of_kind(rows, "check") if row.get("ok") is not True]
    return [f"{row['check']}: errors {row.get('errors')}, ran {row.get('ran')}" for row in bad]


def failed(rows: Rows) -> list[str]:
    return [f"{row['test']}: {row.get('reason', '')}" for row in of_kind(rows, "test") if row.get("outcome") == "failed"]


def not_kept(rows: Rows) -> list[str]:
    """Kernels of others may break them: this says which must not run by default."""
    return [f"{row['backend']}: {row['promise']}" for row in of_kind(rows, "promise") if row.get("kept") is False]


def errors(rows: Rows) -> list[str]:
    return [f"{row.get('stage')}, {row.get('item')}: {row['error']}" for row in of_kind(rows, "error")]


def failures(rows: Rows) -> int:
    """Of checks, tests, items and processes."""
    ended = sum("hung" in row or "crashed" in row or str(row.get("result")).startswith("not started") for row in rows)
    return len(wrong(rows)) + len(failed(rows)) + len(errors(rows)) + ended


def summary(rows: Rows, outcomes: list[str], seconds: float) -> str:
    """A section that a row it does not understand breaks says so; the others are there."""
    sections = []
    for section in (
        lambda: head(rows, seconds),
        lambda: [cut(outcome, 200) for outcome in outcomes],
        lambda: counted("checks against float64 wrong", wrong(rows), len(list(of_kind(rows, "check")))),
        lambda: counted("promises not kept", not_kept(rows), sum(row.get("kept") is not None for row in of_kind(rows, "promise"))),
        lambda: counted("tests failed", failed(rows), len(list(of_kind(rows, "test")))),
        lambda: counted("items failed", errors(rows), len(errors(rows))),
        lambda: tuned(rows),
        lambda: measured(rows),
    ):
        try:
            sections.append(section())
        except Exception as error:
            sections.append([f"a part of the table is missing: {one_line(error)}"])
    sections = [[str(line) for line in section] for section in sections]
    text = "\n\n".join("\n".join(section) for section in sections if section)
    if len(text) <= LARGEST:
        return text
    return text[:LARGEST].rpartition("\n")[0] + "\n... and more in rows.jsonl"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def head(rows: Rows, seconds: float) -> list[str]:
    machine = next((row["machine"] for row in of_kind(rows, "machine")), {})
    versions = [f"{key} {machine[key]}" for key in ("torch", "triton", "driver") if machine.get(key)]
    lines = [", ".join([machine.get("device", "no GPU"), *versions])]
    lines += [f"{row['prepared']}: {row['how']}" for row in of_kind(rows, "prepared")]
    compiled = [row["seconds"] for row in of_kind(rows, "compiled")]
    lines.append(f"{seconds:.0f} s, of which {sum(compiled):.0f} s of processes compiled {len(compiled)} kernels")
    ceilings = [f"{row['ceiling']} {short_rate(row)}" for row in of_kind(rows, "ceiling")]
    return [*lines, *([f"ceilings: {', '.join(ceilings)}"] if ceilings else [])]


def counted(what: str, bad: list[str], count: int) -> list[str]:
    if not count:
        return []
    more = [f"... and {len(bad) - LINES} more"] if len(bad) > LINES else []
    return [f"{what}: {len(bad)} of {count}", *(cut(line, 250) for line in bad[:LINES]), *more]


def short_rate(row: dict[str, Any]) -> str:
    if "useful_gflops" in row:
        return f"{row['useful_gflops'] / 1e3:.1f} TFLOP/s"
    return f"{row['useful_gbps']:.0f} GB/s"


def share(row: dict[str, Any], ceilings: dict[str, float]) -> str:
    """Of the ceiling of its own unit."""
    unit = "useful_gflops" if "useful_gflops" in row else "useful_gbps"
    return f"{row[unit] / ceilings[unit]:.0%}" if unit in ceilings else ""


def measured(rows: Rows) -> list[str]:
    """A line for each op, dtype and pass: ours, then how many times faster it is than each of the others."""
    ceilings = {key: row[key] for row in of_kind(rows, "ceiling") for key in ("useful_gflops", "useful_gbps") if key in row}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in of_kind(rows, "implementation"):
        groups.setdefault(group(row), []).append(row)
    lines = []
    for key, members in groups.items():
        cells = [f"{mark(row)} {row['speedup']:.2f}x" for row in members if "speedup" in row]
        cells += [f"{row['implementation']} not supported" for row in members if "reason" in row]
        for row in members:
            if "ms" in row and "speedup" not in row:
                of_ceiling = f" ({share(row, ceilings)} of the ceiling)" if share(row, ceilings) else ""
                cells.insert(0, f"{mark(row)} {short_rate(row)}{of_ceiling}, {milliseconds(row['ms'][1])} ms")
        lines.append(f"{', '.join(key)}: {'; '.join(cells)}")
    return ["measured, and how many times faster ours is", *lines] if lines else []


def tuned(rows: Rows) -> list[str]:
    """For each line of the tables the present blocks and the best ones."""
    lines = []
    for (kernel, head_dim), members in groupby(of_kind(rows, "blocks"), lambda row: (row["kernel"], row["head_dim"])):
        timed = [row for row in members if "ms" in row]
        if timed:
            best = min(timed, key=lambda row: row["ms"])
            present = next((f"{tuple(row['blocks'])} {row['ms']:.3f} ms" for row in timed if row["present"]), "not measured")
            text = f"{kernel}, d {head_dim}: present {present}, best of {len(timed)}"
            lines.append(f"{text} {tuple(best['blocks'])} {best['ms']:.3f} ms")
    return ["blocks (queries, keys, warps, stages)", *lines] if lines else []
