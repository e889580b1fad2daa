"""The kurtosis of linears' outputs with its gradient added in place, against autograd of its formula in float64."""

import pytest
import torch
from fake_quant_checks import assert_near, poison
from lit_actreg_kernels import kurtosis, view_ops
from quantizer_checks import DEVICE, DTYPES

from lit_actreg.quant.statistics import tap_token_kurtosis, token_kurtosis

EPS = 1e-12


# float32 where the Triton kernel runs under Inductor, which then writes into the incoming gradient
WIDEST, TOLERANCE = (torch.float64, 1e-10) if DEVICE == "cpu" else (torch.float32, 1e-4)


def outputs(*shape: int) -> torch.Tensor:
    """Skewed, with a mean: float64."""
    y = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return y + 0.3 * y**2 + 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "every"), [((3, 7, 66), 1), ((2, 9, 130), 4), ((5, 2, 1), 3), ((9, 33), 2), ((1, 8, 768), 4)]
)
def test_values_and_gradients(monkeypatch, dtype, shape, every):
    y = outputs(*shape).to(dtype)
    g = torch.randn(shape).to(dtype)
    first = min(every // 2, shape[-2] - 1)
    wide = y.double().requires_grad_()
    expected = token_kurtosis(wide, every)
    (30 * expected).backward()

    poison(monkeypatch)
    kappa, terms = kurtosis.token_kurtosis(y.to(DEVICE), first, every, EPS)
    torch.testing.assert_close(kappa.sum().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    found = g.to(DEVICE, copy=True)
    d_kappa = torch.tensor(30.0, device=DEVICE)
    kurtosis.add_kurtosis_gradient(found, y.to(DEVICE), terms, d_kappa, first, every)
    assert_near(found, g.double() + wide.grad, dtype, roundings=32)
    unseen = torch.ones(shape[-2], dtype=torch.bool)
    unseen[first::every] = False
    assert torch.equal(found.cpu()[..., unseen, :], g[..., unseen, :])


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_in_float64(every):
    def both(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, kappa = tap_token_kurtosis(y * 2, every)
        return y.sin(), kappa

    y = outputs(2, 5, 7).requires_grad_()
    assert torch.autograd.gradcheck(both, y)
    torch.testing.assert_close(both(y)[1], token_kurtosis(y * 2, every), rtol=1e-12, atol=0)


def test_opcheck():
    y, g = outputs(2, 5, 8).float().to(DEVICE), torch.randn(2, 5, 8, device=DEVICE)
    d_kappa = torch.tensor(0.5, device=DEVICE)
    torch.library.opcheck(view_ops._token_kurtosis, (y, 1, 2, EPS))
    terms = torch.randn(4, 4, device=DEVICE)
    torch.library.opcheck(view_ops._add_kurtosis_gradient, (g, y, terms, d_kappa, 1, 2))


def test_the_right_output_gets_the_right_gradient_compiled_or_not():
    """Three after each other, a y that is used twice, and a gradient that another tensor shares."""

    def loss(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, first = tap_token_kurtosis(y * weight, 2)
        z, second = tap_token_kurtosis(y @ y.transpose(-1, -2), 1)
        x, third = tap_token_kurtosis(z.sin(), 1)
        x = z + x  # both get the same gradient
        return (y + y.sin()).sum() + z.square().sum() + x.exp().sum() + 3 * first + 5 * second + 7 * third

    def plain(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = y * weight
        z = y @ y.transpose(-1, -2)
        x = z + z.sin()
        penalties = 3 * token_kurtosis(y, 2) + 5 * token_kurtosis(z) + 7 * token_kurtosis(z.sin())
        return (y + y.sin()).sum() + z.square().sum() + x.exp().sum() + penalties

    arguments = tuple((outputs(*s) / 4).to(DEVICE, WIDEST).requires_grad_() for s in ((2, 6, 5), (5,)))
    expected = torch.autograd.grad(plain(*arguments), arguments)
    for function in (loss, torch.compile(loss, fullgraph=True)):
        found = torch.autograd.grad(function(*arguments), arguments)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_gradient_that_is_shared_stays_as_it_is():
    y = outputs(1, 4, 6).to(DEVICE, WIDEST).requires_grad_()
    z, kappa = tap_token_kurtosis(y, 1)
    shared = torch.ones_like(z)
    torch.autograd.grad((z, kappa), y, (shared, torch.ones_like(kappa)))
    assert torch.equal(shared, torch.ones_like(z))


def test_integers_are_refused():
    with pytest.raises(ValueError, match="cast it to float32"):
        view_ops.token_kurtosis(torch.zeros(1, 2, 3, dtype=torch.int32), 0, 1, EPS)
