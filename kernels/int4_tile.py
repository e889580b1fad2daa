"""What the tensor-core kernels of the W4A4 linear share: 4-bit codes to int8 operands, and the epilogue of a tile.

Byte j of a weight row holds w_j in its low nibble and w_{j+P} in its high one, P bytes a row (:func:`.grid.pack_int4`).
Read as int8, `byte & 0xF0` is 16 w_{j+P}, sign and all, and `(byte << 4) & 0xF0` is 16 w_j: one and two operations on
four bytes at a time, where sign extension would take many. The product carries the factor 16, which is shifted out
before the epilogue; |16 · 8 · 128 · K| < 2^31 keeps it exact for K < 131,072. Triton shifts int8 lane by lane (a
128 × 128 × 128-byte step of the loop compiled to 667 instructions on sm_90), so the shift is one line of PTX on four
bytes (254 instructions); the interpreter, which has no inline assembly, takes the plain expression.

A tile is y^T, outputs × tokens (:mod:`.int4_linear` says why).
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def times_16_low(packed, ASM: tl.constexpr):
    """16 · (low nibble, signed) of every byte, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return (packed << 4).to(tl.int8, bitcast=True)


@triton.jit
def times_16_high(packed):
    """16 · (high nibble, signed) of every byte, int8."""
    return (packed & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def times_16(packed, shift, ASM: tl.constexpr):
    """16 · (nibble, signed) of every byte, int8: the low one for a uint8 ``shift`` of 4, the high one for 0."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, t; and.b32 s, $2, 4; shl.b32 t, $1, s; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r,r",
            [packed, shift],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return ((packed << shift) & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def finish(
    y,
    y_ptr,
    bias_ptr,
    residual_ptr,
    m,
    n,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Adds bias and residual to y [BLOCK_N, BLOCK_M] (float32, all scales applied) and stores y^T."""
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(y)
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_rows(y, act_scale_ptr, m, M, PER_TOKEN: tl.constexpr):
    """s_x · y, y [BLOCK_N, BLOCK_M]."""
    return y * tl.load(act_scale_ptr + m * PER_TOKEN, mask=m < M, other=0.0)[None, :]


@triton.jit
def correct(acc, act_zero_point_ptr, weight_scale_ptr, weight_sums_ptr, m, n, M, N, PER_TOKEN: tl.constexpr):
    """s_w · (acc − z_x · Σ w), float32 [BLOCK_N, BLOCK_M]; acc int32 without the factor 16, one scale a channel."""
    zero_point = tl.load(act_zero_point_ptr + m * PER_TOKEN, mask=m < M, other=0.0)
    sums = tl.load(weight_sums_ptr + n, mask=n < N, other=0).to(tl.float32)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
    return weight_scale[:, None] * (acc.to(tl.float32) - zero_point[None, :] * sums[:, None])
