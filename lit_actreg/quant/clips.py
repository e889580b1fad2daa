"""Starting values of the clips: from a constant, or from the inputs that a site has just seen.

Whatever the method, a site whose values have a known lower bound (after GELU) starts with c⁻ on that bound: codes
below it would never be used.

- "constant": ±4, the authors' example. Behind a norm it masks next to nothing; where inputs are small, as the
  attention projection's are early in training (about ±0.3), its step of 0.53 rounds all of them to zero.
- "minmax": the extremes. Nothing is masked, and one large value sets the step of all.
- "quantile": the ``tail`` and 1 − ``tail`` quantiles.
- "mse": of 40 shrunken ranges f · [min, max], the one whose grid has the least squared error on these inputs.
"""

import math
from typing import Literal

import torch
from lit_actreg_kernels.grid import dequantize, grid_from_clips, quantize
from torch import Tensor

ClipMethod = Literal["constant", "minmax", "quantile", "mse"]
MAX_SAMPLES = 1 << 18


def initial_clips(
    x: Tensor,
    method: ClipMethod,
    bits: int = 4,
    integer_zero_point: bool = True,
    lower_bound: float | None = None,
    constant: float = 4.0,
    tail: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Clips c⁻, c⁺ (float32 [1] each) for inputs x [...], of which at most 2¹⁸ evenly spaced values are looked at."""
    stride = max(1, math.ceil(x.numel() / MAX_SAMPLES))
    while math.gcd(stride, x.shape[-1]) > 1:  # or only a few of the channels would ever be looked at
        stride += 1
    values = x.detach().flatten()[::stride].float()
    if method == "constant":
        low, high = values.new_tensor([-constant]), values.new_tensor([constant])
    elif method == "quantile":
        ordered = values.sort().values  # torch.quantile refuses more than 16 M values and is slower
        index = min(int(tail * len(ordered)), (len(ordered) - 1) // 2)
        low, high = ordered[index].reshape(1), ordered[len(ordered) - 1 - index].reshape(1)
    else:
        low, high = values.amin().reshape(1), values.amax().reshape(1)
        if method == "mse":
            shares = torch.linspace(0.05, 1.0, 40, device=values.device).unsqueeze(1)
            lows = low * shares if lower_bound is None else torch.full_like(shares, lower_bound)
            highs = high * shares
            scales, zero_points = grid_from_clips(lows, highs, bits, integer_zero_point)
            errors = [
                (dequantize(quantize(values, s, z, bits), s, z) - values).square().mean()
                for s, z in zip(scales, zero_points, strict=True)
            ]
            best = torch.stack(errors).argmin()
            low, high = lows[best], highs[best]
    return (low if lower_bound is None else torch.full_like(low, lower_bound)), high
