"""Cross-entropy of logits and its gradient, which takes their place: one pass for training.

    loss = log Σ exp(l) − l_t          ∂loss/∂l = softmax(l) − e_t            t the target; an ignored row has 0 and 0

A row is read once, stays in registers, and is written once: 4 bytes a bfloat16 logit. A compiler's code reads it twice
forward (once for the largest and the sum), and reads and writes it backward: 8 bytes, and both the logits and their
gradient are in memory. Here the gradient of each row's own loss is made before anybody knows that of the mean, which is
one number: it is applied to what the gradient is multiplied with (:mod:`.training_ops`).

One program a row. logits contiguous [R, V], of any float dtype but float64; V ≤ 65,536; targets int64 [R]. No autograd
in here.
"""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.fake_quant import visible
from torch import Tensor


@triton.jit
def _kernel(logits_ptr, targets_ptr, loss_ptr, V, IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    counts = target != IGNORED
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    of_target = tl.load(logits_ptr + row * V + target, mask=counts, other=0.0).to(tl.float32)
    largest = tl.max(logits, 0)
    exponentials = tl.exp(logits - largest)
    total = tl.sum(exponentials, 0)
    tl.store(loss_ptr + row, tl.where(counts, largest + tl.log(total) - of_target, 0.0))
    if GRADIENT:
        gradient = tl.where(counts, exponentials / total - tl.where(v == target, 1.0, 0.0), 0.0)
        tl.store(logits_ptr + row * V + v, gradient.to(logits_ptr.dtype.element_ty), mask=v < V)


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int, gradient: bool) -> Tensor:
    """Every row's loss, float32 [R]; and if ``gradient``, that loss's gradient in the place of the logits."""
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    if loss.numel():
        block = triton.next_power_of_2(logits.shape[1])
        num_warps = max(4, min(16, block // 1024))
        visible(_kernel)[(len(logits),)](
            logits, targets, loss, logits.shape[1], ignored, gradient, BLOCK=block, num_warps=num_warps
        )
    return loss
