"""The fused norm and quantizer against the norm in float64, rounded to x's dtype and quantized."""

import pytest
import torch
from fake_quant_checks import as_stored
from lit_actreg_kernels import norm_quant, reference
from quantizer_checks import DTYPES, assert_codes_between, on_device, static_grid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rms", "bias"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("columns", [48, 131])
def test_norm(dtype, rms, bias, columns):
    torch.manual_seed(0)
    x = (torch.randn(9, columns) * 2 + 0.5).to(dtype)
    weight = (torch.rand(columns) + 0.5).to(dtype)
    offset = torch.randn(columns).to(dtype) if bias else None
    grid = static_grid(0.31, -0.7)
    norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
    scaled = norm(x.double(), (columns,), weight.double(), eps=1e-5)
    y = scaled if offset is None else scaled + offset.double()
    # Roundings, eps / 2 each: a sum over a row takes up to 20 in sequence, so μ is off by 24 with the quotient, of
    # a size of x, about σ; σ² by 28, its root by 14; 10 for the root, quotient, difference and products; and one of y.
    error = 12 * torch.finfo(torch.float32).eps * (weight.double() + scaled.abs() + y.abs())
    ends = (y - error, y + error)
    codes = norm_quant.norm_quantize(*on_device(x, weight, offset), 1e-5, rms, *on_device(*grid), 4)
    assert_codes_between(codes, *(as_stored(end, dtype) for end in ends), grid, 4)
    expected = reference.norm_quantize(x, weight, offset, 1e-5, rms, *grid, 4)
    assert_codes_between(expected, *(end.to(dtype) for end in ends), grid, 4)
