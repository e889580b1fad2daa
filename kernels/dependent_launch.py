"""Programmatic dependent launch: a kernel starts while the one before it ends, and fetches its weights meanwhile.

A decode step is a chain of kernels of a few microseconds, and between two of them the GPU idles for about one: the last
program has to end, its writes to be flushed, the next grid to be sent out and its first bytes to come from memory. On
sm_90 and later a kernel launched with `launch_pdl=True` (CUDA's programmatic stream serialization) may be sent out as
soon as every program of the kernel before it has executed `griddepcontrol.launch_dependents` or ended;
`griddepcontrol.wait` then blocks until that kernel has ended and its writes are visible (PTX ISA 9.7.13.13; CUDA
Programming Guide, "Programmatic Dependent Launch"). CUDA graphs keep such edges.

Our kernels all begin alike:

    launch_dependents()      the next kernel of the stream may come, too
    prefetch_rows(...)       a linear layer's weights are asked for: they do not depend on the kernel before
    wait_for_inputs()        now that one has ended, and the one before it, which it waited for itself

**What keeps it right.** No tensor is read or written before the wait. The prefetch is only a hint to L2, where all
processors see one memory, so weights that the kernel before has just written are read right as well. Every kernel that
lets others start early also waits itself, so that a wait covers all that came before. A kernel that takes no part, as
any of PyTorch's, starts when the one before it has ended, as ever.

Without PDL (older GPUs, the interpreter, LIT_ACTREG_PDL=0 in the environment) the helpers are empty.
"""

import functools
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# A prefetch is for one sector, the smallest piece of an L2 line. (The bulk prefetch of sm_90 takes whole rows, but its
# address is uniform, and ptxas makes a loop over the lanes of it.)
SECTOR_BYTES = 32


@functools.cache
def supports_dependent_launch(device: torch.device) -> bool:
    """Whether kernels on this device are launched so: sm_90 and later, compiled, not switched off."""
    if INTERPRETED or device.type != "cuda" or os.environ.get("LIT_ACTREG_PDL") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Lets the next kernel of the stream start, once every program of this one came here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Blocks until the kernel before has ended; all loads and stores come after it."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_rows(row_ptrs, num_bytes, inside, SECTORS: tl.constexpr):
    """Asks L2 for the first SECTORS · 32 bytes of each row, or for as many as it has.

    Args:
        row_ptrs: [ROWS] pointers.
        num_bytes: Length of a row.
        inside: [ROWS], which rows exist.
        SECTORS: Power of two.
    """
    first = tl.arange(0, SECTORS) * 32
    wanted = (inside[:, None] & (first < num_bytes)[None, :]).to(tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [row_ptrs.to(tl.int64)[:, None] + first[None, :], wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
