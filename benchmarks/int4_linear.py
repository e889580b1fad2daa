"""How fast the W4A4 linear is, against bfloat16 `F.linear`, `torch._int_mm` and a plain Triton int8 GEMM (needs a GPU).

    python benchmarks/int4_linear.py [--cases gemm linear norm decode groups] [--out benchmarks/results/NAME.csv]
    python benchmarks/int4_linear.py --quick          # checks, then tiles of every regime, in about a minute

Both check integers over tails first, compile on all cores, and measure this GPU's ceilings (:mod:`harness` has the
method). A row is printed only if its output passed the check against :mod:`lit_actreg_kernels.reference`; a failure
ends the run with status 1. The floor is the larger of bytes over copy bandwidth and operations over the int8 rate.

Shapes are (M tokens, N outputs, K inputs).
"""

import argparse
import csv
import datetime
import functools
import sys
import time
from pathlib import Path

import torch
import triton
from harness import (
    Candidate,
    Ceilings,
    CheckFailed,
    check,
    compile_in_parallel,
    has_gpu,
    measure,
    measure_ceilings,
    usable,
)
from int4_problem import (
    GROUP,
    TAILED_SHAPES,
    Problem,
    Shape,
    bf16_candidate,
    bytes_moved,
    check_integers,
    from_codes,
    from_float_in_groups,
    from_float_per_token,
    grouped_reference,
    int8_candidate,
    int_mm_candidate,
    linear_reference,
    make_problem,
    make_problems,
    norm_candidates,
    per_token_reference,
    static_candidate,
)
from int4_tiles import sweep, sweep_candidates, tiles_to_check
from int8_gemm import INT8_TILES

PREFILL_SHAPES = [(8192, 8192, 8192), (4096, 4096, 4096), (4096, 11008, 4096), (16384, 8192, 2048)]
DECODE_SHAPES = [(m, n, k) for m in (1, 16, 64) for n, k in ((4096, 4096), (11008, 4096), (8192, 8192))]
GROUPED_SHAPES = [
    *((m, 4096, 11008) for m in (1, 16, 64, 4096)),
    *((m, 4096, 4096) for m in (16, 256, 512, 1024, 4096)),
    *((m, 8192, 8192) for m in (64, 8192)),
]
BARS = {"gemm": 1.5, "linear": 1.4, "norm": 1.45, "decode": 3.3, "decode M=64": 2.6}
QUICK_SHAPES = [*DECODE_SHAPES, (256, 8192, 8192), *PREFILL_SHAPES]
# These need all the kernels that the others use: sizes are arguments, and only a row's length is compiled in (M = 1).
QUICK_KERNELS = [(1, 4096, 4096), *((m, 8192, 8192) for m in (1, 16, 64, 256))]


def best_int8(problems: list[Problem]) -> Candidate:
    """The fastest of INT8_TILES at this shape: the yardstick is tuned as well as we are."""
    candidates = [candidate for tile in INT8_TILES if (candidate := usable(int8_candidate(tile), problems[0]))]
    timings = measure(candidates, problems, rounds=5)
    return min(zip(timings, candidates, strict=True), key=lambda pair: pair[0].median)[1]


def candidates_of(case: str, int8: list[Candidate]) -> list[Candidate]:
    """Baseline first; ``int8`` are the yardsticks of the case gemm."""
    if case == "gemm":
        ours = Candidate("w4a4, codes in", lambda p: from_codes(p, p.codes), linear_reference)
        return [bf16_candidate(), int_mm_candidate(), *int8, ours]
    if case == "norm":
        return norm_candidates()
    return [
        bf16_candidate(),
        static_candidate(),
        Candidate("w4a4, per token", from_float_per_token, per_token_reference),
        Candidate(f"w4a4, groups of {GROUP} a token", from_float_in_groups, grouped_reference),
    ]


def shapes_of(case: str) -> list[Shape]:
    return {"decode": DECODE_SHAPES, "groups": GROUPED_SHAPES}.get(case, PREFILL_SHAPES)


def bar_of(case: str, shape: Shape) -> str:
    bar = BARS.get("decode M=64" if case == "decode" and shape[0] == 64 else case)
    return "" if bar is None else f"{bar:.2f}"


def print_table(cases: list[str], rounds: int, ceilings: Ceilings) -> list[dict[str, str | float]]:
    """The table of issue 5, one case and shape after the other."""
    print(
        f"{'case':6} {'M, N, K':>19}  {'candidate':33} {'µs':>8} {'p10-p90':>15} {'floor':>6} {'× bf16':>7} {'bar':>5}"
    )
    rows: list[dict[str, str | float]] = []
    for case in cases:
        for shape in shapes_of(case):
            m, n, k = shape
            problems = make_problems(shape)
            candidates = candidates_of(case, [best_int8(problems)] if case == "gemm" else [])
            for candidate in candidates:
                try:
                    check(candidate, problems[0])
                except CheckFailed as error:
                    sys.exit(f"no row for {case} {shape}: {error}")
            timings = measure(candidates, problems, rounds)
            floor = ceilings.floor(bytes_moved(shape, 1 if case == "gemm" else 2), 2 * m * n * k)
            for timing in timings:
                speedup = timings[0].median / timing.median
                bar = bar_of(case, shape) if timing.name.startswith("w4a4") else ""
                spread = f"{timing.low:.1f}-{timing.high:.1f}"
                name = f"{case:6} {shape!s:>19}  {timing.name:33}"
                figures = f"{timing.median:8.1f} {spread:>15} {floor:6.1f} {speedup:6.2f}x {bar:>5}"
                print(name, figures, flush=True)
                numbers = {"us": timing.median, "us_p10": timing.low, "us_p90": timing.high, "speedup": speedup}
                numbers = {name: round(value, 3) for name, value in (numbers | {"us_floor": floor}).items()}
                rows.append({"case": case, "M": m, "N": n, "K": k, "candidate": timing.name, **numbers})
            del problems
            torch.cuda.empty_cache()
    return rows


def ceilings_of_this_gpu() -> Ceilings:
    problem = make_problem(8192, 8192, 8192)
    fastest = int8_candidate(INT8_TILES[0])
    ceilings = measure_ceilings(lambda: fastest.call(problem))
    torch.cuda.empty_cache()
    return ceilings


@functools.lru_cache(maxsize=1)
def _problem(shape: Shape) -> Problem:
    return make_problem(*shape)


def _compile(item: tuple[str, Shape, int]) -> None:
    """One kernel of the run, in a process of its own: (case, shape, index of the candidate)."""
    case, shape, index = item
    if case == "integers":
        check_integers(lambda tailed: tiles_to_check(tailed) if tailed == shape else [])
        return
    int8 = [int8_candidate(tile) for tile in INT8_TILES]
    candidates = sweep_candidates(shape) if case == "sweep" else candidates_of(case, int8)
    if index < len(candidates):
        candidates[index].call(_problem(shape))


def compile_ahead(cases: list[str], quick: bool) -> None:
    items = [("integers", shape, 0) for shape in TAILED_SHAPES]
    if quick:
        items += [("sweep", shape, index) for shape in QUICK_KERNELS for index in range(1, 24)]
    else:
        items += [(case, shape, index) for case in cases for shape in shapes_of(case) for index in range(1, 12)]
    compile_in_parallel(_compile, items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["gemm", "linear", "norm", "decode", "groups"]
    parser.add_argument("--cases", nargs="+", choices=choices, default=choices)
    parser.add_argument("--rounds", type=int, default=30, help="replays of every candidate")
    parser.add_argument("--quick", action="store_true", help="sweep tiles of every regime instead of the table")
    parser.add_argument("--out", type=Path, help="CSV file for the table, or for all tiles")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if not has_gpu():
        sys.exit("this benchmark needs a CUDA GPU: none is visible")
    compile_ahead(arguments.cases, arguments.quick)  # forks: nothing may have touched CUDA before
    torch.manual_seed(0)
    print(f"compiled ahead in {time.perf_counter() - start:.0f} s")
    failures = check_integers(tiles_to_check)
    if failures and not arguments.quick:
        sys.exit("\n".join(failures))
    print(f"integers checked, {time.perf_counter() - start:.0f} s")
    setting = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    ceilings = ceilings_of_this_gpu()
    header = [
        " ".join(f"{name}={value}" for name, value in setting.items()),
        f"copy {ceilings.copy / 1e6:.2f} TB/s, int8 {ceilings.int8 / 1e6:.0f} TOP/s, empty kernel in a graph "
        f"{ceilings.launch:.2f} µs",
    ]
    if arguments.quick:
        lines, rows = sweep(QUICK_SHAPES, min(arguments.rounds, 12), ceilings)
        print("\n".join([*header, *(f"WRONG: {failure}" for failure in failures), *lines]))
    else:
        print("\n".join(header))
        rows = print_table(arguments.cases, arguments.rounds, ceilings)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*rows[0], *setting])
            writer.writeheader()
            writer.writerows([row | setting for row in rows])


if __name__ == "__main__":
    main()
