"""The norm before a linear, the linear, and the non-linearity behind it: what a block computes between two sums.

    y = W codes(norm(x)) + b         or         codes(GELU(y)),   codes(SwiGLU(y))

For one token these are one kernel (:mod:`.int4_gemv`): the norm of a token is a few instructions a value, less than
a launch, and an output's non-linearity is taken where the output is. For more tokens every program would compute the
norm of all of them, so norm and activation are kernels of their own (:mod:`.norm_quant`, :mod:`.gelu_quant`) and write
codes. Values are rounded at the same places either way, but a row's sums are added in another order: a value on the
edge between two codes may fall to the other side.
"""

import torch
from lit_actreg_kernels import gelu_quant, int4_gemv, int4_linear, norm_quant
from torch import Tensor


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
    """y [M, N] in x's dtype; where ``activation`` is "gelu" or "swiglu", its codes int8 [M, N] or [M, N / 2]."""
    layer = (packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, None)
    if int4_gemv.serves(x.shape[0], packed, weight_scale.shape[1]):
        into = None
        if activation:
            assert out_scale is not None
            assert out_zero_point is not None
            into = int4_gemv.Activation(activation == "swiglu", out_scale, out_zero_point, out_bits)
        width = packed.shape[0] // 2 if into and into.gated else packed.shape[0]
        y = x.new_empty((1, width), dtype=torch.int8 if into else x.dtype)
        norm = int4_gemv.Norm(norm_weight, norm_bias, eps, rms)
        int4_gemv.int4_gemv(x, *layer, y, act_bits, norm, into)
        return y
    codes = norm_quant.norm_quantize(x, norm_weight, norm_bias, eps, rms, act_scale, act_zero_point, act_bits)
    y = int4_linear.int4_linear(codes, *layer, x.dtype)
    if activation:
        assert out_scale is not None
        assert out_zero_point is not None
        quantize = gelu_quant.swiglu_quantize if activation == "swiglu" else gelu_quant.gelu_quantize
        return quantize(y, out_scale, out_zero_point, out_bits)
    return y
