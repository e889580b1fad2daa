"""A W4A4 layer's tensors, and the ways to compute it that the benchmark and the sweep of tiles compare.

Shapes are (M tokens, N outputs, K inputs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Candidate
from int8_gemm import int8_linear
from lit_actreg_kernels import act_quant, dequantize, grid, int4_linear, ops, reference
from lit_actreg_kernels.int4_gemv import GemvTile
from lit_actreg_kernels.int4_linear import Tile
from torch import Tensor
from torch.nn import functional
from triton.errors import TritonError

Shape = tuple[int, int, int]
GROUP = 64  # columns of a token that share a grid, as configs/fit_llama.yaml has them
COLD_BYTES = 160 << 20  # the copies' packed weights together: more than three times the L2 of an H100


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
    expected: Tensor | None = None  # the reference's output, once it was asked for

    @property
    def epilogue(self) -> tuple[Tensor, ...]:
        return self.act_scale, self.act_zero_point, self.weight_scale, self.weight_sums

    @property
    def grid(self) -> tuple[Tensor, Tensor, int]:
        return self.act_scale, self.act_zero_point, 4


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


def make_problems(shape: Shape) -> list[Problem]:
    _, n, k = shape
    return [make_problem(*shape) for _ in range(max(2, min(24, math.ceil(COLD_BYTES / (n * k / 2)))))]


def bytes_moved(shape: Shape, act_bytes: int) -> float:
    """Each input read once, the bfloat16 output written once; act_bytes a token's element."""
    m, n, k = shape
    return act_bytes * m * k + n * k / 2 + 8 * n + 2 * m * n


def linear_reference(problem: Problem) -> Tensor:
    if problem.expected is None:
        rest = (*problem.epilogue, None, None, torch.bfloat16)
        problem.expected = reference.int4_linear(problem.codes, problem.packed, *rest)
    return problem.expected


def normed(problem: Problem) -> Tensor:
    return functional.rms_norm(problem.x, problem.norm_weight.shape, problem.norm_weight, 1e-5)


def fused_norm_codes(problem: Problem) -> Tensor:
    return ops.norm_quantize(problem.x, problem.norm_weight, None, 1e-5, True, *problem.grid)


def from_codes(problem: Problem, codes: Tensor) -> Tensor:
    return ops.int4_linear(codes, problem.packed, *problem.epilogue, None, None, torch.bfloat16)


def from_float(problem: Problem) -> Tensor:
    rest = (problem.weight_scale, problem.weight_sums, None, None)
    return ops.quantized_int4_linear(problem.x, problem.packed, *problem.grid, *rest)


def from_float_per_token(problem: Problem) -> Tensor:
    codes, *token_grid = ops.quantize_activation_per_token(problem.x, 4)
    rest = (problem.weight_scale, problem.weight_sums, None, None)
    return ops.int4_linear(codes, problem.packed, *token_grid, *rest, torch.bfloat16)


def per_token_reference(problem: Problem) -> Tensor:
    codes, *token_grid = ops.quantize_activation_per_token(problem.x, 4)
    rest = (problem.weight_scale, problem.weight_sums, None, None)
    return reference.int4_linear(codes, problem.packed, *token_grid, *rest, torch.bfloat16)


def from_float_in_groups(problem: Problem) -> Tensor:
    weight = (problem.packed, problem.weight_scale, None, None)
    return ops.token_grouped_int4_linear(problem.x, problem.x.shape[1] // GROUP, 4, *weight)


def grouped_reference(problem: Problem) -> Tensor:
    """Of the kernel's own codes: PyTorch on a GPU divides by a number as a product, which moves values at ties."""
    codes, scale = act_quant.quantize_groups(problem.x.unflatten(1, (-1, GROUP)), 4)
    if dequantize.serves(len(codes), GROUP, problem.x.dtype):
        x_hat = (codes * scale[..., None]).flatten(1).bfloat16()
        return functional.linear(x_hat, (problem.weight_codes * problem.weight_scale).bfloat16())
    rest = (problem.weight_scale, None, None, None, torch.bfloat16)
    return reference.int4_linear(codes.flatten(1), problem.packed, scale, None, *rest)


def norm_reference(problem: Problem) -> Tensor:
    rest = (*problem.epilogue, None, None, torch.bfloat16)
    return reference.int4_linear(fused_norm_codes(problem), problem.packed, *rest)


def bf16_candidate() -> Candidate:
    return Candidate("bf16 F.linear", lambda p: functional.linear(p.x, p.weight))


def static_candidate() -> Candidate:
    """A layer as a model calls it: bfloat16 in, quantization included, the chosen tile."""
    return Candidate("w4a4, static grid", from_float, linear_reference)


def norm_candidates() -> list[Candidate]:
    """RMSNorm and the linear behind it: in bfloat16, and with the codes leaving the norm."""
    return [
        Candidate("bf16 rms_norm, F.linear", lambda p: functional.linear(normed(p), p.weight)),
        Candidate("w4a4, fused norm", lambda p: from_codes(p, fused_norm_codes(p)), norm_reference),
    ]


def int_mm_candidate() -> Candidate:
    return Candidate(
        "torch._int_mm (int32 out)",
        lambda p: torch._int_mm(p.codes, p.weight_codes.T),
        lambda p: reference.integer_matmul(p.codes, p.weight_codes),
    )


def int8_candidate(tile: Tile) -> Candidate:
    def call(p: Problem) -> Tensor:
        return int8_linear(p.codes, p.weight_codes, p.act_scale, p.weight_scale, tile)

    def expect(p: Problem) -> Tensor:
        product = reference.integer_matmul(p.codes, p.weight_codes).float()
        return (product * p.act_scale * p.weight_scale.T).bfloat16()

    return Candidate(f"triton int8 {describe(tile)}", call, expect)


def int4_candidate(tile: Tile | GemvTile, mode: str) -> Candidate:
    """``mode``: codes are given ("codes"), made by a launch before ("separate"), or by the product itself ("fused")."""

    def call(p: Problem) -> Tensor:
        x = {"codes": p.codes, "fused": p.x}.get(mode)
        x = ops.quantize_activation(p.x, *p.grid) if x is None else x
        return int4_linear.int4_linear(x, p.packed, *p.epilogue, None, None, torch.bfloat16, tile=tile)

    return Candidate(f"w4a4 {mode} {describe(tile)}", call, linear_reference)


def describe(tile: Tile | GemvTile) -> str:
    if isinstance(tile, GemvTile):
        return f"gemv n{tile.block_n} w{tile.num_warps}{' dependent' if tile.dependent else ''}"
    split = f"/{tile.split_k}" if tile.split_k > 1 else ""
    kernel = "hopper " if tile.hopper else ""
    return f"{kernel}{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}{split}"


# The last one has more tiles than a persistent kernel has programs.
TAILED_SHAPES = [
    (1, 33, 96),
    (1, 4099, 4096),
    (3, 65, 78),
    (17, 31, 130),
    (64, 500, 1056),
    (300, 520, 1040),
    (2600, 2100, 528),
]


def check_integers(tiles_of: Callable[[Shape], list[Tile | GemvTile]]) -> list[str]:
    """What failed: each tile's int32 sums must equal int64 arithmetic over tails, and repeated runs each other."""
    failures = []
    for m, n, k in TAILED_SHAPES:
        weight_codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        codes = torch.randint(-8, 8, (m, k), dtype=torch.int8)
        packed = grid.pack_int4(functional.pad(weight_codes, (0, -k % 128)))
        unit = torch.ones(1), torch.zeros(1), torch.ones(n, 1), reference.weight_sums(weight_codes, 1)
        arguments = [tensor.cuda() for tensor in (codes, packed, *unit)]
        expected = (codes.double() @ weight_codes.double().T).float().cuda()  # exact, and below 2^24
        for tile in tiles_of((m, n, k)):
            try:
                runs = [int4_linear.int4_linear(*arguments, None, None, torch.float32, tile=tile) for _ in range(5)]
            except (TritonError, RuntimeError) as error:  # a compiler pass that fails is a RuntimeError
                failures.append(f"{describe(tile)} at {(m, n, k)}: {str(error)[-150:]}")
                continue
            wrong = [int((run != expected).sum()) for run in runs]
            if any(wrong):
                failures.append(f"{describe(tile)} at {(m, n, k)}: {wrong} of {m * n} integers differ in five runs")
    return failures
