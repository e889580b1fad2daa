"""What learned clips are compared with: a Hadamard rotation of the input, and QuEST's estimator on top of one.

Both are per-token grids of the *rotated* input, rotated back, so that the linear behind them keeps its weight:

    W · Hᵀ Q(H x) = (W Hᵀ) · Q(H x)

the right-hand side being what an integer kernel would run. H is orthogonal and spreads an outlier channel over all the
channels of its block. They exist for comparison (``fit`` and ``validate``, W16A4): no artifact holds a rotation.

- :func:`fake_quantize_rotated`: min-max grids, a rival that needs no training (after QuaRot, arXiv 2404.00456).
- :func:`fake_quantize_quest`: a grid of half-integers that is optimal for a Gaussian, and gradients that pass where
  the rounding error is at most half a step (QuEST, arXiv 2502.05003): a rival in training.
"""

import torch
from torch import Tensor

from lit_actreg.quant.fake_quant import fake_quantize_per_token

LARGEST_BLOCK = 1024
# Step of the uniform quantizer with 2^b levels that has the least squared error for a unit normal
# (J. Max, "Quantizing for minimum distortion", 1960, table II; 7 and 8 bits computed).
GAUSSIAN_STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}


def block_hadamard(x: Tensor) -> Tensor:
    """H x of x [..., K], H symmetric, orthogonal and block-diagonal: its own inverse.

    Blocks are as large as the largest power of two that divides K (at most 1024): 256 for K = 768.
    """
    size = min(LARGEST_BLOCK, x.shape[-1] & -x.shape[-1])
    index = torch.arange(size, device=x.device)
    bits = index[:, None] & index  # Sylvester's matrix: −1 to the number of ones in i & j
    for shift in (8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    hadamard = (1 - 2 * (bits & 1)).to(x.dtype) * size**-0.5
    return (x.unflatten(-1, (-1, size)) @ hadamard).flatten(-2)


def fake_quantize_rotated(x: Tensor, bits: int = 4) -> Tensor:
    """Hᵀ Q(H x) with each token's own min-max grid: [..., K] → [..., K]; straight-through gradient."""
    return block_hadamard(fake_quantize_per_token(block_hadamard(x), bits))


def fake_quantize_quest(x: Tensor, bits: int = 4) -> Tensor:
    """Hᵀ Q(H x) on QuEST's grid of each token: [..., K] → [..., K].

    Values (k + ½) · s with s = Gaussian step · root mean square of the token, 2^b of them.

    Gradient of H x: passed where |Q(H x) − H x| ≤ s / 2, none elsewhere (the "trust mask").
    """
    rotated = block_hadamard(x)
    with torch.no_grad():
        wide = rotated if rotated.dtype == torch.float64 else rotated.float()
        step = (wide.square().mean(-1, keepdim=True).sqrt() * GAUSSIAN_STEPS[bits]).clamp(min=1e-12)
        half = 2 ** (bits - 1)
        x_hat = ((wide / step - 0.5).round().clamp(-half, half - 1) + 0.5) * step
        trusted = ((x_hat - wide).abs() <= step / 2).to(x.dtype)
        correction = x_hat.to(x.dtype) - rotated * trusted
    return block_hadamard(rotated * trusted + correction)
