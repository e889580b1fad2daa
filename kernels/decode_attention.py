"""Attention of one new token to a key/value cache, with rotary positions and the cache's update, in one kernel.

    q, k := rotate(q), rotate(k) at position p      K[p], V[p] := k, v      y = Σ_{c ≤ p} softmax_c(q · K[c] / √E) V[c]

At one token a sequence each of the dozen steps is shorter than its launch, so what counts is that there is one. A
program takes one head: it rotates the head's query and its group's new key itself and starts the softmax with them, so
no program reads what another one writes (entry p; the first head of a group stores it). It then goes through entries
0 … p − 1 in blocks with the running maximum m, sum l and weighted values of the online softmax (Milakov and Gimelshein,
arXiv 1805.02867). They are split among several programs a head, because each step is latency; the last one of a head to
arrive, by a ticket, joins their (m, l, Σ), in a fixed order (flash-decoding, in one launch).

The position is read on the device: the same launch serves every step, and a CUDA graph can hold it. Entries behind p
are never read, so the time is that of the tokens there are and not of the cache's length.

A static grid given, the output's codes leave instead of it, for the linear behind. The launch is dependent on sm_90
(:mod:`.int4_gemv`).

The arithmetic is float32, q and k rounded to the cache's dtype after rotation as if unfused. E even; cos and sin
float32 [E], halves repeated.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.act_quant import to_codes
from lit_actreg_kernels.grid import code_range
from lit_actreg_kernels.int4_gemv import launches_dependent
from lit_actreg_kernels.int4_tile import tickets_of
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_STEP, _LONG_STEP = 64, 128  # entries a step: it waits for memory and for two reductions, so few
_PROGRAMS, _PARTS = 512, 16  # at most: in all, and a head's


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, e, inside, HALF: tl.constexpr):
    """Both halves, float32, of a head's rotated vector."""
    first = tl.load(x_ptr + e, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + e, mask=inside, other=0.0).to(tl.float32)
    cos_first, cos_second = tl.load(cos_ptr + e, mask=inside), tl.load(cos_ptr + HALF + e, mask=inside)
    sin_first, sin_second = tl.load(sin_ptr + e, mask=inside), tl.load(sin_ptr + HALF + e, mask=inside)
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def _store(ptrs, y, inside, dtype: tl.constexpr, scale_ptr, zero_point_ptr, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    """y of ``dtype``, or its codes where Q_MAX is not zero."""
    if Q_MAX:
        y = to_codes(y.to(dtype), tl.load(scale_ptr), tl.load(zero_point_ptr), Q_MIN, Q_MAX)
    tl.store(ptrs, y.to(ptrs.dtype.element_ty), mask=inside)


@triton.jit
def _attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    y_ptr,
    partial_ptr,
    ticket_ptr,
    scale_ptr,
    zero_point_ptr,
    length,
    softmax_scale,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    HALF: tl.constexpr = E // 2
    batch, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    g = h // (H // G)
    position = tl.load(position_ptr).to(tl.int32)
    chunk = tl.maximum(tl.cdiv(position, SPLITS), LEAST)
    needed = tl.maximum(tl.cdiv(position, chunk), 1)
    if split >= needed:
        return
    dtype = keys_ptr.dtype.element_ty
    token_ptr = qkv_ptr + batch.to(tl.int64) * (H + 2 * G) * E
    cache_offset = (batch.to(tl.int64) * G + g) * length * E
    keys_ptr += cache_offset
    values_ptr += cache_offset

    # Keys are handled as two halves, which is how they are rotated; values whole.
    e_half, e = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_E)
    in_half, in_e = e_half < HALF, e < E
    q_first, q_second = _rotated(token_ptr + h * E, cos_ptr, sin_ptr, e_half, in_half, HALF)
    k_first, k_second = _rotated(token_ptr + (H + g) * E, cos_ptr, sin_ptr, e_half, in_half, HALF)
    q_first, q_second = tl.where(in_half, q_first, 0.0), tl.where(in_half, q_second, 0.0)
    k_first, k_second = tl.where(in_half, k_first, 0.0).to(dtype), tl.where(in_half, k_second, 0.0).to(dtype)
    q_first, q_second = q_first.to(dtype).to(tl.float32), q_second.to(dtype).to(tl.float32)
    v = tl.load(token_ptr + (H + G + g) * E + e, mask=in_e, other=0.0).to(dtype)
    if (split == 0) & (h % (H // G) == 0):
        tl.store(keys_ptr + position * E + e_half, k_first, mask=in_half)
        tl.store(keys_ptr + position * E + HALF + e_half, k_second, mask=in_half)
        tl.store(values_ptr + position * E + e, v, mask=in_e)

    # The first split starts with the new token itself; -1e30 rather than -inf, whose differences are not numbers.
    own = tl.sum(q_first * k_first.to(tl.float32) + q_second * k_second.to(tl.float32), 0) * softmax_scale
    m = tl.where(split == 0, own, -1e30)
    total = tl.where(split == 0, 1.0, 0.0)
    y = tl.where(split == 0, v.to(tl.float32), 0.0)
    end = tl.minimum((split + 1) * chunk, position)
    for start in tl.range(split * chunk, end, BLOCK_C, num_stages=1):  # a pipeline lost
        c = start + tl.arange(0, BLOCK_C)
        seen = (c < end)[:, None]
        k_ptrs = keys_ptr + c[:, None] * E + e_half[None, :]
        keys_first = tl.load(k_ptrs, mask=seen & in_half[None, :], other=0.0).to(tl.float32)
        keys_second = tl.load(k_ptrs + HALF, mask=seen & in_half[None, :], other=0.0).to(tl.float32)
        values = tl.load(values_ptr + c[:, None] * E + e[None, :], mask=seen & in_e[None, :], other=0.0)
        scores = tl.sum(q_first[None, :] * keys_first + q_second[None, :] * keys_second, 1) * softmax_scale
        scores = tl.where(c < end, scores, -1e30)
        m_new = tl.maximum(m, tl.max(scores, 0))
        weights = tl.exp(scores - m_new)
        decay = tl.exp(m - m_new)
        total = total * decay + tl.sum(weights, 0)
        y = y * decay + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        m = m_new

    row, last = tl.program_id(0), True
    if SPLITS > 1:
        parts_ptr = partial_ptr + row * SPLITS * (E + 2)
        part_ptr = parts_ptr + split * (E + 2)
        tl.store(part_ptr + e, y, mask=in_e)
        tl.store(part_ptr + E, m)
        tl.store(part_ptr + E + 1, total)
        # Every thread has stored before one of them takes the head's ticket, and that publishes what all have stored.
        tl.debug_barrier()
        last = tl.atomic_add(ticket_ptr + row, 1, sem="acq_rel") == needed - 1
        if last:
            tl.store(ticket_ptr + row, 0)  # for the next launch
            s = tl.arange(0, SPLITS)
            there, part_ptrs = s < needed, parts_ptr + s * (E + 2)
            maxima = tl.load(part_ptrs + E, mask=there, other=-1e30, cache_modifier=".cg")
            factors = tl.exp(maxima - tl.max(maxima, 0))
            total = tl.sum(tl.load(part_ptrs + E + 1, mask=there, other=0.0, cache_modifier=".cg") * factors, 0)
            inside = there[:, None] & in_e[None, :]
            parts = tl.load(part_ptrs[:, None] + e[None, :], mask=inside, other=0.0, cache_modifier=".cg")
            y = tl.sum(parts * factors[:, None], 0)
    if last:
        _store(y_ptr + row * E + e, y / total, in_e, qkv_ptr.dtype.element_ty, scale_ptr, zero_point_ptr, Q_MIN, Q_MAX)


def splits_for(num_heads: int, length: int) -> int:
    """Programs a head, a power of two, for a full cache of ``length`` entries; a step takes as many as are worth it."""
    most = max(1, min(_PROGRAMS // num_heads, _PARTS, length // _STEP))
    return 1 << (most.bit_length() - 1)


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bits: int = 0,
) -> Tensor:
    """y [B, H · E] of qkv [B, (H + 2G) · E]; keys and values [B, G, C, E] get entry ``position`` (int64 [1]).

    Args:
        scale: Of a static grid of ``bits``, [1], as is zero_point: y is its codes then, int8.
    """
    num_batch, num_groups, length, width = keys.shape
    num_heads = qkv.shape[1] // width - 2 * num_groups
    y = qkv.new_empty((num_batch, num_heads * width), dtype=qkv.dtype if scale is None else torch.int8)
    q_min, q_max = (0, 0) if scale is None else code_range(bits)
    rows = num_batch * num_heads
    splits = splits_for(rows, length)
    dependent = launches_dependent(qkv.device, 0)  # it reads no weights
    partial = qkv.new_empty((rows, splits, width + 2), dtype=torch.float32) if splits > 1 else None
    block_e = triton.next_power_of_2(width)
    _attention_kernel[(rows, splits)](
        qkv,
        cos,
        sin,
        keys,
        values,
        position,
        y,
        partial,
        tickets_of(qkv.device) if splits > 1 else None,
        scale,
        zero_point,
        length,
        width**-0.5,
        H=num_heads,
        G=num_groups,
        E=width,
        BLOCK_HALF=max(1, block_e // 2),
        BLOCK_E=block_e,
        BLOCK_C=_LONG_STEP if length // splits >= _LONG_STEP else _STEP,
        SPLITS=splits,
        LEAST=_STEP,
        Q_MIN=q_min,
        Q_MAX=q_max,
        DEPENDENT=dependent,
        num_warps=4,
        **({"launch_pdl": True} if dependent else {}),
    )
    return y
