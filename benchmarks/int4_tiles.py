"""The tiles worth timing, per regime, and the sweep over them: what `choose_tile` and `choose_gemv_tile` are made from.

A sweep's lines read `shape, floor | candidate, µs, × bf16 [<- chosen]`; the chosen ones are what the tables take today.
"""

import sys
from dataclasses import replace

import torch
from harness import Candidate, Ceilings, measure, usable
from int4_problem import (
    Shape,
    bf16_candidate,
    bytes_moved,
    describe,
    int4_candidate,
    int8_candidate,
    int_mm_candidate,
    launched_one_by_one,
    make_problems,
    unpack_candidate,
)
from int8_gemm import INT8_TILES
from lit_actreg_kernels import int4_gemv, int4_linear
from lit_actreg_kernels.int4_gemv import GemvTile
from lit_actreg_kernels.int4_linear import Tile

TRITON_PREFILL = [
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 3),
    Tile(256, 128, 64, 8, 4),
    Tile(128, 256, 128, 8, 3),
]
HOPPER_PREFILL = [
    Tile(128, 256, 64, 8, 4, hopper=True),
    Tile(128, 256, 64, 8, 3, hopper=True),
    Tile(128, 128, 64, 4, 4, hopper=True),
    Tile(128, 128, 64, 4, 3, hopper=True),
]
# (bytes of weights a step, warps, stages, programs a multiprocessor)
GEMV = [
    (8192, 4, 4, 2),
    (8192, 4, 3, 4),
    (8192, 4, 1, 16),
    (16384, 4, 3, 2),
    (16384, 4, 1, 16),
    (16384, 8, 4, 1),
    (16384, 8, 3, 2),
    (16384, 8, 1, 16),
    (32768, 8, 3, 1),
    (32768, 8, 2, 2),
]
FEW = [  # M ≤ 16
    Tile(16, 16, 512, 2, 4),
    Tile(16, 32, 256, 2, 4),
    Tile(16, 32, 256, 4, 4),
    Tile(16, 32, 512, 4, 3),
    Tile(16, 64, 128, 4, 6),
    Tile(16, 64, 256, 4, 4),
    Tile(16, 32, 256, 2, 4, split_k=2),
    Tile(16, 64, 256, 4, 3, split_k=2),
    Tile(16, 128, 128, 4, 4, split_k=4),
]
MORE = [  # M ≤ 64
    Tile(64, 64, 128, 4, 3),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 64, 256, 4, 3),
    Tile(64, 64, 128, 4, 4, split_k=2),
    Tile(64, 128, 128, 4, 3, split_k=2),
    Tile(64, 128, 128, 4, 4, split_k=2),
    Tile(64, 128, 128, 8, 4, split_k=2),
    Tile(64, 128, 128, 8, 3, split_k=4),
    Tile(64, 256, 64, 8, 4, split_k=4),
]


def chosen(shape: Shape) -> Tile | GemvTile:
    m, n, k = shape
    return int4_gemv.choose_gemv_tile(n, k // 2) if m == 1 else int4_linear.choose_tile(m, n, k // 2)


def tiles_of(shape: Shape) -> list[Tile | GemvTile]:
    """The tiles to time at a shape, the chosen one first."""
    m, _, k = shape
    tiles: list[Tile | GemvTile]
    if m == 1:
        row = 1 << (k // 2 - 1).bit_length()
        tiles = [GemvTile(max(1, step // row), *rest) for step, *rest in GEMV]
    elif m <= 64:
        tiles = [replace(tile, block_m=max(16, m)) for tile in (FEW if m <= 16 else MORE)]
    else:
        tiles = [*TRITON_PREFILL, *(HOPPER_PREFILL if torch.cuda.get_device_capability() == (9, 0) else [])]
    first = chosen(shape)
    return [first, *(tile for tile in tiles if tile != first)]


def tiles_to_check(shape: Shape) -> list[Tile | GemvTile]:
    """One tile of each kind of kernel that serves the shape."""
    m, _, k = shape
    tiles: list[Tile | GemvTile] = [TRITON_PREFILL[1]]
    if m == 1:
        tiles += [GemvTile(8, 4, 4, 2), GemvTile(8, 8, 1, 16)]
    if m <= 16:
        tiles += [Tile(16, 32, 128, 2, 4), Tile(16, 64, 128, 4, 3, split_k=2)]
    if m <= 64:
        tiles.append(Tile(64, 128, 128, 8, 3, split_k=2))
    if torch.cuda.get_device_capability() == (9, 0) and k % 16 == 0:
        tiles += HOPPER_PREFILL
    return tiles


def sweep_candidates(shape: Shape) -> list[Candidate]:
    """Baseline first."""
    tiles = tiles_of(shape)
    mode = "fused" if shape[0] == 1 else "separate" if shape[0] <= 64 else "codes"
    candidates = [bf16_candidate(), *(int4_candidate(tile, mode) for tile in tiles)]
    if shape[0] == 1:
        candidates.append(int4_candidate(tiles[0], "separate"))
    if shape[0] <= 64:
        return [*candidates, int4_candidate(tiles[0], "codes"), launched_one_by_one(candidates[1])]
    return [*candidates, *(int8_candidate(tile) for tile in INT8_TILES), int_mm_candidate(), unpack_candidate()]


def sweep(
    shapes: list[Shape], rounds: int, ceilings: Ceilings, keep: int = 5
) -> tuple[list[str], list[dict[str, str | float]]]:
    """Lines of a short table (the fastest tiles, those the tables take today, the yardsticks), and rows of them all."""
    lines: list[str] = []
    rows: list[dict[str, str | float]] = []
    for shape in shapes:
        m, n, k = shape
        problems = make_problems(shape)
        candidates = [candidate for candidate in sweep_candidates(shape) if usable(candidate, problems[0])]
        baseline, *timings = measure(candidates, problems, rounds)
        floor = ceilings.floor(bytes_moved(shape, 1 if m > 64 else 2), 2 * m * n * k)
        order = sorted(timings, key=lambda timing: timing.median)
        tiles = [timing for timing in order if timing.name.startswith("w4a4") and "no-PDL" not in timing.name]
        int8 = [timing for timing in order if timing.name.startswith("triton int8")]
        default = describe(chosen(shape))
        shown = tiles[:keep] + [timing for timing in tiles[keep:] if timing.name.endswith(default)]
        shown += int8[:1] + [timing for timing in timings if timing not in tiles and timing not in int8]
        lines.append(f"{shape} floor {floor:.1f} bf16 {baseline.median:.1f} ({baseline.low:.1f}-{baseline.high:.1f})")
        for timing in shown:
            mark = " <- chosen" if timing.name.endswith(default) else ""
            spread = f"{timing.low:.1f}-{timing.high:.1f}"
            ratio = f"{baseline.median / timing.median:.2f}x"
            lines.append(f"  {timing.name:40} {timing.median:7.1f} {spread:>13} {ratio}{mark}")
        for timing in (baseline, *order):
            numbers = {"us": timing.median, "us_p10": timing.low, "us_p90": timing.high, "us_floor": floor}
            numbers = {name: round(value, 3) for name, value in numbers.items()}
            rows.append({"M": m, "N": n, "K": k, "candidate": timing.name, **numbers})
        print(f"swept {shape}: {len(candidates)} candidates", file=sys.stderr, flush=True)
        del problems
        torch.cuda.empty_cache()
    return lines, rows
