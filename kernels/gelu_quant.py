"""The MLP's non-linearity and the static quantizer behind it in one kernel: GELU(x), or SwiGLU's silu(gate) · up.

    GELU(x) = x Φ(x)         silu(g) = g / (1 + e^−g)         codes = quantize(y)

As with the norms (:mod:`.norm_quant`) y never goes to memory and is rounded to x's dtype before it is quantized. exp
and the error function differ from PyTorch's in the last bits, so a y on the edge between two codes may fall to the
other side; and one code apart in one block, two runs round differently everywhere in the blocks after it.

Of 16-bit x the error function costs more time than reading and writing. There Φ is Abramowitz & Stegun 7.1.26,

    1 − Φ(|x|) = ½ e^(−x²/2) · (a₁t + … + a₅t⁵),    t = 1 / (1 + p |x| / √2),

to within 1e-7, which hardly any of the 65,536 numbers shows when y is rounded. float32 takes erf, as PyTorch does.
Reciprocals and exponentials are the GPU's own: what Triton adds for arguments and results near the ends of float32 is
ten instructions of some fifty.

x contiguous: [..., H] for GELU, [..., 2H] with the gate first for SwiGLU; codes int8 [..., H].
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import to_codes
from lit_actreg_kernels.dependent_launch import MAX_TOKENS, launch_options
from lit_actreg_kernels.grid import code_range
from lit_actreg_kernels.int4_tile import INTERPRETED
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_BLOCK = 4096
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def power_of_two(x):
    """2^x to two units in the last place, 0 below 2^-126."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x of x ≥ 1 to one unit in the last place, 0 below 2^-126."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + power_of_two(x * -1.4426950408889634))


@triton.jit
def normal_distribution(x):
    """Φ(x) and φ(x) of the standard normal distribution."""
    exponential = power_of_two(x * x * (-0.5 * 1.4426950408889634))
    t = reciprocal(1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    tail = 0.5 * p * exponential
    return tl.where(x > 0, 1.0 - tail, tail), 0.3989422804014327 * exponential


@triton.jit
def gelu(x, ERF: tl.constexpr):
    """GELU of float32 x; without ``ERF`` in a third of the instructions, for an x that comes from 16 bits."""
    if ERF:
        cumulative = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        cumulative, _ = normal_distribution(x)
    return x * cumulative


@triton.jit
def swiglu(gate, up):
    return gate * sigmoid(gate) * up


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
    tiles = tl.cdiv(H, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    h = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = h < H
    if GATED:
        x_in = tl.load(x_ptr + row * 2 * H + h, mask=inside, other=0.0)
        gate = x_in.to(tl.float32)
        up = tl.load(x_ptr + row * 2 * H + H + h, mask=inside, other=0.0).to(tl.float32)
        y = swiglu(gate, up)
    else:
        x_in = tl.load(x_ptr + row * H + h, mask=inside, other=0.0)
        y = gelu(x_in.to(tl.float32), ERF=x_in.dtype == tl.float32)
    scale = tl.load(scale_ptr)
    codes = to_codes(y.to(x_in.dtype), scale, tl.load(zero_point_ptr), Q_MIN, Q_MAX)
    tl.store(q_ptr + row * H + h, codes, mask=inside)


def _launch(x: Tensor, width: int, gated: bool, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    codes = x.new_empty((*x.shape[:-1], width), dtype=torch.int8)
    if codes.numel():
        q_min, q_max = code_range(bits)
        num_tokens = codes.numel() // width
        rows, columns = (num_tokens, width) if gated else (1, codes.numel())  # without a gate rows do not matter
        block = _BLOCK if num_tokens > MAX_TOKENS else 1024
        _activation_kernel[(rows * triton.cdiv(columns, block),)](
            x,
            codes,
            scale,
            zero_point,
            columns,
            GATED=gated,
            Q_MIN=q_min,
            Q_MAX=q_max,
            BLOCK=block,
            num_warps=block // 512,
            **launch_options(x.device, num_tokens),
        )
    return codes


def gelu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 [..., H] of GELU(x), x [..., H]."""
    return _launch(x, x.shape[-1], False, scale, zero_point, bits)


def swiglu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 [..., H] of silu(gate) · up, x = [gate, up] [..., 2H]."""
    return _launch(x, x.shape[-1] // 2, True, scale, zero_point, bits)
