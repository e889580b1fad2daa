"""Residual addition, LayerNorm or RMSNorm and the fake quantizer behind it for training: one pass each way.

    x′ = x + y        n = (x′ − μ) / √(σ² + ε)        v = n · w + b        x̂ = fake quantization of v

(RMSNorm: μ = 0, no b.) The backward pass reads x′, the gradient g of x̂ and the gradient d′ that x′ gets from elsewhere
(the residual connection), computes n and v again with the saved μ and 1/σ, and writes the whole gradient of x and y,
to either in its own dtype.

    dv, dc⁻, dc⁺ from g (:mod:`.fake_quant`)        dw = Σ_rows dv · n        db = Σ_rows dv
    dx = d′ + (dv·w − mean(dv·w) − n · mean(dv·w·n)) / σ        (RMSNorm without the first mean)

A fixed number of programs walks over the rows and keeps its share of dw and db in registers; PyTorch adds the shares,
so sums are deterministic. Bytes an element, with a float32 stream and bfloat16 y, x̂: 12 forward, 16 backward. Where y
has the stream's dtype dy is dx, and is not written.

Where the kurtosis κ of y is regularized (:mod:`.kurtosis`), the forward pass computes it of the rows looked at and
keeps a copy of them, and the backward pass adds its gradient to dy alone: 2 bytes each way an element looked at, and a
dy that is written.

v is rounded to ``value_dtype`` before it meets the grid: to what the norm alone would have written (float32 under
autocast). Statistics as in :mod:`.norm_quant`; K ≤ 65,536, all float dtypes but float64, tensors contiguous.
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
from lit_actreg_kernels.grid import code_range
from lit_actreg_kernels.kurtosis import (
    empty_tiles,
    joined,
    look_at_tile,
    looked_at,
    place_of,
    row_gradient,
    share_of,
    terms_of,
    tiles_of,
)
from lit_actreg_kernels.norm_quant import normalize
from torch import Tensor

# Of the backward pass, measured; of rows of 1,024 4 to 9 run at once, by the registers that the compiler takes.
_PROGRAMS_PER_PROCESSOR, _PROGRAMS_WITH_KURTOSIS = 8, 12
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _look_and_keep(y, K, T, tiles_ptr, rows_ptr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Of this program's row y, if it is looked at: what kurtosis takes, and a copy."""
    row, k = tl.program_id(0), tl.arange(0, y.shape[0])
    if looked_at(row, T, FIRST, STEP):
        tl.store(rows_ptr + place_of(row, T, FIRST, STEP).to(tl.int64) * K + k, y, mask=k < K)
        look_at_tile(y, y, k < K, K, tiles_of(tiles_ptr, row, 1, T, FIRST, STEP), TWO=False)


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    high_ptr,
    new_ptr,
    x_hat_ptr,
    statistics_ptr,
    tiles_ptr,
    rows_ptr,
    K,
    T,
    EPS: tl.constexpr,  # not an argument: torch.compile passes those as float64, and the row would follow
    RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    x = tl.load(x_ptr + row * K + k, mask=inside, other=0.0)
    y = tl.load(y_ptr + row * K + k, mask=inside, other=0.0)
    if STEP:
        _look_and_keep(y, K, T, tiles_ptr, rows_ptr, FIRST, STEP)
    x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    tl.store(new_ptr + row * K + k, x, mask=inside)
    value, mean, factor = normalize(x.to(tl.float32), inside, K, EPS, RMS)
    value = value * tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    scale, zero_point = load_grid(low_ptr, high_ptr, Q_MIN, Q_MAX, INTEGER)
    x_hat = on_grid(value.to(VALUE_DTYPE), scale, zero_point, Q_MIN, Q_MAX)
    tl.store(x_hat_ptr + row * K + k, x_hat.to(x_hat_ptr.dtype.element_ty), mask=inside)
    tl.store(statistics_ptr + row, mean)
    tl.store(statistics_ptr + tl.num_programs(0) + row, factor)


@triton.jit
def _statistics_of(row, num_rows, statistics_ptr, RMS: tl.constexpr):
    """μ (0 for RMSNorm) and 1/σ of a row, if there is such a row."""
    mean = 0.0
    if not RMS:
        mean = tl.load(statistics_ptr + row, mask=row < num_rows, other=0.0)
    return mean, tl.load(statistics_ptr + num_rows + row, mask=row < num_rows, other=0.0)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _backward_kernel(
    g_ptr,
    d_new_ptr,
    new_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    high_ptr,
    terms_ptr,
    rows_ptr,
    d_kappa_ptr,
    dx_ptr,
    dy_ptr,
    parameters_ptr,
    clips_ptr,
    num_rows,
    num_looked_at,
    K,
    T,
    RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    MASKED: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    DY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    scale, zero_point = load_grid(low_ptr, high_ptr, Q_MIN, Q_MAX, INTEGER)
    sums = no_sums(BLOCK_K)
    sum_weight, sum_bias = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    if STEP:
        d_kappa = share_of(d_kappa_ptr, num_looked_at)
        next_terms = terms_of(tl.program_id(0), num_rows, T, terms_ptr, FIRST, STEP)
    next_mean, next_factor = _statistics_of(tl.program_id(0), num_rows, statistics_ptr, RMS)
    for index in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        x = tl.load(new_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)  # zero in the padding, as dv then is
        # a row's single numbers are asked for a row before, as the compiler does with its tensors
        mean, factor = next_mean, next_factor
        next_mean, next_factor = _statistics_of(index + tl.num_programs(0), num_rows, statistics_ptr, RMS)
        if not RMS:
            x -= mean
        normed = x * factor
        value = normed * weight
        if HAS_BIAS:
            value += bias
        value = value.to(VALUE_DTYPE).to(tl.float32)
        dv, sums = straight_through(value, g, scale, zero_point, sums, Q_MIN, Q_MAX, MASKED)
        sum_weight += dv * normed
        if HAS_BIAS:
            sum_bias += dv
        weighted = dv * weight
        if RMS:
            dx = weighted - normed * (tl.sum(weighted * normed, 0) / K)
        else:  # both sums at once: one after the other they take more registers
            along, total = tl.reduce((weighted * normed, weighted), 0, _add_pairs)
            dx = weighted - normed * (along / K) - total / K
        dx = dx * factor + tl.load(d_new_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * K + k, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if DY:
            if STEP:  # without a branch, so that the row kept is on its way early
                place, wanted, terms = next_terms
                next_terms = terms_of(index + tl.num_programs(0), num_rows, T, terms_ptr, FIRST, STEP)
                y_ptr = rows_ptr + place.to(tl.int64) * K + k
                y = tl.load(y_ptr, mask=k < tl.where(wanted, K, 0), other=0.0).to(tl.float32)
                dx += tl.where(wanted, row_gradient(y, terms, d_kappa), 0.0)
            tl.store(dy_ptr + row * K + k, dx.to(dy_ptr.dtype.element_ty), mask=inside)
    store_clip_sums(clips_ptr, sums, Q_MIN, Q_MAX)
    program = tl.program_id(0)
    tl.store(parameters_ptr + program * K + k, sum_weight, mask=inside)
    tl.store(parameters_ptr + (tl.num_programs(0) + program) * K + k, sum_bias, mask=inside)


def _num_warps(block: int) -> int:
    """16 elements a thread from 512 to 8,192: more threads wait for each other longer, at every row's sums."""
    return max(1, min(16, block // 512))


def _num_stages(row_bytes: int) -> int:
    """Rows in flight a program of the backward pass: while one is summed two load, as shared memory has room for."""
    return 3 if row_bytes <= 32768 else 2 if row_bytes <= 65536 else 1


def add_norm_fake_quantize(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor,
    high: Tensor,
    eps: float,
    rms: bool,
    bits: int,
    integer_zero_point: bool,
    value_dtype: torch.dtype,
    out_dtype: torch.dtype,
    first: int,
    step: int,
    kurtosis_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x′ in the dtype of x, x̂ [..., K] in ``out_dtype``, and μ, 1/σ of rows, float32 [2, M].

    And of y [..., T, K] κ̄ and its terms, as :func:`.kurtosis.joined`, and the rows looked at, [R, K].
    """
    num_columns = x.shape[-1]
    num_rows = x.numel() // max(1, num_columns)
    new, x_hat = torch.empty_like(x), torch.empty_like(x, dtype=out_dtype)
    statistics = x.new_empty((2, num_rows), dtype=torch.float32)
    tiles = empty_tiles(y, 1, first, step)
    rows = y.new_empty((tiles.shape[0], num_columns))
    if x.numel():
        q_min, q_max = code_range(bits)
        block = triton.next_power_of_2(num_columns)
        visible(_forward_kernel)[(num_rows,)](
            x,
            y,
            weight,
            bias,
            low,
            high,
            new,
            x_hat,
            statistics,
            tiles,
            rows,
            num_columns,
            x.shape[-2] if step else 1,
            eps,
            RMS=rms,
            HAS_BIAS=bias is not None,
            VALUE_DTYPE=_DTYPES[value_dtype],
            Q_MIN=q_min,
            Q_MAX=q_max,
            INTEGER=integer_zero_point,
            FIRST=first,
            STEP=step,
            BLOCK_K=block,
            num_warps=_num_warps(block),
        )
    return new, x_hat, statistics, *joined(tiles, num_columns, kurtosis_eps), rows


def add_norm_fake_quantize_backward(
    g: Tensor,
    d_new: Tensor,
    new: Tensor,
    y_dtype: torch.dtype,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor,
    high: Tensor,
    rms: bool,
    bits: int,
    integer_zero_point: bool,
    masked: bool,
    value_dtype: torch.dtype,
    terms: Tensor,
    rows: Tensor,
    d_kappa: Tensor,
    first: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx in the dtype of x′, dy in that of y (empty where it would equal dx), and partial sums.

    These are dw and db, float32 [2, programs, K], and dc⁻ and dc⁺, float32 [2, programs].
    """
    num_columns = new.shape[-1]
    num_rows = new.numel() // max(1, num_columns)
    has_dy = step > 0 or y_dtype != new.dtype
    dx, dy = torch.empty_like(new), new.new_empty(new.shape if has_dy else 0, dtype=y_dtype)
    block = triton.next_power_of_2(num_columns)
    wanted, num_warps = _PROGRAMS_WITH_KURTOSIS if step else _PROGRAMS_PER_PROCESSOR, _num_warps(block)
    programs = programs_for(new.device, min(wanted, 64 // num_warps))  # of 64 warps that a multiprocessor has room for
    parameters = new.new_empty((2, programs, num_columns), dtype=torch.float32)
    clips = new.new_empty((2, programs), dtype=torch.float32)
    q_min, q_max = code_range(bits)
    visible(_backward_kernel)[(programs,)](
        g,
        d_new,
        new,
        statistics,
        weight,
        bias,
        low,
        high,
        terms,
        rows,
        d_kappa,
        dx,
        dy,
        parameters,
        clips,
        num_rows,
        rows.shape[0],
        num_columns,
        new.shape[-2] if step else 1,
        RMS=rms,
        HAS_BIAS=bias is not None,
        VALUE_DTYPE=_DTYPES[value_dtype],
        Q_MIN=q_min,
        Q_MAX=q_max,
        INTEGER=integer_zero_point,
        MASKED=masked,
        FIRST=first,
        STEP=step,
        DY=has_dy,
        BLOCK_K=block,
        STAGES=_num_stages(block * sum(t.element_size() for t in (g, d_new, new, *([rows] if step else [])))),
        num_warps=num_warps,
    )
    return dx, dy, parameters, clips
