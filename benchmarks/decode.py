"""Decode: the linear of few tokens, and a block of one, as a model runs them beside bfloat16 (needs a GPU).

    python benchmarks/decode.py --cases linear            # M = 1, 16, 64: codes in, and quantization included
    python benchmarks/decode.py --cases block             # one token through 24 blocks of the 1 B model

Beside what the tables choose stands what it had to beat: launches of their own; for one token the launch of the other
kind (:mod:`lit_actreg_kernels.int4_gemv`), for more the kernel of other GPUs. Kernels are compiled on all cores first
and checked before they are timed: integers over tails and the codes of every bfloat16 number for equality with the
reference, outputs as :mod:`harness` does, a block's output against that of separate launches. A line is a candidate, µs
and speed-up over bfloat16, the fastest first. Tiles are searched by `int4_linear.py --quick`.
"""

import argparse
import contextlib
import csv
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast
from unittest import mock

import torch
from harness import Candidate, CheckFailed, Timing, compile_in_parallel, has_gpu, measure, usable
from int4_problem import (
    TAILED_SHAPES,
    Shape,
    bf16_candidate,
    check_integers,
    int4_candidate,
    make_problem,
    make_problems,
)
from int4_tiles import chosen, on_hopper, tiles_to_check
from lit_actreg_kernels import decode_attention, grid, int4_gemv, int4_linear, reference
from lit_actreg_kernels.int4_gemv import GemvTile
from lit_actreg_kernels.module import Int4Linear
from lit_actreg_plugins.int4_block import Int4Block
from torch import Tensor

from lit_actreg.config import SITES, ModelConfig, QuantConfig
from lit_actreg.model import Block, LayerCache, rotary_angles

Row = dict[str, str | float]

SHAPES = [(m, n, k) for m in (1, 16, 64) for n, k in ((4096, 4096), (11008, 4096), (8192, 8192))]
WIDTH, NUM_BLOCKS, LENGTH, POSITION = 1920, 24, 384, 255  # of the 1 B model of model_speed.py, in the middle of a text


def linear_candidates(shape: Shape) -> list[Candidate]:
    """Baseline first."""
    codes_in, separate = (int4_candidate(chosen(shape), mode) for mode in ("codes", "separate"))
    if shape[0] > 1:
        plain = int4_linear.choose_tile(shape[0], shape[1], shape[2] // 2, hopper=False)
        others = (int4_candidate(plain, mode) for mode in ("codes", "separate")) if on_hopper() else ()
        return [bf16_candidate(), codes_in, separate, *others]
    fused = cast(GemvTile, chosen(shape, quantizes=True))
    both = (fused, replace(fused, dependent=not fused.dependent)) if on_hopper() else (fused,)
    return [bf16_candidate(), codes_in, *(int4_candidate(tile, "fused") for tile in both), separate]


def check_codes() -> list[str]:
    """What failed: a product that quantizes inside must equal that of the reference's codes, for every bfloat16 number.

    The weight is the identity, so an output is one code on its way through the epilogue.
    """
    failures, size = [], 4096
    numbers = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16)
    numbers = torch.where(numbers.isnan(), 0.0, numbers).cuda().view(16, size)
    weight = torch.eye(size, dtype=torch.int8, device="cuda")
    layer = (torch.ones(size, 1, device="cuda"), reference.weight_sums(weight, 1), None, None, torch.float32)
    packed = grid.pack_int4(weight)
    for scale, zero_point in ((0.0371, 0.3), (0.4, -1.0), (1e-3, 2.25), (0.25, 0.0)):
        static = torch.tensor([scale], device="cuda"), torch.tensor([zero_point], device="cuda")
        codes = reference.quantize_activation(numbers, *static, 4)
        for x, q in zip(numbers.split(1), codes.split(1), strict=True):
            found, expected = (int4_linear.int4_linear(given, packed, *static, *layer) for given in (x, q))
            if not torch.equal(found, expected):
                failures.append(f"grid {scale}, {zero_point}: codes differ from the reference's")
    return failures


def static_linear(num_in: int, num_out: int) -> Int4Linear:
    codes = torch.randint(-8, 8, (num_out, num_in), dtype=torch.int8)
    scale = torch.full((num_out, 1), 0.2 / num_in**0.5)
    return Int4Linear(codes, scale, torch.zeros(num_out), torch.tensor([0.4]), torch.tensor([-0.3]))


def make_blocks(count: int) -> tuple[list[Block], list[Int4Block], list[LayerCache], Tensor, Tensor, Tensor]:
    """Blocks in bfloat16 and of integers (random weights), their caches, a token, and the rotary cos and sin."""
    config = ModelConfig(num_layers=count, width=WIDTH, num_heads=16, context=2048, tie_embeddings=False)
    plain, integer, caches = [], [], []
    with torch.device("cuda"), torch.no_grad():
        for _ in range(count):
            block = Block(config, QuantConfig(activations="none")).requires_grad_(False)
            twin = Block(config, QuantConfig()).requires_grad_(False)
            for site in SITES:
                linear = getattr(block, site)
                torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                setattr(twin, site, static_linear(linear.in_features, linear.out_features))
            plain.append(block.bfloat16())
            integer.append(Int4Block(twin).bfloat16())
            keys, values = torch.randn(2, 1, 16, LENGTH, WIDTH // 16, dtype=torch.bfloat16)
            caches.append(LayerCache(keys, values, torch.tensor([POSITION])))
        cos, sin = rotary_angles(LENGTH, WIDTH // 16, config.rope_theta, torch.device("cuda"))
        token = torch.randn(1, 1, WIDTH, dtype=torch.bfloat16)
    return plain, integer, caches, token, cos[POSITION : POSITION + 1], sin[POSITION : POSITION + 1]


@contextlib.contextmanager
def kernels(fused: bool, dependent: bool) -> Iterator[None]:
    """Without ``fused`` norm and activation are launches of their own while it lasts, without ``dependent`` none is."""
    with contextlib.ExitStack() as patches:
        if not fused:
            patches.enter_context(mock.patch.object(int4_gemv, "serves", return_value=False))
        if not dependent:
            for module in (int4_gemv, decode_attention):
                patches.enter_context(mock.patch.object(module, "launches_dependent", return_value=False))
        yield


def run_blocks(
    blocks: list[Block] | list[Int4Block], inputs: tuple[list[LayerCache], Tensor, Tensor, Tensor]
) -> Tensor:
    caches, x, cos, sin = inputs
    y = None
    for block, cache in zip(blocks, caches, strict=True):
        x, y, _ = block(x, y, cos, sin, cache)
    return x if y is None else x + y


def block_candidates(plain: list[Block], integer: list[Int4Block], inputs: tuple) -> list[Candidate]:
    """Baseline first, then what the others are checked against."""

    def candidate(name: str, fused: bool, dependent: bool) -> Candidate:
        def call(_: None) -> Tensor:
            with kernels(fused, dependent):
                return run_blocks(integer, inputs)

        return Candidate(name, call)

    baseline = Candidate("bf16, eager", lambda _: run_blocks(plain, inputs))
    names = {"separate launches": (False, False), "fused": (True, False), "fused, dependent": (True, True)}
    return [baseline, *(candidate(name, *how) for name, how in names.items())]


def check_block(candidates: list[Candidate]) -> list[str]:
    """What failed: a block's output is that of separate launches, but for values between two codes."""
    _, separate, *others = candidates
    expected = separate.call(None).double()
    failures = []
    for candidate in others:
        error = ((candidate.call(None).double() - expected).norm() / expected.norm()).item()
        if not error < 0.02:
            failures.append(f"{candidate.name}: a block differs by {error:.2%} from separate launches")
    return failures


# one process compiles several variants of one problem
_problem = functools.lru_cache(maxsize=1)(make_problem)
_blocks = functools.lru_cache(maxsize=1)(make_blocks)


@torch.no_grad()
def _compile(item: tuple[str, Shape, int]) -> None:
    """One kernel, or one variant's, in a process of its own."""
    case, shape, index = item
    if case == "integers":
        check_integers(lambda tailed: tiles_to_check(tailed) if tailed == shape else [])
    elif case == "codes":
        check_codes()
    elif case == "linear":
        candidates = linear_candidates(shape)
        if index < len(candidates):
            candidates[index].call(_problem(*shape))
    else:
        plain, integer, *inputs = _blocks(1)
        block_candidates(plain, integer, tuple(inputs))[index].call(None)


def lines_of(title: str, timings: list[Timing], count: int) -> tuple[list[str], list[Row]]:
    """The table and its rows, both per one of the ``count`` units of a call."""
    baseline = timings[0]
    rows: list[Row] = [
        {"case": title, "candidate": t.name, "us": round(t.median / count, 3), "us_p90": round(t.high / count, 3)}
        for t in timings
    ]
    lines = [f"{title}: {baseline.name} {baseline.median / count:.2f}"]
    for timing in sorted(timings[1:], key=lambda t: t.median):
        lines.append(f"  {timing.name:40} {timing.median / count:7.2f} {baseline.median / timing.median:5.2f}x")
    return lines, rows


def time_linears(rounds: int) -> Iterator[tuple[list[str], list[Row]]]:
    for shape in SHAPES:
        problems = make_problems(shape)
        candidates = [candidate for candidate in linear_candidates(shape) if usable(candidate, problems[0])]
        yield lines_of(str(shape), measure(candidates, problems, rounds), 1)
        del problems
        torch.cuda.empty_cache()


def time_blocks(rounds: int) -> Iterator[tuple[list[str], list[Row]]]:
    one = _blocks(1)
    failures = check_block(block_candidates(one[0], one[1], one[2:]))
    if failures:
        sys.exit("\n".join(failures))
    plain, integer, *inputs = make_blocks(NUM_BLOCKS)
    timings = measure(block_candidates(plain, integer, tuple(inputs)), [None], rounds)
    yield lines_of("block of one token", timings, NUM_BLOCKS)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["linear", "block"], default=["linear", "block"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="CSV file of everything timed")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if not has_gpu():
        sys.exit("this benchmark needs a CUDA GPU: none is visible")
    items: list[tuple[str, Shape, int]] = []
    timers: list[Callable[[int], Iterator[tuple[list[str], list[Row]]]]] = []
    if "linear" in arguments.cases:
        items += [("linear", shape, i) for shape in SHAPES for i in range(1, 5)] + [("codes", (0, 0, 0), 0)]
        items += [("integers", shape, 0) for shape in TAILED_SHAPES]
        timers.append(time_linears)
    if "block" in arguments.cases:
        items += [("block", (0, 0, 0), i) for i in range(1, 4)]
        timers.append(time_blocks)
    compile_in_parallel(_compile, items)  # forks: nothing may have touched CUDA before
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; compiled in {time.perf_counter() - start:.0f} s")
    if "linear" in arguments.cases:
        try:
            failures = [*check_integers(tiles_to_check), *check_codes()]
        except (CheckFailed, RuntimeError) as error:
            failures = [str(error)[-300:]]
        if failures:
            sys.exit("\n".join(failures))
        print("integers and codes are exact", flush=True)
    rows: list[Row] = []
    for timer in timers:
        for lines, found in timer(arguments.rounds):
            print("\n".join(lines), flush=True)
            rows += found
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
