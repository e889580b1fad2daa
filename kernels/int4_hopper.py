"""The prefill product of :mod:`.int4_linear` for sm_90, in Gluon: TMA, a ring of buffers, a `wgmma` that hardly idles.

What Triton cannot be told: after a `wgmma` whose left operand is in registers it waits at once, so the tensor cores
stand still while the next weights are unpacked. Gluon, Triton's lower level, leaves the order to us:

    wgmma of step i starts → wait for step i − 1 → its buffer is refilled (TMA) → weights of step i + 1 are unpacked

so there is always a step under way. One step is BLOCK_K packed bytes a row: 2 · BLOCK_K columns, a product for each
nibble. Steps are unrolled over two turns of the ring, which makes buffers and barrier phases constants. Only between
such rounds nothing is under way: unpacked int8 carried around the loop would be split into bytes (230 instructions).
BLOCK_K = 64 is what registers allow; with 128, ptxas gives up the overlap (C7512).

Programs are persistent: each walks over tiles, and the steps of all its tiles are one sequence to the ring, so the
first steps of the next tile arrive while the epilogue of the last one runs. With four warps a tile, two programs have
room on a multiprocessor, and one multiplies while the other is in its epilogue.

TMA fills whatever lies outside a tensor with zeros, so tails need no masks: a step past P multiplies zero weights.

The tile is y^T = W · A^T, BLOCK_N outputs × BLOCK_M tokens. 128 × 128 moves 24 KiB from L2 a step of 128 · 128 · 128
products, where an int8 GEMM of that tile moves 32.

Needs 16-byte rows: K and P multiples of 16. One weight scale a channel. Everything else as :mod:`.int4_linear`.
"""

import torch
from lit_actreg_kernels.int4_tile import Tile
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Gluon is experimental and renames things: Triton 3.6 and the releases after it are both served.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

if hasattr(mbarrier, "allocate_mbarrier"):

    @gluon.jit
    def allocate_barriers(NUM: gl.constexpr):
        return mbarrier.allocate_mbarrier(batch=NUM)

else:

    @gluon.jit
    def allocate_barriers(NUM: gl.constexpr):
        return gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())


@gluon.jit
def times_16_low(packed):
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
        "=r,r",
        [packed],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def times_16_high(packed):
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=gl.int8, is_pure=True, pack=4
    )


@gluon.jit
def _fetch(codes_desc, packed_desc, codes_smem, packed_smem, filled, step, stage, wanted, m, n, P):
    """Starts the copies of one step, if wanted; ``filled`` flips when all three have landed."""
    BLOCK_K: gl.constexpr = packed_desc.block_type.shape[1]
    barrier = filled.index(stage)
    mbarrier.expect(barrier, packed_desc.block_type.nbytes + 2 * codes_desc.block_type.nbytes, pred=wanted)
    j = step * BLOCK_K
    tma_load(packed_desc, [n, j], barrier, packed_smem.index(stage), pred=wanted)
    tma_load(codes_desc, [m, j], barrier, codes_smem.index(2 * stage), pred=wanted)
    tma_load(codes_desc, [m, P + j], barrier, codes_smem.index(2 * stage + 1), pred=wanted)


@gluon.jit
def _unpack(packed_smem, filled, stage, phase, OPERAND: gl.constexpr):
    mbarrier.wait(filled.index(stage), phase)
    packed = packed_smem.index(stage).load(OPERAND)
    return times_16_low(packed), times_16_high(packed)


@gluon.jit
def _place(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First token and first output of a tile: GROUP_M rows of tiles go through all outputs together, for L2."""
    num_m, num_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * num_n) * GROUP_M
    rows = gl.maximum(gl.minimum(num_m - first_m, GROUP_M), 1)  # a tile past the last is never computed
    within = tile % (GROUP_M * num_n)
    return (first_m + within % rows) * BLOCK_M, (within // rows) * BLOCK_N


@gluon.jit
def _halves(acc):
    """The left and the right half of acc's columns; every thread keeps its own."""
    return gl.split(acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute((0, 2, 1)))


@gluon.jit
def allocate_staging(
    DTYPE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, ROW: gl.constexpr
):
    """Where outputs change hands, ROW bytes each of BLOCK_N or less; in float32 where a residual is to come."""
    STAGED: gl.constexpr = gl.float32 if HAS_RESIDUAL else DTYPE
    BITS: gl.constexpr = STAGED.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(128 // BITS, 1, 8, [0, 1])
    return gl.allocate_shared_memory(STAGED, [BLOCK_N, min(BLOCK_M, ROW * 8 // BITS)], LAYOUT)


@gluon.jit
def load_outputs(
    n0,
    N,
    pointers,
    PER_TOKEN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ACC: gl.constexpr,
):
    """What the epilogue wants of a tile's outputs [BLOCK_N]: s_w / 16, 16 Σ w and b; times s_x and z_x if static."""
    _, act_scale_ptr, act_zero_point_ptr, weight_scale_ptr, weight_sums_ptr, bias_ptr, _ = pointers
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ACC))
    scale = gl.load(weight_scale_ptr + n, mask=n < N, other=0.0) * 0.0625
    sums = gl.load(weight_sums_ptr + n, mask=n < N, other=0).to(gl.float32) * 16.0
    bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32) if HAS_BIAS else scale
    if not PER_TOKEN:
        scale *= gl.load(act_scale_ptr)
        sums *= gl.load(act_zero_point_ptr)
    return scale, sums, bias


@gluon.jit
def finish(
    acc,
    m0,
    n0,
    outputs,
    pointers,
    M,
    N,
    staging,
    PER_TOKEN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The epilogue of 16-fold int32 sums acc [BLOCK_N, BLOCK_M]: scales, bias, residual; writes y.

    Outputs are contiguous along N, unlike a thread's sums, and change hands in ``staging``; what does not fit there is
    done half by half.
    """
    if acc.shape[1] > staging.shape[1]:
        left, right = _halves(acc)
        HALF: gl.constexpr = acc.shape[1] // 2
        finish(left, m0, n0, outputs, pointers, M, N, staging, PER_TOKEN, HAS_BIAS, HAS_RESIDUAL, num_warps)
        finish(right, m0 + HALF, n0, outputs, pointers, M, N, staging, PER_TOKEN, HAS_BIAS, HAS_RESIDUAL, num_warps)
    else:
        y_ptr, act_scale_ptr, act_zero_point_ptr, _, _, _, residual_ptr = pointers
        ACC: gl.constexpr = acc.type.layout
        ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
        scale, sums, bias = outputs
        scale = gl.convert_layout(scale, ROWS, assert_trivial=True)[:, None]
        sums = gl.convert_layout(sums, ROWS, assert_trivial=True)[:, None]
        if PER_TOKEN:
            m = m0 + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, ACC))
            zero_point = gl.load(act_zero_point_ptr + m, mask=m < M, other=0.0)[None, :]
            act_scale = gl.load(act_scale_ptr + m, mask=m < M, other=0.0)[None, :]
            y = scale * (acc.to(gl.float32) - zero_point * sums) * act_scale
        else:
            y = scale * (acc.to(gl.float32) - sums)
        if HAS_BIAS:
            y += gl.convert_layout(bias, ROWS, assert_trivial=True)[:, None]
        staging.store(y.to(staging.dtype))
        # Eight outputs a thread, so that bfloat16 leaves in 16-byte stores.
        LANES: gl.constexpr = min(acc.shape[0] // 8, 32)
        STORE: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, num_warps], [0, 1])
        y = staging.load(STORE)
        m = m0 + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, STORE))
        n = n0 + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, STORE))
        offsets = m.to(gl.int64)[None, :] * N + n[:, None]
        inside = (m < M)[None, :] & (n < N)[:, None]
        if HAS_RESIDUAL:
            y += gl.load(residual_ptr + offsets, mask=inside, other=0.0).to(gl.float32)
        gl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _kernel(
    codes_desc,
    packed_desc,
    y_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    P,
    PER_TOKEN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    BLOCK_N: gl.constexpr = packed_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = packed_desc.block_type.shape[1]
    BLOCK_M: gl.constexpr = codes_desc.block_type.shape[0]
    UNROLL: gl.constexpr = 2 * STAGES
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_M, 32]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=4)

    num_tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    m0, n0 = _place(gl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)

    packed_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N, BLOCK_K], packed_desc.layout)
    codes_smem = gl.allocate_shared_memory(gl.int8, [2 * STAGES, BLOCK_M, BLOCK_K], codes_desc.layout)
    staging = allocate_staging(y_ptr.dtype.element_ty, HAS_RESIDUAL, BLOCK_N, BLOCK_M, 128)
    pointers = (y_ptr, act_scale_ptr, act_zero_point_ptr, weight_scale_ptr, weight_sums_ptr, bias_ptr, residual_ptr)
    filled = allocate_barriers(STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
    fence_async_shared()

    num_steps = UNROLL * gl.cdiv(P, UNROLL * BLOCK_K)
    for stage in gl.static_range(STAGES - 1):
        _fetch(codes_desc, packed_desc, codes_smem, packed_smem, filled, stage, stage, True, m0, n0, P)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        next_tile = tile + gl.num_programs(0)
        m_next, n_next = _place(next_tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        outputs = load_outputs(n0, N, pointers, PER_TOKEN, HAS_BIAS, BLOCK_N, ACC)
        acc = gl.zeros((BLOCK_N, BLOCK_M), gl.int32, ACC)
        for base in range(0, num_steps, UNROLL):
            low, high = _unpack(packed_smem, filled, 0, 0, OPERAND)
            for i in gl.static_range(UNROLL):
                low_codes = codes_smem.index(2 * (i % STAGES)).permute((1, 0))
                high_codes = codes_smem.index(2 * (i % STAGES) + 1).permute((1, 0))
                acc = warpgroup_mma(low, low_codes, acc, is_async=True)
                acc = warpgroup_mma(high, high_codes, acc, is_async=True)
                if i > 0:
                    acc = warpgroup_mma_wait(2, deps=[acc])  # the two of the step before are done
                # Past the tile's end the next tile's first steps follow: they arrive during the epilogue.
                ahead = base + i + STAGES - 1
                over = ahead >= num_steps
                _fetch(
                    codes_desc,
                    packed_desc,
                    codes_smem,
                    packed_smem,
                    filled,
                    gl.where(over, ahead - num_steps, ahead),
                    (i + STAGES - 1) % STAGES,
                    (ahead < num_steps) | (next_tile < num_tiles),
                    gl.where(over, m_next, m0),
                    gl.where(over, n_next, n0),
                    P,
                )
                if i + 1 < UNROLL:
                    low, high = _unpack(packed_smem, filled, (i + 1) % STAGES, (i + 1) // STAGES % 2, OPERAND)
            acc = warpgroup_mma_wait(0, deps=[acc])
        finish(acc, m0, n0, outputs, pointers, M, N, staging, PER_TOKEN, HAS_BIAS, HAS_RESIDUAL, num_warps)
        m0, n0 = m_next, n_next
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(filled.index(stage))


def operand_layout(block_k: int) -> gl.NVMMASharedLayout:
    """Shared-memory layout of both operands: rows of block_k bytes, swizzled by as many, or by 128."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(block_k, 128), element_bitwidth=8, rank=2)


def serves(codes: Tensor, packed: Tensor) -> bool:
    """Whether TMA can read these tensors: int8 codes and rows of 16 bytes, at addresses of 16."""
    aligned = all(t.data_ptr() % 16 == 0 and t.shape[1] % 16 == 0 for t in (codes, packed))
    return codes.dtype == torch.int8 and aligned


def int4_prefill(
    codes: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    tile: Tile,
) -> None:
    """Writes y [M, N]. See :func:`.int4_linear.int4_linear`."""
    assert tile.split_k == 1, "K of this kernel is not split"
    (num_tokens, num_outputs), num_bytes = y.shape, packed.shape[1]
    layout = operand_layout(tile.block_k)
    num_tiles = -(-num_tokens // tile.block_m) * -(-num_outputs // tile.block_n)
    # Two warp groups take all registers of a multiprocessor: one program of eight warps, or two of four.
    num_sms = torch.cuda.get_device_properties(codes.device).multi_processor_count
    programs = min(num_tiles, num_sms * max(1, 8 // tile.num_warps))
    _kernel[(programs,)](
        TensorDescriptor.from_tensor(codes, [tile.block_m, tile.block_k], layout),
        TensorDescriptor.from_tensor(packed, [tile.block_n, tile.block_k], layout),
        y,
        act_scale,
        act_zero_point,
        weight_scale,
        weight_sums,
        bias,
        residual,
        num_tokens,
        num_outputs,
        num_bytes,
        PER_TOKEN=act_scale.numel() > 1,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        STAGES=tile.num_stages,
        GROUP_M=8,
        num_warps=tile.num_warps,
    )
