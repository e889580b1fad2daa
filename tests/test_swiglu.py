"""SwiGLU's gradient against float64 autograd, and the operator around it."""

import pytest
import torch
from fake_quant_checks import assert_near, doubled, poison
from lit_actreg_kernels import swiglu, training_ops
from quantizer_checks import DEVICE, DTYPES
from torch.nn import functional


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 66), (2, 2600), (0, 8)])
def test_the_kernels_gradient(monkeypatch, dtype, shape):
    torch.manual_seed(0)
    h = torch.randn(shape).mul(2).to(dtype)
    g = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    (wide,) = doubled(h)
    gate, up = wide.chunk(2, -1)
    (functional.silu(gate) * up).backward(g.double())
    poison(monkeypatch)
    dh = swiglu.swiglu_backward(g.to(DEVICE), h.to(DEVICE))
    assert dh.dtype == dtype
    assert_near(dh, wide.grad, dtype)


def test_far_tails_are_finite():
    h = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    dh = swiglu.swiglu_backward(torch.ones(1, 4, device=DEVICE), h)
    torch.testing.assert_close(dh.cpu(), torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 100.0, 1e4]]))


def test_the_operators_value_and_gradient():
    h, g = torch.randn(2, 7, 20, device=DEVICE), torch.randn(2, 7, 10, device=DEVICE)
    plain, ours = h.clone().requires_grad_(), h.clone().requires_grad_()
    expected = functional.silu(plain.chunk(2, -1)[0]) * plain.chunk(2, -1)[1]
    expected.backward(g)
    found = training_ops.swiglu(ours)
    found.backward(g)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
