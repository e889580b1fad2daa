"""The fused fake-quantizing operators of training, as PyTorch operators with gradients (namespace ``lit_actreg``).

    fake_quantize             x → x̂
    gelu_fake_quantize        h → x̂ of GELU(h), κ̄ of h; backwards also for the bias of the linear before
    swiglu_fake_quantize      h = [gate, up] → x̂ of silu(gate) · up, κ̄ of h
    swiglu_fake_quantize_per_token                  the same on tokens' grids
    add_norm_fake_quantize    x, y → x′ = x + y, x̂ of norm(x′), κ̄ of y

and, not about quantization but as near to the linears:

    swiglu                    [gate, up] → silu(gate) · up

(Rotary positions, and kurtosis where nothing else comes along: :mod:`.view_ops`.)

Each is a ``torch.library.triton_op`` whose backward is one too: eager PyTorch, activation checkpointing, DDP and FSDP2
see ordinary operators, torch.compile sees through them to the kernels, and launches these from the code it generates
(called as an operator, each would cost some 40 µs of Python, more than the kernel itself takes on a small model). The
body of an operator says its shapes to the compiler, too. Triton on a GPU (sm_80 or later), :mod:`.training_reference`
elsewhere and in float64. Sums over tokens leave as partial sums, one a program, and are added here, where the compiler
fuses the additions.

Who edits a kernel of a backward pass clears the compiler's cache (``TORCHINDUCTOR_FORCE_DISABLE_CACHES=1``): its key
does not know the kernels behind an operator.

The *sum* is in the norm's operator for its gradient, too: that of the residual connection is added in the norm's
backward pass for one read, where outside it would cost two reads and a write of the whole stream.

*Kurtosis* comes along where a pass reads or writes what it needs anyway: of y with the norm's operator, of h with those
of the MLP's activation, of qkv with the rotary positions. ``looks`` is (first, step, ε): at which tokens
(:mod:`.kurtosis`); with step 0, at none.

Clips c⁻ < c⁺ are [1]; ``masked`` says that an x outside them has no gradient. A mistake in the arguments raises a
ValueError of one line, already while compiling.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from lit_actreg_kernels import training_reference
from lit_actreg_kernels.checks import check, check_bits, check_float, check_halves, check_norm
from lit_actreg_kernels.ops import has_triton_kernels
from torch import Tensor


def implementation(x: Tensor, module: str) -> ModuleType:
    """Who computes it for x: a module of kernels, or the reference."""
    if x.is_cuda and x.dtype != torch.float64 and has_triton_kernels(x.device.index):
        return importlib.import_module(f"lit_actreg_kernels.{module}")
    return training_reference


def _check(x: Tensor, low: Tensor, high: Tensor, bits: int) -> None:
    check_float(x, "x", double=True)
    check_bits(bits)
    for name, clip in (("low", low), ("high", high)):
        if clip.numel() != 1:
            raise ValueError(f"{name} has shape {list(clip.shape)}: a static grid has one clip of shape [1]")
        if clip.device != x.device:
            raise ValueError(f"{name} is on {clip.device}, x on {x.device}: move it there")


def _clip_gradients(ctx: Any, partial: Tensor) -> tuple[Tensor, Tensor]:
    """dc⁻ and dc⁺ [1], in the clips' dtypes, from partial sums [2, programs]."""
    low, high = partial.sum(1, keepdim=True).unbind()
    return low.to(ctx.clip_dtype), high.to(ctx.clip_dtype)


# x → x̂


@torch.library.triton_op("lit_actreg::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int, integer_zero_point: bool, masked: bool) -> Tensor:
    """x̂ of x [...], in its dtype."""
    _check(x, low, high, bits)
    return implementation(x, "fake_quant").fake_quantize(x.contiguous(), low, high, bits, integer_zero_point)


@torch.library.triton_op("lit_actreg::fake_quantize_backward", mutates_args=())
def _fake_quantize_backward(
    g: Tensor, x: Tensor, low: Tensor, high: Tensor, bits: int, integer_zero_point: bool, masked: bool
) -> tuple[Tensor, Tensor]:
    function = implementation(x, "fake_quant").fake_quantize_backward
    return function(g.contiguous(), x.contiguous(), low, high, bits, integer_zero_point, masked)


def _keep_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, low, high, *ctx.options = inputs
    ctx.clip_dtype = low.dtype
    ctx.save_for_backward(x, low, high)


def _backward_of_fake_quantize(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dx, clips = _fake_quantize_backward(g, *ctx.saved_tensors, *ctx.options)
    return dx, *_clip_gradients(ctx, clips), None, None, None


fake_quantize.register_autograd(_backward_of_fake_quantize, setup_context=_keep_fake_quantize)


# The MLP's activation: h → x̂, κ̄


@torch.library.triton_op("lit_actreg::activation_fake_quantize", mutates_args=())
def _activation_fake_quantize(
    h: Tensor,
    bias: Tensor | None,
    low: Tensor,
    high: Tensor,
    gated: bool,
    bits: int,
    integer_zero_point: bool,
    masked: bool,
    first: int,
    step: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(h, low, high, bits)
    if gated:
        check_halves(h, "h")
    if bias is not None:
        fits = not gated and bias.shape == h.shape[-1:]
        check(fits, f"bias {list(bias.shape)} does not fit h {list(h.shape)}: one value a column, with SwiGLU none")
    function, looks = implementation(h, "gelu_fake_quant").activation_fake_quantize, (first, step, eps)
    x_hat, kappa, terms = function(h.contiguous(), low, high, gated, bits, integer_zero_point, *looks)
    return x_hat, kappa.sum(), terms


@torch.library.triton_op("lit_actreg::activation_fake_quantize_backward", mutates_args=())
def _activation_backward(
    g: Tensor,
    h: Tensor,
    low: Tensor,
    high: Tensor,
    terms: Tensor,
    d_kappa: Tensor,
    gated: bool,
    bits: int,
    integer_zero_point: bool,
    masked: bool,
    first: int,
    step: int,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    function = implementation(h, "gelu_fake_quant").activation_fake_quantize_backward
    rest = (gated, bits, integer_zero_point, masked, terms, d_kappa, first, step, has_bias)
    return function(g.contiguous(), h.contiguous(), low, high, *rest)


def _keep_activation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, bias, low, high, *ctx.options, _ = inputs
    ctx.clip_dtype, ctx.bias_dtype = low.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(h, low, high, output[2])


def _backward_of_activation(ctx: Any, g: Tensor, d_kappa: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    has_bias = ctx.needs_input_grad[1]
    dh, clips, d_bias = _activation_backward(g, *ctx.saved_tensors, d_kappa, *ctx.options, has_bias)
    return dh, d_bias.sum(0).to(ctx.bias_dtype) if has_bias else None, *_clip_gradients(ctx, clips), *[None] * 7


_activation_fake_quantize.register_autograd(_backward_of_activation, setup_context=_keep_activation)

Looks = tuple[int, int, float]
NOWHERE: Looks = (0, 0, 0.0)


def gelu_fake_quantize(
    h: Tensor, *arguments: Any, looks: Looks = NOWHERE, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x̂ of GELU(h) (not its tanh approximation), and κ̄ of h [..., T, H]; GELU is rounded to the dtype of h first.

    Args:
        arguments: low, high, bits, integer_zero_point, masked.
        bias: Of the linear that gave h, [H]. Only if that added it *detached*, and nothing else is made of h: its
            gradient, that of h summed over tokens, then comes from here, where h's is written.
    """
    low, high, *grid = arguments
    x_hat, kappa, _ = _activation_fake_quantize(h, bias, low, high, False, *grid, *looks)
    return x_hat, kappa


def swiglu_fake_quantize(h: Tensor, *arguments: Any, looks: Looks = NOWHERE) -> tuple[Tensor, Tensor]:
    """x̂ [..., T, H] of silu(gate) · up, and κ̄ of h = [gate, up] [..., T, 2H]; the rest as for GELU."""
    low, high, *grid = arguments
    x_hat, kappa, _ = _activation_fake_quantize(h, None, low, high, True, *grid, *looks)
    return x_hat, kappa


# SwiGLU alone


@torch.library.triton_op("lit_actreg::swiglu", mutates_args=())
def swiglu(h: Tensor) -> Tensor:
    """silu(gate) · up [..., H] for h = [gate, up] [..., 2H], in its dtype."""
    check_float(h, "h", double=True)
    check_halves(h, "h")
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.library.triton_op("lit_actreg::swiglu_backward", mutates_args=())
def _swiglu_backward(g: Tensor, h: Tensor, terms: Tensor, d_kappa: Tensor, first: int, step: int) -> Tensor:
    function = implementation(h, "swiglu").swiglu_backward
    return function(g.contiguous(), h.contiguous(), terms, d_kappa, first, step)


swiglu.register_autograd(
    lambda ctx, g: _swiglu_backward(g, *ctx.saved_tensors, g.new_empty((0, 4)), g.new_empty(0), 0, 0),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.triton_op("lit_actreg::swiglu_fake_quantize_per_token", mutates_args=())
def _swiglu_fake_quantize_per_token(
    h: Tensor, bits: int, num_groups: int, first: int, step: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_float(h, "h", double=True)
    check_bits(bits)
    divide = num_groups >= 1 and h.shape[-1] % (2 * num_groups) == 0
    check(divide, f"{num_groups} groups do not divide the halves of h, which has {h.shape[-1]} columns")
    function = implementation(h, "swiglu").swiglu_fake_quantize_per_token
    x_hat, kappa, terms = function(h.contiguous(), bits, num_groups, first, step, eps)
    return x_hat, kappa.sum(), terms


def _keep_per_token(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, _, _, *ctx.tokens, _ = inputs
    ctx.save_for_backward(h, output[2])


def _backward_of_per_token(ctx: Any, g: Tensor, d_kappa: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _swiglu_backward(g, *ctx.saved_tensors, d_kappa, *ctx.tokens), *[None] * 5


_swiglu_fake_quantize_per_token.register_autograd(_backward_of_per_token, setup_context=_keep_per_token)


def swiglu_fake_quantize_per_token(
    h: Tensor, bits: int, num_groups: int, looks: Looks = NOWHERE
) -> tuple[Tensor, Tensor]:
    """x̂ [..., T, H] of silu(gate) · up, and κ̄ of h = [gate, up] [..., T, 2H].

    On a min-max grid of each of ``num_groups`` groups of a token's columns, after a rounding to the dtype of h. The
    gradient is straight-through.
    """
    x_hat, kappa, _ = _swiglu_fake_quantize_per_token(h, bits, num_groups, *looks)
    return x_hat, kappa


# The norm behind an addition: x, y → x′, x̂, κ̄


@torch.library.triton_op("lit_actreg::add_norm_fake_quantize", mutates_args=())
def _add_norm_fake_quantize(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor,
    high: Tensor,
    eps: float,
    rms: bool,
    bits: int,
    integer_zero_point: bool,
    masked: bool,
    value_dtype: torch.dtype,
    out_dtype: torch.dtype,
    first: int,
    step: int,
    kurtosis_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, low, high, bits)
    check_norm(x, weight, bias, rms)
    if y.shape != x.shape or torch.promote_types(x.dtype, y.dtype) != x.dtype:
        raise ValueError(f"y {y.dtype} {list(y.shape)} cannot be added to x {x.dtype} {list(x.shape)}: cast or expand")
    function, y = implementation(x, "norm_fake_quant").add_norm_fake_quantize, y.contiguous()
    grid, looks = (low, high, eps, rms, bits, integer_zero_point), (first, step, kurtosis_eps)
    new, x_hat, statistics, kappa, *rest = function(
        x.contiguous(), y, weight, bias, *grid, value_dtype, out_dtype, *looks
    )
    return new, x_hat, statistics, kappa.sum(), *rest


@torch.library.triton_op("lit_actreg::add_norm_fake_quantize_backward", mutates_args=())
def _add_norm_backward(
    g: Tensor,
    d_new: Tensor,
    new: Tensor,
    y_dtype: torch.dtype,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor,
    high: Tensor,
    terms: Tensor,
    rows: Tensor,
    d_kappa: Tensor,
    rms: bool,
    bits: int,
    integer_zero_point: bool,
    masked: bool,
    value_dtype: torch.dtype,
    first: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    function = implementation(new, "norm_fake_quant").add_norm_fake_quantize_backward
    grid = (low, high, rms, bits, integer_zero_point, masked, value_dtype)
    looks = (terms, rows, d_kappa, first, step)
    return function(g.contiguous(), d_new.contiguous(), new, y_dtype, statistics, weight, bias, *grid, *looks)


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, weight, bias, low, high, _, *options, _, first, step, _ = inputs
    new, _, statistics, _, terms, rows = output
    ctx.y_dtype, ctx.options = y.dtype, (*options, first, step)
    ctx.clip_dtype, ctx.weight_dtype, ctx.has_bias = low.dtype, weight.dtype, bias is not None
    ctx.save_for_backward(new, statistics, weight, bias, low, high, terms, rows)


def _backward_of_add_norm(ctx: Any, d_new: Tensor, g: Tensor, _: Tensor, d_kappa: Tensor, *__: Tensor) -> Any:
    new, *saved = ctx.saved_tensors
    dx, dy, parameters, clips = _add_norm_backward(g, d_new, new, ctx.y_dtype, *saved, d_kappa, *ctx.options)
    dy = dy if dy.numel() else dx  # one tensor where they are equal
    d_weight, d_bias = parameters.sum(1).to(ctx.weight_dtype).unbind()
    return dx, dy, d_weight, d_bias if ctx.has_bias else None, *_clip_gradients(ctx, clips), *[None] * 10


_add_norm_fake_quantize.register_autograd(_backward_of_add_norm, setup_context=_keep_add_norm)


def add_norm_fake_quantize(
    x: Tensor, y: Tensor, *arguments: Any, looks: Looks = NOWHERE
) -> tuple[Tensor, Tensor, Tensor]:
    """x′ = x + y in the dtype of x, x̂ of its norm, [..., K], and κ̄ of y [..., T, K].

    Args:
        arguments: weight [K], bias [K] or None, low, high, eps, rms, bits, integer_zero_point, masked; the dtype to
            which the norm's value is rounded before the grid, and the dtype of x̂.
    """
    new, x_hat, _, kappa, *_ = _add_norm_fake_quantize(x, y, *arguments, *looks)
    return new, x_hat, kappa
