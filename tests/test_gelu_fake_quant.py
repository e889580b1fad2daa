"""GELU and SwiGLU fused with the fake quantizer, against float64 autograd of the two after each other."""

import pytest
import torch
from fake_quant_checks import (
    GRIDS,
    as_stored,
    assert_near,
    assert_sum_near,
    clips,
    doubled,
    few_programs,
    formula,
    poison,
)
from lit_actreg_kernels import gelu_fake_quant
from quantizer_checks import DEVICE, DTYPES
from torch.nn import functional


def backward(g, h, *rest):
    """Of the activation alone: without kurtosis; of GELU's also the sums of dh."""
    no_kurtosis = (torch.empty(0, 4, device=DEVICE), torch.empty(0, device=DEVICE), 0, 0)
    gated, *_ = rest
    return gelu_fake_quant.activation_fake_quantize_backward(g, h, *clips(), *rest, *no_kurtosis, not gated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "integer", "masked"), GRIDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 66), (2, 2600)])
def test_values_and_gradients(monkeypatch, dtype, bits, integer, masked, gated, shape):
    torch.manual_seed(0)
    h = torch.randn(shape).mul(2).to(dtype)
    g = torch.randn(*shape[:-1], shape[-1] // 2 if gated else shape[-1]).to(dtype)
    wide, low, high = doubled(h, *clips())
    y = functional.silu(wide.chunk(2, -1)[0]) * wide.chunk(2, -1)[1] if gated else functional.gelu(wide)
    expected = formula(as_stored(y, dtype), low, high, bits, integer, masked)
    expected.backward(g.double())
    poison(monkeypatch)
    few_programs(monkeypatch, gelu_fake_quant)
    h, g = h.to(DEVICE), g.to(DEVICE)
    x_hat, *_ = gelu_fake_quant.activation_fake_quantize(h, *clips(), gated, bits, integer, 0, 0, 0.0)
    dh, sums, bias = backward(g, h, gated, bits, integer, masked)
    assert x_hat.dtype == dh.dtype == dtype
    assert_near(x_hat, expected.detach(), dtype)
    assert_near(dh, wide.grad, dtype)
    for found, clip in zip(sums.sum(1), (low, high), strict=True):
        # a value next to a boundary of its own dtype may be stored one unit off, and is then worth another δ
        assert_sum_near(found, clip.grad, g.cpu(), dtype, bits)
    if not gated:
        assert_near(bias.sum(0), wide.grad.flatten(0, -2).sum(0), dtype)


@pytest.mark.parametrize("gated", [False, True])
def test_far_tails_are_finite(gated):
    h = torch.tensor([[-1e4, -60.0, -12.0, -0.0, 0.0, 12.0, 60.0, 1e4]], device=DEVICE)
    g = torch.ones(1, 4 if gated else 8, device=DEVICE)
    dh, *_ = backward(g, h, gated, 4, True, False)
    assert dh.isfinite().all()
    if not gated:
        torch.testing.assert_close(dh.cpu(), torch.tensor([[0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0]]))


def test_sums_do_not_depend_on_the_run():
    h, g = torch.randn(2, 5, 3000, device=DEVICE)
    runs = [backward(g, h, False, 4, True, True) for _ in range(2)]
    assert all(torch.equal(*sums) for sums in zip(*runs, strict=True))
