"""The one definition of the integer grid that training, quantizers, kernels and exports share.

A grid of b bits has the signed codes q in [−2^(b−1), 2^(b−1) − 1], a scale s and a zero point z:

    q = clamp(round(x / s + z), −2^(b−1), 2^(b−1) − 1)        x̂ = (q − z) · s

Rounding is half to even, the division is a true division, and both happen in float32 or wider: this is
compressed-tensors' definition to the bit, so codes are equal in training, in our kernels and in transformers.
The paper (arXiv 2404.03605) writes unsigned codes; its q is ours + 2^(b−1).

Clips c⁻ < c⁺ (activations) fix the grid by s = (c⁺ − c⁻) / (2^b − 1) and z = −2^(b−1) − c⁻ / s. With an *integer*
zero point z is then rounded, so zero is exact and interchange formats can hold it; the *real* one, as published,
keeps the fraction. That rounding is the whole difference between the two modes.
"""

import torch
from torch import Tensor


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of a grid of ``bits`` bits: (−8, 7) for 4."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def grid_from_clips(low: Tensor, high: Tensor, bits: int, integer_zero_point: bool = True) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that spans [low, high]; all tensors share one shape.

    With an integer zero point an interval that excludes zero is first widened to include it. The zero point keeps
    the dtype of ``low`` in both modes, so that the arithmetic that follows is the same.
    """
    q_min, q_max = code_range(bits)
    if integer_zero_point:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # A collapsed interval would divide by zero; its grid is that of the smallest interval we can still divide by.
    scale = ((high - low) / (q_max - q_min)).clamp(min=1e-8)
    zero_point = q_min - low / scale
    if integer_zero_point:
        zero_point = zero_point.round().clamp(q_min, q_max)
    return scale, zero_point


def num_groups(num_columns: int, group_size: int | None, option: str = "group_size") -> int:
    """Groups of neighbouring columns that share a grid, in a row of a weight or in a token; 1 without groups."""
    if group_size is None:
        return 1
    if group_size < 1 or num_columns % group_size:
        raise ValueError(
            f"{option} {group_size} does not divide the {num_columns} input columns: choose a divisor, or null for "
            "one grid a row"
        )
    return num_columns // group_size


def grid_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Dynamic asymmetric grid of every token (the paper's RTN activations): x [..., K] → scale, zero point [..., 1].

    Of groups of a token's columns where x is [..., G, K / G].
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return grid_from_clips(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits)


def symmetric_scale(max_abs: Tensor, bits: int) -> Tensor:
    """Scale of a symmetric weight grid (z = 0) that spans ±max_abs.

    Half of the code range, 7.5 at 4 bits, rather than the largest code: a value at either end is then off by half a
    step, as every other value is at worst, and the step is the smallest one for which this holds.
    """
    q_min, q_max = code_range(bits)
    return (max_abs * 2 / (q_max - q_min)).clamp(min=1e-8)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | float, bits: int) -> Tensor:
    """Codes of x, int8 [shape of x]; scale and zero point broadcast against it. float16/bfloat16 is widened first."""
    q_min, q_max = code_range(bits)
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (x / scale + zero_point).round().clamp(q_min, q_max).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
    """Values (q − z) · s of int8 codes, in the dtype of the scale."""
    return (codes.to(scale.dtype) - zero_point) * scale


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor | float, bits: int) -> Tensor:
    """x̂ = (q − z) · s of finite x (float32, float64): what the two above give, to the bit, in one new tensor."""
    q_min, q_max = code_range(bits)
    return (x / scale).add_(zero_point).round_().clamp_(q_min, q_max).sub_(zero_point).mul_(scale)


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte for the kernels: int8 [N, K] → uint8 [N, ⌈K/2⌉], an odd K padded with a zero code.

    Byte j of a row holds code j in its low nibble and code j + ⌈K/2⌉ in its high one, so that each nibble is a
    contiguous half row and a kernel multiplies the halves separately, with nothing to interleave.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes.view(torch.uint8).chunk(2, dim=-1)
    return (low & 0xF) | (high << 4)


def unpack_int4(packed: Tensor, num_columns: int) -> Tensor:
    """Inverse of :func:`pack_int4`: uint8 [N, ⌈K/2⌉] → int8 [N, K]."""
    low = (packed << 4).view(torch.int8) >> 4  # the arithmetic shift extends the sign
    high = packed.view(torch.int8) >> 4
    return torch.cat([low, high], dim=-1)[..., :num_columns].contiguous()
