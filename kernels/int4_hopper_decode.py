"""The product of 2 to 64 tokens for sm_90, in Gluon: weights are on their way before anybody knows the codes.

    y_mn = s_x · s_w · (Σ_k a_mk w_nk − z_x · Σ_k w_nk) + b_n + r_mn                        (:mod:`.reference`)

Reading the weights is all the time there should be. So a program is a dependent launch (:mod:`.dependent_launch`): it
asks by TMA for as many steps of its weights as its ring of buffers holds, and only then waits for the kernel that makes
the codes, a quantizer or a norm with one. Codes follow through the same ring. A step is BLOCK_K packed bytes a row, a
product for each nibble; a barrier in shared memory flips when the step's weights and codes have both landed.

The tile is y^T = W · A^T, 64 outputs (what `wgmma` multiplies at least) × BLOCK_M ≥ M tokens. Where that makes few
programs K is split; int32 partial sums meet as in :func:`.int4_tile.sum_splits`.

Needs what :mod:`.int4_hopper` needs: K and P multiples of 16, one weight scale a channel.
"""

import torch
from lit_actreg_kernels.int4_hopper import (
    allocate_barriers,
    allocate_staging,
    finish,
    load_outputs,
    operand_layout,
    thread_barrier,
    times_16_high,
    times_16_low,
    tma_load,
)
from lit_actreg_kernels.int4_tile import Tile, tickets_of
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def _wait_for_previous_kernel():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _let_next_kernel_start():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _fetch_weights(codes_desc, packed_desc, packed_smem, filled, step, stage, wanted, n):
    """Starts the copy of a step's weights, if wanted; ``filled`` flips when its codes have landed as well."""
    num_bytes: gl.constexpr = packed_desc.block_type.nbytes + 2 * codes_desc.block_type.nbytes
    mbarrier.expect(filled.index(stage), num_bytes, pred=wanted)
    j = step * packed_desc.block_type.shape[1]
    tma_load(packed_desc, [n, j], filled.index(stage), packed_smem.index(stage), pred=wanted)


@gluon.jit
def _fetch_codes(codes_desc, codes_smem, filled, step, stage, wanted, P):
    j = step * codes_desc.block_type.shape[1]
    tma_load(codes_desc, [0, j], filled.index(stage), codes_smem.index(2 * stage), pred=wanted)
    tma_load(codes_desc, [0, P + j], filled.index(stage), codes_smem.index(2 * stage + 1), pred=wanted)


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
    partial_ptr,
    ticket_ptr,
    M,
    N,
    P,
    PER_TOKEN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    BLOCK_N: gl.constexpr = packed_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = packed_desc.block_type.shape[1]
    BLOCK_M: gl.constexpr = codes_desc.block_type.shape[0]
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_M, 32]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=4)

    tile, split = gl.program_id(0) // SPLIT_K, gl.program_id(0) % SPLIT_K
    n0 = tile * BLOCK_N
    num_steps = gl.cdiv(P, BLOCK_K)
    first = split * gl.cdiv(num_steps, SPLIT_K)
    count = gl.minimum(gl.cdiv(num_steps, SPLIT_K), num_steps - first)

    packed_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N, BLOCK_K], packed_desc.layout)
    codes_smem = gl.allocate_shared_memory(gl.int8, [2 * STAGES, BLOCK_M, BLOCK_K], codes_desc.layout)
    staging = allocate_staging(y_ptr.dtype.element_ty, HAS_RESIDUAL, BLOCK_N, BLOCK_M, 256)
    filled = allocate_barriers(STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
    fence_async_shared()

    for i in gl.static_range(STAGES):
        _fetch_weights(codes_desc, packed_desc, packed_smem, filled, first + i, i, i < count, n0)
    pointers = (y_ptr, act_scale_ptr, act_zero_point_ptr, weight_scale_ptr, weight_sums_ptr, bias_ptr, residual_ptr)
    outputs = load_outputs(n0, N, pointers, PER_TOKEN, HAS_BIAS, BLOCK_N, ACC)
    _wait_for_previous_kernel()
    for i in gl.static_range(STAGES):
        _fetch_codes(codes_desc, codes_smem, filled, first + i, i, i < count, P)

    acc = gl.zeros((BLOCK_N, BLOCK_M), gl.int32, ACC)
    for step in range(count):
        if step == gl.maximum(count - STAGES, 0):  # the last weights have been asked for
            _let_next_kernel_start()
        buffer = step % STAGES
        mbarrier.wait(filled.index(buffer), step // STAGES % 2)
        packed = packed_smem.index(buffer).load(OPERAND)
        low_codes = codes_smem.index(2 * buffer).permute((1, 0))
        high_codes = codes_smem.index(2 * buffer + 1).permute((1, 0))
        acc = warpgroup_mma(times_16_low(packed), low_codes, acc, is_async=True)
        acc = warpgroup_mma(times_16_high(packed), high_codes, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        wanted = step + STAGES < count
        _fetch_weights(codes_desc, packed_desc, packed_smem, filled, first + step + STAGES, buffer, wanted, n0)
        _fetch_codes(codes_desc, codes_smem, filled, first + step + STAGES, buffer, wanted, P)
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(filled.index(stage))

    last = True
    if SPLIT_K > 1:
        m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
        row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ACC))
        partial_ptrs = partial_ptr + tile * SPLIT_K * BLOCK_N * BLOCK_M + (row * BLOCK_M)[:, None] + m[None, :]
        gl.store(partial_ptrs + split * BLOCK_N * BLOCK_M, acc)
        # Every thread has stored before one of them takes the tile's ticket, and that publishes what all have stored.
        thread_barrier()
        last = gl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        if SPLIT_K > 1:
            gl.store(ticket_ptr + tile, 0)  # for the next launch
            acc = gl.zeros((BLOCK_N, BLOCK_M), gl.int32, ACC)
            for part in gl.static_range(SPLIT_K):
                acc += gl.load(partial_ptrs + part * BLOCK_N * BLOCK_M, cache_modifier=".cg")
        finish(acc, 0, n0, outputs, pointers, M, N, staging, PER_TOKEN, HAS_BIAS, HAS_RESIDUAL, num_warps)


def int4_decode(
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
    """Writes y [M, N], M up to the tile's block_m. See :func:`.int4_linear.int4_linear`."""
    (num_tokens, num_outputs), num_tiles = y.shape, -(-y.shape[1] // tile.block_n)
    assert num_tokens <= tile.block_m, "a tile has all tokens"
    layout, splits = operand_layout(tile.block_k), tile.split_k > 1
    tickets = tickets_of(codes.device) if splits else None
    assert tickets is None or num_tiles <= tickets.numel(), "split K of few tiles only"
    _kernel[(num_tiles * tile.split_k,)](
        TensorDescriptor.from_tensor(codes, [tile.block_m, tile.block_k], layout),
        TensorDescriptor.from_tensor(packed, [tile.block_n, tile.block_k], layout),
        y,
        act_scale,
        act_zero_point,
        weight_scale,
        weight_sums,
        bias,
        residual,
        y.new_empty(num_tiles * tile.split_k * tile.block_n * tile.block_m, dtype=torch.int32) if splits else None,
        tickets,
        num_tokens,
        num_outputs,
        packed.shape[1],
        PER_TOKEN=act_scale.dim() > 1,  # of one token, too: its grid is not to be read before the wait
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        SPLIT_K=tile.split_k,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        launch_pdl=True,
    )
