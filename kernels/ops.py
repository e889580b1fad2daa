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
from torch import Tensor

logger = logging.getLogger(__name__)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLUMNS = 131072  # the integer sum of 16-fold products stays below 2^31 up to here
MAX_GPTQ_COLUMNS = 256  # a block's columns are held in registers
MAX_NORM_COLUMNS = 65536  # a row of the fused norm is held in registers


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


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_float(x: Tensor, name: str) -> None:
    _check(x.dtype in FLOAT_DTYPES, f"{name} is {x.dtype}: cast it to float32, bfloat16 or float16")


def _check_grid(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    _check_float(x, "x")
    _check(2 <= bits <= 8, f"activation bits {bits} is out of range: choose 2 to 8")
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        _check(value.numel() == 1, f"{name} has shape {list(value.shape)}: a static grid has one of shape [1]")
        _check(value.dtype == torch.float32, f"{name} is {value.dtype}: the grid is float32")
        _check(value.device == x.device, f"{name} is on {value.device}, x on {x.device}: move it there")


@torch.library.custom_op("lit_actreg::quantize_activation", mutates_args=())
def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 of x [..., K] on the static grid of scale and zero point, float32 [1]."""
    _check_grid(x, scale, zero_point, bits)
    return _implementation(x, "act_quant").quantize_activation(x.contiguous(), scale, zero_point, bits)


@quantize_activation.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    _check_grid(x, scale, zero_point, bits)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("lit_actreg::quantize_activation_per_token", mutates_args=())
def quantize_activation_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of x [..., K] on each token's own min-max grid; scale and zero point, float32 [..., 1]."""
    _check_float(x, "x")
    return _implementation(x, "act_quant").quantize_activation_per_token(x.contiguous(), bits)


@quantize_activation_per_token.register_fake
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_float(x, "x")
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale, torch.empty_like(scale)


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, rms: bool) -> None:
    num_columns = x.shape[-1]
    _check(num_columns <= MAX_NORM_COLUMNS, f"x has {num_columns} columns: the fused norm takes {MAX_NORM_COLUMNS}")
    _check(weight.shape == (num_columns,), f"weight has shape {list(weight.shape)}: x has {num_columns} columns")
    _check(bias is None or not rms, "RMSNorm has no bias: pass None")
    _check(bias is None or bias.shape == weight.shape, "bias differs from the norm's weight in shape")


@torch.library.custom_op("lit_actreg::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """Codes int8 of LayerNorm(x), or of RMSNorm(x) where ``rms``: x [..., K], weight and bias [K]."""
    _check_grid(x, scale, zero_point, bits)
    _check_norm(x, weight, bias, rms)
    function = _implementation(x, "norm_quant").norm_quantize
    return function(x.contiguous(), weight, bias, eps, rms, scale, zero_point, bits)


@norm_quantize.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    _check_grid(x, scale, zero_point, bits)
    _check_norm(x, weight, bias, rms)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("lit_actreg::gelu_quantize", mutates_args=())
def gelu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 of GELU(x) (the exact one), x [..., H]."""
    _check_grid(x, scale, zero_point, bits)
    return _implementation(x, "gelu_quant").gelu_quantize(x.contiguous(), scale, zero_point, bits)


@gelu_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    _check_grid(x, scale, zero_point, bits)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("lit_actreg::swiglu_quantize", mutates_args=())
def swiglu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 [..., H] of silu(gate) · up, x = [gate, up] [..., 2H]."""
    _check_grid(x, scale, zero_point, bits)
    _check(x.shape[-1] % 2 == 0, f"x has {x.shape[-1]} columns: SwiGLU takes a gate and an up half, an even number")
    return _implementation(x, "gelu_quant").swiglu_quantize(x.contiguous(), scale, zero_point, bits)


@swiglu_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    _check_grid(x, scale, zero_point, bits)
    _check(x.shape[-1] % 2 == 0, f"x has {x.shape[-1]} columns: SwiGLU takes a gate and an up half, an even number")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8)


def _check_linear(
    x: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    _check(x.dim() == 2 and packed.dim() == 2, "activations and packed weights must be matrices: flatten the tokens")
    (num_tokens, num_columns), (num_outputs, num_bytes), num_groups = x.shape, packed.shape, weight_scale.shape[-1]
    _check(packed.dtype == torch.uint8, f"packed is {packed.dtype}: pass grid.pack_int4's uint8")
    _check(
        num_columns <= 2 * num_bytes and num_columns < MAX_COLUMNS,
        f"{num_columns} input columns: the packed weight holds {2 * num_bytes}, the kernels {MAX_COLUMNS - 1}",
    )
    _check(
        weight_scale.shape == weight_sums.shape == (num_outputs, num_groups),
        f"weight_scale {list(weight_scale.shape)} and weight_sums {list(weight_sums.shape)} must be [{num_outputs}, G]",
    )
    _check(num_columns % num_groups == 0, f"{num_groups} groups do not divide {num_columns} input columns")
    _check(weight_scale.dtype == torch.float32, f"weight_scale is {weight_scale.dtype}: keep it float32")
    _check(weight_sums.dtype == torch.int32, f"weight_sums is {weight_sums.dtype}: keep it int32")
    for name, value in (("act_scale", act_scale), ("act_zero_point", act_zero_point)):
        _check(value.dtype == torch.float32, f"{name} is {value.dtype}: the grid is float32")
        shapes = ((1,), (num_tokens, 1), (num_tokens, num_groups))
        _check(value.shape in shapes, f"{name} has shape {list(value.shape)}: pass [1], [M, 1] or [M, G]")
    _check(act_scale.shape == act_zero_point.shape, "act_scale and act_zero_point differ in shape")
    _check(bias is None or bias.shape == (num_outputs,), f"bias must have shape [{num_outputs}]")
    _check(residual is None or residual.shape == (num_tokens, num_outputs), "residual must have the output's shape")
    _check(out_dtype in FLOAT_DTYPES, f"out_dtype {out_dtype}: choose float32, bfloat16 or float16")
    tensors: tuple[Tensor | None, ...] = (packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, residual)
    for tensor in tensors:
        _check(tensor is None or tensor.device == x.device, f"activations are on {x.device}, another input is not")


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
    _check(codes.dtype == torch.int8, f"codes are {codes.dtype}: quantize the activations to int8 first")
    _check_linear(codes, *rest)
    return _implementation(codes, "int4_linear").int4_linear(codes.contiguous(), *rest)


@int4_linear.register_fake
def _(codes: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    _check(codes.dtype == torch.int8, f"codes are {codes.dtype}: quantize the activations to int8 first")
    _check_linear(codes, packed, *rest)
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
    _check_grid(x, act_scale, act_zero_point, act_bits)
    residual = None if residual is None else residual.contiguous()
    rest = (packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, residual, x.dtype)
    _check_linear(x, *rest)
    implementation, x = _implementation(x, "int4_linear"), x.contiguous()
    if implementation is not reference and implementation.fuses_quantization(x, packed, weight_scale.shape[1]):
        return implementation.int4_linear(x, *rest, act_bits=act_bits)
    codes = _implementation(x, "act_quant").quantize_activation(x, act_scale, act_zero_point, act_bits)
    return implementation.int4_linear(codes, *rest)


@quantized_int4_linear.register_fake
def _(x: Tensor, packed: Tensor, act_scale: Tensor, act_zero_point: Tensor, act_bits: int, *rest: Any) -> Tensor:
    _check_grid(x, act_scale, act_zero_point, act_bits)
    arguments = (act_scale, act_zero_point, *rest, x.dtype)
    _check_linear(x, packed, *arguments)
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
    _check_grid(x, act_scale, act_zero_point, act_bits)
    _check_norm(x, norm_weight, norm_bias, rms)
    _check_linear(x, packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, None, x.dtype)
    _check_activation(x, packed, activation, out_scale, out_zero_point, out_bits)
    arguments = (eps, rms, packed, act_scale, act_zero_point, act_bits, weight_scale, weight_sums, bias)
    function = _implementation(x, "norm_int4_linear").norm_int4_linear
    into = (activation, out_scale, out_zero_point, out_bits)
    return function(x.contiguous(), norm_weight, norm_bias, *arguments, *into)


@norm_int4_linear.register_fake
def _(
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
    _check_grid(x, act_scale, act_zero_point, act_bits)
    _check_norm(x, norm_weight, norm_bias, rms)
    _check_linear(x, packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, None, x.dtype)
    _check_activation(x, packed, activation, out_scale, out_zero_point, out_bits)
    width = packed.shape[0] // 2 if activation == "swiglu" else packed.shape[0]
    return x.new_empty((x.shape[0], width), dtype=torch.int8 if activation else x.dtype)


def _check_activation(
    x: Tensor, packed: Tensor, activation: str, scale: Tensor | None, zero_point: Tensor | None, bits: int
) -> None:
    _check(activation in ("", "gelu", "swiglu"), f'activation {activation!r}: choose "gelu", "swiglu" or ""')
    if activation:
        if scale is None or zero_point is None:
            raise ValueError(f"{activation} is quantized: give the grid's out_scale and out_zero_point")
        _check_grid(x, scale, zero_point, bits)
        _check(activation == "gelu" or packed.shape[0] % 2 == 0, "SwiGLU takes an even number of outputs")


def _check_attention(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    _check(keys.dim() == 4 and keys.shape == values.shape, "keys and values must be [B, G, C, E] both")
    num_batch, num_groups, _, width = keys.shape
    heads = f"[{num_batch}, (H + 2 · {num_groups}) · {width}]"
    num_heads = qkv.shape[-1] // width - 2 * num_groups
    fits = qkv.dim() == 2 and qkv.shape[0] == num_batch and qkv.shape[1] % width == 0 and num_heads > 0
    _check(fits and num_heads % num_groups == 0, f"qkv has shape {list(qkv.shape)}: these keys take {heads}")
    _check(width % 2 == 0, f"heads of width {width} cannot be rotated: it must be even")
    _check(cos.numel() == sin.numel() == width, f"cos and sin must have {width} elements each: one token's")
    _check(cos.dtype == sin.dtype == torch.float32, f"cos is {cos.dtype}: keep the angles float32")
    _check(position.shape == (1,) and position.dtype == torch.int64, "position must be int64 [1]")
    _check(keys.is_contiguous() and values.is_contiguous(), "keys and values must be contiguous: they are written to")
    for tensor in (cos, sin, keys, values, position):
        _check(tensor.device == qkv.device, f"qkv is on {qkv.device}, another input is not")


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
    """
    _check_attention(qkv, cos, sin, keys, values, position)
    if scale is not None and zero_point is not None:
        _check_grid(qkv, scale, zero_point, bits)
    implementation = _implementation(qkv, "decode_attention") if qkv.dtype in FLOAT_DTYPES else reference
    cache, into = (cos.flatten(), sin.flatten(), keys, values, position), (scale, zero_point, bits)
    return implementation.decode_attention(qkv.contiguous(), *cache, *into)


@decode_attention.register_fake
def _(
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
    _check_attention(qkv, cos, sin, keys, values, position)
    width = qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]
    return qkv.new_empty((qkv.shape[0], width), dtype=qkv.dtype if scale is None else torch.int8)


def gptq_columns(
    w: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes int8 and errors [C, N] of one block of GPTQ; see :func:`lit_actreg_kernels.reference.gptq_columns`.

    float64 runs the reference on every device. A plain function: nobody compiles a quantizer, and the first call of a
    custom operator takes seconds, because it loads the compiler.
    """
    num_columns, num_rows = w.shape
    _check(1 <= num_columns <= MAX_GPTQ_COLUMNS, f"a block of {num_columns} columns: 1 to {MAX_GPTQ_COLUMNS} are taken")
    _check(
        factor.shape == (num_columns, num_columns), f"factor has shape {list(factor.shape)}: w has {num_columns} rows"
    )
    _check(scale.shape == zero_point.shape, "scale and zero_point differ in shape")
    _check(scale.shape[0] == num_rows, f"scale has {scale.shape[0]} rows: w has {num_rows} columns")
    _check(group.shape == (num_columns,) and group.dtype == torch.int64, f"group must be int64 [{num_columns}]")
    for tensor in (factor, scale, zero_point):
        _check(tensor.dtype == w.dtype, f"w is {w.dtype}, another input {tensor.dtype}: cast it")
    for tensor in (factor, scale, zero_point, group):
        _check(tensor.device == w.device, f"w is on {w.device}, another input is not")
    function = (_implementation(w, "gptq_columns") if w.dtype == torch.float32 else reference).gptq_columns
    tensors = (tensor.contiguous() for tensor in (w, factor, scale, zero_point, group))
    return function(*tensors, bits)
