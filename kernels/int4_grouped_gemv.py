"""The W4A4 linear of a single token with groups: of the weights' columns, of the token's, or of both.

    y_n = Σ_g s_x,g · s_w,ng · (Σ_k a_k w_nk − z_g · Σ_k w_nk) + b_n + r_n, k over the columns of group g

As :mod:`.int4_gemv` it takes weights as 32-bit words and multiplies four of them by four codes with one `dp4a`. There a
row's integers are added first and scaled once; here the halves of a word (columns 4i … and P + 4i …) belong to two
groups, so each half's four products are summed, made a float and scaled, and the row is a sum of floats. The zero
point's part, where the weights alone have groups, is a sum over them, [BLOCK_N, BLOCK_G] (:mod:`.int4_grouped` says
why there is none on a token's groups). Four columns of a word must lie in one group: group sizes are multiples of 4.

Shapes: codes int8 [1, K]; packed uint8 [N, P], P a multiple of 16 and at most 16 KiB; the rest as in :mod:`.reference`.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.int4_gemv import MAX_WORDS, GemvTile, choose_gemv_tile
from lit_actreg_kernels.int4_tile import INTERPRETED
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def multiply_high_nibbles(packed, codes, ASM: tl.constexpr):
    """16 · Σ of the products of a word's four high nibbles and four int8 codes, int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 w; and.b32 w, $1, 0xF0F0F0F0; dp4a.s32.s32 $0, w, $2, 0; }",
            "=r,r,r",
            [packed, codes],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    total = packed * 0  # the interpreter has no inline assembly: shifts to the top and back extend the signs
    for i in tl.static_range(4):
        total += (((packed << (24 - 8 * i)) >> 28) << 4) * ((codes << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _half(
    packed,
    codes_ptr,
    act_scale_ptr,
    weight_scale_ptr,
    n,
    column_word,
    N,
    CODE_WORDS,
    ACT_WORDS: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Σ a w of the high nibbles of every word, by the scales that have groups; float32 [BLOCK_N, BLOCK_W]."""
    in_row = column_word < CODE_WORDS
    codes = tl.load(codes_ptr + column_word, mask=in_row, other=0)
    y = (multiply_high_nibbles(packed, codes[None, :], ASM) >> 4).to(tl.float32)
    if ACT_WORDS:
        y *= tl.load(act_scale_ptr + column_word // ACT_WORDS, mask=in_row, other=0.0)[None, :]
    if WEIGHT_WORDS:
        group = n[:, None] * (CODE_WORDS // WEIGHT_WORDS) + (column_word // WEIGHT_WORDS)[None, :]
        y *= tl.load(weight_scale_ptr + group, mask=(n < N)[:, None] & in_row[None, :], other=0.0)
    return y


@triton.jit
def _grouped_gemv_kernel(
    codes_ptr,
    packed_ptr,
    y_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    bias_ptr,
    residual_ptr,
    N,
    CODE_WORDS,
    W,
    ACT_WORDS: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    n, word = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    n_inside = n < N
    inside = n_inside[:, None] & (word < W)[None, :]
    packed = tl.load(packed_ptr + n.to(tl.int64)[:, None] * W + word[None, :], mask=inside, other=0)
    if not ACT_WORDS:
        g, num_groups = tl.arange(0, BLOCK_G), CODE_WORDS // WEIGHT_WORDS
        groups, groups_inside = n[:, None] * num_groups + g[None, :], n_inside[:, None] & (g < num_groups)[None, :]
        sums = tl.load(weight_sums_ptr + groups, mask=groups_inside, other=0).to(tl.float32)
        sums_N = tl.sum(sums * tl.load(weight_scale_ptr + groups, mask=groups_inside, other=0.0), 1)
    if DEPENDENT:  # what a running model never writes has been asked for (:mod:`.int4_gemv`)
        gdc_wait()
        gdc_launch_dependents()
    y = _half(
        packed << 4, codes_ptr, act_scale_ptr, weight_scale_ptr, n, word, N, CODE_WORDS, ACT_WORDS, WEIGHT_WORDS, ASM
    )
    y += _half(
        packed, codes_ptr, act_scale_ptr, weight_scale_ptr, n, word + W, N, CODE_WORDS, ACT_WORDS, WEIGHT_WORDS, ASM
    )
    y_N = tl.sum(y, 1)
    if not ACT_WORDS:
        y_N = tl.load(act_scale_ptr) * (y_N - tl.load(act_zero_point_ptr) * sums_N)
    if not WEIGHT_WORDS:
        y_N *= tl.load(weight_scale_ptr + n, mask=n_inside, other=0.0)
    if HAS_BIAS:
        y_N += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y_N += tl.load(residual_ptr + n, mask=n_inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y_N.to(y_ptr.dtype.element_ty), mask=n_inside)


def serves(codes: Tensor, packed: Tensor, num_groups: int) -> bool:
    """Whether the product is one for this kernel: one token's codes, groups of words, rows of pieces that fit."""
    num_tokens, num_columns = codes.shape
    num_bytes = packed.shape[1]
    words = num_groups > 1 and num_columns // num_groups % 4 == 0 and codes.data_ptr() % 4 == 0
    aligned = num_bytes % 16 == 0 and packed.data_ptr() % 16 == 0
    return num_tokens == 1 and words and aligned and num_bytes <= 4 * MAX_WORDS


def int4_grouped_gemv(
    codes: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    tile: GemvTile | None = None,
) -> None:
    """Writes y [1, N] of codes int8 [1, K] where the product is one that :func:`serves`."""
    num_outputs, num_bytes = packed.shape
    num_words, weight_groups = codes.shape[1] // 4, weight_scale.shape[1]
    tile = tile or choose_gemv_tile(packed, quantizes=False)
    _grouped_gemv_kernel[(triton.cdiv(num_outputs, tile.block_n),)](
        codes.view(torch.int32),
        packed.view(torch.int32),
        y,
        act_scale,
        act_zero_point,
        weight_scale,
        weight_sums,
        bias,
        residual,
        num_outputs,
        num_words,
        num_bytes // 4,
        ACT_WORDS=num_words // act_scale.numel() if act_zero_point is None else 0,
        WEIGHT_WORDS=num_words // weight_groups if weight_groups > 1 else 0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        DEPENDENT=tile.dependent,
        ASM=not INTERPRETED,
        BLOCK_N=tile.block_n,
        BLOCK_W=triton.next_power_of_2(num_bytes // 4),
        BLOCK_G=triton.next_power_of_2(weight_groups),
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if tile.dependent else {}),
    )
