"""Rotary positions for training: one pass each way over what the linear before attention gives.

    qkv [B, T, (H + 2G) E] → q [B, T, H, E], k [B, T, G, E]        (a, b) → (a cos − b sin, b cos + a sin)

a and b are the halves of a head (the GPT-NeoX and Llama convention), cos and sin those of its token. v stays where it
is. The backward pass turns the gradients of q and k back, and writes them and v's where qkv's belong.

Where the kurtosis of qkv is regularized (:mod:`.kurtosis`), the passes have most of a row in their hands anyway: the
forward pass reads v of the rows looked at besides, the backward pass those rows.

One program a token. Tensors contiguous, of any float dtype but float64; cos and sin float32 [T, E], halves repeated;
E even. No autograd in here (:mod:`.view_ops`).
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.fake_quant import visible
from lit_actreg_kernels.kurtosis import empty_tiles, joined, look_if_wanted, looked_at, row_gradient, share_of, terms_of
from torch import Tensor


@triton.jit
def _angles(cos_ptr, sin_ptr, t, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """cos and sin of a token [1, E / 2]."""
    e = tl.arange(0, BLOCK_E)[None, :]
    return tl.load(cos_ptr + t * E + e, mask=e < E // 2), tl.load(sin_ptr + t * E + e, mask=e < E // 2)


@triton.jit
def _first_halves(num_heads, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Where the first halves of a token's heads are, and what of them there is."""
    head, e = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_E)[None, :]
    return head * E + e, (head < num_heads) & (e < E // 2)


@triton.jit
def _load(ptr, at, inside, E: tl.constexpr):
    """Both halves of heads, float32."""
    a = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(ptr + at + E // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turn(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _store(ptr, a, b, at, inside, E: tl.constexpr):
    tl.store(ptr + at, a.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + at + E // 2, b.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    tiles_ptr,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0)
    token = row.to(tl.int64)
    qkv_ptr += token * (H + 2 * G) * E
    cos, sin = _angles(cos_ptr, sin_ptr, row % T, E, BLOCK_E)
    at, of_q = _first_halves(H, E, BLOCK_H, BLOCK_E)
    q_a, q_b = _load(qkv_ptr, at, of_q, E)
    a, b = _turn(q_a, q_b, cos, sin)
    _store(q_ptr + token * H * E, a, b, at, of_q, E)
    at, inside = _first_halves(G, E, BLOCK_G, BLOCK_E)
    k_a, k_b = _load(qkv_ptr + H * E, at, inside, E)
    a, b = _turn(k_a, k_b, cos, sin)
    _store(k_ptr + token * G * E, a, b, at, inside, E)
    if STEP:
        look_if_wanted(q_a, q_b, of_q, H * E, row, 0, 3, T, tiles_ptr, FIRST, STEP, TWO=True)
        look_if_wanted(k_a, k_b, inside, G * E, row, 1, 3, T, tiles_ptr, FIRST, STEP, TWO=True)
        _, seen = _first_halves(tl.where(looked_at(row, T, FIRST, STEP), G, 0), E, BLOCK_G, BLOCK_E)
        v_a, v_b = _load(qkv_ptr + (H + G) * E, at, seen, E)
        look_if_wanted(v_a, v_b, seen, G * E, row, 2, 3, T, tiles_ptr, FIRST, STEP, TWO=True)


@triton.jit
def _turn_back(
    from_ptr,
    y_ptr,
    to_ptr,
    cos,
    sin,
    wanted,
    terms,
    d_kappa,
    num_heads,
    TURN: tl.constexpr,
    STEP: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradient of some of a token's heads, with kurtosis' added if ``wanted``: without a branch, to load early."""
    at, inside = _first_halves(num_heads, E, BLOCK, BLOCK_E)
    a, b = _load(from_ptr, at, inside, E)
    if TURN:
        a, b = _turn(a, b, cos, -sin)
    if STEP:
        _, seen = _first_halves(tl.where(wanted, num_heads, 0), E, BLOCK, BLOCK_E)
        first, second = _load(y_ptr, at, seen, E)
        a += tl.where(wanted, row_gradient(first, terms, d_kappa), 0.0)
        b += tl.where(wanted, row_gradient(second, terms, d_kappa), 0.0)
    _store(to_ptr, a, b, at, inside, E)


@triton.jit
def _backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    terms_ptr,
    d_kappa_ptr,
    d_qkv_ptr,
    num_looked_at,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, N = tl.program_id(0), (H + 2 * G) * E
    token = row.to(tl.int64)
    cos, sin = _angles(cos_ptr, sin_ptr, row % T, E, BLOCK_E)
    wanted, terms, d_kappa = False, (0.0, 0.0, 0.0, 0.0), 0.0
    if STEP:
        _, wanted, terms = terms_of(row, tl.num_programs(0), T, terms_ptr, FIRST, STEP)
        d_kappa = share_of(d_kappa_ptr, num_looked_at)
    y_ptr, to_ptr = qkv_ptr + token * N, d_qkv_ptr + token * N
    looks = (wanted, terms, d_kappa)
    _turn_back(dq_ptr + token * H * E, y_ptr, to_ptr, cos, sin, *looks, H, True, STEP, E, BLOCK_H, BLOCK_E)
    y_ptr, to_ptr = y_ptr + H * E, to_ptr + H * E
    _turn_back(dk_ptr + token * G * E, y_ptr, to_ptr, cos, sin, *looks, G, True, STEP, E, BLOCK_G, BLOCK_E)
    y_ptr, to_ptr = y_ptr + G * E, to_ptr + G * E
    _turn_back(dv_ptr + token * G * E, y_ptr, to_ptr, cos, sin, *looks, G, False, STEP, E, BLOCK_G, BLOCK_E)


def _sizes(num_heads: int, num_groups: int, width: int) -> dict[str, int]:
    """Of the blocks; 4 elements of either half of q a thread."""
    blocks = [triton.next_power_of_2(size) for size in (num_heads, num_groups, width // 2)]
    num_warps = max(1, min(8, blocks[0] * blocks[2] // 128))
    return dict(zip(("BLOCK_H", "BLOCK_G", "BLOCK_E"), blocks, strict=True)) | {"num_warps": num_warps}


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_groups: int, first: int, step: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [..., T, H, E] and k [..., T, G, E], turned, of qkv [..., T, (H + 2G) E], in its dtype.

    And of qkv κ̄ and its terms, as :func:`.kurtosis.joined`.
    """
    width = cos.shape[-1]
    q, k = (qkv.new_empty((*qkv.shape[:-1], heads, width)) for heads in (num_heads, num_groups))
    tiles = empty_tiles(qkv, 3, first, step)
    if qkv.numel():
        visible(_forward_kernel)[(qkv.numel() // qkv.shape[-1],)](
            qkv,
            cos,
            sin,
            q,
            k,
            tiles,
            qkv.shape[-2],
            num_heads,
            num_groups,
            width,
            first,
            step,
            **_sizes(num_heads, num_groups, width),
        )
    return q, k, *joined(tiles, qkv.shape[-1], eps)


def rotate_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    terms: Tensor,
    d_kappa: Tensor,
    first: int,
    step: int,
) -> Tensor:
    """The gradient of qkv, in its dtype, of those of q [..., T, H, E], k and v [..., T, G, E]; d_kappa one value."""
    d_qkv = torch.empty_like(qkv)
    num_heads, num_groups, width = dq.shape[-2], dk.shape[-2], cos.shape[-1]
    if qkv.numel():
        visible(_backward_kernel)[(qkv.numel() // qkv.shape[-1],)](
            dq,
            dk,
            dv,
            qkv,
            cos,
            sin,
            terms,
            d_kappa,
            d_qkv,
            terms.shape[0],
            qkv.shape[-2],
            num_heads,
            num_groups,
            width,
            first,
            step,
            **_sizes(num_heads, num_groups, width),
        )
    return d_qkv
