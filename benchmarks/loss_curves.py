"""Loss curves of several fits in one picture, and the numbers behind it as CSV, read from their TensorBoard folders.

    python benchmarks/loss_curves.py NAME=runs/…/version_0 … --baseline NAME --out docs/figures/NAME

writes NAME.png (left: training loss; right: its difference from the baseline, both averaged over ``--window`` logged
steps) and NAME.csv (run, step, training loss; validation losses have their own rows). Fits that saw the same batches
in the same order differ by far less than their losses scatter, so the right panel is the one to read.
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure
from named_runs import named_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = dict[int, float]  # optimizer step → loss


def read_curve(folder: Path, tag: str) -> Curve:
    """The scalars of a tag in a folder of event files; empty if there are none."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars(tag)}


def averaged(curve: Curve, window: int) -> Curve:
    """Means over ``window`` logged steps, at the last of them."""
    steps = sorted(curve)
    return {
        steps[i + window - 1]: sum(curve[step] for step in steps[i : i + window]) / window
        for i in range(0, len(steps) - window + 1, window)
    }


def draw(curves: dict[str, Curve], baseline: str, window: int) -> Figure:
    """Both panels; a run is compared with the baseline at the steps that both have logged."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    for name, curve in curves.items():
        smooth = averaged(curve, window)
        losses.plot(list(smooth), list(smooth.values()), label=name, linewidth=1)
        shared = {step: value - curves[baseline][step] for step, value in curve.items() if step in curves[baseline]}
        difference = averaged(shared, window)
        differences.plot(list(difference), list(difference.values()), label=name, linewidth=1)
    losses.set(xlabel="optimizer step", ylabel="training loss, nats", yscale="log")
    differences.set(xlabel="optimizer step", ylabel=f"training loss − {baseline}, nats")
    losses.legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--baseline", required=True, help="name of the run that the others are compared with")
    parser.add_argument("--window", type=int, default=5, help="logged steps that are averaged")
    parser.add_argument("--out", type=Path, required=True, help="path of both files, without their endings")
    arguments = parser.parse_args()
    folders = named_runs(parser, arguments.runs)
    if arguments.baseline not in folders:
        parser.error(f"--baseline {arguments.baseline} is none of the runs {list(folders)}: name one of them")
    curves = {name: read_curve(folder, "train/loss") for name, folder in folders.items()}
    if empty := [name for name, curve in curves.items() if not curve]:
        parser.error(f"no train/loss in the folders of {empty}: name folders with TensorBoard's event files")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "what", "step", "loss"])
        for name, folder in folders.items():
            for what in ("train/loss", "val/loss"):
                writer.writerows([name, what, step, f"{value:.5f}"] for step, value in read_curve(folder, what).items())
    draw(curves, arguments.baseline, arguments.window).savefig(arguments.out.with_suffix(".png"), dpi=110)
    print(f"{arguments.out.with_suffix('.png')}, {arguments.out.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
