"""The Triton fake quantizer: values equal the grid's to the bit, gradients are those of float64 autograd."""

import pytest
import torch
from fake_quant_checks import GRIDS, assert_near, assert_sum_near, clips, doubled, few_programs, formula, poison
from lit_actreg_kernels import fake_quant, training_reference
from lit_actreg_kernels.grid import code_range, grid_from_clips
from quantizer_checks import DEVICE, DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "integer", "masked"), GRIDS)
@pytest.mark.parametrize("shape", [(5, 7, 131), (3,), (2, 4096)])
def test_values_and_gradients(monkeypatch, dtype, bits, integer, masked, shape):
    torch.manual_seed(0)
    x, g = (torch.randn(shape).mul(1.5).to(dtype) for _ in range(2))
    wide, low, high = doubled(x, *clips())
    expected = formula(wide, low, high, bits, integer, masked)
    expected.backward(g.double())
    poison(monkeypatch)
    few_programs(monkeypatch, fake_quant)
    x, g = x.to(DEVICE), g.to(DEVICE)
    x_hat = fake_quant.fake_quantize(x, *clips(), bits, integer)
    dx, sums = fake_quant.fake_quantize_backward(g, x, *clips(), bits, integer, masked)
    assert x_hat.dtype == dx.dtype == dtype
    assert_near(x_hat, expected.detach(), dtype)
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        exact = training_reference.fake_quantize(x.cpu(), *clips(device="cpu"), bits, integer)
        assert torch.equal(x_hat.cpu(), exact)
    assert torch.equal(dx.cpu().double(), wide.grad)  # g or nothing: no arithmetic
    for found, clip in zip(sums.sum(1), (low, high), strict=True):
        assert_sum_near(found, clip.grad, g.cpu(), torch.float32, bits)


@pytest.mark.parametrize("far", [float("inf"), 3e38])
def test_clips_gradients_of_far_values_are_finite(far):
    x, g = torch.tensor([far, -far, 0.4]), torch.tensor([1.0, 2.0, 3.0])
    expected = training_reference.fake_quantize_backward(g, x, *clips(device="cpu"), 4, True, True)
    found = fake_quant.fake_quantize_backward(g.to(DEVICE), x.to(DEVICE), *clips(), 4, True, True)
    torch.testing.assert_close(found[1].sum(1).cpu(), expected[1].sum(1))
    assert torch.equal(found[0].cpu(), expected[0])


def test_a_value_on_an_end_is_outside():
    scale, zero_point = grid_from_clips(*clips(), 4, True)
    x = torch.cat([(q - zero_point) * scale for q in code_range(4)])
    g = torch.tensor([1.0, 2.0], device=DEVICE)
    dx, sums = fake_quant.fake_quantize_backward(g, x, *clips(), 4, True, True)
    assert dx.tolist() == [0.0, 0.0]
    assert sums.sum(1).tolist() == [1.0, 2.0]


def test_sums_do_not_depend_on_the_run():
    x, g = torch.randn(2, 9000, device=DEVICE)
    first, second = (fake_quant.fake_quantize_backward(g, x, *clips(), 4, True, True)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_a_nan_stays_one_and_infinity_is_clipped():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)
    x_hat = fake_quant.fake_quantize(x, *clips(), 4, False).tolist()
    assert x_hat[0] != x_hat[0]
    assert x_hat[1:] == pytest.approx([2.2, -1.7])
