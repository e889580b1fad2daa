"""Statistics of activations and weights that the method is about: kurtosis, outlier channels, quantization error.

Everything is computed in float32 (float64 stays float64), whatever the autocast or input dtype.
"""

import torch
from lit_actreg_kernels.grid import dequantize, quantize, symmetric_scale
from torch import Tensor

OUTLIER_RATIO = 6.0  # arXiv 2404.03605: an outlier channel's mean |x| exceeds 6 × the layer's mean |x|


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def token_kurtosis(y: Tensor, eps: float = 1e-12) -> Tensor:
    """Mean over tokens of κ = mean((y − μ)⁴) / (σ⁴ + ε), moments over the features of y [..., N] → scalar.

    Not the excess: a Gaussian has 3, a constant 0. The mean over tokens makes it independent of the batch; sums
    over layers are the loss term's (arXiv 2404.03605 leaves the normalization open). ε only keeps an all-equal token
    finite: outputs of std 0.01, usual early in training, have σ⁴ = 1e-8, which a larger ε would silence.
    """
    y = _wide(y)
    squares = (y - y.mean(-1, keepdim=True)).square()
    variance = squares.mean(-1)
    return (squares.square().mean(-1) / (variance.square() + eps)).mean()


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


def rounding_error(weight: Tensor, bits: int) -> Tensor:
    """‖Ŵ − W‖² / ‖W‖² of round-to-nearest with one symmetric scale a row: the migration measure; weight [N, K]."""
    weight = _wide(weight)
    scale = symmetric_scale(weight.abs().amax(-1, keepdim=True), bits)
    error = dequantize(quantize(weight, scale, 0.0, bits), scale, 0.0) - weight
    return error.square().sum() / weight.square().sum().clamp(min=1e-30)
