"""Cross-entropy of logits and its gradient, which takes their place: one pass for training.

    loss = log Σ exp(l) − l_t          ∂loss/∂l = softmax(l) − e_t            t the target; an ignored row has 0 and 0

A row is read once from memory and written once: 4 bytes a bfloat16 logit. A compiler's code moves 6: it reads the row
for its largest and its sum, and reads and writes it in the backward pass. Here the gradient of each row's own loss is
made before anybody knows that of the mean, which is one number: it is applied to what the gradient is multiplied with
(:mod:`.linear_cross_entropy`). Up to 16,384 logits a row stays in registers; a longer one is read a second time, from
L2 if it is not much longer. Rows of several programs must be on their way at once, so a program keeps the logits as
they are stored and makes every exponential twice.

One program a row. logits contiguous [R, V], of any float dtype but float64; targets int64 [R], one that is no index
gives NaN. No autograd in here.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.fake_quant import visible
from torch import Tensor

_MAX_BLOCK = 16384
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(row_ptr, v, V):
    return tl.load(row_ptr + v, mask=v < V, other=float("-inf"))


@triton.jit
def _store_gradient(row_ptr, v, V, logits, largest, log2_total, target, counts):
    softmax = tl.exp2((logits.to(tl.float32) - largest) * _LOG2_E - log2_total)
    gradient = tl.where(counts, softmax - tl.where(v == target, 1.0, 0.0), 0.0)
    tl.store(row_ptr + v, gradient.to(row_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    V,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row_ptr, target = logits_ptr + row * V, tl.load(targets_ptr + row)
    counts, valid = target != IGNORED, (target >= 0) & (target < V)
    target = tl.where(valid, target, 0).to(tl.int32)
    of_target = tl.load(row_ptr + target).to(tl.float32)
    if ONE_BLOCK:
        logits = _load(row_ptr, v, V)
        largest = tl.max(logits, 0).to(tl.float32)
        total = tl.sum(tl.exp2((logits.to(tl.float32) - largest) * _LOG2_E), 0)
    else:
        largest, total = -3.4028234663852886e38, 0.0  # not −∞: a chunk may have nothing else
        for start in range(0, V, BLOCK):
            chunk = _load(row_ptr, start + v, V).to(tl.float32)
            before, largest = largest, tl.maximum(largest, tl.max(chunk, 0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp2((chunk - largest) * _LOG2_E), 0)
    loss = tl.where(valid, largest + tl.log(total) - of_target, float("nan"))
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        log2_total = tl.log2(total)
        if ONE_BLOCK:
            _store_gradient(row_ptr, v, V, logits, largest, log2_total, target, counts)
        else:
            for start in range(0, V, BLOCK):
                chunk = _load(row_ptr, start + v, V)
                _store_gradient(row_ptr, start + v, V, chunk, largest, log2_total, target, counts)


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int, gradient: bool) -> Tensor:
    """Every row's loss, float32 [R]; and if ``gradient``, that loss's gradient in the place of the logits."""
    num_rows, num_logits = logits.shape
    loss = logits.new_empty(num_rows, dtype=torch.float32)
    if loss.numel():
        width = triton.next_power_of_2(num_logits)
        block = min(width, _MAX_BLOCK)
        visible(_kernel)[(num_rows,)](
            logits,
            targets,
            loss,
            num_logits,
            ignored,
            gradient,
            ONE_BLOCK=block == width,
            BLOCK=block,
            num_warps=max(4, block // 2048) if block == width else 16,
        )
    return loss
