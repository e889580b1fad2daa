"""What the operators ask of their arguments: a mistake is a ValueError of one line, on every device and in a trace."""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLUMNS = 131072  # the integer sum of 16-fold products stays below 2^31 up to here
MAX_NORM_COLUMNS = 65536  # a row of the fused norm is held in registers


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_float(x: Tensor, name: str, double: bool = False) -> None:
    check(
        x.dtype in FLOAT_DTYPES or (double and x.dtype == torch.float64),
        f"{name} is {x.dtype}: cast it to float32, bfloat16 or float16",
    )


def check_bits(bits: int) -> None:
    check(2 <= bits <= 8, f"activation bits {bits} is out of range: choose 2 to 8")


def check_halves(x: Tensor, name: str) -> None:
    even = x.shape[-1] % 2 == 0
    check(even, f"{name} has {x.shape[-1]} columns: SwiGLU takes a gate and an up half, an even number")


def check_grid(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    check_float(x, "x")
    check_bits(bits)
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        check(value.numel() == 1, f"{name} has shape {list(value.shape)}: a static grid has one of shape [1]")
        check(value.dtype == torch.float32, f"{name} is {value.dtype}: the grid is float32")
        check(value.device == x.device, f"{name} is on {value.device}, x on {x.device}: move it there")


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, rms: bool) -> None:
    num_columns = x.shape[-1]
    check(num_columns <= MAX_NORM_COLUMNS, f"x has {num_columns} columns: the fused norm takes {MAX_NORM_COLUMNS}")
    fits = weight.shape == (num_columns,) and (bias is None or bias.shape == weight.shape)
    check(fits, f"the norm's weight and bias must have shape [{num_columns}], as x has columns")
    check(bias is None or not rms, "RMSNorm has no bias: pass None")


def check_weight(
    x: Tensor,
    act_groups: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    check(x.dim() == 2 and packed.dim() == 2, "activations and packed weights must be matrices: flatten the tokens")
    (num_tokens, num_columns), (num_outputs, num_bytes), weight_groups = x.shape, packed.shape, weight_scale.shape[-1]
    check(packed.dtype == torch.uint8, f"packed is {packed.dtype}: pass grid.pack_int4's uint8")
    check(
        num_columns <= 2 * num_bytes and num_columns < MAX_COLUMNS,
        f"{num_columns} input columns: the packed weight holds {2 * num_bytes}, the kernels {MAX_COLUMNS - 1}",
    )
    check(
        weight_scale.shape == (num_outputs, weight_groups),
        f"weight_scale has shape {list(weight_scale.shape)}: pass [{num_outputs}, G]",
    )
    check(weight_scale.dtype == torch.float32, f"weight_scale is {weight_scale.dtype}: keep it float32")
    check(min(weight_groups, act_groups, num_columns) > 0, "no groups, or no input columns")
    num_groups = math.lcm(weight_groups, act_groups)
    check(
        num_groups in (weight_groups, act_groups) and num_columns % num_groups == 0,
        f"{weight_groups} groups of weights, {act_groups} of activations: one must divide the other, and both the "
        f"{num_columns} input columns",
    )
    group_size = num_columns // num_groups
    check(
        num_groups == 1 or num_bytes % group_size == 0,
        f"packed rows have {num_bytes} bytes: pad the weights to a multiple of a group's {group_size} columns",
    )
    check(bias is None or bias.shape == (num_outputs,), f"bias must have shape [{num_outputs}]")
    check(residual is None or residual.shape == (num_tokens, num_outputs), "residual must have the output's shape")
    tensors: tuple[Tensor | None, ...] = (packed, weight_scale, bias, residual)
    for tensor in tensors:
        check(tensor is None or tensor.device == x.device, f"activations are on {x.device}, another input is not")
        check(tensor is None or tensor is residual or tensor.is_contiguous(), "the layer's tensors must be contiguous")


def check_linear(
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
    check_weight(x, 1, packed, weight_scale, bias, residual)
    check(
        weight_sums.shape == weight_scale.shape,
        f"weight_sums has shape {list(weight_sums.shape)}: it must be weight_scale's {list(weight_scale.shape)}",
    )
    check(weight_sums.dtype == torch.int32, f"weight_sums is {weight_sums.dtype}: keep it int32")
    for name, value in (("act_scale", act_scale), ("act_zero_point", act_zero_point)):
        check(value.dtype == torch.float32, f"{name} is {value.dtype}: the grid is float32")
        check(value.shape in ((1,), (x.shape[0], 1)), f"{name} has shape {list(value.shape)}: pass [1] or [M, 1]")
    check(act_scale.shape == act_zero_point.shape, "act_scale and act_zero_point differ in shape")
    check(out_dtype in FLOAT_DTYPES, f"out_dtype {out_dtype}: choose float32, bfloat16 or float16")
    for tensor in (act_scale, act_zero_point, weight_sums):
        check(tensor.device == x.device, f"activations are on {x.device}, another input is not")
        check(tensor.is_contiguous(), "the layer's tensors must be contiguous")


def check_token_grouped_linear(
    x: Tensor,
    act_groups: int,
    act_bits: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    check_float(x, "x")
    check(act_groups > 1, "a token's columns are one group: quantize_activation_per_token and int4_linear serve it")
    check(2 <= act_bits <= 7, f"activation bits {act_bits} in groups of a token: choose 2 to 7")
    check_weight(x, act_groups, packed, weight_scale, bias, residual)


def check_activation(
    x: Tensor, packed: Tensor, activation: str, scale: Tensor | None, zero_point: Tensor | None, bits: int
) -> None:
    check(activation in ("", "gelu", "swiglu"), f'activation {activation!r}: choose "gelu", "swiglu" or ""')
    if activation:
        if scale is None or zero_point is None:
            raise ValueError(f"{activation} is quantized: give the grid's out_scale and out_zero_point")
        check_grid(x, scale, zero_point, bits)
        check(activation == "gelu" or packed.shape[0] % 2 == 0, "SwiGLU takes an even number of outputs")


def check_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bits: int = 0,
) -> None:
    check(keys.dim() == 4 and keys.shape == values.shape, "keys and values must be [B, G, C, E] both")
    num_batch, num_groups, _, width = keys.shape
    heads = f"[{num_batch}, (H + 2 · {num_groups}) · {width}]"
    num_heads = qkv.shape[-1] // width - 2 * num_groups
    fits = qkv.dim() == 2 and qkv.shape[0] == num_batch and qkv.shape[1] % width == 0 and num_heads > 0
    check(fits and num_heads % num_groups == 0, f"qkv has shape {list(qkv.shape)}: these keys take {heads}")
    check(width % 2 == 0, f"heads of width {width} cannot be rotated: it must be even")
    check(cos.numel() == sin.numel() == width, f"cos and sin must have {width} elements each: one token's")
    check(cos.dtype == sin.dtype == torch.float32, f"cos is {cos.dtype}: keep the angles float32")
    check(position.shape == (1,) and position.dtype == torch.int64, "position must be int64 [1]")
    check(keys.is_contiguous() and values.is_contiguous(), "keys and values must be contiguous: they are written to")
    for tensor in (cos, sin, keys, values, position):
        check(tensor.device == qkv.device, f"qkv is on {qkv.device}, another input is not")
    if scale is not None and zero_point is not None:
        check_grid(qkv, scale, zero_point, bits)
