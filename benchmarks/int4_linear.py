"""How fast the W4A4 linear is, against bfloat16 `F.linear`, `torch._int_mm` and a plain Triton int8 GEMM (needs a GPU).

    python benchmarks/int4_linear.py [--cases gemm linear norm decode] [--out benchmarks/results/NAME.csv]
    python benchmarks/int4_linear.py --sweep [--cases gemm decode]      # which tiles: the table in choose_tile

Method: every candidate of a row is captured in a CUDA graph of one call for each of several copies of weights and
inputs, together larger than the 50 MB of L2, so that weights come from memory as they do in a model. Graphs are
replayed in turn, round by round, so that clocks and heat are shared; a figure is the median over rounds of a replay's
time per call, the spread is from the 10th to the 90th percentile, and the speed-up is a ratio of medians of one run. A
row is printed only if its output passed the check against :mod:`lit_actreg_kernels.reference`; a failure ends the run
with status 1.

Shapes are (M tokens, N outputs, K inputs).
"""

import argparse
import csv
import datetime
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from lit_actreg_kernels import grid, int4_linear, ops, reference
from lit_actreg_kernels.int4_linear import Tile
from torch import Tensor
from torch.nn import functional

PREFILL_SHAPES = [(8192, 8192, 8192), (4096, 4096, 4096), (4096, 11008, 4096), (16384, 8192, 2048)]
DECODE_SHAPES = [(m, n, k) for m in (1, 16, 64) for n, k in ((4096, 4096), (11008, 4096), (8192, 8192))]
BARS = {"gemm": 1.5, "linear": 1.4, "norm": 1.45, "decode": 3.3, "decode M=64": 2.6}
COLD_BYTES = 160 << 20  # the copies' packed weights together: more than three times the L2 of an H100

PREFILL_TILES = [
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 128, 4, 2),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 128, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(256, 128, 64, 8, 4),
    Tile(256, 128, 128, 8, 2),
    Tile(64, 256, 64, 4, 4),
    Tile(256, 64, 64, 4, 3),
]
HOPPER_TILES = [
    Tile(128, 256, 64, 8, 4, hopper=True),
    Tile(128, 256, 64, 8, 6, hopper=True),
    Tile(128, 128, 64, 4, 4, hopper=True),
]
DECODE_TILES = [
    Tile(8, 16, 256, 1, 4),
    Tile(8, 16, 512, 2, 4),
    Tile(8, 32, 256, 2, 4),
    Tile(8, 32, 256, 2, 6),
    Tile(8, 32, 256, 2, 4, 2),
    Tile(8, 64, 128, 4, 5),
    Tile(8, 64, 256, 4, 4, 2),
    Tile(8, 64, 256, 4, 4, 4),
]
INT8_TILES = [
    Tile(128, 128, 128, 4, 3),
    Tile(128, 128, 128, 8, 4),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 128, 8, 3),
    Tile(256, 128, 64, 8, 4),
    Tile(256, 128, 128, 8, 3),
]


@triton.jit
def _int8_kernel(
    a_ptr,
    w_ptr,
    y_ptr,
    act_scale_ptr,
    weight_scale_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The yardstick: y = s_x · s_w · A Wᵀ for int8 A [M, K] and W [N, K], shapes that are multiples of the tile."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * num_n) * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * num_n)
    m = (first_m + within % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    w_ptrs = w_ptr + n.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(a_ptrs), tl.load(w_ptrs), acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    y = acc.to(tl.float32) * tl.load(act_scale_ptr) * tl.load(weight_scale_ptr + n)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty))


def int8_linear(codes: Tensor, weight: Tensor, act_scale: Tensor, weight_scale: Tensor, tile: Tile) -> Tensor:
    (m, k), n = codes.shape, weight.shape[0]
    y = codes.new_empty((m, n), dtype=torch.bfloat16)
    programs = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    _int8_kernel[programs](
        codes,
        weight,
        y,
        act_scale,
        weight_scale,
        m,
        n,
        k,
        tile.block_m,
        tile.block_n,
        tile.block_k,
        GROUP_M=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


@dataclass
class Problem:
    """One layer's tensors; a row of the benchmark has several, used in turn."""

    x: Tensor  # bfloat16 [M, K]
    codes: Tensor  # int8 [M, K], x on the grid
    weight: Tensor  # bfloat16 [N, K], the dequantized weight
    weight_codes: Tensor  # int8 [N, K]
    packed: Tensor
    act_scale: Tensor
    act_zero_point: Tensor
    weight_scale: Tensor
    weight_sums: Tensor
    norm_weight: Tensor

    @property
    def epilogue(self) -> tuple[Tensor, ...]:
        return self.act_scale, self.act_zero_point, self.weight_scale, self.weight_sums


def make_problem(m: int, n: int, k: int) -> Problem:
    """Gaussian activations on a grid of ±3σ, Gaussian weights rounded to nearest: realistic codes draw real power."""
    device = "cuda"
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    clips = torch.tensor([-3.0], device=device), torch.tensor([3.0], device=device)
    act_scale, act_zero_point = grid.grid_from_clips(*clips, 4)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    weight_scale = grid.symmetric_scale(weight.float().abs().amax(-1, keepdim=True), 4)
    weight_codes = grid.quantize(weight, weight_scale, 0.0, 4)
    return Problem(
        x,
        grid.quantize(x, act_scale, act_zero_point, 4),
        grid.dequantize(weight_codes, weight_scale, 0.0).bfloat16(),
        weight_codes,
        grid.pack_int4(weight_codes),
        act_scale,
        act_zero_point,
        weight_scale,
        reference.weight_sums(weight_codes, 1),
        torch.rand(k, device=device, dtype=torch.bfloat16) + 0.5,
    )


def make_problems(shape: tuple[int, int, int]) -> list[Problem]:
    _, n, k = shape
    return [make_problem(*shape) for _ in range(max(2, min(24, math.ceil(COLD_BYTES / (n * k / 2)))))]


@dataclass
class Candidate:
    """A way to compute a row: what to call, and the output to expect (None: a baseline in other arithmetic)."""

    name: str
    call: Callable[[Problem], Tensor]
    expect: Callable[[Problem], Tensor] | None = None


class CheckFailed(Exception):
    """A candidate's output is not the reference's."""


def check(candidate: Candidate, problem: Problem) -> None:
    """Raises unless the candidate's output is the reference's, within one rounding to its dtype (integers: equal)."""
    if candidate.expect is None:
        return
    output, expected = candidate.call(problem), candidate.expect(problem)
    if output.dtype == torch.int32:
        passed = torch.equal(output, expected)
    else:
        # One unit in the last place of the dtype; sums that cancel are measured against the typical size of an output.
        eps = torch.finfo(output.dtype).eps
        bound = eps * (expected.float().abs() + 1e-3 * expected.float().std())
        passed = bool(((output.float() - expected.float()).abs() <= bound).all())
    if not passed:
        worst = (output.double() - expected.double()).abs().max().item()
        raise CheckFailed(f"{candidate.name} differs from the reference by up to {worst:.4g} at {tuple(output.shape)}")


def capture(candidate: Candidate, problems: list[Problem]) -> torch.cuda.CUDAGraph:
    for problem in problems[:2]:
        candidate.call(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for problem in problems:
            candidate.call(problem)
    return graph


@dataclass
class Timing:
    name: str
    median: float  # µs a call
    low: float  # 10th and 90th percentile
    high: float


def measure(candidates: list[Candidate], problems: list[Problem], rounds: int) -> list[Timing]:
    """Median and spread of every candidate, replayed in turn."""
    graphs = [capture(candidate, problems) for candidate in candidates]
    events = [[(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(rounds)] for _ in graphs]
    for graph in graphs:
        graph.replay()
    for turn in range(rounds):
        for graph, pairs in zip(graphs, events, strict=True):
            pairs[turn][0].record()
            graph.replay()
            pairs[turn][1].record()
    torch.cuda.synchronize()
    timings = []
    for candidate, pairs in zip(candidates, events, strict=True):
        times = sorted(1000 * start.elapsed_time(end) / len(problems) for start, end in pairs)
        low, high = times[len(times) // 10], times[-1 - len(times) // 10]
        timings.append(Timing(candidate.name, statistics.median(times), low, high))
    return timings


def linear_reference(problem: Problem, codes: Tensor | None = None) -> Tensor:
    codes = problem.codes if codes is None else codes
    return reference.int4_linear(codes, problem.packed, *problem.epilogue, None, None, torch.bfloat16)


def normed(problem: Problem) -> Tensor:
    return functional.rms_norm(problem.x, problem.norm_weight.shape, problem.norm_weight, 1e-5)


def fused_norm_codes(problem: Problem) -> Tensor:
    grid_ = (problem.act_scale, problem.act_zero_point, 4)
    return ops.norm_quantize(problem.x, problem.norm_weight, None, 1e-5, True, *grid_)


def from_codes(problem: Problem, codes: Tensor) -> Tensor:
    return ops.int4_linear(codes, problem.packed, *problem.epilogue, None, None, torch.bfloat16)


def from_float(problem: Problem) -> Tensor:
    grid_ = (problem.act_scale, problem.act_zero_point, 4)
    rest = (problem.weight_scale, problem.weight_sums, None, None)
    return ops.quantized_int4_linear(problem.x, problem.packed, *grid_, *rest)


def from_float_per_token(problem: Problem) -> Tensor:
    codes, *grid_ = ops.quantize_activation_per_token(problem.x, 4)
    rest = (problem.weight_scale, problem.weight_sums, None, None)
    return ops.int4_linear(codes, problem.packed, *grid_, *rest, torch.bfloat16)


def per_token_reference(problem: Problem) -> Tensor:
    codes, *grid_ = ops.quantize_activation_per_token(problem.x, 4)
    rest = (problem.weight_scale, problem.weight_sums, None, None)
    return reference.int4_linear(codes, problem.packed, *grid_, *rest, torch.bfloat16)


def int8_candidate(tile: Tile) -> Candidate:
    def call(p: Problem) -> Tensor:
        return int8_linear(p.codes, p.weight_codes, p.act_scale, p.weight_scale, tile)

    def expect(p: Problem) -> Tensor:
        product = reference.integer_matmul(p.codes, p.weight_codes).float()
        return (product * p.act_scale * p.weight_scale.T).bfloat16()

    return Candidate(f"triton int8 {describe(tile)}", call, expect)


def int4_candidate(tile: Tile, case: str) -> Candidate:
    def call(p: Problem) -> Tensor:
        rest = (p.packed, *p.epilogue, None, None, torch.bfloat16)
        if case == "fused":
            return int4_linear.int4_linear(p.x, *rest, tile=tile)
        codes = p.codes if case == "gemm" else ops.quantize_activation(p.x, p.act_scale, p.act_zero_point, 4)
        return int4_linear.int4_linear(codes, *rest, tile=tile)

    return Candidate(f"w4a4 {case} {describe(tile)}", call, linear_reference)


def describe(tile: Tile) -> str:
    split = f"/{tile.split_k}" if tile.split_k > 1 else ""
    kernel = "hopper " if tile.hopper else ""
    return f"{kernel}{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}{split}"


def best_int8(problems: list[Problem]) -> Candidate:
    """The fastest of INT8_TILES at this shape: the yardstick is tuned as well as we are."""
    candidates = [candidate for tile in INT8_TILES if (candidate := usable(int8_candidate(tile), problems[0]))]
    timings = measure(candidates, problems, rounds=5)
    return min(zip(timings, candidates, strict=True), key=lambda pair: pair[0].median)[1]


def usable(candidate: Candidate, problem: Problem) -> Candidate | None:
    """The candidate; None, with a note, where its tile does not fit the GPU or its check fails."""
    try:
        check(candidate, problem)
    except (CheckFailed, triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
        print(f"skipped {candidate.name}: {str(error)[-200:]}")
        return None
    return candidate


def candidates_of(case: str, problems: list[Problem]) -> list[Candidate]:
    """Baseline first."""
    plain = Candidate("bf16 F.linear", lambda p: functional.linear(p.x, p.weight))
    if case == "gemm":
        return [
            plain,
            Candidate(
                "torch._int_mm (int32 out)",
                lambda p: torch._int_mm(p.codes, p.weight_codes.T),
                lambda p: reference.integer_matmul(p.codes, p.weight_codes),
            ),
            best_int8(problems),
            Candidate("w4a4, codes in", lambda p: from_codes(p, p.codes), linear_reference),
        ]
    if case == "norm":
        return [
            Candidate("bf16 rms_norm, F.linear", lambda p: functional.linear(normed(p), p.weight)),
            Candidate(
                "w4a4, fused norm",
                lambda p: from_codes(p, fused_norm_codes(p)),
                lambda p: linear_reference(p, fused_norm_codes(p)),
            ),
        ]
    return [
        plain,
        Candidate("w4a4, static grid", from_float, linear_reference),
        Candidate("w4a4, per token", from_float_per_token, per_token_reference),
    ]


def bar_of(case: str, shape: tuple[int, int, int]) -> float:
    return BARS["decode M=64" if case == "decode" and shape[0] == 64 else case]


def print_table(cases: list[str], rounds: int) -> list[dict[str, str | float]]:
    """The table of issue 5, one case and shape after the other."""
    print(f"{'case':7} {'M, N, K':>20}  {'candidate':38} {'µs':>9} {'p10-p90':>17} {'× bf16':>7} {'bar':>5}")
    rows: list[dict[str, str | float]] = []
    for case in cases:
        for shape in DECODE_SHAPES if case == "decode" else PREFILL_SHAPES:
            problems = make_problems(shape)
            candidates = candidates_of(case, problems)
            for candidate in candidates:
                try:
                    check(candidate, problems[0])
                except CheckFailed as error:
                    sys.exit(f"no row for {case} {shape}: {error}")
            timings = measure(candidates, problems, rounds)
            for timing in timings:
                speedup = timings[0].median / timing.median
                bar = f"{bar_of(case, shape):.2f}" if timing.name.startswith("w4a4") else ""
                spread = f"{timing.low:.1f}-{timing.high:.1f}"
                name = f"{case:7} {shape!s:>20}  {timing.name:38}"
                print(f"{name} {timing.median:9.1f} {spread:>17} {speedup:6.2f}x {bar:>5}", flush=True)
                m, n, k = shape
                figures = {"us": timing.median, "us_p10": timing.low, "us_p90": timing.high, "speedup": speedup}
                figures = {name: round(value, 3) for name, value in figures.items()}
                rows.append({"case": case, "M": m, "N": n, "K": k, "candidate": timing.name, **figures})
            del problems
            torch.cuda.empty_cache()
    return rows


def sweep(cases: list[str], rounds: int, keep: int = 5) -> None:
    """The fastest tiles of every shape, and what the table in choose_tile takes today."""
    lines = []
    for case in cases:
        for shape in DECODE_SHAPES if case == "decode" else PREFILL_SHAPES:
            problems = make_problems(shape)
            m, n, k = shape
            tiles = PREFILL_TILES + (HOPPER_TILES if torch.cuda.get_device_capability() == (9, 0) else [])
            if case == "decode":
                block_m = max(8, m)
                tiles = [replace(tile, block_m=block_m) for tile in DECODE_TILES]
            default = int4_linear.choose_tile(m, n, k // 2)
            tiles = [default, *(tile for tile in tiles if tile != default)]
            modes = ["gemm"] if case == "gemm" else ["fused", "separate"] if m == 1 else ["separate"]
            candidates = [Candidate("bf16 F.linear", lambda p: functional.linear(p.x, p.weight))]
            candidates += [int4_candidate(tile, mode) for mode in modes for tile in tiles]
            if case == "gemm":
                candidates += [int8_candidate(tile) for tile in INT8_TILES]
            candidates = [candidate for candidate in candidates if usable(candidate, problems[0])]
            baseline, *timings = measure(candidates, problems, rounds)
            lines.append(f"{shape} bf16 {baseline.median:.1f} µs")
            order = sorted(timings, key=lambda timing: timing.median)
            shown = [t for t in order if "w4a4" in t.name][:keep] + [t for t in order if "int8" in t.name][:1]
            current = [f"w4a4 {mode} {describe(default)}" for mode in modes]
            shown += [t for t in timings if t.name in current and t not in shown]
            for timing in shown:
                mark = " <- choose_tile" if timing.name in current else ""
                lines.append(f"    {timing.name:38} {timing.median:8.1f} {baseline.median / timing.median:5.2f}x{mark}")
            print(f"swept {case} {shape}: {len(candidates)} candidates", file=sys.stderr, flush=True)
            del problems
            torch.cuda.empty_cache()
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["gemm", "linear", "norm", "decode"]
    parser.add_argument("--cases", nargs="+", choices=choices, default=choices)
    parser.add_argument("--rounds", type=int, default=30, help="replays of every candidate")
    parser.add_argument("--sweep", action="store_true", help="time tiles of the gemm and decode cases instead")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU: none is visible")
    torch.manual_seed(0)
    setting = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(" ".join(f"{name}={value}" for name, value in setting.items()))
    if arguments.sweep:
        sweep([case for case in arguments.cases if case in ("gemm", "decode")], min(arguments.rounds, 10))
        return
    rows = print_table(arguments.cases, arguments.rounds)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*rows[0], *setting])
            writer.writeheader()
            writer.writerows([row | setting for row in rows])


if __name__ == "__main__":
    main()
