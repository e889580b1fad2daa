"""RTN against its formula, written out in float64 without the package's helpers."""

import itertools

import pytest
import torch
from lit_actreg_plugins.rtn import RTN

from lit_actreg.quant.weight_grid import SHRINK_FACTORS, dequantize_weight


def rounded(row, bits, symmetric, factor):
    """The formula for one row that shares a grid: Ŵ of the range shrunken by ``factor``."""
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale, zero = float(row.abs().max()) * factor / ((q_max - q_min) / 2), 0.0
    else:
        low, high = min(float(row.min()), 0.0) * factor, max(float(row.max()), 0.0) * factor
        scale = (high - low) / (q_max - q_min)
        zero = float(torch.tensor(q_min - low / scale, dtype=torch.float64).round().clamp(q_min, q_max))
    codes = (row / scale + zero).round().clamp(q_min, q_max)
    return (codes - zero) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_equals_the_formula_in_float64(bits, symmetric, group_size, search):
    weight = torch.randn(7, 15, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    weight[0] = weight[0].abs()  # a row of one sign
    result = RTN(bits, group_size, symmetric, search).quantize_weight(weight, None)
    found = dequantize_weight(result.codes, result.scale, result.zero_point)
    size = group_size or 15
    for n, start in itertools.product(range(7), range(0, 15, size)):
        row = weight[n, start : start + size]
        factors = (1.0,) if search == "minmax" else SHRINK_FACTORS
        candidates = [rounded(row, bits, symmetric, factor) for factor in factors]
        best = min(candidates, key=lambda candidate: float((candidate - row).square().sum()))
        torch.testing.assert_close(found[n, start : start + size], best, rtol=1e-12, atol=1e-14)
    assert result.codes.dtype == torch.int8
    assert (result.zero_point is None) == symmetric


def test_least_squares_is_no_worse_than_minmax():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = {}
    for search in ("minmax", "mse"):
        result = RTN(3, scale_search=search).quantize_weight(weight, None)
        errors[search] = (dequantize_weight(result.codes, result.scale, None) - weight).square().sum(1)
    assert (errors["mse"] <= errors["minmax"]).all()
    assert errors["mse"].sum() < 0.7 * errors["minmax"].sum()


def test_a_row_of_zeros_stays_zero():
    result = RTN().quantize_weight(torch.zeros(2, 6), None)
    assert not dequantize_weight(result.codes, result.scale, None).any()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: RTN(bits=1), "weight bits 1 is out of range: choose 2 to 8"),
        (lambda: RTN(group_size=0), "group_size 0 is not positive"),
        (lambda: RTN(scale_search="best"), 'scale_search "best" is unknown'),
        (lambda: RTN(group_size=4).quantize_weight(torch.ones(2, 6), None), "group_size 4 does not divide the 6 input"),
        (lambda: RTN().quantize_weight(torch.full((2, 2), torch.nan), None), "the weight has NaN"),
    ],
)
def test_mistakes_raise_one_line(make, line):
    with pytest.raises(ValueError, match=line) as error:
        make()
    assert "\n" not in str(error.value)
