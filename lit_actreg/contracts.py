"""What the application knows of its plugins: what a quantizer gets and gives, how a callback adds a term to the loss.

A new quantizer is one file with one subclass of :class:`Quantizer` and one entry point in the group
``lit_actreg.plugins``. A new regularizer is one callback that registers one :class:`LossTerm`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lit_actreg.config import SITES, Site

ENTRY_POINT_GROUP = "lit_actreg.plugins"


@dataclass(frozen=True)
class LossTerm:
    """A penalty on the blocks' linears: coefficient(step) · Σ over blocks and sites of statistic(output or weight).

    Attributes:
        statistic: Differentiable function of one linear's output [B, T, N], or of its weight [N, K], to a scalar. It
            runs inside the compiled, possibly checkpointed block, so it is a pure function of its argument.
        sites: The linears that it sees, named by their input site.
        coefficient: Weight of the term at an optimizer step; evaluated outside the compiled region.
        tap: Called instead of ``statistic``, of outputs only, by who adds its gradient to that of y itself: a function
            of y, and of whether the block keeps y for its backward pass anyway, to (y, statistic). The block goes on
            with the y returned.
        of: Whether the statistic is of outputs or of weights. A block computes both while it runs: there its weights
            are whole also where they are sharded (FSDP2).
    """

    statistic: Callable[[Tensor], Tensor]
    sites: tuple[Site, ...] = SITES
    coefficient: Callable[[int], float] = lambda step: 1.0
    tap: Callable[[Tensor, bool], tuple[Tensor, Tensor]] | None = None
    of: Literal["output", "weight"] = "output"

    def look_at(self, y: Tensor, weight: Tensor, kept: bool) -> tuple[Tensor, Tensor]:
        """The y to go on with, and the statistic."""
        if self.of == "weight":
            return y, self.statistic(weight)
        return (y, self.statistic(y)) if self.tap is None else self.tap(y, kept)


@dataclass
class QuantizedWeight:
    """A weight on its integer grid: Ŵ = (codes − zero_point) · scale.

    Attributes:
        codes: int8 [N, K], within the range of ``bits``.
        scale: float32 [N, G]; G = 1 for one scale per output channel, else K / G columns share one.
        zero_point: int8 [N, G] for an asymmetric grid, None for a symmetric one.
        bits: Bits of the grid, 2-8.
        notes: What the report should say of this layer: plain numbers and strings, "fallback" among them if the
            method failed and another stood in.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    notes: dict[str, float | int | str] = field(default_factory=dict)


class Quantizer(ABC):
    """Turns one layer's weight into codes. Its ``__init__`` arguments are its command-line options.

    Args:
        bits: Bits of the weight grid, 2-8.
        group_size: Input columns that share a scale; null for one scale per output channel.
        symmetric: Whether zero is the middle of the grid (no zero points).

    Attributes:
        needs_hessian: Whether ``quantize_weight`` wants H; where no quantizer does, no text is read for it.
    """

    needs_hessian: bool = False

    def __init__(self, bits: int = 4, group_size: int | None = None, symmetric: bool = True) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"weight bits {bits} is out of range: choose 2 to 8")
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size {group_size} is not positive: name a divisor of the input width, or null")
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    @abstractmethod
    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> QuantizedWeight:
        """Quantizes one linear layer.

        Args:
            weight: float32 [N, K].
            hessian: float32 [K, K], mean over the calibration tokens of x̂ x̂ᵀ, where x̂ is the layer's input *on its
                activation grid*, from blocks that are already quantized. None unless ``needs_hessian``.
        """
