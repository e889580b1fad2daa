"""Operators of training that give their argument back, or a part of it, so that its gradient comes by here.

    rotate                    qkv → q and k at their rotary positions, v, κ̄ of qkv
    token_kurtosis            y → y, κ̄

An operator must not return its argument; an autograd.Function may, as a view. So each is one around two operators like
those of :mod:`.training_ops`, which says what these are, and what ``looks`` is.
"""

from typing import Any

import torch
from lit_actreg_kernels import training_ops
from lit_actreg_kernels.checks import check, check_float
from lit_actreg_kernels.training_ops import NOWHERE, Looks
from torch import Tensor

# Rotary positions: qkv → q, k, v, κ̄


@torch.library.triton_op("lit_actreg::rotate", mutates_args=())
def _rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_groups: int, first: int, step: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (qkv.contiguous(), cos.contiguous(), sin.contiguous(), num_heads, num_groups, first, step, eps)
    q, k, kappa, terms = training_ops.implementation(qkv, "rotary").rotate(*arguments)
    return q, k, kappa.sum(), terms


@torch.library.triton_op("lit_actreg::rotate_backward", mutates_args=())
def _rotate_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    terms: Tensor,
    d_kappa: Tensor,
    first: int,
    step: int,
) -> Tensor:
    tensors = [t.contiguous() for t in (dq, dk, dv, qkv, cos, sin)]
    return training_ops.implementation(qkv, "rotary").rotate_backward(*tensors, terms, d_kappa, first, step)


class _Rotate(torch.autograd.Function):
    """v is a part of qkv, and its gradient comes here, too, for one pass over all three."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        num_groups: int,
        first: int,
        step: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, kappa, terms = _rotate(qkv, cos, sin, num_heads, num_groups, first, step, eps)
        ctx.save_for_backward(qkv, cos, sin, terms)
        ctx.tokens = (first, step)
        return q, k, qkv.unflatten(-1, (-1, cos.shape[-1]))[..., num_heads + num_groups :, :], kappa

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, d_kappa: Tensor) -> tuple[Tensor | None, ...]:
        return _rotate_backward(dq, dk, dv, *ctx.saved_tensors, d_kappa, *ctx.tokens), *[None] * 7


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_groups: int, looks: Looks = NOWHERE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [..., T, H, E] and k [..., T, G, E] at their positions, v [..., T, G, E], and κ̄ of qkv [..., T, (H + 2G) E].

    Args:
        cos, sin: Of the positions, [T, E], halves repeated.
    """
    check_float(qkv, "qkv", double=True)
    width = cos.shape[-1]
    fits = width % 2 == 0 and qkv.shape[-1] == (num_heads + 2 * num_groups) * width
    check(fits, f"qkv has {qkv.shape[-1]} columns, not {num_heads} + 2 · {num_groups} heads of an even width {width}")
    check(cos.shape == sin.shape == (qkv.shape[-2], width), f"cos {list(cos.shape)} are not of {qkv.shape[-2]} tokens")
    right = all(t.device == qkv.device and t.dtype in (torch.float32, qkv.dtype) for t in (cos, sin))
    check(right, f"cos is {cos.dtype} on {cos.device}: keep the angles float32, where qkv is")
    return _Rotate.apply(qkv, cos, sin, num_heads, num_groups, *looks)


# Kurtosis of a linear's output: y → y, κ̄


@torch.library.triton_op("lit_actreg::token_kurtosis", mutates_args=())
def _token_kurtosis(y: Tensor, first: int, step: int, eps: float) -> tuple[Tensor, Tensor]:
    return training_ops.implementation(y, "kurtosis").token_kurtosis(y.contiguous(), first, step, eps)


@torch.library.triton_op("lit_actreg::add_kurtosis_gradient", mutates_args=())
def _add_kurtosis_gradient(g: Tensor, y: Tensor, terms: Tensor, d_kappa: Tensor, first: int, step: int) -> Tensor:
    """A copy of g with the gradient added; a compiler sees that nobody else wants g, and leaves the copy out."""
    g = g.clone(memory_format=torch.contiguous_format)
    training_ops.implementation(y, "kurtosis").add_kurtosis_gradient(g, y.contiguous(), terms, d_kappa, first, step)
    return g


class _TokenKurtosis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, first: int, step: int, eps: float) -> tuple[Tensor, Tensor]:
        kappa, terms = _token_kurtosis(y, first, step, eps)
        ctx.save_for_backward(y, terms)
        ctx.tokens = (first, step)
        return y.view_as(y), kappa.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor, d_kappa: Tensor) -> tuple[Tensor | None, ...]:
        return _add_kurtosis_gradient(g, *ctx.saved_tensors, d_kappa, *ctx.tokens), None, None, None


def token_kurtosis(y: Tensor, first: int, step: int, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., T, N] itself, and κ̄, the mean kurtosis of its tokens first, first + step, … (:mod:`.kurtosis`): scalar.

    Who goes on with the y returned sends its gradient by here, where the gradient of κ̄ is added to it: that costs the
    rows looked at, while a gradient of y that autograd adds costs three passes over all of y.
    """
    check_float(y, "y", double=True)
    return _TokenKurtosis.apply(y, first, step, eps)
