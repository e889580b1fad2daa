"""A Lightning precision that runs quantized linears on 4-bit integer kernels, in validate, test and predict.

Every :class:`~lit_actreg.quant.quantized_linear.QuantizedLinear` becomes an
:class:`~lit_actreg_kernels.module.Int4Linear`: the same codes, scales and grids, but an exact integer product instead
of a float one (Triton on a GPU, its plain reference on a CPU; only small groups of many tokens are multiplied in 16
bits where ``dtype`` is of 16: :mod:`lit_actreg_kernels.dequantize`). Layers that the kernel cannot serve stay as they
are, and one line says how many and why. A block whose linears have static grids (its MLP projection's may follow
tokens) becomes an :class:`~lit_actreg_plugins.int4_block.Int4Block`, where norms, activations and residual sums are
fused into the kernels. A GPU replays the decoder's forward pass as a CUDA graph (:mod:`lit_actreg.replay`): the host
launches these kernels more slowly than they run.

``Precision.convert_module`` is Lightning's hook for this, called on every strategy after ``configure_model``; it
changes the module in place. It cannot be combined with ``--trainer.precision``, so activations between the linears
have ``dtype``.
"""

from collections import Counter
from typing import Literal

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lit_actreg_kernels.module import Int4Linear
from lit_actreg_plugins.int4_block import Int4Block
from torch import nn

from lit_actreg.model import Block, Decoder
from lit_actreg.quant.quantized_linear import QuantizedLinear, int4_obstacle
from lit_actreg.replay import replay


def int4_linear(linear: QuantizedLinear) -> Int4Linear:
    """The kernel's module of a layer for which :func:`int4_obstacle` finds none."""
    return Int4Linear(
        linear.codes,
        linear.weight_scale,
        linear.bias,
        linear.input_scale,
        linear.input_zero_point,
        linear.activation_bits,
        linear.weight_bits,
        linear.activation_groups,
    )


def fuse_blocks(module: nn.Module) -> None:
    """Replaces every block that :class:`Int4Block` serves, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Block) and Int4Block.serves(child):
                setattr(parent, name, Int4Block(child))


class W4A4Precision(Precision):
    """Runs the linears of a quantized checkpoint on 4-bit integer kernels.

    Args:
        dtype: Floating-point type of everything between the integer products: "float32", or "bfloat16" for speed.
    """

    precision = "w4a4"  # type: ignore[assignment] # Lightning lists only its own names

    def __init__(self, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype "{dtype}" is unknown: choose "float32" or "bfloat16"')
        self.dtype = torch.float32 if dtype == "float32" else torch.bfloat16

    def convert_module(self, module: nn.Module) -> nn.Module:
        obstacles: Counter[str] = Counter()
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, QuantizedLinear):
                    continue
                inputs = (child.activations, child.activation_bits)
                groups = (child.weight_scale.shape[1], child.activation_groups)
                obstacle = int4_obstacle(child.weight_bits, child.weight_zero_point is None, *inputs, *groups)
                if obstacle is not None:
                    obstacles[obstacle] += 1
                else:
                    setattr(parent, name, int4_linear(child))
        num_linears = sum(isinstance(part, Int4Linear) for part in module.modules())  # or by an earlier validate
        if num_linears + obstacles.total() == 0:
            raise ValueError("W4A4Precision found no quantized linear: give `validate` a folder that `quantize` wrote")
        fuse_blocks(module)
        num_fused = sum(isinstance(part, Int4Block) for part in module.modules())
        for part in module.modules():
            if type(part) is Decoder:  # FSDP2 has made a sharded one another class, which it must stay
                replay(part)
        for parameter in module.parameters():  # the quantized layers have none: their scales stay float32
            parameter.data = parameter.data.to(self.dtype)
        reasons = "".join(f"; {count} stay in float: {reason}" for reason, count in obstacles.items())
        rank_zero_info(f"W4A4Precision: {num_linears} linears on integer kernels, {num_fused} blocks fused{reasons}")
        return module
