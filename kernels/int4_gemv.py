"""The W4A4 linear of a single token: a matrix-vector product that takes the time of reading its weights.

    y_n = s_x · s_w · (Σ_k a_k w_nk − z_x · Σ_k w_nk) + b_n + r_n                           (:mod:`.reference`)

A tensor core would multiply fifteen columns of nothing, and its operands would pass through shared memory. `dp4a`, four
int8 products and their sum in one instruction, takes weights as they come from memory: a 32-bit word of a packed row is
eight weights (:func:`.grid.pack_int4`), the low nibbles of columns 4i … 4i+3 and the high ones of P+4i … P+4i+3. Two
masks and a shift make two words of 16-fold int8 weights, two `dp4a` multiply them by two words of activation codes:
five instructions for eight products, about a fifth of the time the word needs to arrive (H100). Per-word sums are added
over the row at the end, and the epilogue shifts the factor 16 out.

**All at once.** A program has one block of rows and asks for all of it, and for the rows' scales, before it touches
the token: 3 TB/s at a latency of 1 µs need 23 KB in flight on each of an H100's 132 multiprocessors. Persistent
programs that walk over blocks in a software pipeline were slower (docs/kernels.md).

**Quantization.** A static grid needs no statistics of the token, so a program may quantize all of it for itself while
its weights are on their way. As many programs do that as there are blocks, so it pays for small layers only: above
``FUSED_BYTES`` of weights a launch of its own, one or two microseconds, costs less.

Shapes: x of a float dtype [K] or codes int8 [K]; packed int32 [N, W], the uint8 [N, P = 4 W] of :mod:`.int4_linear`
seen as words; W ≤ 4096, P a multiple of 16 bytes. One weight scale a channel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import to_codes
from lit_actreg_kernels.grid import code_range
from lit_actreg_kernels.int4_tile import INTERPRETED
from torch import Tensor

FUSED_BYTES = 16 << 20
MAX_WORDS = 4096  # a program holds the codes of a whole row in registers


@dataclass(frozen=True)
class GemvTile:
    """The rows that a program multiplies, and its warps."""

    block_n: int
    num_warps: int


@triton.jit
def multiply_word(packed, low, high, ASM: tl.constexpr):
    """16 · Σ of the eight products of a packed word [..] and the codes (four int8 a word) of its two halves, int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 w, sum;
            shl.b32 w, $1, 4;
            and.b32 w, w, 0xF0F0F0F0;
            dp4a.s32.s32 sum, w, $2, 0;
            and.b32 w, $1, 0xF0F0F0F0;
            dp4a.s32.s32 $0, w, $3, sum;
            }""",
            "=r,r,r,r",
            [packed, low, high],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    # The interpreter has no inline assembly: the same, byte by byte. A shift to the top and back extends the sign.
    total = packed * 0
    for i in tl.static_range(4):
        total += (((packed << (28 - 8 * i)) >> 28) << 4) * ((low << (24 - 8 * i)) >> 24)
        total += (((packed << (24 - 8 * i)) >> 28) << 4) * ((high << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _code_words(x_ptr, first, K, scale, zero_point, QUANTIZE: tl.constexpr, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    """Codes of columns first … first+3 as one int32 each; ``first`` [W]; zero from K on."""
    # Four neighbours a thread: one load, and every column is quantized by one thread only.
    byte = tl.arange(0, 4)[None, :]
    k = first[:, None] + byte
    x = tl.load(x_ptr + k, mask=k < K, other=0)
    if QUANTIZE:
        # A column past K gets the code of zero, and its weights are zero.
        x = to_codes(x, scale, zero_point, Q_MIN, Q_MAX)
    return tl.sum((x.to(tl.int32) & 0xFF) << (8 * byte), 1)


@triton.jit
def _gemv_kernel(
    x_ptr,
    packed_ptr,
    y_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    bias_ptr,
    residual_ptr,
    N,
    K,
    W,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside, word = n < N, tl.arange(0, BLOCK_W)
    inside = n_inside[:, None] & (word < W)[None, :]
    packed = tl.load(packed_ptr + n.to(tl.int64)[:, None] * W + word[None, :], mask=inside, other=0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n_inside, other=0.0)
    sums = tl.load(weight_sums_ptr + n, mask=n_inside, other=0).to(tl.float32)
    added = weight_scale * 0.0
    if HAS_BIAS:
        added += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        added += tl.load(residual_ptr + n, mask=n_inside, other=0.0).to(tl.float32)
    act_scale, zero_point = tl.load(act_scale_ptr), tl.load(act_zero_point_ptr)
    low = _code_words(x_ptr, 4 * word, K, act_scale, zero_point, QUANTIZE, Q_MIN, Q_MAX)
    high = _code_words(x_ptr, 4 * (word + W), K, act_scale, zero_point, QUANTIZE, Q_MIN, Q_MAX)
    acc = tl.sum(multiply_word(packed, low[None, :], high[None, :], ASM), 1) >> 4
    y = weight_scale * (acc.to(tl.float32) - zero_point * sums) * act_scale + added
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n_inside)


def serves(num_tokens: int, packed: Tensor, num_groups: int) -> bool:
    """Whether the product is one for this kernel: one token, one scale a channel, rows of 16-byte pieces that fit."""
    num_bytes = packed.shape[1]
    aligned = num_bytes % 16 == 0 and packed.data_ptr() % 16 == 0
    return num_tokens == 1 and num_groups == 1 and aligned and num_bytes <= 4 * MAX_WORDS


def choose_gemv_tile(num_bytes: int, quantizes: bool) -> GemvTile:
    """The tile for rows of so many packed bytes: 8 KB a program, and 32 KB where each quantizes the token."""
    step, num_warps = (32768, 8) if quantizes else (8192, 4)
    return GemvTile(max(1, min(16, step // triton.next_power_of_2(num_bytes))), num_warps)


def int4_gemv(
    x: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    act_bits: int,
    tile: GemvTile | None = None,
) -> None:
    """Writes y [1, N]; x [1, K] of a float dtype on a static grid of act_bits, or codes int8.

    Args:
        tile: Overrides :func:`choose_gemv_tile` (benchmark and tests).
    """
    num_outputs, num_bytes = packed.shape
    num_columns, num_words = x.shape[1], num_bytes // 4
    tile = tile or choose_gemv_tile(num_bytes, x.is_floating_point())
    q_min, q_max = code_range(act_bits)
    _gemv_kernel[(triton.cdiv(num_outputs, tile.block_n),)](
        x,
        packed.view(torch.int32),
        y,
        act_scale,
        act_zero_point,
        weight_scale,
        weight_sums,
        bias,
        residual,
        num_outputs,
        num_columns,
        num_words,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        QUANTIZE=x.is_floating_point(),
        Q_MIN=q_min,
        Q_MAX=q_max,
        ASM=not INTERPRETED,
        BLOCK_N=tile.block_n,
        BLOCK_W=triton.next_power_of_2(num_words),
        num_warps=tile.num_warps,
    )
