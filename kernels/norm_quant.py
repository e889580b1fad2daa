"""LayerNorm or RMSNorm and the static quantizer behind it in one kernel: the normalized row never goes to memory.

    LayerNorm: y = (x − μ) / √(σ² + ε) · w + b      RMSNorm: y = x / √(mean x² + ε) · w      codes = quantize(y)

A static grid needs nothing of y but itself, so the codes leave in the same pass: 2 bytes in and 1 out a bfloat16
element instead of 2 + 2 + 2 + 1. Statistics are float32 and two-pass over the registers (σ² of centred values: no
cancellation); y is rounded to x's dtype before it is quantized, so that fused and unfused models agree. A sum over a
row may differ from PyTorch's in its last bit, so a y on the edge between two codes may fall to the other side.

x contiguous [..., K], K ≤ 65,536 (a row is held in registers); weight and bias [K] of any float dtype.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import num_warps_for, to_codes
from lit_actreg_kernels.dependent_launch import launch_options
from lit_actreg_kernels.grid import code_range
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def normalize(x, inside, K, eps, RMS: tl.constexpr):
    """(x − μ) / √(σ² + ε) of a row x, float32 and zero where not ``inside``; then μ (0 where RMS) and the factor."""
    mean = 0.0
    if not RMS:
        mean = tl.sum(x, 0) / K
        x = tl.where(inside, x - mean, 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / K + eps)
    return x * factor, mean, factor


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    K,
    eps,
    RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    x_in = tl.load(x_ptr + row * K + k, mask=inside, other=0.0)
    y, _, _ = normalize(x_in.to(tl.float32), inside, K, eps, RMS)
    y = y * tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr)
    codes = to_codes(y.to(x_in.dtype), scale, tl.load(zero_point_ptr), Q_MIN, Q_MAX)
    tl.store(q_ptr + row * K + k, codes, mask=inside)


def norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """Codes int8 [..., K] of the norm of x [..., K]; ``rms`` selects RMSNorm (no mean, no bias)."""
    codes = torch.empty_like(x, dtype=torch.int8)
    if x.numel():
        q_min, q_max = code_range(bits)
        num_columns = x.shape[-1]
        block = triton.next_power_of_2(num_columns)
        _norm_kernel[(x.numel() // num_columns,)](
            x,
            weight,
            bias,
            codes,
            scale,
            zero_point,
            num_columns,
            eps,
            RMS=rms,
            HAS_BIAS=bias is not None,
            Q_MIN=q_min,
            Q_MAX=q_max,
            BLOCK_K=block,
            num_warps=num_warps_for(block),
            **launch_options(x.device, x.numel() // num_columns),
        )
    return codes
