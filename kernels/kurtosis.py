"""Kurtosis of the tokens that a regularizer looks at, and its gradient added to the one that is there already.

With c = y − μ, v = mean c², m₃ = mean c³, m₄ = mean c⁴ over a token's N features and d = v² + ε:

    κ = m₄ / d          ∂κ/∂y = 4 / (N d) · (c³ − m₃ − (m₄ v / d) · c)

A regularizer looks at one token in ``step``, from ``first`` on in every sequence. All other tokens have no gradient
from it, so the backward pass touches none of them: it goes over the rows looked at alone and adds, in place, dκ̄ times
the above to what the rest of the network gave y, κ̄ being the mean over the R tokens. Bytes a bfloat16 feature looked
at: 2 forward, 6 backward; written out as a gradient of y's own and added by autograd, with one token in four, it is
2 + 8 + 6 · 4. A backward pass that reads y and writes its gradient anyway adds it for no bytes at all
(:func:`add_row_gradient`; :mod:`.gelu_fake_quant`, :mod:`.swiglu`). The forward pass leaves what it takes of a row:
μ, 4 / (N d), m₃ and m₄ v / d.

y is in memory until the backward pass only where something else keeps it. Where nothing does, the forward pass copies
the rows that it has read (``keep``), and the backward pass reads the copy.

One program a row, which is read once and stays in registers: two-pass moments, float32. y, g contiguous [..., T, N], of
any float dtype but float64; N ≤ 65,536. No autograd in here (:mod:`.training_ops`).
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import num_warps_for
from lit_actreg_kernels.fake_quant import visible
from torch import Tensor


@triton.jit
def _gradient(y, terms_ptr, index, d_kappa_ptr, num_rows):
    """dκ̄ · ∂κ̄/∂y of float32 y, a part of the index-th of the rows looked at."""
    terms_ptr += 4 * index
    c = y - tl.load(terms_ptr)
    factor = tl.load(d_kappa_ptr).to(tl.float32) / num_rows * tl.load(terms_ptr + 1)
    return factor * (c * (c * c - tl.load(terms_ptr + 3)) - tl.load(terms_ptr + 2))


@triton.jit
def add_row_gradient(g, y, row, terms_ptr, d_kappa_ptr, num_rows, T, FIRST: tl.constexpr, STEP: tl.constexpr):
    """g + dκ̄ · ∂κ̄/∂y, float32, for a part of a row of y [..., T, N]; g where the token is not looked at."""
    row = row.to(tl.int32)  # divisions of 64 bits cost twice the registers
    t = row % T
    if (t >= FIRST) & ((t - FIRST) % STEP == 0):
        index = row // T * tl.cdiv(T - FIRST, STEP) + (t - FIRST) // STEP
        g += _gradient(y, terms_ptr, index, d_kappa_ptr, num_rows)
    return g


@triton.jit
def _row_in_sequences(T, per_sequence, FIRST: tl.constexpr, STEP: tl.constexpr):
    """The row of y that this program looks at: every sequence has T tokens, of which ``per_sequence`` are looked at."""
    program = tl.program_id(0).to(tl.int64)
    return (program // per_sequence) * T + FIRST + (program % per_sequence) * STEP


@triton.jit
def _forward_kernel(
    y_ptr,
    kappa_ptr,
    terms_ptr,
    rows_ptr,
    T,
    N,
    per_sequence,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    EPS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, n = _row_in_sequences(T, per_sequence, FIRST, STEP), tl.arange(0, BLOCK)
    y = tl.load(y_ptr + row * N + n, mask=n < N, other=0.0)
    if KEEP:
        tl.store(rows_ptr + tl.program_id(0).to(tl.int64) * N + n, y, mask=n < N)
    mean = tl.sum(y.to(tl.float32), 0) / N
    c = tl.where(n < N, y.to(tl.float32) - mean, 0.0)
    squares = c * c
    v, m3, m4 = tl.sum(squares, 0) / N, tl.sum(squares * c, 0) / N, tl.sum(squares * squares, 0) / N
    d = v * v + EPS
    tl.store(kappa_ptr + tl.program_id(0), m4 / d)
    terms_ptr += 4 * tl.program_id(0)
    tl.store(terms_ptr, mean)
    tl.store(terms_ptr + 1, 4.0 / (N * d))
    tl.store(terms_ptr + 2, m3)
    tl.store(terms_ptr + 3, m4 * v / d)


@triton.jit
def _backward_kernel(
    g_ptr,
    y_ptr,
    terms_ptr,
    d_kappa_ptr,
    T,
    N,
    per_sequence,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, n = _row_in_sequences(T, per_sequence, FIRST, STEP), tl.arange(0, BLOCK)
    y_row = tl.program_id(0).to(tl.int64) if KEPT else row
    y = tl.load(y_ptr + y_row * N + n, mask=n < N, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    g += _gradient(y, terms_ptr, tl.program_id(0), d_kappa_ptr, tl.num_programs(0))
    tl.store(g_ptr + row * N + n, g.to(g_ptr.dtype.element_ty), mask=n < N)


def num_looked_at(num_tokens: int, first: int, step: int) -> int:
    """How many of a sequence's tokens are looked at."""
    return (num_tokens - first + step - 1) // step


def token_kurtosis(y: Tensor, first: int, step: int, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """κ of the tokens looked at, float32 [R]; their gradients' terms [R, 4]; if ``keep`` their rows [R, N], or none."""
    num_tokens, num_columns = y.shape[-2:]
    per_sequence = num_looked_at(num_tokens, first, step)
    num_rows = y[..., 0, 0].numel() * per_sequence
    kappa, terms = (y.new_empty(shape, dtype=torch.float32) for shape in ((num_rows,), (num_rows, 4)))
    rows = y.new_empty((num_rows, num_columns) if keep else 0)
    block = triton.next_power_of_2(num_columns)
    visible(_forward_kernel)[(num_rows,)](
        y,
        kappa,
        terms,
        rows,
        num_tokens,
        num_columns,
        per_sequence,
        first,
        step,
        eps,
        keep,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )
    return kappa, terms, rows


def add_kurtosis_gradient(
    g: Tensor, y: Tensor, terms: Tensor, d_kappa: Tensor, first: int, step: int, kept: bool
) -> None:
    """Adds dκ̄ · ∂κ̄/∂y to g [..., T, N], in place; d_kappa one value; y like g, or the rows kept [R, N]."""
    num_tokens, num_columns = g.shape[-2:]
    per_sequence = num_looked_at(num_tokens, first, step)
    block = triton.next_power_of_2(num_columns)
    visible(_backward_kernel)[(g[..., 0, 0].numel() * per_sequence,)](
        g,
        y,
        terms,
        d_kappa,
        num_tokens,
        num_columns,
        per_sequence,
        first,
        step,
        kept,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )
