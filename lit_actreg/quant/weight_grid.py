"""Scales of a weight's integer grid, and rounding to nearest (RTN): what every weight quantizer starts from.

A weight [N, K] has one grid per output channel, or per group of ``group_size`` neighbouring input columns of one.
Two ways to choose its range:

- "minmax": the grid spans all weights. Symmetric: ±max |w| (:func:`lit_actreg_kernels.grid.symmetric_scale`);
  asymmetric: [min w, max w], widened to include zero, with an integer zero point.
- "mse": that range times the factor in {1, 0.98, …, 0.2} with the least squared error Σ (w − ŵ)². A few clipped
  weights cost less than a coarse step for all others, the more so the fewer the bits.

RTN then rounds every weight to the nearest code of its grid. It is also the yardstick that the report sets beside every
other method.
"""

from typing import Literal

import torch
from lit_actreg_kernels import grid
from lit_actreg_kernels.grid import num_groups
from torch import Tensor

from lit_actreg.contracts import QuantizedWeight

ScaleSearch = Literal["minmax", "mse"]
SHRINK_FACTORS = tuple(1.0 - 0.02 * step for step in range(41))


def _grid_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        scale = grid.symmetric_scale(torch.maximum(-low, high), bits)
        return scale, torch.zeros_like(scale)
    return grid.grid_from_clips(low, high, bits, integer_zero_point=True)


def weight_grid(groups_NGC: Tensor, bits: int, symmetric: bool, search: ScaleSearch) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N, G], both in the weight's dtype, of weights [N, G, C] that share a grid along C."""
    low, high = groups_NGC.amin(-1), groups_NGC.amax(-1)
    scale, zero_point = _grid_of_range(low, high, bits, symmetric)
    if search == "minmax":
        return scale, zero_point
    least = torch.full_like(scale, torch.inf)
    for factor in SHRINK_FACTORS:
        s, z = _grid_of_range(low * factor, high * factor, bits, symmetric)
        error = grid.on_grid(groups_NGC, s[..., None], z[..., None], bits).sub_(groups_NGC).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero_point = torch.where(better, s, scale), torch.where(better, z, zero_point)
    return scale, zero_point


def round_to_nearest(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, search: ScaleSearch
) -> QuantizedWeight:
    """RTN of a weight [N, K] (float32, or float64 for checks): every weight to the nearest code of its grid."""
    groups_NGC = weight.unflatten(1, (num_groups(weight.shape[1], group_size), -1))
    scale, zero_point = weight_grid(groups_NGC, bits, symmetric, search)
    codes = grid.quantize(groups_NGC, scale[..., None], zero_point[..., None], bits).flatten(1)
    return QuantizedWeight(codes, scale, None if symmetric else zero_point.to(torch.int8), bits)


def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Ŵ [N, K] = (q − z) · s of codes int8 [N, K], scale [N, G] and zero point int8 [N, G] or None."""
    groups_NGC = codes.unflatten(1, (scale.shape[1], -1))
    z = 0.0 if zero_point is None else zero_point[..., None]
    return grid.dequantize(groups_NGC, scale[..., None], z).flatten(1)


def relative_layer_error(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> float:
    """‖(W − Ŵ) X̂‖² / ‖W X̂‖² over the calibration tokens, as tr(Δ H Δᵀ) / tr(W H Wᵀ) with H = mean x̂ x̂ᵀ."""
    delta = weight - dequantized
    error = ((delta @ hessian) * delta).sum(dtype=torch.float64)
    power = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return (error / power.clamp(min=1e-300)).item()
