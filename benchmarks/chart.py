"""Draws README's chart of the committed figures: python -m benchmarks.chart

docs/benchmarks/<processor>/README.md -> docs/benchmarks/chart.png
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
TABLE = FOLDER / "amd-epyc-family-26-model-2" / "README.md"  # of the processor that README shows
# Rows of the table, by op, dtype, pass and implementation.
BARS = (
    ("attention", "float32", "forward", "SDPA per sample"),
    ("attention", "bfloat16", "forward", "SDPA per sample"),
    ("attention", "float32", "forward", "SDPA padded"),
    ("layer_norm_modulate, rows per sample", "float32", "forward", "torch.compile"),
    ("rope_3d", "float32", "forward", "torch.compile"),
    ("qk_norm_rope_3d", "bfloat16", "forward", "torch.compile"),
    ("patch_embed_3d", "float32", "forward", "Conv3d per video"),
    ("DiT training step", "float32", "forward+backward", "torch per sample"),
)


def ratios(table: str) -> dict[tuple[str, ...], float]:
    """How many times as fast ours is, by a row's first four cells."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("|")]
    return {tuple(row[:4]): float(row[-1].rstrip("x")) for row in rows if row[-1].rstrip("x").replace(".", "", 1).isdigit()}


def draw(page: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = ratios(page)
    values = [found[bar] for bar in BARS]
    labels = [f"{op.partition(',')[0]}, {dtype}, {direction}\n{peer}" for op, dtype, direction, peer in BARS]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    bars = axis.barh(range(len(BARS)), values, color="#30638e")
    axis.bar_label(bars, [f"{value:.1f}x" for value in values], padding=4, fontsize=9)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(BARS)), labels, fontsize=8)
    axis.set(xlim=(0, 1.1 * max(values)), xticks=[])
    axis.invert_yaxis()
    axis.set_title("how many times as fast as the peer (the line is 1)", loc="left", fontsize=10)
    axis.set_xlabel(page.splitlines()[2].partition(". ")[0], loc="left", fontsize=8)  # the machine
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(TABLE.read_text(), FOLDER / "chart.png")
