"""A linear of 16-bit inputs whose weight is kept in float32, with the weight's gradient in float32 (for training).

    y = x Wᵀ + b and dx = g W, in 16 bits        dW = gᵀ x and db = Σ g, summed and left in float32

Autocast does the same but for dW and db: it rounds them to 16 bits, because the product's operands have so many, and
makes them wide again for the optimizer, which takes two passes over all weights.

An operator of PyTorch (namespace ``lit_actreg``) that a compiler sees through, like those of :mod:`.training_ops`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.triton_op("lit_actreg::narrow_linear", mutates_args=())
def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b [..., N] in the dtype of x [..., K], which is narrower than that of W [N, K] and b [N]."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def weight_gradient(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """gᵀ x [N, K] of g [R, N] and x [R, K], in a dtype that may be wider than theirs, without a rounding to theirs."""
    with torch.autocast(x.device.type, enabled=False):  # compiled, a backward pass is under the forward's autocast
        if x.is_cuda and dtype == torch.float32 != x.dtype:
            return torch.mm(g.t(), x, out_dtype=dtype)
        return g.t().to(dtype) @ x.to(dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = d_weight = d_bias = None
    rows = g.reshape(-1, g.shape[-1])
    if ctx.needs_input_grad[0]:
        dx = g @ weight.to(x.dtype)
    if ctx.needs_input_grad[1]:
        d_weight = weight_gradient(rows, x.reshape(-1, x.shape[-1]), weight.dtype)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        d_bias = rows.sum(0, dtype=weight.dtype)
    return dx, d_weight, d_bias


narrow_linear.register_autograd(_backward, setup_context=_keep)
