"""SwiGLU for training, a pass each: its gradient, and its value on a grid of every token or group of a token's columns.

    y = silu(gate) · up, h = [gate, up]        dgate = g up σ(gate) (1 + gate (1 − σ(gate)))        dup = g silu(gate)

The gradient moves 10 bytes a bfloat16 element of y, where a compiler's code moves 14: it reads its inputs once for
either half of dh. Behind y a grid that spans what it finds, min to max, clips nothing: its gradient is
straight-through, that of y. y is rounded to the dtype of h before it meets the grid, and never goes to memory. Where
the kurtosis of h is regularized (:mod:`.kurtosis`), it comes along as in :mod:`.gelu_fake_quant`.

h and dh contiguous [..., 2H]; g and x̂ [..., H], x̂ in G groups of C = H / G columns.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import grid_of_interval
from lit_actreg_kernels.fake_quant import on_grid, visible
from lit_actreg_kernels.gelu_quant import sigmoid, swiglu
from lit_actreg_kernels.grid import code_range
from lit_actreg_kernels.kurtosis import add_if_wanted, empty_tiles, joined, look_if_wanted, share_of, terms_of
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _backward_kernel(
    g_ptr,
    h_ptr,
    dh_ptr,
    terms_ptr,
    d_kappa_ptr,
    H,
    num_looked_at,
    T,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(H, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < H, row * 2 * H + column
    if STEP:
        _, wanted, terms = terms_of(row.to(tl.int32), tl.num_programs(0), T, terms_ptr, FIRST, STEP)
        d_kappa = share_of(d_kappa_ptr, num_looked_at)
    dtype = dh_ptr.dtype.element_ty
    g = tl.load(g_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + H, mask=inside, other=0.0).to(tl.float32)
    share = sigmoid(gate)
    d_gate, d_up = g * up * share * (1.0 + gate * (1.0 - share)), g * gate * share
    if STEP:
        d_gate = add_if_wanted(d_gate, gate, wanted, terms, d_kappa)
        d_up = add_if_wanted(d_up, up, wanted, terms, d_kappa)
    tl.store(dh_ptr + at, d_gate.to(dtype), mask=inside)
    tl.store(dh_ptr + at + H, d_up.to(dtype), mask=inside)


@triton.jit
def _grouped_kernel(
    h_ptr,
    x_hat_ptr,
    tiles_ptr,
    G,
    C,
    T,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_tiles = tl.cdiv(G, BLOCK_G)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    group, c = tile * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C)
    column, inside = group[:, None] * C + c[None, :], (group < G)[:, None] & (c < C)[None, :]
    gate = tl.load(h_ptr + row * 2 * G * C + column, mask=inside, other=0.0)
    up = tl.load(h_ptr + row * 2 * G * C + G * C + column, mask=inside, other=0.0)
    y = swiglu(gate.to(tl.float32), up.to(tl.float32)).to(gate.dtype)
    wide = y.to(tl.float32)
    # the padding's zeros do no harm: the grid includes zero anyway
    scale, zero_point = grid_of_interval(tl.min(wide, 1), tl.max(wide, 1), Q_MIN, Q_MAX, INTEGER=True)
    x_hat = on_grid(y, scale[:, None], zero_point[:, None], Q_MIN, Q_MAX)
    tl.store(x_hat_ptr + row * G * C + column, x_hat.to(gate.dtype), mask=inside)
    if STEP:
        num = tl.minimum(BLOCK_G, G - tile * BLOCK_G) * 2 * C
        look_if_wanted(gate, up, inside, num, row.to(tl.int32), tile, num_tiles, T, tiles_ptr, FIRST, STEP, TWO=True)


def swiglu_fake_quantize_per_token(
    h: Tensor, bits: int, num_groups: int, first: int, step: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ [..., H] of h [..., 2H], in its dtype; κ̄ and its terms as in :mod:`.gelu_fake_quant`."""
    x_hat = h.new_empty((*h.shape[:-1], h.shape[-1] // 2))
    columns = x_hat.shape[-1] // num_groups
    block_c = triton.next_power_of_2(columns)
    block_g = max(1, min(_BLOCK // block_c, triton.next_power_of_2(num_groups)))
    num_tiles = triton.cdiv(num_groups, block_g)
    tiles = empty_tiles(h, num_tiles, first, step)
    if x_hat.numel():
        visible(_grouped_kernel)[(h.numel() // h.shape[-1] * num_tiles,)](
            h,
            x_hat,
            tiles,
            num_groups,
            columns,
            h.shape[-2] if step else 1,
            first,
            step,
            *code_range(bits),
            BLOCK_G=block_g,
            BLOCK_C=block_c,
            num_warps=max(1, min(16, block_g * block_c // 512)),
        )
    return x_hat, *joined(tiles, h.shape[-1], eps)


def swiglu_backward(g: Tensor, h: Tensor, terms: Tensor, d_kappa: Tensor, first: int, step: int) -> Tensor:
    """dh [..., 2H], in the dtype of h, of g [..., H]; the rest as in :mod:`.gelu_fake_quant`."""
    dh, width = torch.empty_like(h), g.shape[-1]
    if g.numel():
        programs = g.numel() // width * triton.cdiv(width, _BLOCK)
        num_tokens = h.shape[-2] if step else 1
        visible(_backward_kernel)[(programs,)](
            g, h, dh, terms, d_kappa, width, terms.shape[0], num_tokens, first, step, BLOCK=_BLOCK, num_warps=4
        )
    return dh
