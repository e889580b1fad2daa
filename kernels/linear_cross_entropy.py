"""The language model's head and its loss as one operator with gradients (namespace ``lit_actreg``).

    l = x Wᵀ        loss = mean over tokens of log Σ exp(l) − l_t        dx = dl W,  dW = dlᵀ x

The logits' gradient is made in the forward pass, in the place of the logits (:mod:`.cross_entropy`), of the sum of
losses; the gradient g of the mean, one number, then multiplies dx and dW, which are small beside it. dW is summed and
left in float32, as :mod:`.narrow_linear`'s.

An operator as those of :mod:`.training_ops`: seen through by a compiler, with a backward that is one, too.
"""

from typing import Any

import torch
from lit_actreg_kernels.checks import check, check_float
from lit_actreg_kernels.narrow_linear import weight_gradient
from lit_actreg_kernels.training_ops import implementation
from torch import Tensor


@torch.library.triton_op("lit_actreg::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignored: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The sum of losses, and its gradient by the logits if one is wanted."""
    check_float(x, "x", double=True)
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1]
    check(fits, f"x {list(x.shape)} and the head's weight {list(weight.shape)} make no logits: flatten the tokens")
    one_each = targets.shape == x.shape[:1] and targets.dtype == torch.int64 and targets.device == x.device
    check(one_each, f"targets {targets.dtype} {list(targets.shape)} on {targets.device}: pass an int64 for every token")
    with torch.autocast(x.device.type, enabled=False):
        logits = x @ weight.to(x.dtype).t()
    losses = implementation(x, "cross_entropy").cross_entropy(logits, targets, ignored, gradient)
    return losses.sum(), logits if gradient else logits.new_empty(0)


def _keep_linear_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # of the logits' gradient, by which nobody differentiates
    ctx.save_for_backward(*inputs[:2], output[1])


@torch.library.triton_op("lit_actreg::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    g: Tensor, d_logits: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dW, those that are wanted; the other is empty."""
    g = g.view(1, 1)  # a scalar would be rounded to the other factor's dtype
    dx = d_weight = x.new_empty(0)
    if of_x:
        with torch.autocast(x.device.type, enabled=False):
            dx = ((d_logits @ weight.to(x.dtype)) * g).to(x.dtype)
    if of_weight:  # in float32 until g has met it: the sum over all tokens may be too large for float16
        wide = weight_gradient(d_logits, x, torch.promote_types(weight.dtype, torch.float32))
        d_weight = (wide * g).to(weight.dtype)
    return dx, d_weight


def _backward_of_linear_cross_entropy(ctx: Any, g: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, weight, d_logits = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad[:2]
    dx, d_weight = _linear_cross_entropy_backward(g, d_logits, x, weight, of_x, of_weight)
    return dx if of_x else None, d_weight if of_weight else None, None, None, None


_linear_cross_entropy.register_autograd(_backward_of_linear_cross_entropy, setup_context=_keep_linear_cross_entropy)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Mean cross-entropy in nats of the logits x Wᵀ, over the targets that are not ``ignored``: float32 scalar.

    x is [R, K], W [V, K] in a dtype that may be wider; targets int64 [R]; without a target it is NaN. Logits have the
    dtype of x, and their gradient takes their place: 2 bytes a 16-bit logit, where the formula, run eagerly, keeps 10.
    """
    total, _ = _linear_cross_entropy(x.contiguous(), weight, targets.contiguous(), ignored, torch.is_grad_enabled())
    num = (targets != ignored).sum()
    return torch.where(num > 0, total / num.clamp(min=1), float("nan"))
