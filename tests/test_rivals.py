"""The rivals' definitions: H is orthogonal and flattens an outlier channel; QuEST's grid is a Gaussian's best, its mask
that of the trusted values; an artifact never claims to hold either."""

import pytest
import torch

from lit_actreg.config import QuantConfig
from lit_actreg.plan import stored_quant_config
from lit_actreg.quant.fake_quant import fake_quantize_per_token
from lit_actreg.quant.rivals import GAUSSIAN_STEPS, block_hadamard, fake_quantize_quest, fake_quantize_rotated


@pytest.mark.parametrize("width", [1, 6, 64, 96, 768, 4096])
def test_the_rotation_is_its_own_inverse_and_keeps_lengths(width):
    x = torch.randn(3, 5, width, dtype=torch.float64)
    y = block_hadamard(x)
    torch.testing.assert_close(block_hadamard(y), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_it_is_sylvesters_matrix():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    expected = torch.kron(two, torch.kron(two, two)) / 8**0.5
    torch.testing.assert_close(block_hadamard(torch.eye(8)), expected)


def test_an_outlier_channel_costs_the_rotated_grid_less():
    x = torch.randn(64, 768)
    x[:, 7] += 40
    errors = [(quantize(x) - x).square().mean() for quantize in (fake_quantize_per_token, fake_quantize_rotated)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("bits", GAUSSIAN_STEPS)
def test_the_step_is_the_best_for_a_gaussian(bits):
    """Against numerical integration over a fine grid: neighbours 3 % away are worse."""
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    half = 2 ** (bits - 1)

    def error(step: float) -> torch.Tensor:
        x_hat = ((x / step - 0.5).round().clamp(-half, half - 1) + 0.5) * step
        return ((x_hat - x).square() * density).sum()

    best = error(GAUSSIAN_STEPS[bits])
    assert best < error(0.97 * GAUSSIAN_STEPS[bits])
    assert best < error(1.03 * GAUSSIAN_STEPS[bits])


def test_quest_passes_the_gradient_of_trusted_values_only():
    x = torch.randn(2, 16, dtype=torch.float64)
    x[0, 0] = 30  # of one channel alone; spread over all by the rotation
    x[1, 0], x[1, 1:] = 3.706, 1  # 8¼ steps, of which the grid has 7½: off by ¾
    x = block_hadamard(x).requires_grad_()  # now H x has the outliers, outside the grid
    y = fake_quantize_quest(x)
    g = torch.randn_like(y)
    y.backward(g)
    rotated, y_rotated = block_hadamard(x.detach()), block_hadamard(y.detach())
    step = rotated.square().mean(-1, keepdim=True).sqrt() * GAUSSIAN_STEPS[4]
    error = (y_rotated - rotated).abs()
    trusted = error <= step / 2
    assert not trusted[:, 0].any()
    assert error[1, 0] < step[1]
    assert trusted.float().mean() > 0.9
    torch.testing.assert_close(x.grad, block_hadamard(block_hadamard(g) * trusted))
    codes = y_rotated / step - 0.5
    torch.testing.assert_close(codes, codes.round().clamp(-8, 7))


@pytest.mark.parametrize("activations", ["rotated", "quest"])
def test_an_artifact_says_that_it_holds_weights_only(activations):
    quant, notes = stored_quant_config(QuantConfig(activations=activations), False, "auto", None)
    assert quant.activations == "none"
    assert notes[0].startswith("WEIGHTS ONLY")
    assert activations in notes[0]
