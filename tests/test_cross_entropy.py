"""Cross-entropy of logits and its gradient in their place, against PyTorch's in float64."""

import pytest
import torch
from fake_quant_checks import poison
from lit_actreg_kernels import cross_entropy, training_reference
from quantizer_checks import DEVICE, DTYPES
from torch.nn import functional

IGNORED = -100


def some_targets(num_rows: int, num_logits: int) -> torch.Tensor:
    targets = torch.randint(num_logits, (num_rows,))
    targets[::3] = IGNORED
    return targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_logits"), [(7, 130), (2, 4096), (1, 1), (5, 1000), (3, 33000)])
@pytest.mark.parametrize("module", [cross_entropy, training_reference])
def test_losses_and_gradients_of_rows(monkeypatch, module, dtype, num_rows, num_logits):
    logits, targets = (torch.randn(num_rows, num_logits) * 3 + 50).to(dtype), some_targets(num_rows, num_logits)
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    expected.sum().backward()
    poison(monkeypatch)
    kept, changed = logits.to(DEVICE, copy=True), logits.to(DEVICE, copy=True)
    losses = module.cross_entropy(kept, targets.to(DEVICE), IGNORED, gradient=False)
    assert torch.equal(kept.cpu(), logits)
    assert torch.equal(module.cross_entropy(changed, targets.to(DEVICE), IGNORED, gradient=True), losses)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)  # of logits around 50
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(changed.cpu().double(), wide.grad, rtol=max(eps, 1e-5), atol=1e-7)


@pytest.mark.parametrize("wrong", [-1, 130])
def test_a_target_that_is_no_index_gives_nan(wrong):
    logits, targets = torch.randn(3, 130, device=DEVICE), torch.tensor([5, wrong, IGNORED], device=DEVICE)
    losses = cross_entropy.cross_entropy(logits, targets, IGNORED, gradient=False)
    assert losses.isnan().tolist() == [False, True, False]
