"""The tiles worth timing, per regime, and the sweep over them: what `choose_tile` and `choose_gemv_tile` are made from.

A sweep's lines read `shape, floor, bf16` and then `candidate, µs, × bf16 [<- chosen]`; the chosen ones are what the
tables take today. From prefill shapes on, the rows of a layer as models call it follow: with the quantization, and with
the norm before it, whose ratio is to bfloat16 with its norm. Spreads are in the CSV.
"""

import sys
from dataclasses import replace

import torch
from harness import Candidate, Ceilings, Timing, measure, usable
from int4_problem import (
    Shape,
    bf16_candidate,
    bytes_moved,
    describe,
    int4_candidate,
    int8_candidate,
    int_mm_candidate,
    make_problems,
    norm_candidates,
    static_candidate,
)
from int8_gemm import INT8_TILES
from lit_actreg_kernels import int4_gemv, int4_linear
from lit_actreg_kernels.int4_gemv import GemvTile
from lit_actreg_kernels.int4_linear import Tile

TRITON_PREFILL = [Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(64, 64, 128, 4, 4)]
HOPPER_PREFILL = [
    Tile(128, 256, 64, 8, 4, hopper=True),
    Tile(128, 128, 64, 4, 4, hopper=True),
    Tile(64, 64, 128, 4, 4, hopper=True),
]
GEMV = [(4096, 4), (8192, 4), (16384, 4), (16384, 8), (32768, 8)]  # bytes a program, warps
FEW = [  # M ≤ 16
    Tile(16, 16, 256, 2, 4),
    Tile(16, 32, 256, 2, 4),
    Tile(16, 64, 256, 4, 4),
    Tile(16, 32, 256, 2, 4, split_k=2),
    Tile(16, 64, 256, 4, 3, split_k=2),
]
HOPPER_FEW = [
    Tile(16, 64, 256, 4, 4, hopper=True),
    Tile(16, 64, 256, 4, 4, split_k=2, hopper=True),
    Tile(16, 64, 256, 4, 8, hopper=True),
    Tile(16, 64, 128, 4, 8, hopper=True),
]
MORE = [  # M ≤ 64
    Tile(64, 32, 256, 4, 3),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 64, 256, 4, 3),
    Tile(64, 64, 128, 4, 4, split_k=2),
    Tile(64, 64, 128, 4, 4, split_k=4),
    Tile(64, 128, 128, 8, 3, split_k=2),
]
HOPPER_MORE = [
    Tile(64, 64, 128, 4, 4, hopper=True),
    Tile(64, 64, 128, 4, 6, hopper=True),
    Tile(64, 64, 128, 4, 8, hopper=True),
    Tile(64, 64, 128, 4, 6, split_k=2, hopper=True),
]

MODES = ("fused", "separate", "codes")  # of int4_candidate


def on_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


def chosen(shape: Shape, quantizes: bool = False) -> Tile | GemvTile:
    """What the tables take; one token's product differs where it ``quantizes``."""
    m, n, k = shape
    if m > 1:
        return int4_linear.choose_tile(m, n, k // 2, on_hopper())
    return int4_gemv.choose_gemv_tile(torch.empty(n, k // 2, dtype=torch.uint8, device="cuda"), quantizes)


def tiles_of(shape: Shape) -> list[Tile | GemvTile]:
    """The tiles to time at a shape, the chosen one first."""
    m, _, k = shape
    tiles: list[Tile | GemvTile]
    if m == 1:
        row = 1 << (k // 2 - 1).bit_length()
        dependent = int4_gemv.launches_dependent(torch.device("cuda"), shape[1] * k // 2)
        tiles = [chosen(shape, True), *(GemvTile(max(1, step // row), warps, dependent) for step, warps in GEMV)]
    elif m <= 64:
        tiles = [replace(tile, block_m=max(16, m)) for tile in (FEW if m <= 16 else MORE)]
        tiles += (HOPPER_FEW if m <= 16 else HOPPER_MORE) if on_hopper() else []
    else:
        tiles = [*TRITON_PREFILL, *(HOPPER_PREFILL if on_hopper() else [])]
    first = chosen(shape)
    return list(dict.fromkeys([first, *tiles]))


def tiles_to_check(shape: Shape) -> list[Tile | GemvTile]:
    """One tile of each kind of kernel that serves the shape."""
    m, _, k = shape
    tiles: list[Tile | GemvTile] = [TRITON_PREFILL[1]]
    if m == 1:
        tiles += [GemvTile(4, 4), GemvTile(8, 8), GemvTile(16, 8)]
        tiles += [GemvTile(16, 8, dependent=True)] if on_hopper() else []
    if m <= 16:
        tiles += [Tile(16, 32, 128, 2, 4), Tile(16, 64, 128, 4, 3, split_k=2)]
    if m <= 64:
        tiles.append(Tile(64, 128, 128, 8, 3, split_k=2))
    if on_hopper() and k % 16 == 0:
        tiles += HOPPER_PREFILL
        tiles += [HOPPER_FEW[1]] if m <= 16 else []
        tiles += HOPPER_MORE[2:] if m <= 64 else []
    return tiles


def sweep_candidates(shape: Shape) -> list[Candidate]:
    """Baseline first."""
    tiles = tiles_of(shape)
    codes_in = [int4_candidate(tile, "codes") for tile in tiles]
    if shape[0] == 1:
        fused = [int4_candidate(tile, "fused") for tile in tiles]
        return [bf16_candidate(), *fused, *codes_in, int4_candidate(tiles[0], "separate")]
    if shape[0] <= 64:
        return [bf16_candidate(), *(int4_candidate(tile, "separate") for tile in tiles), codes_in[0]]
    # The first int8 tile was the fastest at every shape.
    yardsticks = [int8_candidate(INT8_TILES[0]), int_mm_candidate()]
    return [bf16_candidate(), *codes_in, *yardsticks, static_candidate(), *norm_candidates()]


def names_of_chosen(shape: Shape) -> list[str]:
    return [f"w4a4 {mode} {describe(chosen(shape, mode == 'fused'))}" for mode in MODES]


def worth_printing(timings: list[Timing], taken: list[str], keep: int) -> list[Timing]:
    """Of each mode the ``keep`` fastest tiles and the chosen one; all yardsticks and rows of whole layers."""
    shown: list[Timing] = []
    for mode in MODES:
        ours = [timing for timing in timings if timing.name.startswith(f"w4a4 {mode} ")]
        ours.sort(key=lambda timing: timing.median)
        shown += ours[:keep] + [timing for timing in ours[keep:] if timing.name in taken]
    return shown + [timing for timing in timings if not timing.name.startswith("w4a4 ")]


def sweep(
    shapes: list[Shape], rounds: int, ceilings: Ceilings, keep: int = 3
) -> tuple[list[str], list[dict[str, str | float]]]:
    """Lines of a short table, and rows of everything timed."""
    lines: list[str] = []
    rows: list[dict[str, str | float]] = []
    bf16_norm, fused_norm = (candidate.name for candidate in norm_candidates())
    for shape in shapes:
        m, n, k = shape
        problems = make_problems(shape)
        candidates = [candidate for candidate in sweep_candidates(shape) if usable(candidate, problems[0])]
        baseline, *timings = measure(candidates, problems, rounds)
        medians = {timing.name: timing.median for timing in timings}
        floor = ceilings.floor(bytes_moved(shape, 1 if m > 64 else 2), 2 * m * n * k)
        taken = names_of_chosen(shape)
        lines.append(f"{shape} floor {floor:.1f} bf16 {baseline.median:.1f}")
        for timing in worth_printing(timings, taken, keep):
            mark = " <- chosen" if timing.name in taken else ""
            against = medians[bf16_norm] if timing.name == fused_norm else baseline.median
            lines.append(f"  {timing.name:36} {timing.median:6.1f} {against / timing.median:.2f}x{mark}")
        for timing in (baseline, *timings):
            numbers = {"us": timing.median, "us_p10": timing.low, "us_p90": timing.high, "us_floor": floor}
            numbers = {name: round(value, 3) for name, value in numbers.items()}
            rows.append({"M": m, "N": n, "K": k, "candidate": timing.name, **numbers})
        print(f"swept {shape}: {len(candidates)} candidates", file=sys.stderr, flush=True)
        del problems
        torch.cuda.empty_cache()
    return lines, rows
