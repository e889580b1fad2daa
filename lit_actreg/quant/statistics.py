"""Statistics of activations and weights that the method is about: kurtosis, outlier channels, quantization error.

Everything is computed in float32 (float64 stays float64), whatever the autocast or input dtype.
"""

import torch
from torch import Tensor

OUTLIER_RATIO = 6.0  # arXiv 2404.03605: an outlier channel's mean |x| exceeds 6 × the layer's mean |x|


def token_kurtosis(y: Tensor, eps: float = 1e-12) -> Tensor:
    """Mean over tokens of κ = mean((y − μ)⁴) / (σ⁴ + ε), moments over the features of y [..., N] → scalar.

    Not the excess: a Gaussian has 3, a constant 0. The mean over tokens makes it independent of the batch; sums
    over layers are the loss term's (arXiv 2404.03605 leaves the normalization open). ε only keeps an all-equal token finite: outputs of std 0.01, usual early in
    training, have σ⁴ = 1e-8, which a larger ε would silence.
    """
    y = y if y.dtype == torch.float64 else y.float()
    squares = (y - y.mean(-1, keepdim=True)).square()
    variance = squares.mean(-1)
    return (squares.square().mean(-1) / (variance.square() + eps)).mean()
