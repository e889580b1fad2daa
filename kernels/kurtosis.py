"""Kurtosis of the tokens that a regularizer looks at, and its gradient added to the one that is there already.

With c = y − μ, v = mean c², m₃ = mean c³, m₄ = mean c⁴ over a token's N features and d = v² + ε:

    κ = m₄ / d          ∂κ/∂y = 4 / (N d) · (c³ − m₃ − (m₄ v / d) · c)

A regularizer looks at one token in ``step``, from ``first`` on in every sequence. All other tokens have no gradient
from it. κ̄ is the mean over the R tokens looked at; its gradient is added to what the rest of the network gave y.

Where a kernel reads y anyway it looks at its rows as well, and where one writes y's gradient anyway it adds κ̄'s: that
is so behind all linears, in :mod:`.rotary`, :mod:`.norm_fake_quant`, :mod:`.gelu_fake_quant` and :mod:`.swiglu`. For
other places there are the kernels here, which go over the rows looked at alone. Bytes a bfloat16 feature looked at: 2
forward, 6 backward; written out as a gradient of y's own and added by autograd, with one token in four, it is 2 + 8 +
6 · 4. The forward pass leaves what the backward pass takes of a row: μ, 4 / (N d), m₃ and m₄ v / d.

Moments are float32, in two passes: over registers (:func:`look_at_row`; N ≤ 65,536), or, for a program that otherwise
has no whole row, over memory that is in a cache by then (:func:`look_at_stored_row`). y, g contiguous [..., T, N], of
any float dtype but float64. No autograd in here (:mod:`.training_ops`).
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.fake_quant import visible
from torch import Tensor


@triton.jit
def looked_at(row, T, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Whether a row (int32) of y [..., T, N] is looked at."""
    t = row % T
    return (t >= FIRST) & ((t - FIRST) % STEP == 0)


@triton.jit
def place_of(row, T, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Which of the rows looked at a row (int32) is."""
    return row // T * tl.cdiv(T - FIRST, STEP) + (row % T - FIRST) // STEP


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _store_kappa(mean, v, m3, m4, N, place, kappa_ptr, terms_ptr, EPS: tl.constexpr):
    """κ and its gradient's terms of sums v, m3, m4 [BLOCK] of the powers of c."""
    v, m3, m4 = tl.reduce((v, m3, m4), 0, _add_triples)
    v, m3, m4 = v / N, m3 / N, m4 / N
    d = v * v + EPS
    tl.store(kappa_ptr + place, m4 / d)
    terms_ptr += 4 * place
    tl.store(terms_ptr, mean)
    tl.store(terms_ptr + 1, 4.0 / (N * d))
    tl.store(terms_ptr + 2, m3)
    tl.store(terms_ptr + 3, m4 * v / d)


@triton.jit
def look_at_row(y, inside, N, place, kappa_ptr, terms_ptr, EPS: tl.constexpr):
    """Stores κ and its gradient's terms of a whole row y, at its place."""
    mean = tl.sum(y.to(tl.float32), 0) / N
    c = tl.where(inside, y.to(tl.float32) - mean, 0.0)
    _store_kappa(mean, c * c, c * c * c, c * c * (c * c), N, place, kappa_ptr, terms_ptr, EPS)


@triton.jit
def look_at_stored_row(y_ptr, N, place, kappa_ptr, terms_ptr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """The same of the row at ``y_ptr``."""
    n = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        total += tl.load(y_ptr + start + n, mask=start + n < N, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / N
    v, m3, m4 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        y = tl.load(y_ptr + start + n, mask=start + n < N, other=0.0).to(tl.float32)
        c = tl.where(start + n < N, y - mean, 0.0)
        v += c * c
        m3 += c * c * c
        m4 += c * c * (c * c)
    _store_kappa(mean, v, m3, m4, N, place, kappa_ptr, terms_ptr, EPS)


@triton.jit
def look_if_first(
    y_ptr,
    N,
    tiles,
    T,
    kappa_ptr,
    terms_ptr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first of the ``tiles`` programs that share a row of y [..., T, N] looks at all of it, if anybody does."""
    row = tl.program_id(0) // tiles
    if (tl.program_id(0) % tiles == 0) & looked_at(row, T, FIRST, STEP):
        place = place_of(row, T, FIRST, STEP)
        look_at_stored_row(y_ptr + row.to(tl.int64) * N, N, place, kappa_ptr, terms_ptr, EPS, BLOCK)


@triton.jit
def load_terms(terms_ptr, place, wanted=True):
    ptr = terms_ptr + 4 * place
    mean, factor = tl.load(ptr, mask=wanted), tl.load(ptr + 1, mask=wanted)
    return mean, factor, tl.load(ptr + 2, mask=wanted), tl.load(ptr + 3, mask=wanted)


@triton.jit
def row_gradient(y, terms, d_kappa):
    """dκ̄ · ∂κ̄/∂y of float32 y, a part of a row with these terms; d_kappa already over the number of rows."""
    mean, factor, m3, linear = terms
    c = y - mean
    return d_kappa * factor * (c * (c * c - linear) - m3)


@triton.jit
def add_row_gradient(g, y, row, terms_ptr, d_kappa_ptr, num_looked_at, T, FIRST: tl.constexpr, STEP: tl.constexpr):
    """g + dκ̄ · ∂κ̄/∂y, float32, for a part of a row of y [..., T, N]; g where nobody looks at it."""
    row = row.to(tl.int32)  # divisions of 64 bits cost twice the registers
    if looked_at(row, T, FIRST, STEP):
        terms = load_terms(terms_ptr, place_of(row, T, FIRST, STEP))
        g += row_gradient(y, terms, tl.load(d_kappa_ptr).to(tl.float32) / num_looked_at)
    return g


@triton.jit
def _row_in_sequences(T, FIRST: tl.constexpr, STEP: tl.constexpr):
    """The row of y that this program looks at."""
    program, per_sequence = tl.program_id(0).to(tl.int64), tl.cdiv(T - FIRST, STEP)
    return (program // per_sequence) * T + FIRST + (program % per_sequence) * STEP


@triton.jit
def _forward_kernel(
    y_ptr,
    kappa_ptr,
    terms_ptr,
    T,
    N,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, n = _row_in_sequences(T, FIRST, STEP), tl.arange(0, BLOCK)
    y = tl.load(y_ptr + row * N + n, mask=n < N, other=0.0)
    look_at_row(y, n < N, N, tl.program_id(0), kappa_ptr, terms_ptr, EPS)


@triton.jit
def _backward_kernel(
    g_ptr,
    y_ptr,
    terms_ptr,
    d_kappa_ptr,
    T,
    N,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, n = _row_in_sequences(T, FIRST, STEP), tl.arange(0, BLOCK)
    y = tl.load(y_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    d_kappa = tl.load(d_kappa_ptr).to(tl.float32) / tl.num_programs(0)
    g += row_gradient(y, load_terms(terms_ptr, tl.program_id(0)), d_kappa)
    tl.store(g_ptr + row * N + n, g.to(g_ptr.dtype.element_ty), mask=n < N)


def _num_warps(block: int) -> int:
    """32 elements a thread, of long rows more: all of a program's threads wait for each other at every sum."""
    return max(1, min(8, block // 1024))


def num_looked_at(y: Tensor, first: int, step: int) -> int:
    """How many rows of y [..., T, N] are looked at; none with step 0."""
    return y[..., 0, 0].numel() * ((y.shape[-2] - first + step - 1) // step) if step else 0


def empty_looks(y: Tensor, first: int, step: int) -> tuple[Tensor, Tensor]:
    """Where κ of the R tokens looked at goes, float32 [R], and its gradients' terms [R, 4]."""
    num_rows = num_looked_at(y, first, step)
    return y.new_empty(num_rows, dtype=torch.float32), y.new_empty((num_rows, 4), dtype=torch.float32)


def token_kurtosis(y: Tensor, first: int, step: int, eps: float) -> tuple[Tensor, Tensor]:
    """κ of the tokens looked at, float32 [R], and their gradients' terms [R, 4]."""
    num_tokens, num_columns = y.shape[-2:]
    kappa, terms = empty_looks(y, first, step)
    block = triton.next_power_of_2(num_columns)
    visible(_forward_kernel)[(kappa.numel(),)](
        y, kappa, terms, num_tokens, num_columns, first, step, eps, BLOCK=block, num_warps=_num_warps(block)
    )
    return kappa, terms


def add_kurtosis_gradient(g: Tensor, y: Tensor, terms: Tensor, d_kappa: Tensor, first: int, step: int) -> None:
    """Adds dκ̄ · ∂κ̄/∂y to g [..., T, N], in place; d_kappa one value."""
    num_tokens, num_columns = g.shape[-2:]
    block = triton.next_power_of_2(num_columns)
    visible(_backward_kernel)[(num_looked_at(y, first, step),)](
        g, y, terms, d_kappa, num_tokens, num_columns, first, step, BLOCK=block, num_warps=_num_warps(block)
    )
