"""Learned-clip fake quantization of a linear's input (arXiv 2404.03605, section "input regularization").

Forward: the grid of :mod:`lit_actreg_kernels.grid` that spans the clips [c⁻, c⁺], x̂ = (q − z) · s.

Backward, straight-through with the rounding residual. With u = x / s + z, e⁻ and e⁺ the values of the grid's end
codes (the clips themselves with a real zero point; z is straight-through), g the gradient of x̂ and
δ = (u − round u) / (2^b − 1):

    x ≥ e⁺          dx = 0        dc⁺ += g
    x ≤ e⁻          dx = 0        dc⁻ += g
    between         dx = g        dc⁺ −= δ g      dc⁻ += δ g

There is no custom backward: x̂ is written as clip(x) + s · (round u − u), the second factor a constant, and
differentiating that gives the table. So it stays right, and fuses with its neighbours, under torch.compile, where a
custom ``autograd.Function`` lost every gradient on torch 2.11 (pytorch#180642; docs/qat-stability.md tells the tale).
"""

from typing import Literal

import torch
from lit_actreg_kernels.grid import code_range, grid_from_clips, grid_per_token
from torch import Tensor

Outside = Literal["masked", "passed"]


def _widen(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32: rounding, and the sums of the clip gradients, need the bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def fake_quantize(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int = 4,
    integer_zero_point: bool = True,
    outside: Outside = "masked",
    rounds: bool = True,
) -> Tensor:
    """x̂ of x [...] on the grid that spans the clips ``low`` and ``high`` [1], in the dtype of x.

    Args:
        outside: Gradient of an x outside its clips: "masked", none, as published; "passed", g.
        rounds: False clamps to the grid's ends without rounding: the paper's activation clamping.
    """
    q_min, q_max = code_range(bits)
    wide = _widen(x)
    with torch.no_grad():
        scale, zero_point = grid_from_clips(low, high, bits, integer_zero_point)
    # The values of the end codes; each follows its clip one to one.
    low_end = (q_min - zero_point) * scale + (low - low.detach())
    high_end = (q_max - zero_point) * scale + (high - high.detach())
    through = wide - wide.detach() if outside == "passed" else 0.0
    clipped = torch.where(wide >= high_end, high_end + through, torch.where(wide <= low_end, low_end + through, wide))
    if not rounds:
        return clipped.to(x.dtype)
    with torch.no_grad():
        u = (wide / scale + zero_point).clamp(q_min, q_max)
        residual = u.round() - u
        on_grid = (u.round() - zero_point) * scale
    step = (high - high.detach() - low + low.detach()) / (q_max - q_min)  # zero, with the gradient of the scale
    # In value this is x̂ to the last bit (exactly as kernels and formats compute it); in gradient clip(x) + s·residual.
    return (on_grid + (clipped - clipped.detach()) + step * residual).to(x.dtype)


def fake_quantize_per_token(x: Tensor, bits: int = 4) -> Tensor:
    """x̂ of x [..., K] on each token's own min-max grid; straight-through gradient (nothing is clipped)."""
    q_min, q_max = code_range(bits)
    with torch.no_grad():
        wide = _widen(x)
        scale, zero_point = grid_per_token(wide, bits)
        x_hat = ((wide / scale + zero_point).round().clamp(q_min, q_max) - zero_point) * scale
    return x_hat.to(x.dtype) + (x - x.detach())
