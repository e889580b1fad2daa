"""Programmatic dependent launch (sm_90): a kernel that starts while the one before it in the stream still runs.

It may ask at once for what a running model never writes, weights above all. Then it waits (`griddepcontrol.wait`) until
the kernel before has ended and its writes are seen. A kernel lets the next one start early by
`griddepcontrol.launch_dependents`: a quantizer, which has nothing to ask for, before its own wait, so that the product
behind it fetches weights meanwhile; a product after it, so that no third kernel takes registers, and, if it is
:mod:`.int4_hopper_decode`, when it has asked for all its weights, so that they come before the next product's.

Two rules keep a chain of such kernels right:

- Every program waits before it reads what another kernel wrote, and before it writes anything. So a kernel ends after
  the one before it, and to wait for the last one is to wait for all; a buffer that is used again is safe.
- Weights, their scales and sums, biases, norms and a layer's grids may be read before the wait. Whoever writes such a
  tensor synchronizes before the product is launched, be it right behind or behind a quantizer.

It is used up to 64 tokens, where the latency of a launch and of a kernel's first loads is a good part of the time.
"""

import functools

import torch
from lit_actreg_kernels.int4_tile import INTERPRETED

MAX_TOKENS = 64


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels of few tokens use it on this device: on sm_90, where it was measured."""
    return device.type == "cuda" and not INTERPRETED and torch.cuda.get_device_capability(device) == (9, 0)


def launch_options(device: torch.device, num_tokens: int) -> dict[str, bool]:
    """What a quantizer of so many tokens, which has an argument DEPENDENT, is launched with."""
    dependent = num_tokens <= MAX_TOKENS and has_dependent_launch(device)
    return {"DEPENDENT": dependent, **({"launch_pdl": True} if dependent else {})}
