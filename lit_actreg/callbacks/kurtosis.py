"""Kurtosis regularization of layer outputs (arXiv 2404.03605, section "output regularization").

    penalty = λ(step) · Σ over blocks and chosen linears of κ̄,      κ̄ = mean over tokens of mean((y − μ)⁴) / (σ⁴ + ε)

with moments over the features of each token's output y, before anything is added to it. There is no target: κ is
minimized outright. Normalization: mean over tokens, sum over linears; the paper leaves both open, so its λ = 1e-5 is
not comparable as it stands: here 1e-4 did better (docs/qat-stability.md). A Gaussian has κ = 3: N regularized linears
start near 3 · N · λ nats.

Its purpose is QAT's side effect: without it, the paper finds, the difficulty of outlier channels moves from the
activations into the weights.
"""

from lightning.pytorch import Callback

from lit_actreg.config import SITES, Site
from lit_actreg.contracts import LossTerm
from lit_actreg.module import LitLanguageModel
from lit_actreg.quant.statistics import token_kurtosis


class KurtosisRegularization(Callback):
    """Adds the mean per-token kurtosis of the blocks' linear outputs to the loss.

    Args:
        weight: λ, in nats per unit of kurtosis and linear; 0 switches the regularization off.
        sites: The linears that are regularized, by their input site.
        warmup_steps: Optimizer steps over which λ rises linearly from zero.
        every_nth_token: Estimate the mean over tokens from one in so many of each sequence, which costs as much less.
    """

    def __init__(
        self,
        weight: float = 1e-4,
        sites: list[Site] | None = None,
        warmup_steps: int = 0,
        every_nth_token: int = 4,
    ) -> None:
        self.weight, self.warmup_steps, self.every_nth_token = weight, warmup_steps, every_nth_token
        self.sites = tuple(dict.fromkeys(SITES if sites is None else sites))
        if weight < 0:
            raise ValueError(f"kurtosis.weight {weight} is negative and would grow outliers: use 0 or more")
        if warmup_steps < 0:
            raise ValueError(f"kurtosis.warmup_steps {warmup_steps} is negative: use 0 or more")
        if every_nth_token < 1:
            raise ValueError(f"kurtosis.every_nth_token {every_nth_token} is too small: use 1 (every token) or more")

    def coefficient(self, step: int) -> float:
        """λ at an optimizer step: of the step alone, so a resumed run continues it."""
        return self.weight * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def loss_terms(self, module: LitLanguageModel) -> dict[str, LossTerm]:
        """See :class:`lit_actreg.contracts.Regularizer`."""
        if self.weight == 0 or not self.sites:
            return {}
        return {"kurtosis": LossTerm(token_kurtosis, self.sites, self.coefficient, self.every_nth_token)}
