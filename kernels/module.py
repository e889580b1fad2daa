"""``Int4Linear``: a linear layer whose weight is 4-bit codes and whose input is quantized on the way in.

Memory: N · K / 2 bytes of codes (K padded to a multiple of 128, or of two groups), 4 bytes a scale and 4 a weight sum,
where bfloat16 takes 2 · N · K.
"""

import torch
from lit_actreg_kernels import checks, ops, reference
from lit_actreg_kernels.grid import code_range, pack_int4
from torch import Tensor, nn
from torch.nn import functional

# Rows of a multiple of 64 bytes: aligned for 16-byte copies and free of tails in the kernels' loops.
_ROW_COLUMNS = 128


class Int4Linear(nn.Module):
    """y = Ŵ x̂ + b: x [..., K] of float32, bfloat16 or float16 → [..., N] of the same dtype.

    Args:
        codes: int8 [N, K], a symmetric grid of ``weight_bits``.
        weight_scale: float32 [N, G]; G = 1 for one scale per output channel, else K / G columns share one.
        bias: [N] of any float dtype, or None; kept as float32.
        act_scale: Step of the static activation grid, [1]; None for a dynamic grid of every token.
        act_zero_point: Its zero point, [1]; may have a fraction.
        act_bits: Bits of the activation grid, 2-8.
        weight_bits: Bits of the weight grid, 2-4 (all are stored in four).
        act_groups: Groups of a token's columns with a grid of their own, dynamic grids of up to 7 bits only. A multiple
            of the weight's groups, or a divisor.

    Buffers stay float32 and int32 under ``module.to(dtype)``: they are arithmetic, not activations.
    """

    weight_scale: Tensor

    def __init__(
        self,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        act_scale: Tensor | None = None,
        act_zero_point: Tensor | None = None,
        act_bits: int = 4,
        weight_bits: int = 4,
        act_groups: int = 1,
    ) -> None:
        super().__init__()
        if not 2 <= weight_bits <= 4:
            raise ValueError(f"weight bits {weight_bits}: the int4 kernels hold 2 to 4, run this model fake-quantized")
        if not 2 <= act_bits <= 8:
            raise ValueError(f"activation bits {act_bits} is out of range: choose 2 to 8")
        if (act_scale is None) != (act_zero_point is None):
            raise ValueError("a static activation grid needs both act_scale and act_zero_point; pass both or neither")
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}: pass int8 [N, K]")
        q_min, q_max = code_range(weight_bits)
        if codes.numel() and not (q_min <= codes.min() and codes.max() <= q_max):
            raise ValueError(f"codes leave the range {q_min}..{q_max} of {weight_bits} bits")
        self.out_features, self.in_features = codes.shape
        if weight_scale.dim() != 2 or weight_scale.shape[0] != self.out_features:
            raise ValueError(f"weight_scale has shape {list(weight_scale.shape)}: pass [{self.out_features}, G]")
        if self.in_features >= checks.MAX_COLUMNS or self.in_features % weight_scale.shape[1]:
            raise ValueError(
                f"{self.in_features} input columns: the kernels need fewer than {checks.MAX_COLUMNS}, "
                f"divisible by {weight_scale.shape[1]} groups"
            )
        if act_groups != 1 and (
            act_groups < 1 or act_scale is not None or act_bits > 7 or self.in_features % act_groups
        ):
            raise ValueError(
                f"{act_groups} groups of {act_bits}-bit activations: they must divide K, and their grids be dynamic, "
                "of up to 7 bits"
            )
        num_groups, coarser = max(act_groups, weight_scale.shape[1]), min(act_groups, weight_scale.shape[1])
        if num_groups % coarser:
            raise ValueError(
                f"{act_groups} groups of activations, {weight_scale.shape[1]} of weights: no whole multiple"
            )
        self.act_bits, self.weight_bits, self.act_groups = act_bits, weight_bits, act_groups
        # with groups, each half of a row holds whole ones
        multiple = _ROW_COLUMNS if num_groups == 1 else 2 * self.in_features // num_groups
        padded = functional.pad(codes, (0, -self.in_features % multiple))
        self.register_buffer("packed", pack_int4(padded))
        self.register_buffer("weight_scale", weight_scale.float().contiguous())
        self.register_buffer("weight_sums", reference.weight_sums(codes, weight_scale.shape[1]))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("act_scale", None if act_scale is None else act_scale.detach().float().reshape(1))
        self.register_buffer(
            "act_zero_point", None if act_zero_point is None else act_zero_point.detach().float().reshape(1)
        )

    def _apply(self, fn, recurse: bool = True):
        """Moves between devices, but keeps every buffer's dtype (what ``.to(torch.bfloat16)`` would narrow)."""
        before = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y, plus ``residual`` [..., N] where one is given (added before the result is rounded to x's dtype)."""
        x_MK = x.reshape(-1, self.in_features)
        residual_MN = None if residual is None else residual.reshape(-1, self.out_features)
        weight = (self.weight_scale, self.weight_sums, self.bias, residual_MN)
        if self.act_groups > 1:
            inputs = (x_MK, self.act_groups, self.act_bits)
            y_MN = ops.token_grouped_int4_linear(*inputs, self.packed, self.weight_scale, self.bias, residual_MN)
        elif self.act_scale is None:
            codes, scale, zero_point = ops.quantize_activation_per_token(x_MK, self.act_bits)
            y_MN = ops.int4_linear(codes, self.packed, scale, zero_point, *weight, x.dtype)
        else:
            grid = (self.act_scale, self.act_zero_point, self.act_bits)
            y_MN = ops.quantized_int4_linear(x_MK, self.packed, *grid, *weight)
        return y_MN.reshape(*x.shape[:-1], self.out_features)

    def forward_codes(self, codes: Tensor, out_dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        """y from codes int8 [..., K] that a fused kernel already put on this layer's static grid."""
        if self.act_scale is None:
            raise ValueError("forward_codes needs a static activation grid: this layer's is dynamic")
        codes_MK = codes.reshape(-1, self.in_features)
        residual_MN = None if residual is None else residual.reshape(-1, self.out_features)
        weight = (self.weight_scale, self.weight_sums, self.bias, residual_MN)
        y_MN = ops.int4_linear(codes_MK, self.packed, self.act_scale, self.act_zero_point, *weight, out_dtype)
        return y_MN.reshape(*codes.shape[:-1], self.out_features)

    def forward_norm(
        self,
        x: Tensor,
        norm: nn.LayerNorm | nn.RMSNorm,
        activation: str = "",
        into: "Int4Linear | None" = None,
    ) -> Tensor:
        """y of norm(x); or the input codes of the layer ``into`` behind an activation, "gelu" or "swiglu"."""
        if self.act_scale is None or (into is not None and into.act_scale is None):
            raise ValueError("forward_norm needs static activation grids: one of the layers' is dynamic")
        assert norm.eps is not None
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        y_MN = ops.norm_int4_linear(
            x.reshape(-1, self.in_features),
            norm.weight,
            bias,
            norm.eps,
            isinstance(norm, nn.RMSNorm),
            self.packed,
            self.act_scale,
            self.act_zero_point,
            self.act_bits,
            self.weight_scale,
            self.weight_sums,
            self.bias,
            activation,
            into.act_scale if into else None,
            into.act_zero_point if into else None,
            into.act_bits if into else 0,
        )
        return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])

    def extra_repr(self) -> str:
        grid = "static" if self.act_scale is not None else "per token"
        grid += f", {self.act_groups} groups" if self.act_groups > 1 else ""
        return (
            f"in={self.in_features}, out={self.out_features}, W{self.weight_bits}A{self.act_bits}, {grid}, "
            f"groups={self.weight_scale.shape[1]}, bias={self.bias is not None}"
        )
