"""The head's logits, their cross-entropy and all gradients in one operator, against PyTorch's in float64."""

import pytest
import torch
from lit_actreg_kernels import linear_cross_entropy as module
from lit_actreg_kernels.linear_cross_entropy import linear_cross_entropy
from quantizer_checks import DEVICE
from test_cross_entropy import IGNORED, some_targets
from torch.nn import functional

from lit_actreg.module import next_token_loss


def head(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight = torch.randn(11, 24, dtype=torch.float64), torch.randn(50, 24, dtype=torch.float64)
    targets = some_targets(11, 50).to(device)
    return x.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets


def test_gradients_in_float64():
    x, weight, targets = head(torch.float64, "cpu")

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return 3 * linear_cross_entropy(x, weight, targets, IGNORED)

    assert torch.autograd.gradcheck(loss, (x, weight), check_undefined_grad=False)
    expected = 3 * functional.cross_entropy(x @ weight.t(), targets, ignore_index=IGNORED)
    torch.testing.assert_close(loss(x, weight), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_the_mean_and_its_gradients(compiled, narrow):
    """16-bit x with a float32 weight, as under autocast; what reaches the weight was never rounded to 16 bits."""
    x, weight, targets = head(torch.float32, DEVICE)
    narrow_x = x.detach().to(narrow).requires_grad_()
    rounded = narrow_x.detach().double(), weight.detach().to(narrow).double()
    wide_x, wide_weight = (t.requires_grad_() for t in rounded)
    logits = (wide_x @ wide_weight.t()).to(narrow).double()  # rounded once, as a product gives them
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED)
    (expected / 8).backward()
    function = torch.compile(linear_cross_entropy) if compiled else linear_cross_entropy
    found = function(narrow_x, weight, targets, IGNORED)
    (found / 8).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert weight.grad.dtype == torch.float32
    eps = max(torch.finfo(narrow).eps, 1e-5)
    for gradient, wide in ((narrow_x.grad, wide_x.grad), (weight.grad, wide_weight.grad)):
        torch.testing.assert_close(gradient.double(), wide, rtol=2 * eps, atol=2 * eps * wide.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_models_loss(autocast):
    """On a GPU it is the operator; everywhere it is PyTorch's cross-entropy of the head's logits."""
    layer = torch.nn.Linear(24, 50, bias=False, device=DEVICE)
    x = torch.randn(2, 11, 24, device=DEVICE, requires_grad=True)
    targets = some_targets(22, 50).view(2, 11).to(DEVICE)
    found, expected = [], []
    for loss_of, results in ((next_token_loss, found), (functional.cross_entropy, expected)):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            if loss_of is next_token_loss:
                loss = loss_of(layer, x, targets)
            else:
                loss = loss_of(layer(x).float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        results += [loss, *torch.autograd.grad(loss, (x, layer.weight))]
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=8 * eps, atol=4 * eps * other.abs().max().item())


def test_without_a_gradient_none_is_made(monkeypatch):
    x, weight, targets = head(torch.float32, DEVICE)
    calls = []
    operator = module._linear_cross_entropy
    monkeypatch.setattr(module, "_linear_cross_entropy", lambda *args: calls.append(args) or operator(*args))
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, targets, IGNORED)
    assert calls[0][-1] is False
    torch.testing.assert_close(found, linear_cross_entropy(x, weight, targets, IGNORED).detach())


def test_targets_that_are_all_ignored_leave_no_gradient():
    x, weight, targets = head(torch.float32, DEVICE)
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORED), IGNORED)
    loss.backward()
    assert loss.isnan()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_sums_over_tokens_are_wide_also_for_float16_weights():
    """One channel of 60 everywhere: 16384 tokens of one target add up to more than float16 holds."""
    x = torch.zeros(16384, 8, dtype=torch.float16, device=DEVICE)
    x[:, 0] = 60.0
    weight = torch.zeros(50, 8, dtype=torch.float16, device=DEVICE).requires_grad_()
    targets = torch.zeros(16384, dtype=torch.int64, device=DEVICE)
    linear_cross_entropy(x, weight, targets, IGNORED).backward()
    expected = torch.full((50,), 60 / 50)
    expected[0] -= 60
    torch.testing.assert_close(weight.grad[:, 0].cpu().float(), expected, rtol=2e-3, atol=0)


def test_there_is_no_second_derivative():
    x, weight, targets = head(torch.float32, DEVICE)
    loss = linear_cross_entropy(x, weight, targets, IGNORED)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


@pytest.mark.parametrize("change", ["hook", "subclass", "bias"])
def test_a_head_of_its_own_kind_is_called(monkeypatch, change):
    """Then the operator, which multiplies by the weight alone, must not run (nowhere else is it looked for here)."""
    called = []

    class Wrapped(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append(True)
            return super().forward(x)

    layer = (Wrapped if change == "subclass" else torch.nn.Linear)(24, 50, bias=change == "bias", device=DEVICE)
    if change == "hook":
        layer.register_forward_hook(lambda *_: called.append(True))
    x, targets = torch.randn(1, 11, 24, device=DEVICE), some_targets(11, 50).view(1, 11).to(DEVICE)
    monkeypatch.setattr("lit_actreg.module.linear_cross_entropy", lambda *_: pytest.fail("the operator ran"))
    expected = functional.cross_entropy(layer(x)[0], targets[0], ignore_index=IGNORED)
    called.clear()
    torch.testing.assert_close(next_token_loss(layer, x, targets), expected)
    assert called or change == "bias"


def test_errors_say_what_to_do():
    x, weight, targets = head(torch.float32, DEVICE)
    with pytest.raises(ValueError, match="flatten the tokens"):
        linear_cross_entropy(x[None], weight, targets, IGNORED)
    with pytest.raises(ValueError, match="pass an int64 for every token"):
        linear_cross_entropy(x, weight, targets[1:], IGNORED)
    with pytest.raises(ValueError, match="pass an int64 for every token"):
        linear_cross_entropy(x, weight, targets.int(), IGNORED)
