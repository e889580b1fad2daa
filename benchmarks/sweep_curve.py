"""Perplexity against a swept option, from the CSV of `lit-actreg table` whose rows are named by the option's values.

    lit-actreg table … --checkpoints '{"1e-5": …/last.ckpt, "1e-4": …/last.ckpt}' --output runs/sweep
    python benchmarks/sweep_curve.py runs/sweep/table.csv --option λ --out docs/figures/NAME

writes NAME.png and NAME.csv: a line a column of the table; a row named 0 stands left of the smallest value.
"""

import argparse
import csv
import shutil
from pathlib import Path

from matplotlib.figure import Figure


def draw(rows: list[dict[str, str]], option: str, columns: list[str]) -> Figure:
    """Perplexity by value, a logarithmic axis of values."""
    values = {float(row["model"]): row for row in rows}
    smallest = min(value for value in values if value > 0)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for column in columns:
        points = sorted((value or smallest / 3, float(row[column])) for value, row in values.items())
        axes.plot(*zip(*points, strict=True), marker="o", label=column)
    axes.set(xscale="log", xlabel=option, ylabel="perplexity")
    if 0.0 in values:
        axes.axvline(smallest / 3, color="lightgray", zorder=0)
        axes.annotate("0", (smallest / 3, axes.get_ylim()[0]), xytext=(3, 3), textcoords="offset points")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--option", required=True, help="what was swept, for the axis")
    parser.add_argument("--columns", nargs="+", default=["W16A4", "W4A4 RTN", "W4A4 GPTQ", "W3A4 RTN", "W3A4 GPTQ"])
    parser.add_argument("--out", type=Path, required=True, help="path of both files, without their endings")
    arguments = parser.parse_args()
    rows = list(csv.DictReader(arguments.table.open()))
    draw(rows, arguments.option, arguments.columns).savefig(arguments.out.with_suffix(".png"), dpi=110)
    shutil.copy(arguments.table, arguments.out.with_suffix(".csv"))


if __name__ == "__main__":
    main()
