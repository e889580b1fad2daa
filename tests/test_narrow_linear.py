"""The linear that leaves its weight's gradient in float32: values, gradients, under autocast, compiled or not."""

import pytest
import torch
from lit_actreg_kernels.narrow_linear import narrow_linear
from quantizer_checks import DEVICE
from torch.nn import functional

from lit_actreg.config import QuantConfig
from lit_actreg.quant.linear import QuantLinear


def test_opcheck():
    x, weight, bias = (torch.randn(s, device=DEVICE, requires_grad=True) for s in [(3, 32), (8, 32), (8,)])
    torch.library.opcheck(narrow_linear, (x.bfloat16(), weight, bias))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 50, 32), (32,)])
def test_a_narrow_linears_weight_gradient_is_not_rounded(shape, has_bias):
    torch.manual_seed(0)
    x, weight, bias, g = (torch.randn(s, device=DEVICE) for s in [shape, (24, 32), (24,), (*shape[:-1], 24)])
    x, g = x.bfloat16().requires_grad_(), g.bfloat16()
    weight.requires_grad_()
    bias = bias.requires_grad_() if has_bias else None
    y = narrow_linear(x, weight, bias)
    y.backward(g)
    assert torch.equal(y, functional.linear(x, weight.bfloat16(), bias.bfloat16() if has_bias else None))
    assert torch.equal(x.grad, g @ weight.bfloat16())
    exact = g.double().reshape(-1, 24).t() @ x.double().reshape(-1, 32)
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-5, atol=1e-5)
    if has_bias:
        torch.testing.assert_close(bias.grad.double(), g.double().reshape(-1, 24).sum(0), rtol=1e-5, atol=1e-5)


def test_compiled_its_backward_pass_is_not_autocast():
    x, weight, g = (
        torch.randn(50, 32, device=DEVICE).bfloat16(),
        torch.randn(24, 32, device=DEVICE, requires_grad=True),
        torch.randn(50, 24, device=DEVICE),
    )
    run = torch.compile(lambda x: narrow_linear(x, weight, None), fullgraph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = run(x)
    y.backward(g.bfloat16())
    exact = g.bfloat16().double().t() @ x.double()
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_linear_under_autocast_is_narrow(dtype, has_bias, compiled):
    linear = QuantLinear(64, 96, has_bias, "qkv", QuantConfig(activations="none")).to(DEVICE)
    x = torch.randn(4, 30, 64, device=DEVICE, requires_grad=True)
    g = torch.randn(4, 30, 96, device=DEVICE).to(dtype)
    run = torch.compile(linear, fullgraph=True) if compiled else linear
    with torch.autocast(DEVICE, dtype):
        y = run(x)
    assert y.dtype == dtype
    y.backward(g)
    wide_x, wide_weight = (t.detach().to(dtype).double() for t in (x, linear.weight))
    expected = wide_x @ wide_weight.t() + (linear.bias.detach().to(dtype).double() if has_bias else 0.0)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    exact = g.double().flatten(0, 1).t() @ wide_x.flatten(0, 1)
    torch.testing.assert_close(linear.weight.grad.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), g.double() @ wide_weight, rtol=2e-2, atol=2e-2)


def test_of_a_frozen_weight_no_gradient_is_made():
    x, weight = torch.randn(3, 32, device=DEVICE).bfloat16().requires_grad_(), torch.randn(8, 32, device=DEVICE)
    narrow_linear(x, weight, None).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
