"""Triton fake quantization for training: x̂ = (q − z) · s, and the gradients of x and of the clips in one pass.

Forward, codes and grid as in :mod:`.grid`. Backward (arXiv 2404.03605), with g the gradient of x̂, u = x / s + z,
e⁻ and e⁺ the values of the grid's end codes and δ = (u − round u) / (2^b − 1):

    x ≥ e⁺          dx = 0        dc⁺ += g
    x ≤ e⁻          dx = 0        dc⁻ += g                 (outside, dx = g where gradients are not masked)
    between         dx = g        dc⁺ −= δ g      dc⁻ += δ g

The forward pass divides exactly (codes must be equal everywhere). The backward pass multiplies by 1 / s: δ enters a sum
over millions of elements, where its last bit is nothing.

Sums over all elements are float32 and deterministic: a fixed number of programs walks over the tiles in a fixed order,
each writes its own partial sum, and PyTorch adds those (no atomics). Both kernels are bound by memory: a bfloat16
element is 2 bytes in and 2 out forward, 4 in and 2 out backward.

x, g contiguous, float32, bfloat16 or float16; clips float [1], read on the device. No autograd in here
(:mod:`.training_ops`).
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import grid_of_interval, round_half_even, to_grid
from lit_actreg_kernels.grid import code_range
from torch import Tensor
from torch.library import wrap_triton

_FORWARD_BLOCK = 2048
_BACKWARD_BLOCK = 1024  # 8 elements a thread: one 16-byte access of each bfloat16 tensor
_PROGRAMS_PER_PROCESSOR = 8


@triton.jit
def load_grid(low_ptr, high_ptr, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, INTEGER: tl.constexpr):
    """Scale and zero point of the clips in memory."""
    low, high = tl.load(low_ptr).to(tl.float32), tl.load(high_ptr).to(tl.float32)
    return grid_of_interval(low, high, Q_MIN, Q_MAX, INTEGER)


@triton.jit
def on_grid(x, scale, zero_point, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    """x̂ of x, float32."""
    return (to_grid(x, scale, zero_point, Q_MIN, Q_MAX) - zero_point) * scale


@triton.jit
def no_sums(BLOCK: tl.constexpr):
    """The clips' sums over tiles of BLOCK elements, before the first: of (2^b − 1) δ g between, g below, g above."""
    zeros = tl.zeros((BLOCK // 8 if BLOCK > 8 else 1,), tl.float32)
    return zeros, zeros, zeros


@triton.jit
def _add(sums, x):
    """Eight neighbours are one thread's (float32: two threads'), so few registers hold sums, and more programs run."""
    return sums + tl.sum(tl.reshape(x, (sums.shape[0], x.shape[0] // sums.shape[0])), 1)


@triton.jit
def straight_through(x, g, scale, zero_point, sums, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, MASKED: tl.constexpr):
    """The module's table for every element of float32 x and g: dx, and the sums with what they add to them."""
    between, low, high = sums
    u = x * tl.div_rn(1.0, scale) + zero_point
    above = x >= (Q_MAX - zero_point) * scale
    below = x <= (Q_MIN - zero_point) * scale
    outside = above | below
    inner = tl.where(outside, 0.0, g)
    sums = (
        _add(between, inner * tl.where(outside, 0.0, u - round_half_even(u))),  # of an infinite u that is a NaN
        _add(low, tl.where(below, g, 0.0)),
        _add(high, tl.where(above, g, 0.0)),
    )
    return inner if MASKED else g, sums


@triton.jit
def _forward_kernel(
    x_ptr,
    x_hat_ptr,
    low_ptr,
    high_ptr,
    num,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < num, other=0.0)
    scale, zero_point = load_grid(low_ptr, high_ptr, Q_MIN, Q_MAX, INTEGER)
    x_hat = on_grid(x, scale, zero_point, Q_MIN, Q_MAX)
    tl.store(x_hat_ptr + offsets, x_hat.to(x_hat_ptr.dtype.element_ty), mask=offsets < num)


@triton.jit
def _backward_kernel(
    g_ptr,
    x_ptr,
    dx_ptr,
    clips_ptr,
    low_ptr,
    high_ptr,
    num,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale, zero_point = load_grid(low_ptr, high_ptr, Q_MIN, Q_MAX, INTEGER)
    sums = no_sums(BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num, BLOCK), tl.num_programs(0)):
        offsets = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < num
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # zero outside: adds nothing to a sum
        dx, sums = straight_through(x, g, scale, zero_point, sums, Q_MIN, Q_MAX, MASKED)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    store_clip_sums(clips_ptr, sums, Q_MIN, Q_MAX)


@triton.jit
def store_clip_sums(clips_ptr, sums, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    """Puts this program's share of dc⁻ and dc⁺ into its column of clips [2, programs]."""
    between, low, high = sums
    between = tl.sum(between, 0) / (Q_MAX - Q_MIN)
    tl.store(clips_ptr + tl.program_id(0), tl.sum(low, 0) + between)
    tl.store(clips_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(high, 0) - between)


def visible(kernel: Any) -> Any:
    """A kernel to launch so that torch.compile sees it; the interpreter's, which it never meets, as it is."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


@functools.cache
def programs_for(device: torch.device, per_processor: int) -> int:
    """How many programs share the tiles of a backward pass, however many rows there are."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return per_processor * processors


def fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int, integer_zero_point: bool) -> Tensor:
    """x̂ of contiguous x [...], in its dtype."""
    x_hat = torch.empty_like(x)
    if x.numel():
        q_min, q_max = code_range(bits)
        programs = (triton.cdiv(x.numel(), _FORWARD_BLOCK),)
        visible(_forward_kernel)[programs](
            x, x_hat, low, high, x.numel(), q_min, q_max, integer_zero_point, BLOCK=_FORWARD_BLOCK, num_warps=4
        )
    return x_hat


def fake_quantize_backward(
    g: Tensor, x: Tensor, low: Tensor, high: Tensor, bits: int, integer_zero_point: bool, masked: bool
) -> tuple[Tensor, Tensor]:
    """dx in the dtype of x, and partial sums of dc⁻ and dc⁺, float32 [2, programs]."""
    dx = torch.empty_like(x)
    programs = programs_for(x.device, _PROGRAMS_PER_PROCESSOR)
    clips = x.new_empty((2, programs), dtype=torch.float32)
    q_min, q_max = code_range(bits)
    visible(_backward_kernel)[(programs,)](
        g,
        x,
        dx,
        clips,
        low,
        high,
        x.numel(),
        q_min,
        q_max,
        integer_zero_point,
        masked,
        BLOCK=_BACKWARD_BLOCK,
        num_warps=4,
    )
    return dx, clips
