"""The ground truth of the fused training operators against the formula of quant/fake_quant.py, in float64."""

import pytest
import torch
from lit_actreg_kernels import training_reference

from lit_actreg.quant.fake_quant import fake_quantize


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("outside", ["masked", "passed"])
def test_values_and_gradients_are_the_formulas(bits, integer, outside):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(33, 17, dtype=torch.float64, generator=generator) * 1.5 for _ in range(2))
    low, high = (torch.tensor([c], dtype=torch.float64, requires_grad=True) for c in (-1.7, 2.3))
    x.requires_grad_()
    expected = fake_quantize(x, low, high, bits, integer, outside)
    expected.backward(g)
    arguments = (low.detach(), high.detach(), bits, integer)
    assert torch.equal(training_reference.fake_quantize(x.detach(), *arguments), expected)
    dx, clips = training_reference.fake_quantize_backward(g, x.detach(), *arguments, outside == "masked")
    # Sums of 561 terms of order one in another order.
    torch.testing.assert_close(dx, x.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(clips.flatten(), torch.cat([low.grad, high.grad]), rtol=0, atol=1e-11)
