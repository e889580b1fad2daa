"""The statistics against readings of their formulas in float64, one value at a time."""

import math

import pytest
import torch

from lit_actreg.quant.statistics import (
    channel_means,
    kurtosis,
    outlier_ratios,
    rounding_error,
    signal_to_noise,
    token_kurtosis,
)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Skewed, with a mean: float64."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x + 0.3 * x**2 + 0.5


def moment(row: list[float], power: int) -> float:
    mean = sum(row) / len(row)
    return sum((value - mean) ** power for value in row) / len(row)


def test_token_kurtosis_is_the_mean_over_tokens():
    y = values(2, 3, 17)
    expected = [moment(row, 4) / moment(row, 2) ** 2 for row in y.flatten(0, 1).tolist()]
    assert token_kurtosis(y).item() == pytest.approx(sum(expected) / 6, rel=1e-10)
    assert token_kurtosis(torch.cat([y, y])).item() == pytest.approx(sum(expected) / 6, rel=1e-10)


def test_token_kurtosis_of_one_token_in_so_many():
    y = values(3, 8, 17)
    assert token_kurtosis(y, 4).item() == pytest.approx(token_kurtosis(y[:, [2, 6]]).item(), rel=1e-12)


def test_token_kurtosis_of_known_distributions():
    assert token_kurtosis(torch.randn(64, 4096)).item() == pytest.approx(3.0, abs=0.05)
    assert token_kurtosis(torch.tensor([[1.0, -1.0, 1.0, -1.0]])).item() == pytest.approx(1.0)
    num = 50  # one channel has it all: ((N − 1)³ + 1) / (N (N − 1))
    assert token_kurtosis(torch.eye(num)).item() == pytest.approx(((num - 1) ** 3 + 1) / (num * (num - 1)), rel=1e-5)
    assert token_kurtosis(torch.full((3, 8), 2.0)).item() == 0.0


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_token_kurtosis_does_not_depend_on_the_scale(scale):
    y = values(8, 64)
    assert token_kurtosis(scale * y).item() == pytest.approx(token_kurtosis(y).item(), rel=1e-3)


def test_token_kurtosis_has_the_gradient_of_its_formula():
    assert torch.autograd.gradcheck(token_kurtosis, values(3, 7).requires_grad_())
    assert torch.autograd.gradcheck(lambda y: token_kurtosis(y, 2), values(2, 4, 7).requires_grad_())
    constant = torch.ones(2, 5, requires_grad=True)
    token_kurtosis(constant).backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_widened_first(dtype):
    y = (values(4, 64) * 30).to(dtype)  # float16 would overflow at 30⁴
    assert token_kurtosis(y).item() == pytest.approx(token_kurtosis(y.double()).item(), rel=1e-5)
    assert kurtosis(y).item() == pytest.approx(kurtosis(y.double()).item(), rel=1e-5)


def test_channel_means_and_outlier_ratios():
    x = values(2, 5, 4)
    mean_abs, mean = channel_means(x)
    for channel in range(4):
        column = x[..., channel].flatten().tolist()
        assert mean[channel].item() == pytest.approx(sum(column) / 10)
        assert mean_abs[channel].item() == pytest.approx(sum(abs(value) for value in column) / 10)
    whole = x.abs().mean().item()
    assert outlier_ratios(mean_abs).tolist() == pytest.approx([m / whole for m in mean_abs.tolist()])
    assert outlier_ratios(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_signal_to_noise_in_decibels():
    x, noise = values(100), values(100, seed=1)
    expected = 10 * math.log10(sum(v * v for v in x.tolist()) / sum(v * v for v in noise.tolist()))
    assert signal_to_noise(x, x + noise).item() == pytest.approx(expected)
    assert signal_to_noise(x, x + noise / 10).item() == pytest.approx(expected + 20)


def test_kurtosis_is_of_all_values_together():
    weight = values(5, 6)
    flat = weight.flatten().tolist()
    assert kurtosis(weight).item() == pytest.approx(moment(flat, 4) / moment(flat, 2) ** 2)


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_error_is_that_of_a_symmetric_grid_a_row(bits):
    weight = values(5, 11)
    error = 0.0
    for row in weight.tolist():
        scale = max(map(abs, row)) * 2 / (2**bits - 1)
        codes = [min(max(round(value / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for value in row]
        error += sum((code * scale - value) ** 2 for code, value in zip(codes, row, strict=True))
    expected = error / sum(value**2 for value in weight.flatten().tolist())
    assert rounding_error(weight, bits).item() == pytest.approx(expected, rel=1e-10)
