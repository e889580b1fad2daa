"""Unpacking against arithmetic on integers, for every byte there is."""

import pytest
import torch
import triton
import triton.language as tl
from lit_actreg_kernels.int4_tile import INTERPRETED, times_16, times_16_high, times_16_low

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def unpack_all(packed_ptr, low_ptr, high_ptr, chosen_ptr, SHIFT: tl.constexpr, ASM: tl.constexpr):
    i = tl.arange(0, 256)
    packed = tl.load(packed_ptr + i)
    tl.store(low_ptr + i, times_16_low(packed, ASM))
    tl.store(high_ptr + i, times_16_high(packed))
    tl.store(chosen_ptr + i, times_16(packed, tl.full((256,), SHIFT, tl.uint8), ASM))


@pytest.mark.parametrize("shift", [0, 4])
def test_nibbles_come_out_sixteenfold_with_their_sign(shift):
    packed = torch.arange(256, dtype=torch.uint8)
    found = [torch.full((256,), 99, dtype=torch.int8, device=DEVICE) for _ in range(3)]
    unpack_all[(1,)](packed.to(DEVICE), *found, SHIFT=shift, ASM=not INTERPRETED)
    low, high = (((nibble + 8) % 16 - 8) * 16 for nibble in (packed.int() % 16, packed.int() // 16))
    expected = (low, high, low if shift else high)
    for values, right in zip(found, expected, strict=True):
        assert torch.equal(values.cpu().int(), right)
