"""Migration: how hard a fit's weights become to round while it trains, several fits beside each other.

    python benchmarks/weight_curves.py NAME=runs/…/version_0 … --out docs/figures/NAME

reads what the outlier monitor logs of the weights and writes NAME.png, a row of panels a quantity and a column a site
(round-to-nearest error at 3 bits; the largest row's norm over the mean row's; kurtosis; means over the blocks), and
NAME.csv (run, site, step and the four means, the error at 4 bits among them).
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from named_runs import named_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_actreg.config import SITES

QUANTITIES = ("error_3bit", "error_4bit", "row_max", "weight_kurtosis")
DRAWN = {"error_3bit": "3-bit error", "row_max": "largest row / mean row", "weight_kurtosis": "kurtosis"}
Curves = dict[str, dict[int, dict[str, float]]]  # site → optimizer step → quantity → mean over blocks


def read_curves(folder: Path) -> Curves:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves: Curves = {}
    for site in SITES:
        found: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for tag in events.Tags()["scalars"]:
            what, _, block = tag.removeprefix(f"outliers_{site}/").rpartition("_")
            if tag.startswith(f"outliers_{site}/") and what in QUANTITIES:
                for event in events.Scalars(tag):  # a resumed fit has logged some steps twice: the last counts
                    found[event.step][what][block] = event.value
        curves[site] = {step: {q: mean(found[step][q].values()) for q in QUANTITIES} for step in sorted(found)}
    if not any(curves.values()):
        raise SystemExit(f"{folder} has no outlier snapshot of a fit's weights")
    return curves


def draw(runs: dict[str, Curves]) -> Figure:
    figure = Figure(figsize=(3.2 * len(SITES), 2.4 * len(DRAWN)), layout="constrained")
    panels = figure.subplots(len(DRAWN), len(SITES), sharex=True)
    for row, (quantity, label) in zip(panels, DRAWN.items(), strict=True):
        for axes, site in zip(row, SITES, strict=True):
            for name, curves in runs.items():
                axes.plot(list(curves[site]), [values[quantity] for values in curves[site].values()], label=name)
            axes.set(title=site if quantity == "error_3bit" else "")
        row[0].set_ylabel(label)
    for axes in panels[-1]:
        axes.set_xlabel("optimizer step")
    panels[0][0].legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="path of both files, without their endings")
    options = parser.parse_args()
    runs = {name: read_curves(folder) for name, folder in named_runs(parser, options.runs).items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{options.out}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "site", "step", *QUANTITIES])
        for name, curves in runs.items():
            for site, steps in curves.items():
                for step, values in steps.items():
                    writer.writerow([name, site, step, *(f"{values[q]:.5g}" for q in QUANTITIES)])
    draw(runs).savefig(f"{options.out}.png", dpi=100)
    print(f"{options.out}.png, {options.out}.csv")


if __name__ == "__main__":
    main()
