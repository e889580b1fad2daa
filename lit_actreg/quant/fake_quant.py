"""Learned-clip fake quantization of a linear's input (arXiv 2404.03605, section "input regularization").

Forward: the grid of :mod:`lit_actreg_kernels.grid` that spans the clips [c⁻, c⁺], x̂ = (q − z) · s.

Backward, straight-through with the rounding residual. With u = x / s + z, q_min and q_max the end codes, g the gradient
of x̂ and δ = (u − round u) / (2^b − 1):

    u ≥ q_max       dx = 0        dc⁺ += g
    u ≤ q_min       dx = 0        dc⁻ += g
    between         dx = g        dc⁺ −= δ g      dc⁻ += δ g

An integer zero point is straight-through: the ends of its grid follow the clips one to one. (Not where both clips have
one sign: the grid then ends at zero, and the clip beyond it moves without effect until it is back.) Clip gradients are
summed row by row first: that is the shape in which the backward passes of the norm and the activation function before a
site run over the same tensor, so torch.compile makes one kernel of both.

One trap (pytorch#180642, torch 2.11): compiled, a custom function whose result is the alias that a no-op ``.to(dtype)``
returns gets another output's gradient. Hence the copy in ``forward``; docs/qat-stability.md tells what it cost.
"""

from typing import Any, Literal

import torch
from lit_actreg_kernels.grid import code_range, grid_from_clips, grid_per_token, num_groups
from torch import Tensor

Outside = Literal["masked", "passed"]


def _widen(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32: rounding, and the sums of the clip gradients, need the bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _FakeQuantize(torch.autograd.Function):
    """The table of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int, integer: bool, outside: Outside, rounds: bool
    ) -> Tensor:
        q_min, q_max = code_range(bits)
        scale, zero_point = grid_from_clips(_widen(low), _widen(high), bits, integer)
        u = (_widen(x) / scale + zero_point).clamp(q_min, q_max)
        x_hat = ((u.round() if rounds else u) - zero_point) * scale
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bits, ctx.outside, ctx.rounds, ctx.clip_dtype = bits, outside, rounds, low.dtype
        return x_hat.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        q_min, q_max = code_range(ctx.bits)
        g, u = _widen(grad), _widen(x) / scale + zero_point
        above, below = u >= q_max, u <= q_min
        delta = (
            torch.where(above | below, 0.0, (u - u.round()) / (q_max - q_min)) if ctx.rounds else torch.zeros_like(u)
        )
        dx = torch.where(above | below, 0.0, g) if ctx.outside == "masked" else g
        d_low = (torch.where(below, g, 0.0) + delta * g).sum(-1).sum().reshape(1)
        d_high = (torch.where(above, g, 0.0) - delta * g).sum(-1).sum().reshape(1)
        return dx.to(x.dtype), d_low.to(ctx.clip_dtype), d_high.to(ctx.clip_dtype), None, None, None, None


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
    return _FakeQuantize.apply(x, low, high, bits, integer_zero_point, outside, rounds)


def fake_quantize_per_token(x: Tensor, bits: int = 4, group_size: int | None = None) -> Tensor:
    """x̂ of x [..., K] on each token's own min-max grid, or on one for every ``group_size`` columns of a token.

    Straight-through gradient (nothing is clipped).
    """
    q_min, q_max = code_range(bits)
    with torch.no_grad():
        wide = _widen(x)
        groups = wide.unflatten(-1, (num_groups(x.shape[-1], group_size), -1))
        scale, zero_point = grid_per_token(groups, bits)
        x_hat = ((groups / scale + zero_point).round().clamp(q_min, q_max) - zero_point) * scale
    return x_hat.view_as(x).to(x.dtype) + (x - x.detach())
