"""Where and when outlier channels form, several fits beside each other, read from their TensorBoard folders.

    python benchmarks/outlier_maps.py NAME=runs/…/version_0 … --site qkv --out docs/figures/NAME

writes NAME.png, a heat map a fit (optimizer step × block; colour: the largest channel's mean |x| over its layer's, as
the outlier monitor logs it at one site), and NAME.csv (run, step, block, largest ratio, share of outlier channels).
"""

import argparse
import csv
import math
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from named_runs import named_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_actreg.quant.statistics import OUTLIER_RATIO

Map = dict[int, dict[int, tuple[float, float]]]  # optimizer step → block → (largest ratio, share of outlier channels)


def read_map(folder: Path, site: str) -> Map:
    """What the outlier monitor logged of one site."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    prefix = f"outliers_{site}/largest_ratio_"
    blocks = sorted(tag.removeprefix(prefix) for tag in events.Tags()["scalars"] if tag.startswith(prefix))
    if not blocks or len(events.Scalars(prefix + blocks[0])) < 2:
        raise SystemExit(f"{folder} has fewer than two outlier snapshots of {site}")
    found: Map = {}
    for block in blocks:
        shares = {event.step: event.value for event in events.Scalars(f"outliers_{site}/share_{block}")}
        for event in events.Scalars(prefix + block):  # a resumed fit has logged some steps twice: the last counts
            found.setdefault(event.step, {})[int(block)] = event.value, shares[event.step]
    return found


def draw(maps: dict[str, Map], site: str) -> Figure:
    """A panel a fit, one scale of colours; black is no outlier channel."""
    largest = max(ratio for found in maps.values() for blocks in found.values() for ratio, _ in blocks.values())
    rows = math.ceil(len(maps) / 4)
    columns = math.ceil(len(maps) / rows)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    for axes, (name, found) in zip(panels, maps.items(), strict=False):
        steps = sorted(found)
        ratios = [[found[step][block][0] for step in steps] for block in sorted(found[steps[0]])]
        edges = [0.5 * (a + b) for a, b in zip([2 * steps[0] - steps[1], *steps], [*steps, steps[-1]], strict=True)]
        norm = LogNorm(OUTLIER_RATIO, max(largest, 2 * OUTLIER_RATIO))
        image = axes.pcolormesh(edges, range(len(ratios) + 1), ratios, norm=norm, cmap="magma")
        axes.set(title=name, xlabel="optimizer step")
    panels[0].set_ylabel("block")
    label = f"{site}: largest channel's mean |x| / layer's"
    bar = figure.colorbar(image, ax=panels.tolist(), label=label, format=ScalarFormatter())
    bar.ax.yaxis.set_minor_formatter(ScalarFormatter())
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--site", default="qkv", choices=["qkv", "attn_proj", "mlp_in", "mlp_proj"])
    parser.add_argument("--out", type=Path, required=True, help="path of both files, without their endings")
    arguments = parser.parse_args()
    maps = {name: read_map(folder, arguments.site) for name, folder in named_runs(parser, arguments.runs).items()}
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "block", "largest_ratio", "share"])
        for name, found in maps.items():
            for step, blocks in sorted(found.items()):
                for block, (ratio, share) in sorted(blocks.items()):
                    writer.writerow([name, step, block, f"{ratio:.3g}", f"{share:.3g}"])
    draw(maps, arguments.site).savefig(arguments.out.with_suffix(".png"), dpi=110)
    print(f"{arguments.out}.png, {arguments.out}.csv")


if __name__ == "__main__":
    main()
