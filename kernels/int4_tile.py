"""What the tensor-core kernels of the W4A4 linear share: tiles, 4-bit codes to int8 operands, split sums, the epilogue.

Byte j of a weight row holds w_j in its low nibble and w_{j+P} in its high one, P bytes a row (:func:`.grid.pack_int4`).
Read as int8, `byte & 0xF0` is 16 w_{j+P}, sign and all, and `(byte << 4) & 0xF0` is 16 w_j: one and two operations on
four bytes at a time, where sign extension would take many. The product carries the factor 16, which is shifted out
before the epilogue; |16 · 8 · 128 · K| < 2^31 keeps it exact for K < 131,072. Triton shifts int8 lane by lane (a
128 × 128 × 128-byte step of the loop compiled to 667 instructions on sm_90), so the shift is one line of PTX on four
bytes (254 instructions); the interpreter, which has no inline assembly, takes the plain expression.

A tile is y^T, outputs × tokens (:mod:`.int4_linear` says why).
"""

import functools
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Tile:
    """What one program computes: block_m tokens × block_n outputs, block_k packed bytes (2 block_k columns) a step.

    ``hopper`` selects a Gluon kernel (sm_90 only): up to 64 tokens a tile :mod:`.int4_hopper_decode`, above
    :mod:`.int4_hopper`, which is not split over K.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    hopper: bool = False


@functools.cache
def tickets_of(device: torch.device) -> Tensor:
    """A zero for every tile whose K is split, every head whose entries are; every launch leaves zeros again.

    One array a GPU: such kernels must not run at the same time on two streams of it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first kernel that splits a sum is being captured in a CUDA graph: run it once before")
    return torch.zeros(16384, dtype=torch.int32, device=device)


@triton.jit
def times_16_low(packed, ASM: tl.constexpr):
    """16 · (low nibble, signed) of every byte, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return (packed << 4).to(tl.int8, bitcast=True)


@triton.jit
def times_16_high(packed):
    """16 · (high nibble, signed) of every byte, int8."""
    return (packed & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tokens [BLOCK_M] and outputs [BLOCK_N] of program_id(0).

    GROUP_M tiles of tokens go through all outputs together: their activations stay in L2, weights pass through.
    """
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * num_n) * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * num_n)
    m = (first_m + within % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    return m, (within // rows) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def sum_splits(part, partial_ptr, ticket_ptr, m, n, M, N, SPLIT_K: tl.constexpr):
    """Adds the parts of a tile that SPLIT_K programs have: the sum, and whether this program is the one to use it.

    The last one to arrive (it takes a ticket) adds all, in the same order whoever is last.
    """
    inside = (m < M)[None, :] & (n < N)[:, None]
    partial_ptrs = partial_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(partial_ptrs + tl.program_id(1).to(tl.int64) * M * N, part, mask=inside)
    # Every thread has stored before one of them takes the tile's ticket, and that publishes what all have stored.
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(ticket_ptr + tl.program_id(0), 0)  # for the next launch
        part = tl.zeros_like(part)
        for i in tl.static_range(SPLIT_K):
            part += tl.load(partial_ptrs + tl.cast(M, tl.int64) * N * i, mask=inside, other=0, cache_modifier=".cg")
    return part, last


@triton.jit
def finish(
    y,
    y_ptr,
    bias_ptr,
    residual_ptr,
    m,
    n,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Adds bias and residual to y [BLOCK_N, BLOCK_M] (float32, all scales applied) and stores y^T."""
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(y)
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_rows(y, act_scale_ptr, m, M, PER_TOKEN: tl.constexpr):
    """s_x · y, y [BLOCK_N, BLOCK_M]."""
    return y * tl.load(act_scale_ptr + m * PER_TOKEN, mask=m < M, other=0.0)[None, :]


@triton.jit
def correct(acc, act_zero_point_ptr, weight_scale_ptr, weight_sums_ptr, m, n, M, N, PER_TOKEN: tl.constexpr):
    """s_w · (acc − z_x · Σ w), float32 [BLOCK_N, BLOCK_M]; acc int32 without the factor 16, one scale a channel."""
    zero_point = tl.load(act_zero_point_ptr + m * PER_TOKEN, mask=m < M, other=0.0)
    sums = tl.load(weight_sums_ptr + n, mask=n < N, other=0).to(tl.float32)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
    return weight_scale[:, None] * (acc.to(tl.float32) - zero_point[None, :] * sums[:, None])
