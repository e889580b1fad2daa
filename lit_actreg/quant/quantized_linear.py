"""A linear layer whose weight is integer codes and whose input passes its grid: what an artifact is made of.

    x̂ = (clamp(round(x / s_x + z_x)) − z_x) · s_x        Ŵ = (q − z_w) · s_w        y = x̂ Ŵᵀ + b

all in float32: to the bit what transformers + compressed-tensors computes from the same checkpoint, and what the
fake-quantized layer computed in training with Ŵ in place of W. It is the reference; integer kernels replace it
(plugins/w4a4_precision.py), and it is what runs where they cannot serve.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lit_actreg_kernels import grid
from lit_actreg_kernels.grid import num_groups
from torch import Tensor, nn

from lit_actreg.contracts import QuantizedWeight
from lit_actreg.quant.linear import InputQuantizer
from lit_actreg.quant.weight_grid import dequantize_weight


def int4_obstacle(
    weight_bits: int,
    symmetric: bool,
    activations: str,
    activation_bits: int,
    weight_groups: int,
    activation_groups: int,
) -> str | None:
    """Why the integer kernels cannot serve such a layer; None if they can."""
    if activations == "none":
        return "their inputs are not quantized"
    if max(weight_groups, activation_groups) % min(weight_groups, activation_groups):
        return f"their weights have {weight_groups} groups a row, their inputs {activation_groups}: no whole multiple"
    if activation_groups > 1 and activation_bits > 7:
        return f"their inputs have groups of {activation_bits} bits, the kernels take up to 7"
    if weight_bits > 4:
        return f"their weights have {weight_bits} bits, the kernels hold 4"
    return None if symmetric else "their weights are asymmetric"


class QuantizedLinear(nn.Module):
    """y = Ŵ x̂ + b: [..., K] → [..., N], computed in float32, returned in the input's dtype.

    Args:
        weight: Codes int8 [N, K], scale float32 [N, G], zero point int8 [N, G] or None, and the bits of the grid.
        bias: float32 [N] or None.
        activations: Grid of the input. "static": ``input_scale`` and ``input_zero_point``; "token": each token's
            own min-max grid; "none": the input stays as it is (weights only).
        activation_bits: Bits of that grid.
        activation_group_size: "token" only: neighbouring columns of a token that share a grid; None: all of them.
        input_scale: float32 [1], "static" only.
        input_zero_point: int8 [1], "static" only.
    """

    codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activations: str,
        activation_bits: int,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        activation_group_size: int | None = None,
    ) -> None:
        super().__init__()
        assert activations in ("static", "token", "none"), activations
        assert (activations == "static") == (input_scale is not None) == (input_zero_point is not None)
        self.out_features, self.in_features = weight.codes.shape
        self.weight_bits, self.activations, self.activation_bits = weight.bits, activations, activation_bits
        self.activation_groups = num_groups(self.in_features, activation_group_size)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("weight_zero_point", weight.zero_point)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)

    @classmethod
    def from_input_quantizer(
        cls, weight: QuantizedWeight, bias: Tensor | None, quantizer: InputQuantizer
    ) -> "QuantizedLinear":
        """Takes the input's grid from a trained layer; its learned clips become a scale and an integer zero point."""
        if quantizer.mode != "static":
            mode = quantizer.mode if quantizer.mode == "token" else "none"
            return cls(weight, bias, mode, quantizer.bits, activation_group_size=quantizer.group_size)
        assert quantizer.integer_zero_point, "no format holds a real zero point"
        low, high = quantizer.low.detach().float(), quantizer.high.detach().float()
        scale, zero_point = grid.grid_from_clips(low, high, quantizer.bits)
        return cls(weight, bias, "static", quantizer.bits, scale, zero_point.to(torch.int8))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Moves to a device; a change of dtype (Lightning's bf16-true) leaves grids and bias as they are stored."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in stored.items():
            if buffer is not None and self.get_buffer(name).dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self.codes.device)
        return self

    def dequantized_weight(self) -> Tensor:
        """Ŵ, float32 [N, K]."""
        return dequantize_weight(self.codes, self.weight_scale, self.weight_zero_point)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int8 of x [..., K] with their scale and zero point: [1], or per token [..., G], one a group."""
        if self.activations == "token":
            groups = x.unflatten(-1, (self.activation_groups, -1))
            scale, zero_point = grid.grid_per_token(groups, self.activation_bits)
            codes = grid.quantize(groups, scale, zero_point, self.activation_bits).flatten(-2)
            return codes, scale.squeeze(-1), zero_point.squeeze(-1)
        assert self.input_scale is not None
        assert self.input_zero_point is not None
        codes = grid.quantize(x, self.input_scale, self.input_zero_point, self.activation_bits)
        return codes, self.input_scale, self.input_zero_point

    def fake_quantize_input(self, x: Tensor) -> Tensor:
        """x̂ of x [..., K], float32."""
        if self.activations == "none":
            return x.float()
        codes, scale, zero_point = self.quantize_input(x.float())
        groups = codes.unflatten(-1, (scale.shape[-1], -1))
        return grid.dequantize(groups, scale[..., None], zero_point[..., None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.fake_quantize_input(x), self.dequantized_weight(), self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        inputs = "" if self.activations == "none" else f"A{self.activation_bits} {self.activations}, "
        inputs += f"{self.activation_groups} groups a token, " if self.activation_groups > 1 else ""
        groups = self.weight_scale.shape[1]
        return f"{self.in_features}, {self.out_features}, {inputs}W{self.weight_bits}, {groups} groups a row"
