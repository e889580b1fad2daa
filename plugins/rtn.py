"""RTN: every weight to the nearest code of its grid, no calibration. Method and formulas: quant/weight_grid.py."""

from torch import Tensor

from lit_actreg.contracts import QuantizedWeight, Quantizer
from lit_actreg.quant.weight_grid import ScaleSearch, round_to_nearest


class RTN(Quantizer):
    """Rounds every weight to the nearest code of its grid; needs no calibration.

    Args:
        bits: Bits of the weight grid, 2-8.
        group_size: Input columns that share a scale; null for one scale per output channel.
        symmetric: Whether zero is the middle of the grid (no zero points).
        scale_search: Range of the grid. "mse": the shrunken range with the least squared error; "minmax": all
            weights (the paper's).
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        symmetric: bool = True,
        scale_search: ScaleSearch = "mse",
    ) -> None:
        super().__init__(bits, group_size, symmetric)
        if scale_search not in ("minmax", "mse"):
            raise ValueError(f'scale_search "{scale_search}" is unknown: choose "minmax" or "mse"')
        self.scale_search = scale_search

    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> QuantizedWeight:
        """See :meth:`lit_actreg.contracts.Quantizer.quantize_weight`; the Hessian is not looked at."""
        if not weight.isfinite().all():
            raise ValueError("the weight has NaN or infinite values: quantize an earlier checkpoint")
        return round_to_nearest(weight, self.bits, self.group_size, self.symmetric, self.scale_search)
