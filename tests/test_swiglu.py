"""SwiGLU's gradient against float64 autograd, and the operator around it."""

import pytest
import torch
from fake_quant_checks import assert_near, doubled, poison
from lit_actreg_kernels import swiglu, training_ops, training_reference
from quantizer_checks import DEVICE, DTYPES
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from lit_actreg.quant.fake_quant import fake_quantize_per_token

NO_KURTOSIS = (torch.empty(0, 4, device=DEVICE), torch.empty(0, device=DEVICE), 0, 0)
NOWHERE = training_ops.NOWHERE
PER_TOKEN = training_ops.swiglu_fake_quantize_per_token


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
    dh = swiglu.swiglu_backward(g.to(DEVICE), h.to(DEVICE), *NO_KURTOSIS)
    assert dh.dtype == dtype
    assert_near(dh, wide.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((3, 5, 2 * 96), 2), ((2, 2 * 1300), 1), ((7, 2 * 60), 5), ((0, 8), 2)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_on_tokens_grids_it_is_the_references(dtype, shape, num_groups, bits):
    torch.manual_seed(0)
    h = torch.randn(shape).mul(2).to(dtype)
    found = swiglu.swiglu_fake_quantize_per_token(h.to(DEVICE), bits, num_groups, *NOWHERE)[0].cpu()
    expected = training_reference.swiglu_fake_quantize_per_token(h, bits, num_groups, *NOWHERE)[0]
    assert found.dtype == expected.dtype == dtype
    assert found.shape == expected.shape == (*shape[:-1], shape[-1] // 2)
    # exp may differ in a last bit; where the interpreter truncates to bfloat16 many a y is lower, and the ends of grids
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        off = ~torch.isclose(found.float(), expected.float(), rtol=1e-2, atol=1e-6)
        assert off.sum() <= 0.001 * off.numel()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    step = 2 * largest / (2**bits - 1)  # at most
    assert ((found - expected).float().abs() <= 1.01 * step + 2 * torch.finfo(dtype).eps * largest).all()


def test_tokens_grids_pass_the_gradient_of_swiglu_on():
    h, g = torch.randn(2, 7, 24, device=DEVICE), torch.randn(2, 7, 12, device=DEVICE)
    plain, ours = h.clone().requires_grad_(), h.clone().requires_grad_()
    fake_quantize_per_token(training_ops.swiglu(plain), 4, 4).backward(g)
    found, _ = training_ops.swiglu_fake_quantize_per_token(ours, 4, 3)
    found.backward(g)
    torch.testing.assert_close(ours.grad, plain.grad)
    torch.testing.assert_close(found, fake_quantize_per_token(training_ops.swiglu(h), 4, 4))


@pytest.mark.parametrize(
    ("operator", "num_columns", "dtype", "rest", "message"),
    [
        (training_ops.swiglu, 24, torch.int64, (), "h is torch.int64: cast it"),
        (training_ops.swiglu, 23, torch.float32, (), "h has 23 columns: .* an even number"),
        (PER_TOKEN, 24, torch.int64, (4, 3), "h is torch.int64: cast it"),
        (PER_TOKEN, 24, torch.float32, (9, 3), "activation bits 9 is out of range"),
        (PER_TOKEN, 24, torch.float32, (4, 5), "5 groups do not divide the halves of h, which has 24 columns"),
        (PER_TOKEN, 24, torch.float32, (4, 0), "0 groups do not divide the halves"),
    ],
)
def test_refuses(operator, num_columns, dtype, rest, message):
    with FakeTensorMode():  # as while compiling
        h = torch.ones(2, num_columns, dtype=dtype, device="cuda")
    with pytest.raises(ValueError, match=message):
        operator(h, *rest)


def test_far_tails_are_finite():
    h = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    dh = swiglu.swiglu_backward(torch.ones(1, 4, device=DEVICE), h, *NO_KURTOSIS)
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
