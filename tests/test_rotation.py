"""Rounding behind a rotation: the Hessian is that of rotated inputs, and blocks are calibrated behind rounded ones."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from lit_actreg_plugins.gptq import GPTQ
from lit_actreg_plugins.rtn import RTN
from quantizer_checks import upward
from small_models import correlated_inputs, small_decoder, text_ids

from lit_actreg.config import SITES, QuantConfig
from lit_actreg.quant.rivals import block_hadamard
from lit_actreg.quant.weight_grid import dequantize_weight

ROTATION = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "rotation.py"))
round_behind_rotation, round_model = ROTATION["round_behind_rotation"], ROTATION["round_model"]


def inputs_with_outliers(num_tokens: int, num_columns: int) -> torch.Tensor:
    inputs = correlated_inputs(num_tokens, num_columns)
    inputs[:, [3, 17]] += torch.tensor([40.0, -25.0])
    return inputs


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("width", [64, 96])  # one block; three blocks of 32
def test_behind_a_rotation_gptqs_output_error_is_below_rtns(bits, search, width):
    inputs = inputs_with_outliers(512, width)
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for quantizer in (GPTQ(bits, scale_search=search), RTN(bits, scale_search=search)):
        rounded = round_behind_rotation(quantizer, weight, inputs.T @ inputs / len(inputs))
        errors.append((inputs @ (weight - rounded).T).norm() / (inputs @ weight.T).norm())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("quantizer", [GPTQ(), GPTQ(3, scale_search="mse"), RTN()])
def test_it_is_the_rotated_weight_rounded_for_rotated_inputs_and_rotated_back(quantizer):
    inputs = inputs_with_outliers(512, 96)
    rotation = block_hadamard(torch.eye(96, dtype=torch.float64)).T
    rotated_inputs = inputs @ rotation.T
    rotated_weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotated_weight = upward(rotated_weight, 96)
    expected = quantizer.quantize_weight(rotated_weight, rotated_inputs.T @ rotated_inputs / len(inputs))
    expected = dequantize_weight(expected.codes, expected.scale, None) @ rotation
    found = round_behind_rotation(quantizer, rotated_weight @ rotation, inputs.T @ inputs / len(inputs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_block_is_calibrated_on_its_rotated_grid_behind_rounded_blocks():
    before = small_decoder("neox", QuantConfig(activations="rotated"))
    model, ids = copy.deepcopy(before), text_ids(6)
    round_model(GPTQ(), model, list(ids.split([4, 2])), torch.device("cpu"))
    before.blocks[0] = model.blocks[0]
    for site in SITES:
        linear, inputs = getattr(before.blocks[1], site), []
        hook = linear.input_quantizer.register_forward_hook(lambda _, args, x_hat, to=inputs: to.append(x_hat))
        before(ids)
        hook.remove()
        x_hat = inputs[0].flatten(0, 1)
        expected = round_behind_rotation(GPTQ(), linear.weight, x_hat.T @ x_hat / len(x_hat))
        found = getattr(model.blocks[1], site).weight
        assert torch.isclose(found, expected, atol=1e-6).float().mean() > 0.95  # float32 sums may turn a code
        assert not torch.isclose(found, linear.weight).all()


def test_a_hopeless_hessian_stops_it():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 5.0
    with pytest.raises(AssertionError, match="not positive definite"):
        round_behind_rotation(GPTQ(), torch.randn(4, 8), hessian)
