"""The quantizing kernels against plain PyTorch on the CPU: in the interpreter without a GPU, compiled with one.

The reference always runs on the CPU: PyTorch's CUDA division by a Python number multiplies by its reciprocal.
"""

import pytest
import torch
from lit_actreg_kernels import act_quant, gelu_quant, norm_quant, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [(0.37, -2.0, 4), (0.0413, 1.37, 4), (0.9, 0.0, 3), (0.021, -11.3, 8)]


def on_device(*tensors):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def static_grid(scale, zero_point):
    return torch.tensor([scale]), torch.tensor([zero_point])


def edge_values(scale, zero_point):
    """Ties, their float32 neighbours, zeros, and what only the clamp stops."""
    ties = (torch.arange(-20, 20) + 0.5 - zero_point) * scale
    far = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), 1e-40])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    return torch.cat([ties, ties.nextafter(up), ties.nextafter(down), far])


def assert_codes_match(codes, expected, before_rounding, tolerance):
    """Equal, except by one code where the value before rounding is within ``tolerance`` steps of an edge."""
    difference = (codes.cpu().int() - expected.int()).abs()
    edge = (before_rounding - before_rounding.floor() - 0.5).abs() <= tolerance
    assert difference.max() <= 1
    assert not (difference.bool() & ~edge).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "zero_point", "bits"), GRIDS)
def test_static_codes_are_equal_to_the_bit(dtype, scale, zero_point, bits):
    grid = static_grid(scale, zero_point)
    x = torch.cat([edge_values(scale, zero_point), torch.randn(3333) * 3]).to(dtype)  # a tail: no multiple of a block
    codes = act_quant.quantize_activation(*on_device(x, *grid), bits)
    assert torch.equal(codes.cpu(), reference.quantize_activation(x, *grid, bits))


def test_every_bfloat16_number():
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16)
    x = x[~x.isnan()]
    grid = static_grid(0.0371, 0.3)
    codes = act_quant.quantize_activation(*on_device(x, *grid), 4)
    assert torch.equal(codes.cpu(), reference.quantize_activation(x, *grid, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 3, 256), (0, 8)])
def test_per_token_codes_are_equal_to_the_bit(dtype, shape):
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    result = act_quant.quantize_activation_per_token(*on_device(x), 4)
    for got, expected in zip(result, reference.quantize_activation_per_token(x, 4), strict=True):
        assert torch.equal(got.cpu(), expected)


def test_per_token_long_rows_and_constant_rows(monkeypatch):
    monkeypatch.setattr(act_quant, "_MAX_ROW_BLOCK", 64)  # several blocks a row without a row of 16,384
    x = torch.randn(4, 200)
    x[1], x[2], x[3] = 0.0, 5.0, -5.0
    result = act_quant.quantize_activation_per_token(*on_device(x), 4)
    for got, expected in zip(result, reference.quantize_activation_per_token(x, 4), strict=True):
        assert torch.equal(got.cpu(), expected)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [6, 1030])
def test_gelu_and_swiglu(dtype, columns):
    x = (torch.randn(5, columns) * 3).to(dtype)
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
