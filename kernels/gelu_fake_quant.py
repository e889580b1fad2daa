"""The MLP's non-linearity and the fake quantizer behind it for training: one pass forward, one pass backward.

    y = GELU(h) = h Φ(h)            or   y = silu(gate) · up, h = [gate, up]            x̂ = fake quantization of y
    dGELU/dh = Φ(h) + h φ(h)             silu′ = σ(gate) (1 + gate (1 − σ(gate)))

y never goes to memory and is rounded to the dtype of h before it meets the grid, as it is where an activation function
writes it. The backward pass reads h and g and writes dh: 6 bytes a bfloat16 element, the floor; the table of
:mod:`.fake_quant` is applied to y, computed again.

GELU's backward pass also sums dh, before it is rounded, over tokens, if asked to: that is the gradient of the bias of
the linear that gave h. Summed elsewhere, dh would be read once more. (Of few tokens the partial sums are more bytes
than that: below 5,632 at H = 3072 on 132 processors.) For it a program stays in its columns and walks down rows.

Φ as in :mod:`.gelu_quant`; the backward pass takes the polynomial for float32, too, and φ from the same exponential.

Where the kurtosis of h is regularized (:mod:`.kurtosis`), the forward pass looks at its tiles of a row, which are
joined then, and the backward pass adds the gradient.

h contiguous [..., H] or, gated, [..., 2H]; clips [1]. Partial sums as in :mod:`.fake_quant`, but how many depends on H.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.fake_quant import (
    load_grid,
    no_sums,
    on_grid,
    programs_for,
    store_clip_sums,
    straight_through,
    visible,
)
from lit_actreg_kernels.gelu_quant import gelu, normal_distribution, sigmoid, swiglu
from lit_actreg_kernels.grid import code_range
from lit_actreg_kernels.kurtosis import add_if_wanted, empty_tiles, joined, look_if_wanted, share_of, terms_of
from torch import Tensor

_FORWARD_BLOCK, _FORWARD_WARPS = 1024, 2  # 16 elements a thread: what is done once a thread takes as long as 5 do
_BACKWARD_BLOCK, _GATED_BACKWARD_BLOCK = 512, 1024  # measured: GELU is faster with 512, SwiGLU slower
_PROGRAMS_PER_PROCESSOR = 64  # many more than run at once: those that are done first make room for others


@triton.jit
def _forward_kernel(
    h_ptr,
    x_hat_ptr,
    low_ptr,
    high_ptr,
    tiles_ptr,
    H,
    T,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    GATED: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_tiles = tl.cdiv(H, BLOCK)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    column = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    if GATED:
        h = tl.load(h_ptr + row * 2 * H + column, mask=inside, other=0.0)
        up = tl.load(h_ptr + row * 2 * H + H + column, mask=inside, other=0.0)
        y = swiglu(h.to(tl.float32), up.to(tl.float32))
    else:
        h = tl.load(h_ptr + row * H + column, mask=inside, other=0.0)
        y = gelu(h.to(tl.float32), ERF=h.dtype == tl.float32)
    scale, zero_point = load_grid(low_ptr, high_ptr, Q_MIN, Q_MAX, INTEGER)
    x_hat = on_grid(y.to(h.dtype), scale, zero_point, Q_MIN, Q_MAX)
    tl.store(x_hat_ptr + row * H + column, x_hat.to(h.dtype), mask=inside)
    if STEP:
        num, second = tl.minimum(BLOCK, H - tile * BLOCK) * (2 if GATED else 1), up if GATED else h
        look_if_wanted(h, second, inside, num, row.to(tl.int32), tile, num_tiles, T, tiles_ptr, FIRST, STEP, GATED)


@triton.jit
def _backward_kernel(
    g_ptr,
    h_ptr,
    dh_ptr,
    clips_ptr,
    d_bias_ptr,
    low_ptr,
    high_ptr,
    terms_ptr,
    d_kappa_ptr,
    num_rows,
    H,
    num_looked_at,
    T,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale, zero_point = load_grid(low_ptr, high_ptr, Q_MIN, Q_MAX, INTEGER)
    sums, d_bias = no_sums(BLOCK), tl.zeros((BLOCK,), tl.float32)
    dtype = h_ptr.dtype.element_ty
    num_tiles = tl.cdiv(H, BLOCK)
    first_row = tl.program_id(0) // num_tiles
    column = tl.program_id(0) % num_tiles * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    if STEP:
        d_kappa = share_of(d_kappa_ptr, num_looked_at)
    for index in tl.range(first_row, num_rows, tl.num_programs(0) // num_tiles):
        row = tl.cast(index, tl.int64)
        if STEP:
            _, wanted, terms = terms_of(index, num_rows, T, terms_ptr, FIRST, STEP)
        g = tl.load(g_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            at = row * 2 * H + column
            gate = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(h_ptr + at + H, mask=inside, other=0.0).to(tl.float32)
            share = sigmoid(gate)
            y = gate * share * up
        else:
            at = row * H + column
            h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
            cumulative, density = normal_distribution(h)
            y = h * cumulative
        y = y.to(dtype).to(tl.float32)
        dy, sums = straight_through(y, g, scale, zero_point, sums, Q_MIN, Q_MAX, MASKED)
        if GATED:
            d_gate = dy * up * share * (1.0 + gate * (1.0 - share))
            d_up = dy * gate * share
            if STEP:
                d_gate = add_if_wanted(d_gate, gate, wanted, terms, d_kappa)
                d_up = add_if_wanted(d_up, up, wanted, terms, d_kappa)
            tl.store(dh_ptr + at, d_gate.to(dtype), mask=inside)
            tl.store(dh_ptr + at + H, d_up.to(dtype), mask=inside)
        else:
            dh = dy * (cumulative + h * density)
            if STEP:
                dh = add_if_wanted(dh, h, wanted, terms, d_kappa)
            if HAS_BIAS:
                d_bias += dh
            tl.store(dh_ptr + at, dh.to(dtype), mask=inside)
    if HAS_BIAS:
        tl.store(d_bias_ptr + first_row * H + column, d_bias, mask=inside)
    store_clip_sums(clips_ptr, sums, Q_MIN, Q_MAX)


def _rows(h: Tensor, gated: bool) -> tuple[int, int]:
    """Rows and columns of y."""
    return h.numel() // max(1, h.shape[-1]), h.shape[-1] // 2 if gated else h.shape[-1]


def activation_fake_quantize(
    h: Tensor,
    low: Tensor,
    high: Tensor,
    gated: bool,
    bits: int,
    integer_zero_point: bool,
    first: int,
    step: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ [..., H], in the dtype of h, of GELU(h), h [..., H], or of SwiGLU where ``gated``, h [..., 2H].

    And of h [..., T, …] κ̄ and its terms, as :func:`.kurtosis.joined`.
    """
    x_hat = h.new_empty((*h.shape[:-1], h.shape[-1] // 2)) if gated else torch.empty_like(h)
    rows, width = _rows(h, gated)
    num_tiles = triton.cdiv(width, _FORWARD_BLOCK)
    tiles = empty_tiles(h, num_tiles, first, step)
    if x_hat.numel():
        visible(_forward_kernel)[(rows * num_tiles,)](
            h,
            x_hat,
            low,
            high,
            tiles,
            width,
            h.shape[-2] if step else 1,
            first,
            step,
            gated,
            *code_range(bits),
            integer_zero_point,
            BLOCK=_FORWARD_BLOCK,
            num_warps=_FORWARD_WARPS,
        )
    return x_hat, *joined(tiles, h.shape[-1], eps)


def activation_fake_quantize_backward(
    g: Tensor,
    h: Tensor,
    low: Tensor,
    high: Tensor,
    gated: bool,
    bits: int,
    integer_zero_point: bool,
    masked: bool,
    terms: Tensor,
    d_kappa: Tensor,
    first: int,
    step: int,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh in the dtype of h, and partial sums, float32: dc⁻ and dc⁺ [2, programs]; if ``has_bias``, its gradient [·, H].

    ``terms`` [R, 4] and d_kappa (one value) are those of :mod:`.kurtosis`, for tokens first, first + step, …; of h
    [..., T, ...]. Without kurtosis ``step`` is 0. What is gated has no bias.
    """
    dh = torch.empty_like(h)
    rows, width = _rows(h, gated)
    block = _GATED_BACKWARD_BLOCK if gated else _BACKWARD_BLOCK
    num_tiles = triton.cdiv(width, block)
    programs_per_tile = max(1, programs_for(h.device, _PROGRAMS_PER_PROCESSOR) // max(1, num_tiles))
    clips = h.new_empty((2, num_tiles * programs_per_tile), dtype=torch.float32)
    d_bias = h.new_empty((programs_per_tile if has_bias else 0, width), dtype=torch.float32)
    q_min, q_max = code_range(bits)
    visible(_backward_kernel)[(num_tiles * programs_per_tile,)](
        g,
        h,
        dh,
        clips,
        d_bias,
        low,
        high,
        terms,
        d_kappa,
        rows,
        width,
        terms.shape[0],
        h.shape[-2] if step else 1,
        first,
        step,
        gated,
        has_bias,
        q_min,
        q_max,
        integer_zero_point,
        masked,
        BLOCK=block,
        num_warps=block // 256,  # 8 elements a thread: one 16-byte access of each bfloat16 tensor
    )
    return dh, clips, d_bias
