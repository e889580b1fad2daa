"""SwiGLU's gradient for training, in one pass: a compiler's code reads its inputs once for either half of the output.

    y = silu(gate) · up, h = [gate, up]        dgate = g up σ(gate) (1 + gate (1 − σ(gate)))        dup = g silu(gate)

h and dh contiguous [..., 2H], g [..., H]: 10 bytes a bfloat16 element of y, where the compiler's code moves 14.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.fake_quant import visible
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _backward_kernel(g_ptr, h_ptr, dh_ptr, H, BLOCK: tl.constexpr):
    tiles = tl.cdiv(H, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < H, row * 2 * H + column
    dtype = dh_ptr.dtype.element_ty
    g = tl.load(g_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + H, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(dh_ptr + at, (g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype), mask=inside)
    tl.store(dh_ptr + at + H, (g * gate * sigmoid).to(dtype), mask=inside)


def swiglu_backward(g: Tensor, h: Tensor) -> Tensor:
    """dh [..., 2H], in the dtype of h, of g [..., H]."""
    dh, width = torch.empty_like(h), g.shape[-1]
    if g.numel():
        programs = g.numel() // width * triton.cdiv(width, _BLOCK)
        visible(_backward_kernel)[(programs,)](g, h, dh, width, BLOCK=_BLOCK, num_warps=4)
    return dh
