"""The W4A4 linear of a single token: a matrix-vector product that takes the time of reading its weights.

    y_n = s_x · s_w · (Σ_k a_k w_nk − z_x · Σ_k w_nk) + b_n + r_n                           (:mod:`.reference`)

A tensor core would multiply fifteen columns of nothing, and its operands would pass through shared memory. `dp4a`, four
int8 products and their sum in one instruction, takes weights as they come from memory: a 32-bit word of a packed row is
eight weights (:func:`.grid.pack_int4`), the low nibbles of columns 4i … 4i+3 and the high ones of P+4i … P+4i+3. Two
masks and a shift make two words of 16-fold int8 weights, two `dp4a` multiply them by two words of activation codes:
five instructions for eight products, about a fifth of the time the word needs to arrive (H100). Per-word sums are added
over the row at the end, and the epilogue shifts the factor 16 out.

**All at once.** A program has one block of rows and asks for all of it before it uses any: 3 TB/s at a latency of 1 µs
need 23 KB in flight on each of an H100's 132 multiprocessors. Persistent programs that walk over blocks in a software
pipeline were slower (docs/kernels.md).

**What comes before.** While its weights are on their way a program turns the whole token into codes itself: from a
float, or from the input of the norm before the linear, whose statistics it then computes too. As many programs do that
as there are blocks, but a launch of its own costs more than the few instructions a value
(:func:`.act_quant.to_code_bytes`).

**What comes after.** The MLP's non-linearity is taken of an output where it is computed, once, and leaves as the next
linear's codes. SwiGLU's row h of the gate and row h of the other half are in the same program.

**Dependent launch** (:func:`launches_dependent`). A kernel may start while the one before it in the stream still runs,
and wait (`griddepcontrol.wait`) before it reads what that one writes. What a running model never writes is asked for
before the wait: weights with their scales and sums, bias, norm, output grid. Whoever writes such a tensor must not
launch the product right behind. The grid of the activations is read after it: a token's own is the output of the kernel
before. The one after this may start when the wait is over, and not before (:mod:`.dependent_launch`).

Shapes: x of a float dtype [K] or codes int8 [K]; packed int32 [N, W], the uint8 [N, P = 4 W] of :mod:`.int4_linear`
seen as words; W ≤ 4096, P a multiple of 16 bytes. One weight scale a channel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import to_code_bytes, to_codes
from lit_actreg_kernels.dependent_launch import has_dependent_launch
from lit_actreg_kernels.gelu_quant import gelu, swiglu
from lit_actreg_kernels.grid import code_range
from lit_actreg_kernels.int4_tile import INTERPRETED
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_WORDS = 4096  # a program holds the codes of a whole row in registers
_MAX_DEPENDENT_BYTES = 16 << 20


@dataclass(frozen=True)
class GemvTile:
    """The rows that a program multiplies, its warps, and whether it is a dependent launch."""

    block_n: int
    num_warps: int
    dependent: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm before the linear: LayerNorm, or RMSNorm where ``rms`` (no mean, no bias); weight and bias [K]."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool


@dataclass(frozen=True)
class Activation:
    """What becomes of the outputs: GELU, or SwiGLU where ``gated``, then codes on this static grid."""

    gated: bool
    scale: Tensor
    zero_point: Tensor
    bits: int


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
def _columns(ptr, word, W, K, FIRST: tl.constexpr):
    """Columns 4 · word … 4 · word + 3 of a vector [K], [W, 4]: of its low half where FIRST; zero outside."""
    # Four neighbours a thread: one load, and every column is quantized by one thread only.
    k = 4 * (word if FIRST else word + W)[:, None] + tl.arange(0, 4)[None, :]
    inside = (word < W)[:, None] & (k < K)
    return tl.load(ptr + k, mask=inside, other=0)


@triton.jit
def _standardized(x_low, x_high, word, W, K, eps, RMS: tl.constexpr):
    """(x − μ) / √(σ² + ε) of a token in two halves [W, 4], float32, as :func:`.norm_quant.normalize`."""
    low, high = x_low.to(tl.float32), x_high.to(tl.float32)
    if not RMS:
        mean = tl.sum(tl.sum(low + high, 1), 0) / K
        k, in_row = 4 * word[:, None] + tl.arange(0, 4)[None, :], (word < W)[:, None]
        low = tl.where(in_row & (k < K), low - mean, 0.0)
        high = tl.where(in_row & (k + 4 * W < K), high - mean, 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(low * low + high * high, 1), 0) / K + eps)
    return low * factor, high * factor


@triton.jit
def _code_words(x, scale, zero_point, QUANTIZE: tl.constexpr, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    """The codes of x [W, 4] as one int32 a row. A column past K gets the code of zero; its weights are zero."""
    codes = to_code_bytes(x, scale, zero_point, Q_MIN, Q_MAX) if QUANTIZE else x.to(tl.int32)
    return tl.sum((codes & 0xFF) << (8 * tl.arange(0, 4)[None, :]), 1)


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
    norm_weight_ptr,
    norm_bias_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    N,
    K,
    W,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    NORM: tl.constexpr,
    RMS: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    OUT_MIN: tl.constexpr,
    OUT_MAX: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i, word = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    if GATED:  # half the rows are of the gate, half of what it multiplies
        h = tl.program_id(0) * (BLOCK_N // 2) + i % (BLOCK_N // 2)
        n, n_inside = i // (BLOCK_N // 2) * (N // 2) + h, h < N // 2
    else:
        n = tl.program_id(0) * BLOCK_N + i
        n_inside = n < N
    inside = n_inside[:, None] & (word < W)[None, :]
    packed = tl.load(packed_ptr + n.to(tl.int64)[:, None] * W + word[None, :], mask=inside, other=0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n_inside, other=0.0)
    sums = tl.load(weight_sums_ptr + n, mask=n_inside, other=0).to(tl.float32)
    added = weight_scale * 0.0
    if HAS_BIAS:
        added += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)
    if NORM:
        g_low = _columns(norm_weight_ptr, word, W, K, True).to(tl.float32)
        g_high = _columns(norm_weight_ptr, word, W, K, False).to(tl.float32)
    if HAS_NORM_BIAS:
        b_low = _columns(norm_bias_ptr, word, W, K, True).to(tl.float32)
        b_high = _columns(norm_bias_ptr, word, W, K, False).to(tl.float32)
    if ACTIVATION:
        out_scale, out_zero_point = tl.load(out_scale_ptr), tl.load(out_zero_point_ptr)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    act_scale, zero_point = tl.load(act_scale_ptr), tl.load(act_zero_point_ptr)
    x_low, x_high = _columns(x_ptr, word, W, K, True), _columns(x_ptr, word, W, K, False)
    if HAS_RESIDUAL:
        added += tl.load(residual_ptr + n, mask=n_inside, other=0.0).to(tl.float32)
    if not DEPENDENT:
        tl.debug_barrier()  # all above has been asked for: the compiler would let some weights wait for the token
    if NORM:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        low, high = _standardized(x_low, x_high, word, W, K, eps, RMS)
        low, high = low * g_low, high * g_high
        if HAS_NORM_BIAS:
            low, high = low + b_low, high + b_high
        x_low, x_high = low.to(dtype), high.to(dtype)  # as the norm of its own rounds them
    low = _code_words(x_low, act_scale, zero_point, QUANTIZE, Q_MIN, Q_MAX)
    high = _code_words(x_high, act_scale, zero_point, QUANTIZE, Q_MIN, Q_MAX)
    acc = tl.sum(multiply_word(packed, low[None, :], high[None, :], ASM), 1) >> 4
    y = weight_scale * (acc.to(tl.float32) - zero_point * sums) * act_scale + added
    if ACTIVATION:
        dtype_out: tl.constexpr = x_ptr.dtype.element_ty  # what a linear of its own rounds its output to
        y = y.to(dtype_out).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.trans(tl.reshape(y, (2, BLOCK_N // 2))))
            y = swiglu(gate, up)
            n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            n_inside = n < N // 2
        else:
            y = gelu(y, ERF=True)
        out = to_codes(y.to(dtype_out), out_scale, out_zero_point, OUT_MIN, OUT_MAX)
        tl.store(y_ptr + n, out, mask=n_inside)
    else:
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n_inside)


def serves(num_tokens: int, packed: Tensor, num_groups: int) -> bool:
    """Whether the product is one for this kernel: one token, one scale a channel, rows of 16-byte pieces that fit."""
    num_bytes = packed.shape[1]
    aligned = num_bytes % 16 == 0 and packed.data_ptr() % 16 == 0
    return num_tokens == 1 and num_groups == 1 and aligned and num_bytes <= 4 * MAX_WORDS


def launches_dependent(device: torch.device, num_bytes: int) -> bool:
    """Whether a decode kernel that reads so many bytes of weights is a dependent launch: on sm_90, up to 16 MB.

    What is to be won is the latency of a launch, about a microsecond however much is read. Two kernels' programs on a
    multiprocessor at once get in each other's way, and large weights lose more by that (docs/kernels.md). It was
    measured on an H100 only.
    """
    return num_bytes <= _MAX_DEPENDENT_BYTES and has_dependent_launch(device)


def choose_gemv_tile(packed: Tensor, quantizes: bool) -> GemvTile:
    """The tile for weights [N, P] uint8: up to 8 KB a program; where each quantizes the token, 16 rows up to 32 KB.

    Fewer and larger programs quantize less often. Rows short of 2 KB stay at 16: 16 KB a program beat 32.
    """
    step, num_warps = (32768, 8) if quantizes else (8192, 4)
    block_n = max(1, min(16, step // triton.next_power_of_2(packed.shape[1])))
    return GemvTile(block_n, num_warps, launches_dependent(packed.device, packed.numel()))


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
    norm: Norm | None = None,
    activation: Activation | None = None,
    tile: GemvTile | None = None,
) -> None:
    """Writes y [1, N]; x [1, K] of a float dtype on a static grid of act_bits, or codes int8.

    Args:
        norm: Of x, which is a float then.
        activation: y is int8 then, and [1, N / 2] where it is gated; x is a float.
        tile: Overrides :func:`choose_gemv_tile` (benchmark and tests).
    """
    num_outputs, num_bytes = packed.shape
    num_columns, num_words = x.shape[1], num_bytes // 4
    quantizes, gated = x.is_floating_point(), activation is not None and activation.gated
    assert quantizes or (norm is None and activation is None)
    tile = tile or choose_gemv_tile(packed, quantizes)
    block_n = max(2, tile.block_n) if gated else tile.block_n
    q_min, q_max = code_range(act_bits)
    out_min, out_max = code_range(activation.bits) if activation else (0, 0)
    _gemv_kernel[(triton.cdiv(num_outputs, block_n),)](
        x,
        packed.view(torch.int32),
        y,
        act_scale,
        act_zero_point,
        weight_scale,
        weight_sums,
        bias,
        residual,
        norm.weight if norm else None,
        norm.bias if norm else None,
        activation.scale if activation else None,
        activation.zero_point if activation else None,
        num_outputs,
        num_columns,
        num_words,
        norm.eps if norm else 0.0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        QUANTIZE=quantizes,
        NORM=norm is not None,
        RMS=norm is not None and norm.rms,
        HAS_NORM_BIAS=norm is not None and norm.bias is not None,
        ACTIVATION=activation is not None,
        GATED=gated,
        Q_MIN=q_min,
        Q_MAX=q_max,
        OUT_MIN=out_min,
        OUT_MAX=out_max,
        DEPENDENT=tile.dependent,
        ASM=not INTERPRETED,
        BLOCK_N=block_n,
        BLOCK_W=triton.next_power_of_2(num_words),
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if tile.dependent else {}),
    )
