"""The fused norm and quantizer against the same two steps in plain PyTorch."""

import pytest
import torch
from lit_actreg_kernels import norm_quant, reference
from quantizer_checks import DTYPES, assert_codes_match, on_device, static_grid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rms", "bias"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("columns", [48, 131])
def test_norm(dtype, rms, bias, columns):
    x = (torch.randn(9, columns) * 2 + 0.5).to(dtype)
    weight = (torch.rand(columns) + 0.5).to(dtype)
    offset = torch.randn(columns).to(dtype) if bias else None
    grid = static_grid(0.31, -0.7)
    codes = norm_quant.norm_quantize(*on_device(x, weight, offset), 1e-5, rms, *on_device(*grid), 4)
    expected = reference.norm_quantize(x, weight, offset, 1e-5, rms, *grid, 4)
    # y may differ by a few float32 roundings, and then by one rounding to x's dtype; |y| < 16 here, in steps of 0.31.
    tolerance = 16 * max(8 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps) / 0.31
    y = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
    wide = [x.float(), (columns,), weight.float()] + ([] if rms else [None if offset is None else offset.float()])
    assert_codes_match(codes, expected, y(*wide, eps=1e-5) / grid[0] + grid[1], tolerance)
