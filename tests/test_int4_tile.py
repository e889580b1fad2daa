"""Unpacking against arithmetic on integers, for every byte there is."""

import torch
import triton
import triton.language as tl
from lit_actreg_kernels.int4_tile import INTERPRETED, times_16_high, times_16_low

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def unpack_all(packed_ptr, low_ptr, high_ptr, ASM: tl.constexpr):
    i = tl.arange(0, 256)
    packed = tl.load(packed_ptr + i)
    tl.store(low_ptr + i, times_16_low(packed, ASM))
    tl.store(high_ptr + i, times_16_high(packed))


def test_nibbles_come_out_whole():
    packed = torch.arange(256, dtype=torch.uint8)
    found = [torch.full((256,), 99, dtype=torch.int8, device=DEVICE) for _ in range(2)]
    unpack_all[(1,)](packed.to(DEVICE), *found, ASM=not INTERPRETED)
    nibbles = [(nibble + 8) % 16 - 8 for nibble in (packed.int() % 16, packed.int() // 16)]
    for nibble, times_16 in zip(nibbles, found, strict=True):
        assert torch.equal(times_16.cpu().int(), 16 * nibble)
