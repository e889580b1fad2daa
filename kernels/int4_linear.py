"""Triton W4A4 linear: 4-bit weights packed two a byte, int8 activation codes, int32 accumulation, fused epilogue.

    y_mn = s_x · s_w · (Σ_k a_mk w_nk − z_x · Σ_k w_nk) + b_n + r_mn                       (:mod:`.reference`)

**Unpacking** into 16-fold int8 and the epilogue are :mod:`.int4_tile`. The two halves of a packed row are two dots with
the two halves of the activations, so nothing is ever interleaved.

**Orientation.** The tile computed is y^T = W · A^T: the unpacked weights are in registers, and only the left operand of
Hopper's wgmma may come from there. INT4 tensor cores do not exist on sm_90 and later, so int8 ones do the work and
four bits buy bandwidth and memory.

**Regimes.** One token: :mod:`.int4_gemv`, or :mod:`.int4_grouped_gemv`, without tensor cores. Up to 64: the weights
are read once and that is the time it takes; on sm_90 :mod:`.int4_hopper_decode`, else the kernel here. K is split when
N gives too few tiles: split programs write int32 partial sums, and the last one of a tile to arrive (it takes a ticket)
adds them, integers, so the result does not depend on the order. Many tokens: 128 × 128 tiles, two programs a
multiprocessor so that one unpacks or writes while the other multiplies, ordered so that neighbours share weights in L2,
and 64 × 64 where those are few; on sm_90 in :mod:`.int4_hopper`.

**Groups** of columns, of weights or of activations, are :mod:`.int4_grouped`'s (P is a multiple of theirs); small ones
of many tokens, for 16 bits out, :mod:`.dequantize`'s.

Contiguous tensors: codes int8 [M, K]; packed uint8 [N, P] with 2P ≥ K and zero codes from
K on; the rest as in :mod:`.reference`. Any M, N, K < 131,072. sm_80 or later.
"""

import functools
from types import ModuleType

import torch
import triton
import triton.language as tl
from lit_actreg_kernels import dequantize
from lit_actreg_kernels.dependent_launch import MAX_TOKENS
from lit_actreg_kernels.int4_gemv import GemvTile, int4_gemv
from lit_actreg_kernels.int4_gemv import serves as gemv_serves
from lit_actreg_kernels.int4_grouped import int4_grouped_linear
from lit_actreg_kernels.int4_grouped_gemv import int4_grouped_gemv
from lit_actreg_kernels.int4_grouped_gemv import serves as grouped_gemv_serves
from lit_actreg_kernels.int4_tile import (
    INTERPRETED,
    Tile,
    correct,
    finish,
    scale_rows,
    sum_splits,
    tickets_of,
    tile_of_program,
    times_16_high,
    times_16_low,
)
from torch import Tensor


@triton.jit
def _linear_kernel(
    codes_ptr,
    packed_ptr,
    y_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    bias_ptr,
    residual_ptr,
    partial_ptr,
    ticket_ptr,
    M,
    N,
    K,
    P,
    PER_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    m, n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    steps = tl.cdiv(tl.cdiv(P, BLOCK_K), SPLIT_K)
    start = split * steps * BLOCK_K
    j = start + tl.arange(0, BLOCK_K)
    low_ptrs = codes_ptr + m.to(tl.int64)[None, :] * K + j[:, None]
    packed_ptrs = packed_ptr + n.to(tl.int64)[:, None] * P + j[None, :]
    m_inside, n_inside = (m < M)[None, :], (n < N)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for base in range(start, min(start + steps * BLOCK_K, P), BLOCK_K):
        # A byte past P reads as two zero codes, so what the low half of the codes holds there does not matter.
        k = base + tl.arange(0, BLOCK_K)
        packed = tl.load(packed_ptrs, mask=n_inside if EVEN_K else n_inside & (k < P)[None, :], other=0)
        low = tl.load(low_ptrs, mask=m_inside if EVEN_K else m_inside & (k < K)[:, None], other=0)
        high = tl.load(low_ptrs + P, mask=m_inside if EVEN_K else m_inside & (k + P < K)[:, None], other=0)
        acc = tl.dot(times_16_low(packed, ASM), low, acc, out_dtype=tl.int32)
        acc = tl.dot(times_16_high(packed), high, acc, out_dtype=tl.int32)
        low_ptrs += BLOCK_K
        packed_ptrs += BLOCK_K
    acc = acc >> 4

    last = True
    if SPLIT_K > 1:
        acc, last = sum_splits(acc, partial_ptr, ticket_ptr, m, n, M, N, SPLIT_K)
    if last:
        y = correct(acc, act_zero_point_ptr, weight_scale_ptr, weight_sums_ptr, m, n, M, N, PER_TOKEN)
        y = scale_rows(y, act_scale_ptr, m, M, PER_TOKEN)
        finish(y, y_ptr, bias_ptr, residual_ptr, m, n, M, N, HAS_BIAS, HAS_RESIDUAL)


def choose_tile(num_tokens: int, num_outputs: int, num_bytes: int, hopper: bool) -> Tile:
    """The tile for M tokens, N outputs and P packed bytes a row: a table by regime, no search at run time.

    Args:
        hopper: Whether :mod:`.int4_hopper` serves the tensors. The other tiles fit the 99 KB of shared memory of the
            smallest GPUs.
    """
    if hopper and num_tokens <= MAX_TOKENS:
        return choose_decode_tile(num_tokens, num_outputs, num_bytes)
    if num_tokens <= 16:
        split_k = split_for(triton.cdiv(num_outputs, 32), num_bytes, num_programs=64)
        return Tile(16, 32, 256, num_warps=2, num_stages=4, split_k=split_k)
    if num_tokens <= MAX_TOKENS:  # two programs have room on a multiprocessor: 256 are one wave of an H100's 132
        split_k = split_for(triton.cdiv(num_outputs, 64), num_bytes, num_programs=256)
        return Tile(32 if num_tokens <= 32 else 64, 64, 128, num_warps=4, num_stages=4, split_k=split_k)
    # Two programs have room on a multiprocessor. With no more than half of an H100's 132 busy smaller tiles spread the
    # work over the others.
    if triton.cdiv(num_tokens, 128) * triton.cdiv(num_outputs, 128) > 66:
        return Tile(128, 128, 64, num_warps=4, num_stages=4, hopper=hopper)
    return Tile(64, 64, 128, num_warps=4, num_stages=4, hopper=hopper)


def choose_decode_tile(num_tokens: int, num_outputs: int, num_bytes: int) -> Tile:
    """The tile of :mod:`.int4_hopper_decode` for 2 to 64 tokens.

    Two programs share a multiprocessor, with 96 KB of buffers each, where there are more than 132 tiles, or, up to 16
    tokens, fewer than 96, of which K is split; else one program has 128 or 144 KB.
    """
    num_tiles = triton.cdiv(num_outputs, 64)
    shared = num_tiles > 132 or (num_tokens <= 16 and num_tiles < 96)
    if num_tokens <= 16:
        block_m, block_k, num_stages = 16, 256, 4 if shared else 6
    elif num_tokens <= 32:
        block_m, block_k, num_stages = 32, 256, 3 if shared else 4
    else:
        block_m, block_k, num_stages = 64, 128, 4 if shared else 6
    split_k = split_for(num_tiles, num_bytes, num_programs=264 if shared else 132)
    return Tile(block_m, 64, block_k, num_warps=4, num_stages=num_stages, split_k=split_k, hopper=True)


def split_for(num_tiles: int, num_bytes: int, num_programs: int) -> int:
    """Parts of K for at most ``num_programs`` programs, where that is not below the tiles; none below 1 KiB a row."""
    return max(1, min(8, num_programs // num_tiles, num_bytes // 1024))


def fuses_quantization(x: Tensor, packed: Tensor, num_groups: int) -> bool:
    """Whether the linear quantizes its own input: every program does all of it, so for one token only.

    With a quantizer of its own it takes 4.9 instead of 4.3 µs at 4096², 10.8 instead of 10.0 at (11008, 4096), 14.6
    instead of 13.8 at 8192² (benchmarks/results/decode_linear_h100_2026-11-28.csv).
    """
    return gemv_serves(x.shape[0], packed, num_groups)


@functools.cache
def hopper_kernel(device: torch.device) -> ModuleType | None:
    """:mod:`.int4_hopper` where the device can run it and this Triton has what it is written in (Gluon)."""
    if INTERPRETED or device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from lit_actreg_kernels import int4_hopper
    except ImportError:  # Gluon is experimental: another release may have moved it
        return None
    return int4_hopper


def int4_linear(
    x: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    act_bits: int = 4,
    tile: Tile | GemvTile | None = None,
) -> Tensor:
    """y [M, N] of ``out_dtype`` from codes int8 [M, K]; or, where the linear :func:`fuses_quantization`, from float x.

    Args:
        act_bits: Of the static grid that float x is put on.
        tile: Overrides :func:`choose_tile` and the choice of the kernel (benchmark and tests).
    """
    (num_tokens, num_columns), (num_outputs, num_bytes) = x.shape, packed.shape
    num_groups = weight_scale.shape[1]
    if num_groups > 1 and tile is None and dequantize.serves(num_tokens, num_columns // num_groups, out_dtype):
        x_hat = dequantize.activation(x, act_scale, act_zero_point, out_dtype)
        return dequantize.linear(x_hat, packed, weight_scale, bias, residual)
    y = x.new_empty((num_tokens, num_outputs), dtype=out_dtype)
    if not y.numel():
        return y
    epilogue = (act_scale, act_zero_point, weight_scale, weight_sums, bias, residual)
    if isinstance(tile, GemvTile) or (tile is None and gemv_serves(num_tokens, packed, num_groups)):
        int4_gemv(x, packed, *epilogue, y, act_bits, tile=tile)
        return y
    assert x.dtype == torch.int8, "these kernels take codes"
    if tile is None and grouped_gemv_serves(x, packed, num_groups):
        int4_grouped_gemv(x, packed, *epilogue, y)
        return y
    if num_groups > 1:
        int4_grouped_linear(x, packed, *epilogue, y, tile)
        return y
    hopper = hopper_kernel(x.device)
    serves = hopper is not None and hopper.serves(x, packed)
    tile = tile or choose_tile(num_tokens, num_outputs, num_bytes, serves)
    if tile.hopper:
        if hopper is None or not serves:
            raise ValueError("the hopper tile takes sm_90, and int8 codes with K and P multiples of 16")
        if tile.block_m > MAX_TOKENS or num_tokens > tile.block_m:
            hopper.int4_prefill(x, packed, *epilogue, y, tile)
        else:
            from lit_actreg_kernels.int4_hopper_decode import int4_decode  # like hopper, only where there is Gluon

            int4_decode(x, packed, *epilogue, y, tile)
        return y
    num_tiles = triton.cdiv(num_tokens, tile.block_m) * triton.cdiv(num_outputs, tile.block_n)
    partial, tickets = None, None
    if tile.split_k > 1:
        partial = x.new_empty((tile.split_k, num_tokens, num_outputs), dtype=torch.int32)
        tickets = tickets_of(x.device)
        assert num_tiles <= tickets.numel(), "split K of few tiles only"
    _linear_kernel[(num_tiles, tile.split_k)](
        x,
        packed,
        y,
        *epilogue,
        partial,
        tickets,
        num_tokens,
        num_outputs,
        num_columns,
        num_bytes,
        PER_TOKEN=act_scale.numel() > 1,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN_K=num_columns == 2 * num_bytes and num_bytes % tile.block_k == 0,
        SPLIT_K=tile.split_k,
        ASM=not INTERPRETED,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y
