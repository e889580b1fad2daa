"""The fused activation functions and quantizer against the same two steps in plain PyTorch."""

import pytest
import torch
from lit_actreg_kernels import gelu_quant, reference
from quantizer_checks import DTYPES, assert_codes_match, on_device, static_grid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(5, 6), (5, 1030), (70, 134)])
def test_gelu_and_swiglu(dtype, tokens, columns):
    x = (torch.randn(tokens, columns) * 3).to(dtype)
    grid = static_grid(0.21, -5.0)
    # |y| < 16 · 16; erf and exp are good to a few float32 roundings, and then y is rounded to x's dtype.
    tolerance = 256 * max(8 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps) / 0.21
    gate, up = x.float().chunk(2, dim=-1)
    cases = [
        (gelu_quant.gelu_quantize, reference.gelu_quantize, torch.nn.functional.gelu(x.float())),
        (gelu_quant.swiglu_quantize, reference.swiglu_quantize, torch.nn.functional.silu(gate) * up),
    ]
    for kernel, plain, y in cases:
        codes = kernel(*on_device(x, *grid), 4)
        assert_codes_match(codes, plain(x, *grid, 4), y / grid[0] + grid[1], tolerance)
