"""A block on integer kernels in which nothing but the residual stream and the linears' outputs goes to memory.

A block of :mod:`lit_actreg.model` with its linears swapped alone still writes every normalized and every activated
tensor in floating point and reads it again to quantize it, and reads both sides of a residual sum. On a *static* grid
a code depends on its own value only, so what produces the value can write the code itself:

    codes  = quantize(norm(x))                 qkv    = W_qkv codes
    x     := x + W_attn attend(qkv)            the sum in the linear's epilogue; attend's output is quantized by itself
    codes  = quantize(norm(x))                 hidden = W_in codes
    codes  = quantize(gelu(hidden))            x     := x + W_proj codes

Each line is two kernels, attention aside. Of one token that is generated each line with a norm is one, and attention
writes codes: five kernels a block (:mod:`lit_actreg_kernels.norm_int4_linear`).

Bytes moved besides weights, a token, bfloat16, width D, GELU with 4 D hidden: norm 5 D → 3 D (twice), activation
20 D → 12 D, sums 6 D → 2 D (twice).

The same values are rounded at the same places as unfused, except that a residual sum is rounded to x's type once
rather than twice: in float32 outputs are equal but for a norm's, an erf's or an exp's last bit, which moves a code
where a value lies on the edge between two.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from lit_actreg_kernels import ops
from lit_actreg_kernels.checks import MAX_NORM_COLUMNS
from lit_actreg_kernels.module import Int4Linear
from torch import Tensor, nn

from lit_actreg.config import SITES
from lit_actreg.model import Block, LayerCache
from lit_actreg.quant.fused import swiglu


def grid_of(linear: Int4Linear) -> tuple[Any, Any, int]:
    """Scale, zero point and bits of a linear's static input grid."""
    return linear.act_scale, linear.act_zero_point, linear.act_bits


class Int4Block(Block):
    """A :class:`~lit_actreg.model.Block` of four ``Int4Linear`` layers: same inputs, outputs and parameters.

    The first three are static. Where the MLP projection's grids follow tokens, its activation and quantizer are kernels
    of their own.

    It leaves nothing to be added, and returns no statistics: the outputs they are taken of do not exist apart from the
    sums.
    """

    def __init__(self, block: Block) -> None:
        assert self.serves(block)
        nn.Module.__init__(self)  # not Block's, which would make new weights
        self.config, self.loss_terms = block.config, ()
        for name, child in block.named_children():
            self.add_module(name, child)
        if block._compiled_call_impl is not None:  # what `model.compile` asked for goes on
            self.compile(fullgraph=True)

    @staticmethod
    def serves(block: nn.Module) -> bool:
        """Whether the fused kernels can run this block (not a subclass: sharding makes one, with hooks)."""
        if type(block) is not Block or block.loss_terms or block.config.width > MAX_NORM_COLUMNS:
            return False
        linears = [getattr(block, site) for site in SITES]
        if not all(isinstance(linear, Int4Linear) for linear in linears):
            return False
        return all(linear.act_scale is not None for linear in linears[:3])

    def nothing_to_add(self, x_BTD: Tensor) -> None:
        """None, as the y of the blocks behind it."""

    def forward(
        self, x_BTD: Tensor, y_BTD: Tensor | None, cos: Tensor, sin: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if any(getattr(self, site)._forward_pre_hooks for site in SITES):  # who looks at inputs wants them as numbers
            return super().forward(x_BTD, y_BTD, cos, sin, cache)
        x_BTD = x_BTD if y_BTD is None else x_BTD + y_BTD
        qkv_linear, attn_proj, mlp_in, mlp_proj = (cast(Int4Linear, getattr(self, site)) for site in SITES)
        norm_1, norm_2 = cast(nn.LayerNorm, self.norm_1), cast(nn.LayerNorm, self.norm_2)
        activation = "gelu" if self.config.style == "neox" else "swiglu"

        qkv = qkv_linear.forward_norm(x_BTD, norm_1)
        if cache is not None and x_BTD.shape[1] == 1:
            codes = ops.decode_attention(qkv[:, 0], cos, sin, *cache, *grid_of(attn_proj))[:, None]
            x_BTD = attn_proj.forward_codes(codes, x_BTD.dtype, residual=x_BTD)
        else:
            attended, _ = self.attend(qkv, cos, sin, cache)
            x_BTD = attn_proj(attended, residual=x_BTD)
        if mlp_proj.act_scale is None:
            hidden = mlp_in.forward_norm(x_BTD, norm_2)
            activated = F.gelu(hidden) if self.config.style == "neox" else swiglu(hidden)
            x_BTD = mlp_proj(activated, residual=x_BTD)
        else:
            codes = mlp_in.forward_norm(x_BTD, norm_2, activation, mlp_proj)
            x_BTD = mlp_proj.forward_codes(codes, x_BTD.dtype, residual=x_BTD)
        return x_BTD, None, x_BTD.new_zeros(0, dtype=torch.float32)
