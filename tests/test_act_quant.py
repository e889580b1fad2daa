"""The quantizing kernels against plain PyTorch on the CPU: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from fake_quant_checks import as_stored
from lit_actreg_kernels import act_quant, grid, reference
from quantizer_checks import DTYPES, on_device, static_grid

GRIDS = [(0.37, -2.0, 4), (0.0413, 1.37, 4), (0.9, 0.0, 3), (0.021, -11.3, 8)]


def edge_values(scale, zero_point):
    """Ties, their float32 neighbours, zeros, and what only the clamp stops."""
    ties = (torch.arange(-20, 20) + 0.5 - zero_point) * scale
    far = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), 1e-40])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    return torch.cat([ties, ties.nextafter(up), ties.nextafter(down), far])


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
@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 3, 256), (5, 9, 64), (3, 300), (0, 8)])
def test_per_token_codes_are_equal_to_the_bit(dtype, shape):
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    result = act_quant.quantize_activation_per_token(*on_device(x), 4)
    for got, expected in zip(result, reference.quantize_activation_per_token(x, 4), strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 9, 20), (3, 2, 3000), (0, 2, 8)])
@pytest.mark.parametrize("bits", [4, 7])
def test_groups_have_the_grids_of_tokens(dtype, shape, bits):
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    codes, scale, zero_point = reference.quantize_activation_per_token(x, bits)
    for result in (reference.quantize_groups(x, bits), act_quant.quantize_groups(*on_device(x), bits)):
        centered, found = (tensor.cpu() for tensor in result)
        assert torch.equal(found, scale[..., 0])
        assert torch.equal(centered, codes - zero_point)
    x_hat = act_quant.fake_quantize_groups(*on_device(x), bits).cpu()
    assert torch.equal(x_hat.double(), as_stored(grid.dequantize(codes, scale, zero_point).double(), dtype))


def test_per_token_long_rows_and_constant_rows(monkeypatch):
    monkeypatch.setattr(act_quant, "_MAX_ROW_BLOCK", 64)  # several blocks a row without a row of 16,384
    x = torch.randn(4, 200)
    x[1], x[2], x[3] = 0.0, 5.0, -5.0
    result = act_quant.quantize_activation_per_token(*on_device(x), 4)
    for got, expected in zip(result, reference.quantize_activation_per_token(x, 4), strict=True):
        assert torch.equal(got.cpu(), expected)
