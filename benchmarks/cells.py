"""How a measured row is written in a table, wherever the table is. Nothing here needs torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

UNITS = {"useful_gflops": "GFLOP/s", "useful_gbps": "GB/s"}


def percentiles(seconds: Sequence[float]) -> list[float]:
    """Milliseconds at 20%, 50% and 80%."""
    cuts = statistics.quantiles(sorted(seconds), n=10, method="inclusive")
    return [1e3 * cuts[i] for i in (1, 4, 7)]


def group(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["dtype"], row["pass"]


def rate(row: dict[str, Any]) -> str:
    """134.1 GFLOP/s; where it is both, 134.1 GFLOP/s, 12.5 GB/s."""
    return ", ".join(f"{row[key]:,.1f} {unit}" for key, unit in UNITS.items() if key in row)


def mark(row: dict[str, Any]) -> str:
    """The implementation's name, and what is to be known of it."""
    notes = ["inexact"] if "inexact" in row else []
    notes += ["by the reference"] if "reference" in row.get("backends", ()) else []
    notes += [f"host {row['host_ms']:.3g} ms"] if row.get("host_bound") else []
    return row["implementation"] + (f" ({', '.join(notes)})" if notes else "")


def milliseconds(value: float) -> str:
    """Three digits of it, or all of its whole ones."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
