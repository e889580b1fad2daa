"""The MLP's non-linearity and the static quantizer behind it in one kernel: GELU(x), or SwiGLU's silu(gate) · up.

    GELU(x) = x/2 · (1 + erf(x / √2))         silu(g) = g / (1 + e^−g)         codes = quantize(y)

As with the norms (:mod:`.norm_quant`) y never goes to memory and is rounded to x's dtype before it is quantized. erf
and exp differ from PyTorch's in the last bits, so a y on the edge between two codes may fall to the other side.

x contiguous: [..., H] for GELU, [..., 2H] with the gate first for SwiGLU; codes int8 [..., H].
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import to_codes
from lit_actreg_kernels.dependent_launch import launch_options
from lit_actreg_kernels.grid import code_range
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_BLOCK = 1024


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _activation_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    H,
    GATED: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = h < H
    if GATED:
        x_in = tl.load(x_ptr + row * 2 * H + h, mask=inside, other=0.0)
        gate = x_in.to(tl.float32)
        up = tl.load(x_ptr + row * 2 * H + H + h, mask=inside, other=0.0).to(tl.float32)
        y = swiglu(gate, up)
    else:
        x_in = tl.load(x_ptr + row * H + h, mask=inside, other=0.0)
        y = gelu(x_in.to(tl.float32))
    scale = tl.load(scale_ptr)
    codes = to_codes(y.to(x_in.dtype), scale, tl.load(zero_point_ptr), Q_MIN, Q_MAX)
    tl.store(q_ptr + row * H + h, codes, mask=inside)


def _launch(x: Tensor, width: int, gated: bool, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    codes = x.new_empty((*x.shape[:-1], width), dtype=torch.int8)
    if codes.numel():
        q_min, q_max = code_range(bits)
        programs = (codes.numel() // width, triton.cdiv(width, _BLOCK))
        _activation_kernel[programs](
            x,
            codes,
            scale,
            zero_point,
            width,
            GATED=gated,
            Q_MIN=q_min,
            Q_MAX=q_max,
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(x.device, programs[0]),
        )
    return codes


def gelu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 [..., H] of GELU(x), x [..., H]."""
    return _launch(x, x.shape[-1], False, scale, zero_point, bits)


def swiglu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 [..., H] of silu(gate) · up, x = [gate, up] [..., 2H]."""
    return _launch(x, x.shape[-1] // 2, True, scale, zero_point, bits)
