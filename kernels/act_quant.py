"""Triton quantizers of activations: a static grid (one pass); a grid of each token or of a group of its columns.

    q = clamp(round(x / s + z), −2^(b−1), 2^(b−1) − 1)                                      (:mod:`.grid`)

Codes must equal :func:`.grid.quantize` bit for bit, so the division is the IEEE one (:func:`divide`; Triton's `/` is an
approximation) and rounding is half to even. The latter is had by adding and subtracting 1.5 · 2^23: float32 numbers of
that size are the integers, so the addition itself rounds. It is exact here because the clamp comes first, and it runs
in the interpreter too, where libdevice's `rint` does not.

The clamp is of x rather than of x / s + z, to what the outermost codes stand for, so the quotient cannot overflow:
codes are monotone in x, and these bounds are off by some 2^-22 z of a step, so for |z| < 2^20 rounding gives the
outermost codes still.

The kernels are bound by memory: 2 bytes in and 1 out a bfloat16 element.

x is contiguous float32, bfloat16 or float16; scale and zero point are float32 [1], read on the device, so neither
learned clips nor CUDA graphs need a synchronization.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.dependent_launch import launch_options
from lit_actreg_kernels.grid import code_range
from lit_actreg_kernels.int4_tile import INTERPRETED
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_BLOCK = 2048
_HAS_FMA = tl.constexpr(not INTERPRETED)  # so `divide` is tested on a GPU only
# A token of up to this many elements is kept in registers between the two passes of the per-token kernel.
_MAX_ROW_BLOCK = 16384


@triton.jit
def round_half_even(x):
    """Nearest integer of float32 |x| < 2^22, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def divide(x, scale, NARROW: tl.constexpr):
    """x / scale, correctly rounded, of float32 x; ``NARROW``: that 16 bits hold, or x is a bound of the grid.

    x · (1 / scale), corrected by its remainder: 3 instructions a value (5) instead of the 9 of `div_rn`, none of them a
    branch. Once is enough for every bfloat16 and float16 x: all 2^10 mantissas were tried with all 2^23 of the scale.
    Twice is for float32: the first correction leaves an error below one unit in the last place, and then the second,
    with a correctly rounded 1 / scale, rounds correctly (Markstein, IBM J. Res. Dev. 34, 1990). Quotients near the
    least float32 numbers are excepted; beside the zero point that is added next they are nothing.
    """
    if not _HAS_FMA:
        return tl.div_rn(x, scale)
    inverse = tl.div_rn(1.0, scale)
    q = x * inverse
    q = tl.fma(tl.fma(q, -scale, x), inverse, q)
    if not NARROW:
        q = tl.fma(tl.fma(q, -scale, x), inverse, q)
    return q


@triton.jit
def to_grid(x, scale, zero_point, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    """Codes of x (any float dtype) as float32, a NaN as NaN; scale and zero point broadcast against x."""
    wide = tl.maximum(x.to(tl.float32), (Q_MIN - zero_point) * scale, propagate_nan=tl.PropagateNan.ALL)
    wide = tl.minimum(wide, (Q_MAX - zero_point) * scale, propagate_nan=tl.PropagateNan.ALL)
    return round_half_even(divide(wide, scale, x.dtype != tl.float32) + zero_point)


@triton.jit
def to_code_bytes(x, scale, zero_point, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    """Codes of x (any float dtype) on the grid: int32 whose low byte is the code, that of a NaN Q_MIN.

    Scale and zero point broadcast against x. After the addition that rounds (:func:`round_half_even`) the code is the
    mantissa's low byte.
    """
    wide = tl.minimum(tl.maximum(x.to(tl.float32), (Q_MIN - zero_point) * scale), (Q_MAX - zero_point) * scale)
    return ((divide(wide, scale, x.dtype != tl.float32) + zero_point) + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def to_codes(x, scale, zero_point, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    """:func:`to_code_bytes` as int8."""
    return to_code_bytes(x, scale, zero_point, Q_MIN, Q_MAX).to(tl.int8)


@triton.jit
def grid_of_interval(low, high, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, INTEGER: tl.constexpr):
    """Scale and zero point of the grid that spans [low, high]: :func:`.grid.grid_from_clips`."""
    if INTEGER:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    scale = tl.maximum(tl.div_rn(high - low, (Q_MAX - Q_MIN) * 1.0), 1e-8)
    zero_point = Q_MIN - tl.div_rn(low, scale)
    if INTEGER:
        zero_point = round_half_even(tl.minimum(tl.maximum(zero_point, Q_MIN * 1.0), Q_MAX * 1.0))
    return scale, zero_point


@triton.jit
def ask_for(x_ptr, num, BLOCK: tl.constexpr):
    """Has L2 fetch BLOCK elements of x for this program. Nothing is read, so it may come before :func:`gdc_wait`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK // 32) * 32
    addresses = (x_ptr + tl.minimum(offsets, num - 1)).to(tl.int64)
    prefetch: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(prefetch, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _static_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    num,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        ask_for(x_ptr, num, BLOCK)
        gdc_wait()
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < num, other=0.0)
    codes = to_codes(x, tl.load(scale_ptr), tl.load(zero_point_ptr), Q_MIN, Q_MAX)
    tl.store(q_ptr + offsets, codes, mask=offsets < num)


@triton.jit
def _per_token_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    K,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
    wide = x.to(tl.float32)
    low, high = tl.min(wide, 0), tl.max(wide, 0)  # the padding's zeros do no harm: the grid includes zero anyway
    if not ONE_BLOCK:
        for start in range(BLOCK_K, K, BLOCK_K):
            wide = tl.load(x_ptr + row * K + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            low, high = tl.minimum(low, tl.min(wide, 0)), tl.maximum(high, tl.max(wide, 0))
    scale, zero_point = grid_of_interval(low, high, Q_MIN, Q_MAX, INTEGER=True)
    tl.store(scale_ptr + row, scale)
    tl.store(zero_point_ptr + row, zero_point)
    if ONE_BLOCK:
        tl.store(q_ptr + row * K + k, to_codes(x, scale, zero_point, Q_MIN, Q_MAX), mask=k < K)
    else:
        for start in range(0, K, BLOCK_K):
            x = tl.load(x_ptr + row * K + start + k, mask=start + k < K, other=0.0)
            codes = to_codes(x, scale, zero_point, Q_MIN, Q_MAX)
            tl.store(q_ptr + row * K + start + k, codes, mask=start + k < K)


@triton.jit
def _groups_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    num_groups,
    C,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, c = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C)
    offsets, inside = group[:, None] * C + c[None, :], (group < num_groups)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale, zero_point = grid_of_interval(tl.min(x, 1), tl.max(x, 1), Q_MIN, Q_MAX, INTEGER=True)
    codes = to_grid(x, scale[:, None], zero_point[:, None], Q_MIN, Q_MAX) - zero_point[:, None]
    if DEQUANTIZE:
        codes *= scale[:, None]
    else:
        tl.store(scale_ptr + group, scale, mask=group < num_groups)
    tl.store(q_ptr + offsets, codes.to(q_ptr.dtype.element_ty), mask=inside)


def num_warps_for(block: int) -> int:
    """Warps for a block of so many elements: about 16 elements a thread, 1 to 16 warps."""
    return max(1, min(16, block // 512))


def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 of contiguous x [..., K] on the grid of scale and zero point [1]."""
    codes = torch.empty_like(x, dtype=torch.int8)
    if x.numel():
        q_min, q_max = code_range(bits)
        block = _BLOCK if x.numel() > 1 << 18 else _BLOCK // 2  # of few tokens, more programs
        programs, how = (triton.cdiv(x.numel(), block),), launch_options(x.device, x.numel() // x.shape[-1])
        _static_kernel[programs](x, codes, scale, zero_point, x.numel(), q_min, q_max, BLOCK=block, num_warps=4, **how)
    return codes


def quantize_activation_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of contiguous x [..., K] and every token's scale and zero point, float32 [..., 1]."""
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    zero_point = torch.empty_like(scale)
    if x.numel():
        q_min, q_max = code_range(bits)
        num_columns = x.shape[-1]
        block = min(triton.next_power_of_2(num_columns), _MAX_ROW_BLOCK)
        _per_token_kernel[(scale.numel(),)](
            x,
            codes,
            scale,
            zero_point,
            num_columns,
            q_min,
            q_max,
            BLOCK_K=block,
            ONE_BLOCK=num_columns <= block,
            num_warps=num_warps_for(block),
            **launch_options(x.device, scale.numel()),
        )
    return codes, scale, zero_point


def quantize_groups(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 less their zero point [M, G, C] of contiguous x, each group on its own min-max grid; scale [M, G].

    Up to 7 bits fit.
    """
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_empty(x.shape[:2], dtype=torch.float32)
    _launch_groups(x, codes, scale, bits)
    return codes, scale


def fake_quantize_groups(x: Tensor, bits: int) -> Tensor:
    """x̂ of the same grids in the dtype of x, [M, G, C]."""
    x_hat = torch.empty_like(x)
    _launch_groups(x, x_hat, None, bits)
    return x_hat


def _launch_groups(x: Tensor, out: Tensor, scale: Tensor | None, bits: int) -> None:
    (num_tokens, num_groups, num_columns), (q_min, q_max) = x.shape, code_range(bits)
    if not x.numel():
        return
    block = triton.next_power_of_2(num_columns)
    # of few tokens, few groups a program: as many programs as an H100 has multiprocessors, twice
    groups = max(1, min(_BLOCK // block, triton.next_power_of_2(max(1, num_tokens * num_groups // 256))))
    sizes = (num_tokens * num_groups, num_columns, q_min, q_max, scale is None)
    programs = (triton.cdiv(num_tokens * num_groups, groups),)
    warps = num_warps_for(groups * block)
    _groups_kernel[programs](x, out, scale, *sizes, BLOCK_G=groups, BLOCK_C=block, num_warps=warps)
