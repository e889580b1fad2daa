"""Rotary positions of q and k, kernels and operator, against float64 autograd of the formula in complex numbers."""

import pytest
import torch
from fake_quant_checks import assert_near, poison
from lit_actreg_kernels import rotary, view_ops
from quantizer_checks import DEVICE, DTYPES

from lit_actreg.model import rotary_angles

NO_KURTOSIS = (torch.empty(0, 4, device=DEVICE), torch.empty(0, device=DEVICE), 0, 0)


def formula(qkv, num_heads, num_groups, width):
    """q, k and v [B, T, heads, E] of float64 qkv: a + ib times e^(i t θ^(−2j / E))."""
    q, k, v = qkv.unflatten(-1, (-1, width)).split([num_heads, num_groups, num_groups], dim=-2)
    places = torch.arange(qkv.shape[-2], dtype=torch.float64)
    angles = torch.outer(places, 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width))

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        y = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([y.real, y.imag], dim=-1)

    return turned(q), turned(k), v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_heads", "num_groups", "width"),
    [((2, 5), 3, 3, 16), ((1, 7), 4, 2, 6), ((3, 2, 4), 5, 1, 60), ((0, 4), 2, 2, 8)],
)
def test_values_and_gradients(monkeypatch, dtype, shape, num_heads, num_groups, width):
    torch.manual_seed(0)
    qkv = torch.randn(*shape, (num_heads + 2 * num_groups) * width).to(dtype)
    gradients = [torch.randn(*shape, heads, width).to(dtype) for heads in (num_heads, num_groups, num_groups)]
    wide = qkv.double().requires_grad_()
    expected = formula(wide, num_heads, num_groups, width)
    torch.autograd.backward(expected, [g.double() for g in gradients])
    angles = rotary_angles(shape[-1], width, 10_000.0, torch.device(DEVICE))

    poison(monkeypatch)
    qkv = qkv.to(DEVICE)
    q, k, *_ = rotary.rotate(qkv, *angles, num_heads, num_groups, 0, 0, 0.0)
    d_qkv = rotary.rotate_backward(*(g.to(DEVICE) for g in gradients), qkv, *angles, *NO_KURTOSIS)
    for found, truth in ((q, expected[0]), (k, expected[1]), (d_qkv, wide.grad)):
        assert found.dtype == dtype
        assert found.shape == truth.shape
        assert_near(found, truth.detach(), dtype, roundings=32)  # angles are float32


@pytest.mark.parametrize("step", [0, 2])
def test_opcheck(step):
    qkv, angles = torch.randn(2, 4, 32, device=DEVICE), rotary_angles(4, 8, 10_000.0, torch.device(DEVICE))
    looks = (min(step, 1), step, 1e-12)
    torch.library.opcheck(view_ops._rotate, (qkv, *angles, 2, 1, *looks))
    q, k, _, terms = view_ops._rotate(qkv, *angles, 2, 1, *looks)
    gradients = (q, k, torch.randn_like(k), qkv, *angles, terms, torch.ones((), device=DEVICE), *looks[:2])
    torch.library.opcheck(view_ops._rotate_backward, gradients)


def test_of_anything_that_has_a_gradient_compiled_or_not():
    """v is a part of the argument, and strides of gradients are the caller's affair."""
    num_heads, num_groups, width = 3, 1, 4
    angles = rotary_angles(5, width, 10_000.0, torch.device(DEVICE))
    x = torch.randn(2, 5, 20, device=DEVICE, requires_grad=True)
    weights = [torch.randn(2, heads, 5, width, device=DEVICE) for heads in (num_heads, num_groups, num_groups)]

    def loss(x):
        q, k, v, kappa = view_ops.rotate(x.sin(), *angles, num_heads, num_groups, (1, 2, 1e-12))
        return sum((y.transpose(1, 2) * w).sum() for y, w in zip((q, k, v), weights, strict=True)) + v.sum() + kappa

    def plain(x):
        q, k, v = formula(x.sin().cpu().double(), num_heads, num_groups, width)
        values = [(y.transpose(1, 2) * w.cpu().double()).sum() for y, w in zip((q, k, v), weights, strict=True)]
        rows = x.sin().cpu().double()[:, 1::2]
        c = rows - rows.mean(-1, keepdim=True)
        return sum(values) + v.sum() + (c.pow(4).mean(-1) / (c.pow(2).mean(-1).square() + 1e-12)).mean()

    (expected,) = torch.autograd.grad(plain(x), x)
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value = function(x)
        torch.testing.assert_close(value.cpu().double(), plain(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_gradients_in_float64():
    angles = [a.double() for a in rotary_angles(3, 4, 10_000.0, torch.device("cpu"))]
    qkv = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: view_ops.rotate(y, *angles, 1, 1, (1, 2, 1e-12)), qkv)


def test_mistakes_are_named():
    qkv, (cos, sin) = torch.zeros(1, 3, 12, device=DEVICE), rotary_angles(3, 4, 10_000.0, torch.device(DEVICE))
    with pytest.raises(ValueError, match="qkv has 12 columns, not 2 \\+ 2 · 1 heads of an even width 4"):
        view_ops.rotate(qkv, cos, sin, 2, 1)
    with pytest.raises(ValueError, match="are not of 3 tokens"):
        view_ops.rotate(qkv, cos[:2], sin[:2], 1, 1)
    with pytest.raises(ValueError, match="cast it to float32"):
        view_ops.rotate(qkv.int(), cos, sin, 1, 1)
