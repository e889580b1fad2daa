"""A linear with what stands before it, in one operator where that is possible: add → norm → quantize → linear.

Every function here says what is computed twice: as the plain modules, and as the fused operator of
:mod:`lit_actreg_kernels.training_ops` with the same values (codes are equal but for the last bit of a norm or an
activation; run eagerly in 16 bits, plain SwiGLU also rounds its silu) and the same gradients. The operators read and
write each tensor once, where a compiler's code for the plain path makes several passes over it in the backward pass.

Which path runs is :func:`fuses`: the fused one for a static grid (behind SwiGLU also for tokens' own grids) on a CUDA
device, or wherever ``InputQuantizer.fused`` says so. A hook on the linear or on its quantizer means that somebody wants
to see the linear's raw input, which the fused path never makes; then, too, the plain one runs.
"""

import torch
import torch.nn.functional as F
from lit_actreg_kernels import training_ops
from lit_actreg_kernels.grid import num_groups
from torch import Tensor, nn

from lit_actreg.quant.linear import QuantLinear
from lit_actreg.quant.statistics import looks, tap_token_kurtosis


def fuses(linear: nn.Module, x: Tensor, mode: str = "static") -> bool:
    """Whether ``linear``'s quantizer, of this mode, is fused with what comes before it, for an input made from x."""
    if not isinstance(linear, QuantLinear) or not linear.input_quantizer.fuses(x, mode):
        return False
    modules = (linear, linear.input_quantizer)
    return not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def wide_norm(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """norm(x), in the dtype of the norm's weight where x is narrower, as a bfloat16 stream is."""
    return norm(x.to(torch.promote_types(x.dtype, norm.weight.dtype)))


def norm_linear(
    norm: nn.LayerNorm | nn.RMSNorm,
    linear: nn.Module,
    x: Tensor,
    y: Tensor | None,
    every_nth_token: int | None = None,
    detach_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x′ = x + y (None: zero) and linear(norm(x′)): [..., T, K] → [..., T, K], [..., T, N].

    And the kurtosis of y, of one token in so many. With ``detach_bias`` the linear's bias gets its gradient from
    :func:`gelu_linear`: only where both fuse.
    """
    if not fuses(linear, x):
        assert not detach_bias
        kappa = None if every_nth_token is None else x.new_zeros((), dtype=torch.float32)
        if y is not None:
            y, kappa = tap_token_kurtosis(y, every_nth_token)
            x = x + y
        return x, linear(wide_norm(norm, x)), kappa
    assert isinstance(linear, QuantLinear)
    quantizer = linear.input_quantizer
    value_dtype, out_dtype = x.dtype, x.dtype
    if torch.is_autocast_enabled(x.device.type):  # norms then give float32, which the linear casts
        value_dtype, out_dtype = torch.float32, torch.get_autocast_dtype(x.device.type)
    x, x_hat, kappa = training_ops.add_norm_fake_quantize(
        x,
        torch.zeros_like(x) if y is None else y,
        norm.weight,
        getattr(norm, "bias", None),
        quantizer.low,
        quantizer.high,
        norm.eps,
        isinstance(norm, nn.RMSNorm),
        *quantizer.grid_options(),
        value_dtype,
        out_dtype,
        looks=looks(x.shape[-2], every_nth_token),
    )
    return x, linear.project(x_hat, detach_bias), kappa


def gelu_linear(
    linear: nn.Module, hidden: Tensor, every_nth_token: int | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """linear(GELU(hidden)): [..., T, H] → [..., T, N]; and the kurtosis of ``hidden``, of one token in so many.

    ``bias`` is that of the linear before if it was detached there; then its gradient comes from here.
    """
    if not fuses(linear, hidden):
        assert bias is None
        hidden, kappa = tap_token_kurtosis(hidden, every_nth_token)
        return linear(F.gelu(hidden)), kappa
    assert isinstance(linear, QuantLinear)
    q, where = linear.input_quantizer, looks(hidden.shape[-2], every_nth_token)
    x_hat, kappa = training_ops.gelu_fake_quantize(hidden, q.low, q.high, *q.grid_options(), looks=where, bias=bias)
    return linear.project(x_hat), kappa


def swiglu(hidden: Tensor) -> Tensor:
    """silu(gate) · up for hidden = [gate, up]: [..., 2H] → [..., H]."""
    if hidden.is_cuda:
        return training_ops.swiglu(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_linear(linear: nn.Module, hidden: Tensor, every_nth_token: int | None) -> tuple[Tensor, Tensor | None]:
    """linear(silu(gate) · up) for hidden = [gate, up] [..., T, 2H]; the rest as :func:`gelu_linear`."""
    static, tokens = fuses(linear, hidden), fuses(linear, hidden, "token")
    if not (static or tokens):
        hidden, kappa = tap_token_kurtosis(hidden, every_nth_token)
        return linear(swiglu(hidden)), kappa
    assert isinstance(linear, QuantLinear)
    q, where = linear.input_quantizer, looks(hidden.shape[-2], every_nth_token)
    if tokens:
        groups = num_groups(linear.in_features, q.group_size)
        x_hat, kappa = training_ops.swiglu_fake_quantize_per_token(hidden, q.bits, groups, where)
    else:
        x_hat, kappa = training_ops.swiglu_fake_quantize(hidden, q.low, q.high, *q.grid_options(), looks=where)
    return linear.project(x_hat), kappa
