"""Learned-clip fake quantization of a linear's input (arXiv 2404.03605, section "input regularization").

Forward: the grid of :mod:`lit_actreg_kernels.grid` that spans the clips [c⁻, c⁺], x̂ = (q − z) · s.

Backward, straight-through with the rounding residual. With u = x / s + z, e⁻ and e⁺ the values of the grid's end
codes (the clips themselves with a real zero point; z is straight-through), g the gradient of x̂ and
δ = (u − round u) / (2^b − 1):

    x ≥ e⁺          dx = 0        dc⁺ += g
    x ≤ e⁻          dx = 0        dc⁻ += g
    between         dx = g        dc⁺ −= δ g      dc⁻ += δ g

The clip gradients are summed in float32 (float64 for float64 inputs) over all elements. What dx is outside the
clips is an option, because zero is what stalls training (docs/qat-stability.md):

- "masked": zero, as published. An input that is outside for every token is never moved again.
- "passed": g. Nothing keeps an input from drifting further out, where it has no effect any more.
- "inward": g where a descent step brings the input back (x ≥ e⁺ and g > 0, or x ≤ e⁻ and g < 0), else zero.
"""

from typing import Any, Literal

import torch
from lit_actreg_kernels.grid import code_range, grid_from_clips, grid_per_token
from torch import Tensor

Outside = Literal["masked", "passed", "inward"]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int, integer: bool, outside: Outside, rounds: bool
    ) -> Tensor:
        q_min, q_max = code_range(bits)
        scale, zero_point = grid_from_clips(low, high, bits, integer)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bits, ctx.outside, ctx.rounds = bits, outside, rounds
        u = (_wide(x) / scale + zero_point).clamp(q_min, q_max)
        return (((u.round() if rounds else u) - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, zero_point = ctx.saved_tensors
        q_min, q_max = code_range(ctx.bits)
        g = _wide(grad)
        u = _wide(x) / scale + zero_point
        above, below = u >= q_max, u <= q_min
        inside = ~(above | below)
        if ctx.outside == "passed":
            grad_x = g
        elif ctx.outside == "inward":
            grad_x = torch.where(inside | (above & (g > 0)) | (below & (g < 0)), g, 0.0)
        else:
            grad_x = torch.where(inside, g, 0.0)
        residual = (u - u.round()) / (q_max - q_min) * g if ctx.rounds else torch.zeros_like(g)
        grad_high = torch.where(above, g, torch.where(below, 0.0, -residual)).sum()
        grad_low = torch.where(below, g, torch.where(above, 0.0, residual)).sum()
        return grad_x.to(x.dtype), grad_low.reshape(1), grad_high.reshape(1), None, None, None, None


def fake_quantize(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int = 4,
    integer_zero_point: bool = True,
    outside: Outside = "inward",
    rounds: bool = True,
) -> Tensor:
    """x̂ of x [...] on the grid that spans the clips ``low`` and ``high`` [1], with the gradients above.

    ``rounds=False`` clamps to the grid's ends without rounding: the paper's activation clamping.
    """
    return _FakeQuantize.apply(x, low, high, bits, integer_zero_point, outside, rounds)


def fake_quantize_per_token(x: Tensor, bits: int = 4) -> Tensor:
    """x̂ of x [..., K] on each token's own min-max grid; straight-through gradient (nothing is clipped)."""
    q_min, q_max = code_range(bits)
    wide = _wide(x.detach())
    scale, zero_point = grid_per_token(wide, bits)
    x_hat = ((wide / scale + zero_point).round().clamp(q_min, q_max) - zero_point) * scale
    return x + (x_hat.to(x.dtype) - x.detach())
