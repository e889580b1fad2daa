"""Statistics of activations and weights that the method is about: kurtosis, outlier channels, quantization error.

Everything is computed in float32 (float64 stays float64), whatever the autocast or input dtype.
"""

import torch
from lit_actreg_kernels import training_ops, view_ops
from lit_actreg_kernels.grid import dequantize, quantize, symmetric_scale
from torch import Tensor

OUTLIER_RATIO = 6.0  # arXiv 2404.03605: an outlier channel's mean |x| exceeds 6 × the layer's mean |x|


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _first(num_tokens: int, every_nth_token: int) -> int:
    """The first token looked at: the middle one of the first ``every_nth_token``."""
    return min(every_nth_token // 2, num_tokens - 1)


def token_kurtosis(y: Tensor, every_nth_token: int = 1, eps: float = 1e-12) -> Tensor:
    """Mean over tokens of κ = mean((y − μ)⁴) / (σ⁴ + ε), moments over the features of y [..., T, N] → scalar.

    Not the excess: a Gaussian has 3, a constant 0. The mean over tokens makes it independent of the batch; sums
    over layers are the loss term's (arXiv 2404.03605 leaves the normalization open). ε only keeps an all-equal token
    finite: outputs of std 0.01, usual early in training, have σ⁴ = 1e-8, which a larger ε would silence.

    Args:
        every_nth_token: Look at one in so many tokens of a sequence: an estimate of the same mean at a fraction of the
            memory traffic.
    """
    if every_nth_token > 1:
        y = y[..., _first(y.shape[-2], every_nth_token) :: every_nth_token, :]
    squares = (_wide(y) - _wide(y).mean(-1, keepdim=True)).square()
    return (squares.square().mean(-1) / (squares.mean(-1).square() + eps)).mean()


def looks(num_tokens: int, every_nth_token: int | None, eps: float = 1e-12) -> training_ops.Looks:
    """At which tokens of a sequence, for the operators that compute the kurtosis of their input as well."""
    if every_nth_token is None:
        return training_ops.NOWHERE
    return _first(num_tokens, every_nth_token), every_nth_token, eps


def tap_token_kurtosis(y: Tensor, every_nth_token: int | None) -> tuple[Tensor, Tensor | None]:
    """The y to go on with, and :func:`token_kurtosis` of it (None: of no token)."""
    if every_nth_token is None:
        return y, None
    return view_ops.token_kurtosis(y, *looks(y.shape[-2], every_nth_token))


def channel_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean |x| and mean x of every channel over all tokens: x [..., K] → two [K]."""
    tokens = _wide(x).flatten(0, -2)
    return tokens.abs().mean(0), tokens.mean(0)


def outlier_ratios(mean_abs: Tensor) -> Tensor:
    """Mean |x| of each channel over the layer's mean |x|: [K] → [K]; outlier channels exceed ``OUTLIER_RATIO``."""
    return mean_abs / mean_abs.mean().clamp(min=1e-12)


def signal_to_noise(x: Tensor, x_hat: Tensor) -> Tensor:
    """10 · log₁₀(mean x² / mean (x̂ − x)²) in decibels."""
    x = _wide(x)
    return 10 * torch.log10(x.square().mean() / (_wide(x_hat) - x).square().mean().clamp(min=1e-20))


def kurtosis(x: Tensor) -> Tensor:
    """Kurtosis of all values together (weights: large where a few rows or columns have taken over)."""
    x = _wide(x).flatten()
    squares = (x - x.mean()).square()
    return squares.square().mean() / squares.mean().square().clamp(min=1e-30)


def row_maximum(weight: Tensor) -> Tensor:
    """Mean over rows of max |w|, which sets the scale of a symmetric grid a row: weight [N, K] → scalar."""
    return _wide(weight).abs().amax(-1).mean()


def rounding_error(weight: Tensor, bits: int) -> Tensor:
    """‖Ŵ − W‖² / ‖W‖² of round-to-nearest with one symmetric scale a row: the migration measure; weight [N, K]."""
    weight = _wide(weight)
    scale = symmetric_scale(weight.abs().amax(-1, keepdim=True), bits)
    error = dequantize(quantize(weight, scale, 0.0, bits), scale, 0.0) - weight
    return error.square().sum() / weight.square().sum().clamp(min=1e-30)
