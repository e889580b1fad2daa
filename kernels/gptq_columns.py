"""Triton: GPTQ's loop over the columns of one block, a whole block a launch.

The loop is sequential in the columns and independent in the rows of the weight. Written with PyTorch's operators a
column is 14 small kernels (50 calls with their views), some 80 µs of Python however fast the GPU is: 26 s for the
322,560 columns of a 1 B model, more than all matrix products of its calibration. Here a program keeps a tile of 8 rows
and all C columns of the block in registers and walks through the columns itself:

    q = round to the grid of w_i        e = (w_i − ŵ_i) / U_ii        w_j ← w_j − e · U_ij   for all j of the block

A tile in registers cannot be indexed by a running number, so column i is had as a sum over the tile with all other
columns masked, which is exact. U is upper triangular: the update leaves columns before i as they are, and column i
itself, which it spoils, is not looked at again.

A program is one warp, so that sums and broadcasts stay within it. The division is the IEEE one and rounding half to
even (:mod:`.act_quant`); w − e · U may be fused to one rounding where the reference has two, so that a weight on the
edge between two codes can fall to either side.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import to_grid
from lit_actreg_kernels.grid import code_range
from torch import Tensor

_BLOCK_N = 8  # 32 bytes of float32, what memory delivers at least


@triton.jit
def _kernel(
    w_ptr,
    factor_ptr,
    scale_ptr,
    zero_point_ptr,
    group_ptr,
    codes_ptr,
    errors_ptr,
    C,
    N,
    G,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    w = tl.load(w_ptr + c[:, None] * N + n[None, :], mask=(c < C)[:, None] & (n < N)[None, :], other=0.0)
    for i in range(C):
        column = tl.sum(tl.where((c == i)[:, None], w, 0.0), 0)
        group = n * G + tl.load(group_ptr + i)
        scale = tl.load(scale_ptr + group, mask=n < N, other=1.0)
        zero_point = tl.load(zero_point_ptr + group, mask=n < N, other=0.0)
        code = to_grid(column, scale, zero_point, Q_MIN, Q_MAX)
        diagonal = tl.load(factor_ptr + i * C + i)
        error = tl.div_rn(column - (code - zero_point) * scale, diagonal + tl.zeros_like(column))
        tl.store(codes_ptr + i * N + n, code.to(tl.int8), mask=n < N)
        tl.store(errors_ptr + i * N + n, error, mask=n < N)
        factor_row = tl.load(factor_ptr + i * C + c, mask=c < C, other=0.0)
        w -= factor_row[:, None] * error[None, :]


def gptq_columns(
    w: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes int8 and errors [C, N]; the arguments, contiguous here, are those of :func:`.reference.gptq_columns`."""
    num_columns, num_rows = w.shape
    codes, errors = torch.empty_like(w, dtype=torch.int8), torch.empty_like(w)
    q_min, q_max = code_range(bits)
    _kernel[(triton.cdiv(num_rows, _BLOCK_N),)](
        w,
        factor,
        scale,
        zero_point,
        group,
        codes,
        errors,
        num_columns,
        num_rows,
        scale.shape[1],
        q_min,
        q_max,
        BLOCK_C=triton.next_power_of_2(num_columns),
        BLOCK_N=_BLOCK_N,
        num_warps=1,
    )
    return codes, errors
