"""A penalty on the linears' weights themselves, for comparison: the paper (arXiv 2404.03605) found it unstable.

    penalty = λ(step) · mean over blocks and chosen linears of p(W),      W [N, K]

    kurtosis    p = mean((w − μ)⁴) / mean((w − μ)²)²    over all of W: 3 for a Gaussian, 1 (the least) for ±c
    linf        p = mean over rows of max |w|           a row's scale on a symmetric 4-bit grid is its maximum over 7.5

There is no target. Which norm the paper penalized, over what and how strongly is open; the rows' maxima are what
rounding to nearest feels. Kurtosis is the same for c · W, the maxima shrink with c.

λ is far above that of output kurtosis, because a single weight's share is small: with z = (w − μ)/σ, and no skew, it is
∂κ/∂w = 4 (z³ − κ z) / (N K σ), over the number of linears; ∂linf/∂w is ±1/N for one weight a row, over that number.

Meant with QAT, in the place of output regularization (:mod:`lit_actreg.callbacks.kurtosis`):

    lit-actreg fit --config … --kurtosis.weight 0 --weight_penalty.kind linf --weight_penalty.weight 1
"""

from typing import Literal

from lightning.pytorch import Callback

from lit_actreg.config import SITES, Site
from lit_actreg.contracts import LossTerm
from lit_actreg.module import LitLanguageModel
from lit_actreg.quant.statistics import kurtosis, row_maximum

PENALTIES = {"kurtosis": kurtosis, "linf": row_maximum}


class WeightPenalty(Callback):
    """Adds the kurtosis or the largest magnitudes of the blocks' weights to the loss.

    Args:
        weight: λ, in nats per unit of the mean penalty; 0 switches it off.
        kind: What is penalized: "kurtosis" of a weight's values, or "linf", the mean over its rows of the largest |w|.
        sites: The linears whose weights are penalized, by their input site.
        warmup_steps: Optimizer steps over which λ rises linearly from zero.
    """

    def __init__(
        self,
        weight: float = 0.0,
        kind: Literal["kurtosis", "linf"] = "kurtosis",
        sites: list[Site] | None = None,
        warmup_steps: int = 0,
    ) -> None:
        self.weight, self.kind, self.warmup_steps = weight, kind, warmup_steps
        self.sites = tuple(SITES if sites is None else sites)
        if weight < 0:
            raise ValueError(f"weight_penalty.weight {weight} is negative and would grow outliers: use 0 or more")
        if warmup_steps < 0:
            raise ValueError(f"weight_penalty.warmup_steps {warmup_steps} is negative: use 0 or more")

    def coefficient(self, step: int) -> float:
        """λ at an optimizer step: of the step alone, so a resumed run continues it."""
        return self.weight * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def loss_terms(self, module: LitLanguageModel) -> dict[str, LossTerm]:
        """See :class:`lit_actreg.contracts.Regularizer`."""
        if self.weight == 0 or not self.sites:
            return {}
        num_linears = module.shape.num_layers * len(self.sites)  # the term sums over them

        def share(step: int) -> float:
            return self.coefficient(step) / num_linears

        return {"weight_penalty": LossTerm(PENALTIES[self.kind], self.sites, share, of="weight")}
