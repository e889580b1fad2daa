"""The W4A4 linear whose columns have grids in groups: of the weights, of every token, or of both.

    y_mn = Σ_g s_x,mg · s_w,ng · Σ_k (a_mk − z_mg) w_nk + b_n + r_mn, k over the columns of group g

The tensor cores' sum ends at every group's border and is scaled into a float32 one. With 64 columns a group that takes
longer than the product itself: a multiprocessor does 4,096 int8 products a clock, and 128 float operations. So as
little as possible is left in the loop:

- Codes on *a token's* groups come less their zero point (a − z fits int8 up to 7 bits): nothing to correct.
- With groups of the *weights* alone the activation's grid is one a token or a static one, and Σ_g s_w,ng Σ_k w_nk, what
  its zero point multiplies, is a vector beside the sum.
- A scale that is one a row, of either side, waits for the end.

Still it has 0.46 of a bfloat16 product's speed with 64 columns a group (docs/kernels.md). For many tokens, small groups
and 16 bits out :mod:`.dequantize` therefore makes both sides 16-bit numbers and multiplies those; what is here is for
the tokens between one (:mod:`.int4_grouped_gemv`) and so many, for larger groups, and for float32.

The two halves of a packed row are two dots as in :mod:`.int4_linear`, which also says why the tile is y^T. So that a
step of the loop lies in one group of either half, a half holds whole groups: P is a multiple of the group.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels import dequantize
from lit_actreg_kernels.act_quant import fake_quantize_groups, quantize_groups
from lit_actreg_kernels.int4_grouped_gemv import int4_grouped_gemv
from lit_actreg_kernels.int4_grouped_gemv import serves as gemv_serves
from lit_actreg_kernels.int4_tile import (
    INTERPRETED,
    Tile,
    finish,
    scale_rows,
    sum_splits,
    tickets_of,
    tile_of_program,
    times_16_high,
    times_16_low,
)
from torch import Tensor


@triton.jit
def _scale_of(
    column,
    act_scale_ptr,
    weight_scale_ptr,
    m,
    n,
    M,
    N,
    K,
    ACT_GROUP: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
):
    """s_x · s_w of the groups that ``column`` is in, float32; [1, BLOCK_M], [BLOCK_N, 1] or [BLOCK_N, BLOCK_M]."""
    column = tl.minimum(column, K - 1)  # a half may end in a group that the row does not have: its sum is zero
    if ACT_GROUP:
        act = act_scale_ptr + m.to(tl.int64) * (K // ACT_GROUP) + column // ACT_GROUP
        scale = tl.load(act, mask=m < M, other=0.0)[None, :]
    if WEIGHT_GROUP:
        weight = weight_scale_ptr + n.to(tl.int64) * (K // WEIGHT_GROUP) + column // WEIGHT_GROUP
        weight_scale = tl.load(weight, mask=n < N, other=0.0)[:, None]
        scale = scale * weight_scale if ACT_GROUP else weight_scale
    return scale


@triton.jit
def grouped_kernel(
    codes_ptr,
    packed_ptr,
    y_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    bias_ptr,
    residual_ptr,
    partial_ptr,
    ticket_ptr,
    M,
    N,
    K,
    P,
    GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    steps: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K  # of a group
    even: tl.constexpr = GROUP % BLOCK_K == 0
    m, n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m_inside, n_inside = (m < M)[None, :], (n < N)[:, None]
    low_rows = codes_ptr + m.to(tl.int64)[None, :] * K
    high_rows = low_rows + P
    packed_rows = packed_ptr + n.to(tl.int64)[:, None] * P

    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    low_acc, high_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32), tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    low_groups = min(P, K) // GROUP  # as many as there are in a half, or in a row that fits into one
    groups = tl.cdiv(low_groups, SPLIT_K)
    start = tl.program_id(1) * groups
    for step in range(start * steps, min(start + groups, low_groups) * steps):
        first = step // steps * GROUP
        within = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        k = first + within
        low_scale = _scale_of(first, act_scale_ptr, weight_scale_ptr, m, n, M, N, K, ACT_GROUP, WEIGHT_GROUP)
        high_scale = _scale_of(first + P, act_scale_ptr, weight_scale_ptr, m, n, M, N, K, ACT_GROUP, WEIGHT_GROUP)
        # A byte past its group reads as two zero codes, and codes past K or past their group are zeros too.
        inside = within < GROUP
        packed = tl.load(packed_rows + k[None, :], mask=n_inside if even else n_inside & inside[None, :], other=0)
        low_inside = m_inside if EVEN_K else m_inside & (inside & (k < K))[:, None]
        high_inside = m_inside if EVEN_K else m_inside & (inside & (k + P < K))[:, None]
        low = tl.load(low_rows + k[:, None], mask=low_inside, other=0)
        high = tl.load(high_rows + k[:, None], mask=high_inside, other=0)
        if steps == 1:
            y += tl.dot(times_16_low(packed, ASM), low, out_dtype=tl.int32).to(tl.float32) * low_scale
            y += tl.dot(times_16_high(packed), high, out_dtype=tl.int32).to(tl.float32) * high_scale
        else:
            low_acc = tl.dot(times_16_low(packed, ASM), low, low_acc, out_dtype=tl.int32)
            high_acc = tl.dot(times_16_high(packed), high, high_acc, out_dtype=tl.int32)
            if step % steps == steps - 1:
                y += low_acc.to(tl.float32) * low_scale + high_acc.to(tl.float32) * high_scale
                low_acc, high_acc = tl.zeros_like(low_acc), tl.zeros_like(high_acc)
        if not ACT_GROUP:
            low_sums = weight_sums_ptr + n.to(tl.int64) * (K // GROUP) + first // GROUP
            part = tl.sum(low_scale, 1) * tl.load(low_sums, mask=n < N, other=0)
            if first + P < K:
                part += tl.sum(high_scale, 1) * tl.load(low_sums + P // GROUP, mask=n < N, other=0)
            sums += tl.where(step % steps == 0, part, 0.0)
    y *= 0.0625
    if not ACT_GROUP:
        y -= tl.load(act_zero_point_ptr + m * PER_TOKEN, mask=m < M, other=0.0)[None, :] * sums[:, None]

    last = True
    if SPLIT_K > 1:
        y, last = sum_splits(y, partial_ptr, ticket_ptr, m, n, M, N, SPLIT_K)
    if last:
        if not WEIGHT_GROUP:
            y *= tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if not ACT_GROUP:
            y = scale_rows(y, act_scale_ptr, m, M, PER_TOKEN)
        finish(y, y_ptr, bias_ptr, residual_ptr, m, n, M, N, HAS_BIAS, HAS_RESIDUAL)


def choose_grouped_tile(num_tokens: int, num_outputs: int, num_groups: int, group_size: int) -> Tile:
    """The tile for groups: a step takes a part of one, the largest power of two that divides it if that serves."""
    divisor = group_size & -group_size
    block_k = min(64, divisor if divisor >= 32 else max(32, triton.next_power_of_2(group_size)))
    if num_tokens > 64:
        return Tile(64, 128, block_k, num_warps=4, num_stages=3)
    block_m = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    block_n, num_warps = (64, 2) if block_m == 16 else (32, 4)
    split_k = max(1, min(8, 512 // triton.cdiv(num_outputs, block_n), num_groups // 16))
    return Tile(block_m, block_n, block_k, num_warps, num_stages=3, split_k=split_k)


def int4_grouped_linear(
    codes: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    tile: Tile | None = None,
) -> None:
    """Writes y [M, N] of codes [M, K].

    Args:
        act_scale: By groups of a token, [M, H]; else [1] or [M, 1], and the weights have groups.
        act_zero_point: [1] or [M, 1]; None with groups of a token, whose codes are less theirs.
    """
    (num_tokens, num_columns), (num_outputs, num_bytes) = codes.shape, packed.shape
    act_groups, weight_groups = act_scale.shape[-1], weight_scale.shape[1]
    num_groups = max(act_groups, weight_groups)
    group_size = num_columns // num_groups
    tile = tile or choose_grouped_tile(num_tokens, num_outputs, num_groups, group_size)
    num_tiles = triton.cdiv(num_tokens, tile.block_m) * triton.cdiv(num_outputs, tile.block_n)
    partial, tickets = None, None
    if tile.split_k > 1:
        partial = y.new_empty((tile.split_k, num_tokens, num_outputs), dtype=torch.float32)
        tickets = tickets_of(codes.device)
        assert num_tiles <= tickets.numel(), "split K of few tiles only"
    grouped_kernel[(num_tiles, tile.split_k)](
        codes,
        packed,
        y,
        act_scale,
        act_zero_point,
        weight_scale,
        weight_sums,
        bias,
        residual,
        partial,
        tickets,
        num_tokens,
        num_outputs,
        num_columns,
        num_bytes,
        GROUP=group_size,
        ACT_GROUP=num_columns // act_groups if act_groups > 1 else 0,
        WEIGHT_GROUP=num_columns // weight_groups if weight_groups > 1 else 0,
        PER_TOKEN=act_scale.numel() > 1,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN_K=num_columns == 2 * num_bytes and group_size % tile.block_k == 0,
        SPLIT_K=tile.split_k,
        ASM=not INTERPRETED,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def token_grouped_int4_linear(
    x: Tensor,
    act_groups: int,
    act_bits: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """y [M, N] in the dtype of x [M, K], each of ``act_groups`` groups of a token's columns on its own grid."""
    x_MGC = x.view(x.shape[0], act_groups, x.shape[1] // act_groups)
    if dequantize.serves(x.shape[0], x.shape[1] // max(act_groups, weight_scale.shape[1]), x.dtype):
        x_hat = fake_quantize_groups(x_MGC, act_bits).view(x.shape)
        return dequantize.linear(x_hat, packed, weight_scale, bias, residual)
    y = x.new_empty((x.shape[0], packed.shape[0]))
    if not y.numel():
        return y
    codes, scale = quantize_groups(x_MGC, act_bits)
    arguments = (codes.view(x.shape), packed, scale, None, weight_scale, None, bias, residual, y)
    if gemv_serves(codes.view(x.shape), packed, max(act_groups, weight_scale.shape[1])):
        int4_grouped_gemv(*arguments)
    else:
        int4_grouped_linear(*arguments)
    return y
