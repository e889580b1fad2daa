"""The kernels as PyTorch operators (namespace ``lit_actreg``): reference on a CPU, Triton on a GPU, shapes for compile.

Every operator but :func:`gptq_columns` is a ``torch.library.custom_op``, so torch.compile takes it whole (fullgraph)
and CUDA graphs capture it. Which implementation runs depends on the tensors' device alone; a GPU older than sm_80 gets
the reference and a warning.
A mistake in the arguments raises a ValueError of one line, on every device and already while compiling.
"""

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from lit_actreg_kernels import reference
from lit_actreg_kernels.checks import (
    FLOAT_DTYPES,
    check,
    check_activation,
    check_attention,
    check_bits,
    check_float,
    check_grid,
    check_halves,
    check_linear,
    check_norm,
    check_token_grouped_linear,
)
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_GPTQ_COLUMNS = 256  # a block's columns are held in registers


@functools.cache
def has_triton_kernels(device_index: int) -> bool:
    """Whether GPU ``device_index`` runs the Triton kernels (sm_80 or later); warns once for one that does not."""
    capability = torch.cuda.get_device_capability(device_index)
    if capability >= (8, 0):
        return True
    logger.warning(
        "GPU %d has compute capability %d.%d, the int4 kernels need 8.0: running the slow reference instead",
        device_index,
        *capability,
    )
    return False


def _implementation(x: Tensor, module: str) -> ModuleType:
    """The module whose functions serve x's device. Triton is imported here, so that a CPU does without it."""
    if x.is_cuda and has_triton_kernels(x.device.index):
        return importlib.import_module(f"lit_actreg_kernels.{module}")
    return reference


@torch.library.custom_op("lit_actreg::quantize_activation", mutates_args=())
def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 of x [..., K] on the static grid of scale and zero point, float32 [1]."""
    check_grid(x, scale, zero_point, bits)
    return _implementation(x, "act_quant").quantize_activation(x.contiguous(), scale, zero_point, bits)


@quantize_activation.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    check_grid(x, scale, zero_point, bits)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("lit_actreg::quantize_activation_per_token", mutates_args=())
def quantize_activation_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of x [..., K] on each token's own min-max grid; scale and zero point, float32 [..., 1]."""
    check_float(x, "x")
    check_bits(bits)
    return _implementation(x, "act_quant").quantize_activation_per_token(x.contiguous(), bits)


@quantize_activation_per_token.register_fake
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    check_float(x, "x")
    check_bits(bits)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale, torch.empty_like(scale)


@torch.library.custom_op("lit_actreg::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """Codes int8 of LayerNorm(x), or of RMSNorm(x) where ``rms``: x [..., K], weight and bias [K]."""
    check_grid(x, scale, zero_point, bits)
    check_norm(x, weight, bias, rms)
    function = _implementation(x, "norm_quant").norm_quantize
    return function(x.contiguous(), weight, bias, eps, rms, scale, zero_point, bits)


@norm_quantize.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    check_grid(x, scale, zero_point, bits)
    check_norm(x, weight, bias, rms)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("lit_actreg::gelu_quantize", mutates_args=())
def gelu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 of GELU(x) (the exact one), x [..., H]."""
    check_grid(x, scale, zero_point, bits)
    return _implementation(x, "gelu_quant").gelu_quantize(x.contiguous(), scale, zero_point, bits)


@gelu_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    check_grid(x, scale, zero_point, bits)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("lit_actreg::swiglu_quantize", mutates_args=())
def swiglu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 [..., H] of silu(gate) · up, x = [gate, up] [..., 2H]."""
    check_grid(x, scale, zero_point, bits)
    check_halves(x, "x")
    return _implementation(x, "gelu_quant").swiglu_quantize(x.contiguous(), scale, zero_point, bits)


@swiglu_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    check_grid(x, scale, zero_point, bits)
    check_halves(x, "x")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8)


@torch.library.custom_op("lit_actreg::int4_linear", mutates_args=())
def int4_linear(
    codes: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N] of codes int8 [M, K] and packed weights uint8 [N, P]; see :mod:`lit_actreg_kernels.reference`."""
    residual = None if residual is None else residual.contiguous()
    rest = (packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, residual, out_dtype)
    check(codes.dtype == torch.int8, f"codes are {codes.dtype}: quantize the activations to int8 first")
    check_linear(codes, *rest)
    return _implementation(codes, "int4_linear").int4_linear(codes.contiguous(), *rest)


@int4_linear.register_fake
def _(codes: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    check(codes.dtype == torch.int8, f"codes are {codes.dtype}: quantize the activations to int8 first")
    check_linear(codes, packed, *rest)
    return codes.new_empty((codes.shape[0], packed.shape[0]), dtype=rest[-1])


@torch.library.custom_op("lit_actreg::quantized_int4_linear", mutates_args=())
def quantized_int4_linear(
    x: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    act_bits: int,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """y [M, N] in x's dtype: x [M, K] on the static grid, then :func:`int4_linear`.

    For so few tokens that the weights' way from memory is all the time there is, both are one kernel.
    """
    check_grid(x, act_scale, act_zero_point, act_bits)
    residual = None if residual is None else residual.contiguous()
    rest = (packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, residual, x.dtype)
    check_linear(x, *rest)
    implementation, x = _implementation(x, "int4_linear"), x.contiguous()
    if implementation is not reference and implementation.fuses_quantization(x, packed, weight_scale.shape[1]):
        return implementation.int4_linear(x, *rest, act_bits=act_bits)
    codes = _implementation(x, "act_quant").quantize_activation(x, act_scale, act_zero_point, act_bits)
    return implementation.int4_linear(codes, *rest)


@quantized_int4_linear.register_fake
def _(x: Tensor, packed: Tensor, act_scale: Tensor, act_zero_point: Tensor, act_bits: int, *rest: Any) -> Tensor:
    check_grid(x, act_scale, act_zero_point, act_bits)
    arguments = (act_scale, act_zero_point, *rest, x.dtype)
    check_linear(x, packed, *arguments)
    return x.new_empty((x.shape[0], packed.shape[0]))


@torch.library.custom_op("lit_actreg::token_grouped_int4_linear", mutates_args=())
def token_grouped_int4_linear(
    x: Tensor,
    act_groups: int,
    act_bits: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """y [M, N] in x's dtype: each of ``act_groups`` groups of a token's columns on its own min-max grid; x [M, K].

    The grids have up to 7 bits.
    """
    residual = None if residual is None else residual.contiguous()
    rest = (act_groups, act_bits, packed, weight_scale, bias, residual)
    check_token_grouped_linear(x, *rest)
    return _implementation(x, "int4_grouped").token_grouped_int4_linear(x.contiguous(), *rest)


@token_grouped_int4_linear.register_fake
def _(x: Tensor, act_groups: int, act_bits: int, packed: Tensor, *rest: Any) -> Tensor:
    check_token_grouped_linear(x, act_groups, act_bits, packed, *rest)
    return x.new_empty((x.shape[0], packed.shape[0]))


@torch.library.custom_op("lit_actreg::norm_int4_linear", mutates_args=())
def norm_int4_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    act_bits: int,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    activation: str,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    out_bits: int,
) -> Tensor:
    """norm, :func:`int4_linear` of its codes on a static grid, in x's dtype [M, N]; x [M, K].

    Where ``activation`` is "gelu" or "swiglu" and not empty, the codes int8 of that [M, N] or [M, N / 2] on the grid of
    ``out_scale`` and ``out_zero_point`` [1].
    """
    check_grid(x, act_scale, act_zero_point, act_bits)
    check_norm(x, norm_weight, norm_bias, rms)
    check_linear(x, packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, None, x.dtype)
    check_activation(x, packed, activation, out_scale, out_zero_point, out_bits)
    arguments = (eps, rms, packed, act_scale, act_zero_point, act_bits, weight_scale, weight_sums, bias)
    function = _implementation(x, "norm_int4_linear").norm_int4_linear
    into = (activation, out_scale, out_zero_point, out_bits)
    return function(x.contiguous(), norm_weight, norm_bias, *arguments, *into)


@norm_int4_linear.register_fake
def _(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, rms: bool, packed: Tensor, *rest: Any
) -> Tensor:
    act_scale, act_zero_point, act_bits, weight_scale, weight_sums, bias, activation, *into = rest
    check_grid(x, act_scale, act_zero_point, act_bits)
    check_norm(x, norm_weight, norm_bias, rms)
    check_linear(x, packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, None, x.dtype)
    check_activation(x, packed, activation, *into)
    width = packed.shape[0] // 2 if activation == "swiglu" else packed.shape[0]
    return x.new_empty((x.shape[0], width), dtype=torch.int8 if activation else x.dtype)


@torch.library.custom_op("lit_actreg::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bits: int = 0,
) -> Tensor:
    """y [B, H · E] of one token a sequence; see :func:`lit_actreg_kernels.reference.decode_attention`.

    With a static grid (``scale`` and ``zero_point`` [1]) its codes, int8. float64 runs the reference on every device.
    Not on two streams of a GPU at a time (:func:`.int4_tile.tickets_of`).
    """
    check_attention(qkv, cos, sin, keys, values, position, scale, zero_point, bits)
    implementation = _implementation(qkv, "decode_attention") if qkv.dtype in FLOAT_DTYPES else reference
    cache, into = (cos.flatten(), sin.flatten(), keys, values, position), (scale, zero_point, bits)
    return implementation.decode_attention(qkv.contiguous(), *cache, *into)


@decode_attention.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, *grid: Any) -> Tensor:
    check_attention(qkv, cos, sin, keys, values, position, *grid)
    width = qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]
    return qkv.new_empty((qkv.shape[0], width), dtype=torch.int8 if grid and grid[0] is not None else qkv.dtype)


def gptq_columns(
    w: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes int8 and errors [C, N] of one block of GPTQ; see :func:`lit_actreg_kernels.reference.gptq_columns`.

    float64 runs the reference on every device. A plain function: nobody compiles a quantizer, and the first call of a
    custom operator takes seconds, because it loads the compiler.
    """
    num_columns, num_rows = w.shape
    check(1 <= num_columns <= MAX_GPTQ_COLUMNS, f"a block of {num_columns} columns: 1 to {MAX_GPTQ_COLUMNS} are taken")
    check(
        factor.shape == (num_columns, num_columns), f"factor has shape {list(factor.shape)}: w has {num_columns} rows"
    )
    check(scale.shape == zero_point.shape, "scale and zero_point differ in shape")
    check(scale.shape[0] == num_rows, f"scale has {scale.shape[0]} rows: w has {num_rows} columns")
    check(group.shape == (num_columns,) and group.dtype == torch.int64, f"group must be int64 [{num_columns}]")
    for tensor in (factor, scale, zero_point):
        check(tensor.dtype == w.dtype, f"w is {w.dtype}, another input {tensor.dtype}: cast it")
    for tensor in (factor, scale, zero_point, group):
        check(tensor.device == w.device, f"w is on {w.device}, another input is not")
    function = (_implementation(w, "gptq_columns") if w.dtype == torch.float32 else reference).gptq_columns
    tensors = (tensor.contiguous() for tensor in (w, factor, scale, zero_point, group))
    return function(*tensors, bits)
