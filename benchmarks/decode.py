"""Decode: which kernels, tiles and launches serve few tokens fastest, beside bfloat16 in the same run (needs a GPU).

    python benchmarks/decode.py --cases linear            # M = 1, 16, 64: every variant of the linear
    python benchmarks/decode.py --cases block             # one token through 24 blocks of the 1 B model

Both compile on all cores first and check before they time: integers over tails and the codes of every bfloat16 number
for equality with the reference, outputs as :mod:`harness` does, a block's output against that of separate launches. A
line is a candidate, µs and speed-up over bfloat16, the fastest first. What wins goes into `choose_tile`,
`choose_gemv_tile` and `AttentionTile`.
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
from unittest import mock

import torch
from harness import Candidate, CheckFailed, Timing, compile_in_parallel, has_gpu, measure, usable
from int4_problem import Shape, bf16_candidate, check_integers, int4_candidate, make_problem, make_problems
from lit_actreg_kernels import decode_attention, grid, int4_gemv, int4_linear, reference
from lit_actreg_kernels.decode_attention import AttentionTile
from lit_actreg_kernels.int4_gemv import GemvTile
from lit_actreg_kernels.int4_linear import Tile
from lit_actreg_kernels.module import Int4Linear
from lit_actreg_plugins.int4_block import Int4Block
from torch import Tensor

from lit_actreg.config import SITES, ModelConfig, QuantConfig
from lit_actreg.model import Block, LayerCache, rotary_angles

SHAPES = [(m, n, k) for m in (1, 16, 64) for n, k in ((4096, 4096), (11008, 4096), (8192, 8192))]
GEMV = [(8192, 4), (16384, 4), (16384, 8), (32768, 8), (65536, 16)]  # bytes a program, warps
SIXTEEN = [  # and whether the tile quantizes inside too
    (Tile(16, 32, 256, 2, 4), False),
    (Tile(16, 64, 256, 4, 4), False),
    (Tile(16, 32, 256, 4, 4), True),
    (Tile(16, 64, 256, 8, 3), True),
    (Tile(16, 64, 256, 4, 3, split_k=2), True),
    (Tile(16, 64, 128, 4, 4, split_k=4), True),
    (Tile(16, 128, 128, 8, 4, split_k=4), True),
    (Tile(16, 128, 128, 8, 4, split_k=2), True),
    (Tile(16, 128, 128, 4, 4, split_k=4), True),
    (Tile(16, 64, 128, 4, 4, split_k=8), True),
]
MORE = [
    Tile(64, 64, 128, 4, 4),
    Tile(64, 64, 256, 4, 3),
    Tile(64, 64, 128, 4, 4, split_k=2),
    Tile(64, 128, 128, 8, 3, split_k=2),
    Tile(64, 128, 128, 4, 3, split_k=2),
    Tile(64, 128, 128, 8, 3, split_k=4),
    Tile(64, 128, 64, 4, 4, split_k=4),
    Tile(64, 128, 256, 8, 2, split_k=2),
]
WIDTH, NUM_BLOCKS, LENGTH, POSITION = 1920, 24, 384, 255  # of the 1 B model of model_speed.py, in the middle of a text
ATTENTION = [
    AttentionTile(),
    AttentionTile(64),
    AttentionTile(128, 2),
    AttentionTile(64, 3),
    AttentionTile(32, 4),
    AttentionTile(64, 2, splits=2),
    AttentionTile(64, 2, splits=4),
]


def linear_candidates(shape: Shape) -> list[Candidate]:
    """Baseline first; every tile in every way it can be used."""
    m, _, k = shape
    candidates = [bf16_candidate()]
    if m == 1:
        row = 1 << (k // 2 - 1).bit_length()
        for step, num_warps in GEMV:
            tile = GemvTile(max(1, step // row), num_warps)
            for variant in (tile, replace(tile, dependent=True)):
                candidates += [int4_candidate(variant, mode) for mode in ("fused", "codes")]
        return [*candidates, int4_candidate(GemvTile(max(1, 8192 // row), 4), "separate")]
    for tile, fused in SIXTEEN if m == 16 else [(tile, False) for tile in MORE]:
        for variant in (tile, replace(tile, dependent=True)):
            candidates += [int4_candidate(variant, mode) for mode in ("separate", *(("fused",) if fused else ()))]
        candidates.append(int4_candidate(tile, "codes"))
    return candidates


def tiles_to_check(shape: Shape) -> list[Tile | GemvTile]:
    """One of each kind of kernel."""
    m, _, _ = shape
    tiles: list[Tile | GemvTile] = []
    if m == 1:
        tiles += [GemvTile(4, 4), GemvTile(16, 8, dependent=True)]
    if m <= 64:
        tiles += [Tile(64, 128, 128, 8, 3, split_k=2), replace(SIXTEEN[6][0], dependent=True), SIXTEEN[5][0]]
    return tiles


def check_codes() -> list[str]:
    """What failed: products that quantize inside must equal those of the reference's codes, for every bfloat16 number.

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
        for tile, rows in ((GemvTile(16, 8), 1), (Tile(16, 128, 128, 8, 4, split_k=4), 16)):
            for first in range(0, 16, rows):
                x, q = numbers[first : first + rows], codes[first : first + rows]
                found = int4_linear.int4_linear(x, packed, *static, *layer, tile=tile)
                if not torch.equal(found, int4_linear.int4_linear(q, packed, *static, *layer, tile=tile)):
                    failures.append(f"{tile} with grid {scale}, {zero_point}: codes differ from the reference's")
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
def kernels(fused: bool, step: int, num_warps: int, dependent: bool, attention: AttentionTile) -> Iterator[None]:
    """Kernels of this kind while it lasts: ``step`` is the bytes a program where it quantizes (8 KB where it does not).

    Without ``fused`` norm and activation are launches of their own.
    """

    def tile(num_bytes: int, quantizes: bool) -> GemvTile:
        rows = (step if quantizes else 8192) // (1 << (num_bytes - 1).bit_length())
        return GemvTile(max(1, rows), num_warps if quantizes else 4, dependent)

    attend = functools.partial(decode_attention.decode_attention, tile=replace(attention, dependent=dependent))
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(int4_gemv, "choose_gemv_tile", tile))
        patches.enter_context(mock.patch.object(decode_attention, "decode_attention", attend))
        if not fused:
            patches.enter_context(mock.patch.object(int4_gemv, "serves", return_value=False))
        yield


def block_variants() -> dict[str, tuple[bool, int, int, bool, AttentionTile]]:
    plain, pipelined, split = ATTENTION[0], ATTENTION[3], ATTENTION[6]
    return {
        "separate launches": (False, 8192, 4, False, plain),
        "fused, 8 KB w4": (True, 8192, 4, False, plain),
        "fused, 16 KB w4": (True, 16384, 4, False, plain),
        "fused, 16 KB w8": (True, 16384, 8, False, plain),
        "fused, 32 KB w8": (True, 32768, 8, False, plain),
        "fused, 16 KB w8, attention 64 s3": (True, 16384, 8, False, pipelined),
        "fused, 16 KB w8, attention 64 s2/4": (True, 16384, 8, False, split),
        "separate launches, dependent": (False, 8192, 4, True, plain),
        "fused, 8 KB w4, dependent": (True, 8192, 4, True, plain),
        "fused, 16 KB w8, dependent": (True, 16384, 8, True, plain),
        "fused, 32 KB w8, dependent": (True, 32768, 8, True, plain),
        "fused, 16 KB w8, dependent, attention 64 s3": (True, 16384, 8, True, pipelined),
        "fused, 16 KB w8, dependent, attention 64 s2/4": (True, 16384, 8, True, split),
    }


def run_blocks(
    blocks: list[Block] | list[Int4Block], inputs: tuple[list[LayerCache], Tensor, Tensor, Tensor]
) -> Tensor:
    caches, x, cos, sin = inputs
    for block, cache in zip(blocks, caches, strict=True):
        x, _ = block(x, cos, sin, cache)
    return x


def block_candidates(plain: list[Block], integer: list[Int4Block], inputs: tuple) -> list[Candidate]:
    def candidate(name: str, arguments: tuple) -> Candidate:
        def call(_: None) -> Tensor:
            with kernels(*arguments):
                return run_blocks(integer, inputs)

        return Candidate(name, call)

    baseline = Candidate("bf16, eager", lambda _: run_blocks(plain, inputs))
    return [baseline, *(candidate(name, arguments) for name, arguments in block_variants().items())]


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


def attention_candidates(caches: list[LayerCache], cos: Tensor, sin: Tensor) -> list[Candidate]:
    """One call is the attention of all blocks."""
    qkv = torch.randn(1, 3 * WIDTH, device="cuda", dtype=torch.bfloat16)
    static = torch.tensor([0.4], device="cuda"), torch.tensor([-0.3], device="cuda"), 4
    angles = cos.flatten(), sin.flatten()

    def candidate(tile: AttentionTile) -> Candidate:
        def call(_: None) -> Tensor:
            for cache in caches:
                y = decode_attention.decode_attention(qkv, *angles, *cache, *static, tile=tile)
            return y

        splits = f"/{tile.splits}" if tile.splits else ""
        name = f"attention {tile.block} s{tile.num_stages}{splits}{' dependent' if tile.dependent else ''}"
        return Candidate(name, call)

    return [candidate(tile) for first in ATTENTION for tile in (first, replace(first, dependent=True))]


@functools.lru_cache(maxsize=1)
def _problem(shape: Shape):  # type: ignore[no-untyped-def]
    return make_problem(*shape)


@functools.lru_cache(maxsize=1)
def _block():  # type: ignore[no-untyped-def]
    return make_blocks(1)


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
            candidates[index].call(_problem(shape))
    else:
        plain, integer, caches, token, cos, sin = _block()
        candidates = block_candidates(plain, integer, (caches, token, cos, sin))
        (candidates + attention_candidates(caches, cos, sin))[index].call(None)


def lines_of(
    title: str, timings: list[Timing], count: int, keep: int
) -> tuple[list[str], list[dict[str, str | float]]]:
    """The ``keep`` fastest of each kind, per ``count`` units a call, and all of them as rows."""
    baseline = timings[0]
    rows: list[dict[str, str | float]] = [
        {"case": title, "candidate": t.name, "us": round(t.median / count, 3), "us_p90": round(t.high / count, 3)}
        for t in timings
    ]
    lines = [f"{title}: {baseline.name} {baseline.median / count:.2f}"]
    kinds: dict[tuple[str, ...], int] = {}
    for timing in sorted(timings[1:], key=lambda t: t.median):
        kind = tuple(word for word in ("fused", "separate", "codes", "dependent") if word in timing.name)
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= keep:
            lines.append(f"  {timing.name:48} {timing.median / count:7.2f} {baseline.median / timing.median:5.2f}x")
    return lines, rows


def time_linears(rounds: int) -> Iterator[tuple[list[str], list[dict[str, str | float]]]]:
    for shape in SHAPES:
        problems = make_problems(shape)
        candidates = [candidate for candidate in linear_candidates(shape) if usable(candidate, problems[0])]
        yield lines_of(str(shape), measure(candidates, problems, rounds), 1, keep=2)
        del problems
        torch.cuda.empty_cache()


def time_blocks(rounds: int) -> Iterator[tuple[list[str], list[dict[str, str | float]]]]:
    one = _block()
    failures = check_block(block_candidates(one[0], one[1], one[2:]))
    if failures:
        sys.exit("\n".join(failures))
    plain, integer, *inputs = make_blocks(NUM_BLOCKS)
    timings = measure(block_candidates(plain, integer, tuple(inputs)), [None], rounds)
    yield lines_of("block of one token", timings, NUM_BLOCKS, keep=99)
    caches, _, cos, sin = inputs
    yield lines_of("attention", measure(attention_candidates(caches, cos, sin), [None], rounds), NUM_BLOCKS, keep=99)


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
    timers: list[Callable[[int], Iterator[tuple[list[str], list[dict[str, str | float]]]]]] = []
    if "linear" in arguments.cases:
        # Sizes are arguments: the other shapes need no other kernels, but for a row's length in that of one token.
        compiled = ((1, 4096, 4096), (1, 8192, 8192), (16, 4096, 4096), (64, 4096, 4096))
        items += [("linear", shape, i) for shape in compiled for i in range(1, 64)] + [("codes", (0, 0, 0), 0)]
        items += [("integers", shape, 0) for shape in ((1, 33, 96), (1, 4099, 4096), (3, 65, 78), (17, 31, 130))]
        timers.append(time_linears)
    if "block" in arguments.cases:
        items += [("block", (0, 0, 0), i) for i in range(1, len(block_variants()) + 1 + 2 * len(ATTENTION))]
        timers.append(time_blocks)
    compile_in_parallel(_compile, items)  # forks: nothing may have touched CUDA before
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; compiled in {time.perf_counter() - start:.0f} s")
    if "linear" in arguments.cases:
        try:
            failures = [*check_integers(tiles_to_check), *check_codes()]
        except (CheckFailed, RuntimeError) as error:
            failures = [str(error)[-300:]]
        print("\n".join(f"WRONG: {failure}" for failure in failures) or "integers and codes are exact", flush=True)
    rows: list[dict[str, str | float]] = []
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
