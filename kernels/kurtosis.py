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

Moments are float32, of a tile of a row in two passes over registers (:func:`look_at_tile`). One more kernel joins tiles
exactly: with n values in a tile and δ its mean less the row's, the row has the sums over its tiles of

    Σc² + n δ²        Σc³ + 3 δ Σc² + n δ³        Σc⁴ + 4 δ Σc³ + 6 δ² Σc² + n δ⁴

y, g contiguous [..., T, N], of any float dtype but float64; here a tile is a row, N ≤ 65,536. No autograd in here
(:mod:`.training_ops`).
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.fake_quant import visible
from torch import Tensor

_JOIN_BLOCK = 128  # tiles: one a thread


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
def tiles_of(tiles_ptr, row, num_tiles, T, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Where the first of a row's tiles has its five numbers."""
    return tiles_ptr + 5 * num_tiles * place_of(row, T, FIRST, STEP)


@triton.jit
def look_at_tile(y, z, inside, num, tile_ptr, TWO: tl.constexpr):
    """Stores n, mean, Σc², Σc³ and Σc⁴ of the ``num`` values of y (TWO: of y and z) inside; outside they are zero."""
    y, z = y.to(tl.float32), z.to(tl.float32)
    mean = tl.sum(y + z if TWO else y) / num
    c = tl.where(inside, y - mean, 0.0)
    v, m3, m4 = c * c, c * c * c, c * c * (c * c)
    if TWO:
        c = tl.where(inside, z - mean, 0.0)
        v, m3, m4 = v + c * c, m3 + c * c * c, m4 + c * c * (c * c)
    v, m3, m4 = tl.reduce((tl.ravel(v), tl.ravel(m3), tl.ravel(m4)), 0, _add_triples)
    tl.store(tile_ptr, num * 1.0)
    tl.store(tile_ptr + 1, mean)
    tl.store(tile_ptr + 2, v)
    tl.store(tile_ptr + 3, m3)
    tl.store(tile_ptr + 4, m4)


@triton.jit
def look_if_wanted(
    y,
    z,
    inside,
    num,
    row,
    tile,
    num_tiles,
    T,
    tiles_ptr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    TWO: tl.constexpr,
):
    """:func:`look_at_tile` of one of a row's tiles, if the row (int32) is looked at."""
    if looked_at(row, T, FIRST, STEP):
        look_at_tile(y, z, inside, num, tiles_of(tiles_ptr, row, num_tiles, T, FIRST, STEP) + 5 * tile, TWO)


@triton.jit
def _join_kernel(
    tiles_ptr,
    kappa_ptr,
    terms_ptr,
    num_rows,
    num_tiles,
    N,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row, tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_TILES)[None, :]
    inside = (row < num_rows)[:, None] & (tile < num_tiles)
    ptr = tiles_ptr + 5 * (row[:, None] * num_tiles + tile)
    n, mean = tl.load(ptr, mask=inside, other=0.0), tl.load(ptr + 1, mask=inside, other=0.0)
    c2, c3 = tl.load(ptr + 2, mask=inside, other=0.0), tl.load(ptr + 3, mask=inside, other=0.0)
    c4 = tl.load(ptr + 4, mask=inside, other=0.0)
    row_mean = tl.sum(n * mean, 1) / N
    d = mean - row_mean[:, None]
    v = tl.sum(c2 + n * d * d, 1) / N
    m3 = tl.sum(c3 + 3.0 * d * c2 + n * d * d * d, 1) / N
    m4 = tl.sum(c4 + 4.0 * d * c3 + 6.0 * d * d * c2 + n * (d * d) * (d * d), 1) / N
    d = v * v + EPS
    tl.store(kappa_ptr + tl.program_id(0), tl.sum(tl.where(row < num_rows, m4 / d, 0.0), 0) / num_rows)
    terms_ptr += 4 * row
    tl.store(terms_ptr, row_mean, mask=row < num_rows)
    tl.store(terms_ptr + 1, 4.0 / (N * d), mask=row < num_rows)
    tl.store(terms_ptr + 2, m3, mask=row < num_rows)
    tl.store(terms_ptr + 3, m4 * v / d, mask=row < num_rows)


@triton.jit
def _load_terms(terms_ptr, place, wanted):
    """Anything where they are not wanted."""
    ptr = terms_ptr + 4 * place
    mean, factor = tl.load(ptr, mask=wanted), tl.load(ptr + 1, mask=wanted)
    return mean, factor, tl.load(ptr + 2, mask=wanted), tl.load(ptr + 3, mask=wanted)


@triton.jit
def terms_of(row, num_rows, T, terms_ptr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Of a row (int32): its place among those looked at, whether it is one, and the terms of κ's gradient if so."""
    wanted = (row < num_rows) & looked_at(row, T, FIRST, STEP)
    place = tl.where(wanted, place_of(row, T, FIRST, STEP), 0)
    return place, wanted, _load_terms(terms_ptr, place, wanted)


@triton.jit
def share_of(d_kappa_ptr, num_looked_at):
    """The gradient of κ of one row looked at."""
    return tl.load(d_kappa_ptr).to(tl.float32) / num_looked_at


@triton.jit
def row_gradient(y, terms, d_kappa):
    """dκ · ∂κ/∂y of float32 y, a part of a row with these terms."""
    mean, factor, m3, linear = terms
    c = y - mean
    return d_kappa * factor * (c * (c * c - linear) - m3)


@triton.jit
def add_if_wanted(g, y, wanted, terms, d_kappa):
    """g, with :func:`row_gradient` added if its row is looked at."""
    if wanted:
        g += row_gradient(y, terms, d_kappa)
    return g


@triton.jit
def _row_in_sequences(T, FIRST: tl.constexpr, STEP: tl.constexpr):
    """The row of y that this program looks at."""
    program, per_sequence = tl.program_id(0).to(tl.int64), tl.cdiv(T - FIRST, STEP)
    return (program // per_sequence) * T + FIRST + (program % per_sequence) * STEP


@triton.jit
def _forward_kernel(y_ptr, tiles_ptr, T, N, FIRST: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    row, n = _row_in_sequences(T, FIRST, STEP), tl.arange(0, BLOCK)
    y = tl.load(y_ptr + row * N + n, mask=n < N, other=0.0)
    look_at_tile(y, y, n < N, N, tiles_ptr + 5 * tl.program_id(0), TWO=False)


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
    d_kappa = share_of(d_kappa_ptr, tl.num_programs(0))
    g += row_gradient(y, _load_terms(terms_ptr, tl.program_id(0), True), d_kappa)
    tl.store(g_ptr + row * N + n, g.to(g_ptr.dtype.element_ty), mask=n < N)


def _num_warps(block: int) -> int:
    """32 elements a thread, of long rows more: all of a program's threads wait for each other at every sum."""
    return max(1, min(8, block // 1024))


def num_looked_at(y: Tensor, first: int, step: int) -> int:
    """How many rows of y [..., T, N] are looked at; none with step 0."""
    return y[..., 0, 0].numel() * ((y.shape[-2] - first + step - 1) // step) if step else 0


def empty_tiles(y: Tensor, num_tiles: int, first: int, step: int) -> Tensor:
    """Where what is seen of the tiles of the R rows looked at goes, float32 [R, tiles, 5]."""
    return y.new_empty((num_looked_at(y, first, step), num_tiles, 5), dtype=torch.float32)


def joined(tiles: Tensor, num_columns: int, eps: float) -> tuple[Tensor, Tensor]:
    """Of the R rows looked at, of all their tiles: shares of κ̄, float32 [programs], and gradients' terms [R, 4]."""
    num_rows, num_tiles, _ = tiles.shape
    block_tiles = triton.next_power_of_2(num_tiles)
    block = max(1, _JOIN_BLOCK // block_tiles)
    # The last program has no rows and adds zero: torch.compile compiles sizes of 1 apart, and this one never is.
    programs = triton.cdiv(num_rows, block) + 1 if num_rows else 0
    kappa, terms = tiles.new_empty(programs), tiles.new_empty((num_rows, 4))
    if num_rows:
        sizes = (num_rows, num_tiles, num_columns, eps, block, block_tiles)
        visible(_join_kernel)[(programs,)](tiles, kappa, terms, *sizes, num_warps=4)
    return kappa, terms


def token_kurtosis(y: Tensor, first: int, step: int, eps: float) -> tuple[Tensor, Tensor]:
    """Shares of κ̄ and the R rows' terms, as :func:`joined`."""
    num_tokens, num_columns = y.shape[-2:]
    tiles = empty_tiles(y, 1, first, step)
    block = triton.next_power_of_2(num_columns)
    visible(_forward_kernel)[(tiles.shape[0],)](
        y, tiles, num_tokens, num_columns, first, step, BLOCK=block, num_warps=_num_warps(block)
    )
    return joined(tiles, num_columns, eps)


def add_kurtosis_gradient(g: Tensor, y: Tensor, terms: Tensor, d_kappa: Tensor, first: int, step: int) -> None:
    """Adds dκ̄ · ∂κ̄/∂y to g [..., T, N], in place; d_kappa one value."""
    num_tokens, num_columns = g.shape[-2:]
    block = triton.next_power_of_2(num_columns)
    visible(_backward_kernel)[(num_looked_at(y, first, step),)](
        g, y, terms, d_kappa, num_tokens, num_columns, first, step, BLOCK=block, num_warps=_num_warps(block)
    )
