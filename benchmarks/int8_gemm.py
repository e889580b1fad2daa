"""The yardstick of the W4A4 linear: a plain Triton int8 GEMM, tuned as well as ours.

y = s_x · s_w · A Wᵀ        int8 A [M, K], W [N, K]; shapes that are multiples of the tile
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.int4_linear import Tile
from torch import Tensor

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
    """y bfloat16 [M, N] of codes int8 [M, K] and weight int8 [N, K]."""
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
