"""The fused activation functions and quantizer against the formulas in float64, rounded to x's dtype and quantized."""

import pytest
import torch
from fake_quant_checks import as_stored
from lit_actreg_kernels import gelu_quant, reference
from quantizer_checks import DTYPES, assert_codes_between, on_device, static_grid

EPS = torch.finfo(torch.float32).eps  # a rounding is half of it, an approximate division on a GPU two


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(5, 6), (5, 1030), (70, 134)])
def test_gelu_and_swiglu(dtype, tokens, columns):
    torch.manual_seed(0)
    x = (torch.randn(tokens, columns) * 3).to(dtype)
    grid, wide = static_grid(0.21, -5.0), x.double()
    gate, up = wide.chunk(2, dim=-1)
    # Φ = (1 + erf) / 2: 4 roundings of erf's argument, of erf (2) and of the sum, halved; one of x · Φ. Of 16 bits a
    # polynomial, good to 1e-7; 1 / (1 + p |x|), Horner's scheme, exp and the products have some 20.
    gelu_error = wide.abs() * (2 * EPS if dtype == torch.float32 else 1e-7 + 12 * EPS)
    swiglu = torch.nn.functional.silu(gate) * up
    # 10 roundings of exp, sum, quotient and product; and 2 of exp's argument, relative to it: exp is off by |gate| · 2
    swiglu_error = swiglu.abs() * (5 + gate.abs()) * EPS
    cases = [
        (gelu_quant.gelu_quantize, reference.gelu_quantize, torch.nn.functional.gelu(wide), gelu_error),
        (gelu_quant.swiglu_quantize, reference.swiglu_quantize, swiglu, swiglu_error),
    ]
    for kernel, plain, y, error in cases:
        ends = (y - error, y + error)
        codes = kernel(*on_device(x, *grid), 4)
        assert_codes_between(codes, *(as_stored(end, dtype) for end in ends), grid, 4)
        assert_codes_between(plain(x, *grid, 4), *(end.to(dtype) for end in ends), grid, 4)
