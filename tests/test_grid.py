"""The 4-bit grid: rounding, clips, per-token grids, packing. All kernels and exports are measured against these."""

import pytest
import torch
from lit_actreg_kernels import grid


def test_code_range():
    assert [grid.code_range(bits) for bits in (2, 3, 4, 8)] == [(-2, 1), (-4, 3), (-8, 7), (-128, 127)]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("integer", [True, False])
def test_clips_are_the_ends_of_the_grid(bits, integer):
    low, high = torch.tensor([-1.7]), torch.tensor([2.9])
    scale, zero_point = grid.grid_from_clips(low, high, bits, integer)
    q_min, q_max = grid.code_range(bits)
    ends = grid.dequantize(torch.tensor([q_min, q_max], dtype=torch.int8), scale, zero_point)
    # An integer zero point moves both ends by the same rounding, at most half a step; a real one by float32's.
    torch.testing.assert_close(ends, torch.cat([low, high]), rtol=0, atol=scale.item() / 2 if integer else 1e-5)
    assert not integer or zero_point == zero_point.round()


def test_integer_zero_point_widens_an_interval_without_zero():
    scale, zero_point = grid.grid_from_clips(torch.tensor([1.0]), torch.tensor([3.0]), 4)
    assert grid.dequantize(grid.quantize(torch.zeros(1), scale, zero_point, 4), scale, zero_point) == 0
    torch.testing.assert_close(scale, torch.tensor([3.0 / 15]))


def test_collapsed_interval_is_finite():
    scale, zero_point = grid.grid_from_clips(torch.zeros(1), torch.zeros(1), 4)
    assert scale > 0
    assert torch.isfinite(zero_point)


def test_rounding_is_half_to_even_and_saturates():
    x = torch.tensor([-100.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 100.0])
    codes = grid.quantize(x, torch.ones(1), 0.0, 4)
    assert codes.tolist() == [-8, -2, -2, 0, 0, 2, 2, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_division(dtype):
    x = torch.randn(1000).to(dtype)
    scale, zero_point = torch.tensor([0.123]), torch.tensor([1.3])
    assert torch.equal(grid.quantize(x, scale, zero_point, 4), grid.quantize(x.float(), scale, zero_point, 4))


def test_round_trip_error_is_half_a_step_inside_the_clips():
    x = torch.rand(10000) * 4 - 1
    scale, zero_point = grid.grid_from_clips(torch.tensor([-1.0]), torch.tensor([3.0]), 4, integer_zero_point=False)
    error = (grid.dequantize(grid.quantize(x, scale, zero_point, 4), scale, zero_point) - x).abs().max()
    assert error <= scale.item() * (0.5 + 1e-5)  # plus float32's rounding of (q − z) · s


def test_per_token_grid_covers_every_token():
    x = torch.randn(17, 33) * torch.logspace(-3, 3, 17)[:, None]
    scale, zero_point = grid.grid_per_token(x, 4)
    assert scale.shape == zero_point.shape == (17, 1)
    error = (grid.dequantize(grid.quantize(x, scale, zero_point, 4), scale, zero_point) - x).abs()
    assert (error <= scale * 1.001).all()  # half a step of the codes' rounding and half of the zero point's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("integer_zero_point", [True, False])
def test_on_grid_is_quantize_and_dequantize(dtype, integer_zero_point):
    x = torch.randn(50, 40, dtype=dtype) * torch.logspace(-3, 3, 50, dtype=dtype)[:, None]
    scale, zero_point = grid.grid_from_clips(x.amin(1, True) * 0.7, x.amax(1, True) * 0.6, 4, integer_zero_point)
    expected = grid.dequantize(grid.quantize(x, scale, zero_point, 4), scale, zero_point)
    assert torch.equal(grid.on_grid(x, scale, zero_point, 4), expected)


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 129])
def test_packing_round_trip(columns):
    codes = torch.randint(-8, 8, (5, columns), dtype=torch.int8)
    packed = grid.pack_int4(codes)
    assert packed.shape == (5, (columns + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(grid.unpack_int4(packed, columns), codes)


def test_packing_keeps_row_halves_together():
    codes = torch.tensor([[1, 2, -1, -8]], dtype=torch.int8)
    assert grid.pack_int4(codes).tolist() == [[0xF1, 0x82]]


def test_symmetric_scale_bounds_the_error_by_half_a_step():
    weight = torch.randn(8, 100)
    scale = grid.symmetric_scale(weight.abs().amax(-1, keepdim=True), 4)
    error = (grid.dequantize(grid.quantize(weight, scale, 0.0, 4), scale, 0.0) - weight).abs()
    assert (error <= scale * (0.5 + 1e-5)).all()
