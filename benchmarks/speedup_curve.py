"""Speed-up of the W4A4 linear over bfloat16 against the number of tokens, decode to prefill: a table and a picture.

    python benchmarks/speedup_curve.py --out docs/figures/int4_speedup         # needs a GPU; writes .csv and .png
    python benchmarks/speedup_curve.py --out docs/figures/int4_speedup --draw  # the .png anew from the .csv

Every layer is timed as :mod:`harness` does with the kernels and tiles that a model gets, from a bfloat16 input
(quantization included) and with codes in. A point is printed only if its output passed the check.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from harness import Candidate, check, compile_in_parallel, has_gpu, measure
from int4_problem import bf16_candidate, from_codes, linear_reference, make_problem, make_problems, static_candidate
from matplotlib.figure import Figure

LAYERS = [(4096, 4096), (11008, 4096), (8192, 8192)]  # N, K
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
INCLUDED, CODES_IN = "quantization included", "codes in"
Row = dict[str, str]


def candidates() -> list[Candidate]:
    """Baseline first, then those that are drawn, in the order of INCLUDED and CODES_IN."""
    codes_in = Candidate("w4a4, codes in", lambda p: from_codes(p, p.codes), linear_reference)
    return [bf16_candidate(), static_candidate(), codes_in]


def _compile(shape: tuple[int, int, int]) -> None:
    problem = make_problem(*shape)
    for candidate in candidates()[1:]:
        candidate.call(problem)


def time_layers(rounds: int) -> list[Row]:
    rows = []
    for n, k in LAYERS:
        for m in TOKENS:
            problems = make_problems((m, n, k))
            for candidate in candidates():
                check(candidate, problems[0])
            bf16, included, codes_in = (timing.median for timing in measure(candidates(), problems, rounds))
            for name, time in ((INCLUDED, included), (CODES_IN, codes_in)):
                values = {"M": m, "N": n, "K": k, "what": name, "us": f"{time:.2f}", "speedup": f"{bf16 / time:.3f}"}
                rows.append({key: str(value) for key, value in values.items()} | {"gpu": torch.cuda.get_device_name()})
            print(
                f"{(m, n, k)}: bf16 {bf16:.1f} µs, {bf16 / included:.2f}x, codes in {bf16 / codes_in:.2f}x", flush=True
            )
            del problems
            torch.cuda.empty_cache()
    return rows


def draw(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, (n, k) in zip(("tab:blue", "tab:orange", "tab:green"), LAYERS, strict=True):
        for what, style in ((INCLUDED, "-"), (CODES_IN, ":")):
            ours = [row for row in rows if (row["N"], row["K"], row["what"]) == (str(n), str(k), what)]
            tokens, speedups = [int(row["M"]) for row in ours], [float(row["speedup"]) for row in ours]
            axes.plot(tokens, speedups, style, color=color, marker=".", label=f"{n} × {k}, {what}")
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens (M)", ylabel="speed-up over bfloat16 F.linear", title=rows[0]["gpu"], ylim=(0, None))
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of both files, without their endings")
    parser.add_argument("--draw", action="store_true", help="draw what the CSV file holds, without a GPU")
    parser.add_argument("--rounds", type=int, default=10, help="replays of every candidate")
    arguments = parser.parse_args()
    table = arguments.out.with_suffix(".csv")
    if not arguments.draw:
        if not has_gpu():
            sys.exit("timing needs a CUDA GPU, and none is visible: --draw draws a table that exists")
        # Sizes are arguments of the kernels, and only a row's length (M = 1), launch and split are compiled in.
        others = [(1, 4096, 4096), *((m, 11008, 4096) for m in (1, 32, 64))]
        compile_in_parallel(_compile, [*((m, 8192, 8192) for m in TOKENS), *others])
        torch.manual_seed(0)
        rows = time_layers(arguments.rounds)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    with table.open(newline="") as file:
        draw(list(csv.DictReader(file))).savefig(arguments.out.with_suffix(".png"), dpi=110)
    print(f"{arguments.out.with_suffix('.png')}, {table}")


if __name__ == "__main__":
    main()
