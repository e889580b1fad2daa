"""GPTQ against optimal brain surgery written out in float64, and how it fails."""

import pytest
import torch
from lit_actreg_kernels import grid
from lit_actreg_plugins.gptq import GPTQ, inverse_factor
from lit_actreg_plugins.rtn import RTN
from quantizer_checks import upward
from small_models import correlated_inputs

from lit_actreg.quant.weight_grid import dequantize_weight, relative_layer_error, weight_grid

SCALE, ZERO_POINT = torch.tensor(0.4137), torch.tensor(-1.0)  # TF32 cannot hold the scale


def optimal_brain_surgery(weight, hessian, bits, symmetric, group_size, search, ordered, damping):
    """The method without its factorization: after each column, the rest is refitted with the inverse of *its* block.

    Minimizing tr(Δ H Δᵀ) with column i fixed moves the columns F still free by −e (H_F⁻¹)_i / (H_F⁻¹)_ii.
    """
    num_columns = weight.shape[1]
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(num_columns, dtype=torch.float64)
    order = h.diagonal().argsort(descending=True).tolist() if ordered else list(range(num_columns))
    size = group_size or num_columns
    w, w_hat = weight.clone(), torch.zeros_like(weight)
    grids = {}
    for step, column in enumerate(order):
        group = column // size
        if group not in grids:
            source = weight if ordered or group_size is None else w
            columns = source[:, group * size : (group + 1) * size].unsqueeze(1)
            grids[group] = weight_grid(columns, bits, symmetric, search)
        scale, zero = (value[:, 0] for value in grids[group])
        codes = (w[:, column] / scale + zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        w_hat[:, column] = (codes - zero) * scale
        free = order[step:]
        inverse = torch.linalg.inv(h[free][:, free])
        error = w[:, column] - w_hat[:, column]
        w[:, free] -= torch.outer(error, inverse[0]) / inverse[0, 0]
    return w_hat


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_equals_optimal_brain_surgery_in_float64(symmetric, group_size, ordered, block_size):
    inputs = correlated_inputs(200, 24)
    hessian = inputs.T @ inputs / len(inputs)
    weight = upward(torch.randn(10, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 6)
    # min-max wherever its grid is of the weights as they were; one chosen on the way may have an edge at its lowest
    search = "mse" if symmetric and group_size and not ordered else "minmax"
    expected = optimal_brain_surgery(weight, hessian, 4, symmetric, group_size, search, ordered, 0.01)
    quantizer = GPTQ(4, group_size, symmetric, search, ordered, 0.01, block_size)
    result = quantizer.quantize_weight(weight, hessian)
    found = dequantize_weight(result.codes, result.scale, result.zero_point)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_factor_is_that_of_the_inverse():
    inputs = correlated_inputs(64, 9)
    hessian = inputs.T @ inputs
    factor = inverse_factor(hessian)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian))
    assert not factor.tril(-1).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_layer_error_is_below_rtns(bits, group_size, search):
    inputs = correlated_inputs(512, 96).float()
    hessian = inputs.T @ inputs / len(inputs)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(2))
    errors = []
    for quantizer in (GPTQ(bits, group_size, scale_search=search), RTN(bits, group_size, scale_search=search)):
        result = quantizer.quantize_weight(weight, hessian)
        errors.append(relative_layer_error(weight, dequantize_weight(result.codes, result.scale, None), hessian))
    assert errors[0] < errors[1]


def test_hessians_of_tf32_inputs_are_as_good_as_float64_ones():
    """On a GPU calibration multiplies in TF32: inputs rounded to 11 bits, here by hand, sums in float32."""
    inputs = correlated_inputs(2048, 128).float()
    inputs = grid.dequantize(grid.quantize(inputs / inputs.std(), SCALE, ZERO_POINT, 4), SCALE, ZERO_POINT)
    rounded = ((inputs.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    exact = inputs.double().T @ inputs.double() / 2048
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(4))
    results = [GPTQ().quantize_weight(weight, h) for h in (exact.float(), rounded.T @ rounded / 2048)]
    errors = [
        relative_layer_error(weight.double(), dequantize_weight(r.codes, r.scale, None).double(), exact)
        for r in results
    ]
    assert (results[0].codes != results[1].codes).float().mean() < 0.005
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_relative_layer_error_is_that_of_the_outputs():
    inputs, weight = correlated_inputs(100, 12), torch.randn(5, 12, dtype=torch.float64)
    rounded = weight.round()
    expected = (inputs @ (weight - rounded).T).square().sum() / (inputs @ weight.T).square().sum()
    found = relative_layer_error(weight, rounded, inputs.T @ inputs / 100)
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_dead_columns_are_rounded_to_nearest_and_change_nothing_else():
    inputs = correlated_inputs(200, 20).float()
    inputs[:, [3, 11]] = 0
    hessian = inputs.T @ inputs / 200
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(3))
    # Both grids span the same range, whatever the dead columns hold.
    weight[:, 0] = 4.0
    result = GPTQ(scale_search="minmax").quantize_weight(weight, hessian)
    assert result.notes["dead_columns"] == 2
    nearest = RTN(scale_search="minmax").quantize_weight(weight, None).codes
    assert torch.equal(result.codes[:, [3, 11]], nearest[:, [3, 11]])
    alive = [k for k in range(20) if k not in (3, 11)]
    without = GPTQ(scale_search="minmax").quantize_weight(weight[:, alive], hessian[alive][:, alive])
    assert (result.codes[:, alive] != without.codes).float().mean() < 0.02  # the mean that damps is the same


def test_damping_is_raised_until_the_factor_exists():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.05  # smallest eigenvalue −0.05
    result = GPTQ(damping=0.001).quantize_weight(torch.randn(4, 8), hessian)
    assert result.notes["damping"] == pytest.approx(0.1)
    assert "fallback" not in result.notes


def test_a_hopeless_hessian_falls_back_to_rtn_and_says_so():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 5.0
    weight = torch.randn(4, 8)
    result = GPTQ().quantize_weight(weight, hessian)
    assert "not positive definite" in result.notes["fallback"]
    assert torch.equal(result.codes, RTN().quantize_weight(weight, None).codes)


def test_all_inputs_dead():
    weight = torch.randn(4, 8)
    result = GPTQ().quantize_weight(weight, torch.zeros(8, 8))
    assert torch.equal(result.codes, RTN().quantize_weight(weight, None).codes)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: GPTQ(damping=2), "damping 2 is out of range"),
        (lambda: GPTQ(block_size=0), "block_size 0 is out of range"),
        (lambda: GPTQ(block_size=512), "choose 1 to 256, 128 as a rule"),
        (lambda: GPTQ().quantize_weight(torch.ones(2, 2), torch.full((2, 2), torch.nan)), "the Hessian has NaN"),
        (lambda: GPTQ().quantize_weight(torch.full((2, 2), torch.inf), torch.eye(2)), "the weight has NaN or infinite"),
        (lambda: GPTQ(group_size=4).quantize_weight(torch.ones(2, 6), torch.eye(6)), "group_size 4 does not divide"),
    ],
)
def test_mistakes_raise_one_line(make, line):
    with pytest.raises(ValueError, match=line) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_it_is_given_stays_as_it_is():
    weight, hessian = torch.randn(4, 4, dtype=torch.float64), torch.tensor([0.0, 1, 2, 3], dtype=torch.float64).diag()
    before = weight.clone(), hessian.clone()
    GPTQ().quantize_weight(weight, hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
