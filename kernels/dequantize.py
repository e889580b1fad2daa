"""Back to 16 bits, for many tokens where columns have small groups: x̂ and ŵ, and an ordinary product of them.

    x̂ = s_x (a − z)    ŵ = s_w w    y = x̂ ŵᵀ + b + r

An int8 sum that is scaled at every group's border takes longer than the product itself (:mod:`.int4_grouped`). So here
both sides are rounded to 16 bits, as training computed them, and the vendor's library multiplies them. Four bits then
buy memory, not time: ŵ is made for every call anew, in 2 N K bytes that are free after it. This is no integer product:
rounding x̂ to bfloat16 adds 2^-9 of each value, little beside a step of 4 bits, half as much as one of 8 bits does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Making ŵ moves 2.5 N K bytes whatever the tokens. (256, 4096, 4096) on an H100, groups of 64 columns: 36 µs, with the
# int8 product 44 (bfloat16 18). Scaling takes half of that product's time at 128 columns, a quarter at 256.
MANY_TOKENS, MOST_COLUMNS = 256, 128
_BLOCK = 2048


@triton.jit
def _weight_kernel(packed_ptr, scale_ptr, w_ptr, K, P, GROUP, NUM_GROUPS, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(packed_ptr + row * P + j, mask=j < P, other=0).to(tl.int32)
    for high in tl.static_range(2):
        column = j + P if high else j
        inside = (j < P) & (column < K)
        code = ((packed >> 4 if high else packed & 15) ^ 8) - 8
        scale = tl.load(scale_ptr + row * NUM_GROUPS + column // GROUP, mask=inside, other=0.0)
        tl.store(w_ptr + row * K + column, (code.to(tl.float32) * scale).to(w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_kernel(codes_ptr, scale_ptr, zero_point_ptr, x_ptr, K, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + row * K + k, mask=k < K, other=0).to(tl.float32)
    x = (codes - tl.load(zero_point_ptr + row * PER_TOKEN)) * tl.load(scale_ptr + row * PER_TOKEN)
    tl.store(x_ptr + row * K + k, x.to(x_ptr.dtype.element_ty), mask=k < K)


def serves(num_tokens: int, group_size: int, dtype: torch.dtype) -> bool:
    """Whether a product with groups of so many columns is computed in 16 bits: only if that is what it gives."""
    return num_tokens >= MANY_TOKENS and group_size <= MOST_COLUMNS and dtype in (torch.bfloat16, torch.float16)


def weight(packed: Tensor, weight_scale: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """ŵ [N, K] of packed [N, P] and scales [N, G]."""
    (num_outputs, num_bytes), num_groups = packed.shape, weight_scale.shape[1]
    w_hat = torch.empty((num_outputs, num_columns), dtype=dtype, device=packed.device)
    sizes = (num_columns, num_bytes, num_columns // num_groups, num_groups)
    programs = (num_outputs, triton.cdiv(num_bytes, _BLOCK))
    _weight_kernel[programs](packed, weight_scale, w_hat, *sizes, BLOCK=_BLOCK, num_warps=4)
    return w_hat


def activation(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """x̂ [M, K] of codes int8 on a grid of all tokens, [1], or one a token, [M, 1]."""
    x_hat = torch.empty_like(codes, dtype=dtype)
    programs = (codes.shape[0], triton.cdiv(codes.shape[1], _BLOCK))
    options = {"PER_TOKEN": scale.numel() > 1, "BLOCK": _BLOCK, "num_warps": 4}
    _activation_kernel[programs](codes, scale, zero_point, x_hat, codes.shape[1], **options)
    return x_hat


def linear(x_hat: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """y [M, N] in the dtype of x̂ [M, K], to which bias and residual are rounded too (their sum, if there are both)."""
    w_hat = weight(packed, weight_scale, x_hat.shape[1], x_hat.dtype)
    added = [term for term in (bias, residual) if term is not None]
    with torch.autocast(x_hat.device.type, enabled=False):
        if not added:
            return x_hat @ w_hat.T
        return torch.addmm(sum(added[1:], added[0]).to(x_hat.dtype), x_hat, w_hat.T)
