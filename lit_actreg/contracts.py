"""What the application knows of its plugins: what a quantizer gets and gives, how a callback adds a term to the loss.

A new quantizer is one subclass of :class:`Quantizer`, a new regularizer one Lightning callback with the method of
:class:`Regularizer`:

    class Stochastic(Quantizer):                                # lit-actreg quantize --quantizer Stochastic …
        def quantize_weight(self, weight, hessian):
            scale = symmetric_scale(weight.abs().amax(1, keepdim=True), self.bits)
            low, high = code_range(self.bits)                   # both from lit_actreg_kernels.grid
            codes = (weight / scale + torch.rand_like(weight)).floor().clamp(low, high)
            return QuantizedWeight(codes.to(torch.int8), scale, None, self.bits)

    class SmallOutputs(Callback):                               # lit-actreg fit --trainer.callbacks+=SmallOutputs
        def __init__(self, weight: float = 1e-4):               #   --trainer.callbacks.weight=1e-3 …
            self.weight = weight

        def loss_terms(self, module):
            term = LossTerm(lambda y: y.float().square().mean(), coefficient=lambda step: self.weight)
            return {"small_outputs": term}

Both are found by name once their package is installed with an entry point, here in its pyproject.toml:

    [project.entry-points."lit_actreg.plugins"]
    mine = "my_package.my_module"
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lit_actreg_kernels.grid import code_range, num_groups
from torch import Tensor

from lit_actreg.config import SITES, Site
from lit_actreg.quant.statistics import tap_token_kurtosis, token_kurtosis

ENTRY_POINT_GROUP = "lit_actreg.plugins"


@dataclass(frozen=True)
class LossTerm:
    """A penalty on the blocks' linears: coefficient(step) · Σ over blocks and sites of statistic(output or weight).

    Attributes:
        statistic: Differentiable function of one linear's output [B, T, N], or of its weight [N, K], to a scalar. It
            runs inside the compiled, possibly checkpointed block, so it is a pure function of its argument.
        sites: The linears that it sees, named by their input site.
        coefficient: Weight of the term at an optimizer step; evaluated outside the compiled region.
        every_nth_token: Only with the statistic :func:`lit_actreg.quant.statistics.token_kurtosis`, of outputs: look at
            one token in so many (1: at all), with a gradient that costs less than autograd's. None: the statistic is
            called as it stands.
        of: Whether the statistic is of outputs or of weights. A block computes both while it runs: there its weights
            are whole also where they are sharded (FSDP2).
    """

    statistic: Callable[[Tensor], Tensor]
    sites: tuple[Site, ...] = SITES
    coefficient: Callable[[int], float] = lambda step: 1.0
    every_nth_token: int | None = None
    of: Literal["output", "weight"] = "output"

    def __post_init__(self) -> None:
        if isinstance(self.sites, str) or not set(self.sites) <= set(SITES):
            raise ValueError(f"a loss term's sites {self.sites!r} are not some of {SITES}")
        if self.every_nth_token is None:
            return
        if self.statistic is not token_kurtosis or self.of != "output":
            raise ValueError(
                "a loss term's every_nth_token is for the statistic token_kurtosis itself, of outputs: leave it out, "
                "and bind another statistic's options by functools.partial"
            )
        if not isinstance(self.every_nth_token, int) or self.every_nth_token < 1:
            raise ValueError(
                f"a loss term's every_nth_token {self.every_nth_token} is no number of tokens: use 1 or more"
            )

    def look_at(self, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The y to go on with, and the statistic."""
        if self.of == "weight":
            return y, self.statistic(weight)
        if self.every_nth_token is not None:
            y, kappa = tap_token_kurtosis(y, self.every_nth_token)
            assert kappa is not None
            return y, kappa
        return y, self.statistic(y)


@runtime_checkable
class Regularizer(Protocol):
    """A callback that adds to the loss."""

    def loss_terms(self, module: Any) -> dict[str, LossTerm]:
        """The terms of a fit of this LitLanguageModel, by the name that each is logged under."""


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

    def fault(self, quantizer: "Quantizer", shape: torch.Size) -> str | None:
        """What is wrong with it as the ``quantizer``'s answer for a weight of this shape; None if nothing is."""
        if self.bits != quantizer.bits:
            return f"bits {self.bits}, where all layers have the quantizer's {quantizer.bits}"
        if (self.zero_point is None) != quantizer.symmetric:
            return (
                f"zero points {'missing' if self.zero_point is None else 'given'}, symmetric is {quantizer.symmetric}"
            )
        per_group, (low, high) = (shape[0], num_groups(shape[1], quantizer.group_size)), code_range(self.bits)
        expected = {"codes": (shape, torch.int8), "scale": (per_group, torch.float32)}
        expected |= {} if self.zero_point is None else {"zero_point": (per_group, torch.int8)}
        for name, (its_shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.shape != its_shape or tensor.dtype != dtype:
                found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
                return f"{name} {found}, not {dtype} {list(its_shape)}"
            if dtype == torch.int8 and (tensor.min() < low or tensor.max() > high):
                return f"{name} outside {low} to {high}"
        return None if self.scale.isfinite().all() else "a scale that is not finite"


class Quantizer(ABC):
    """Turns one layer's weight into codes. Its ``__init__`` arguments are its command-line options.

    Its public attributes are written into the artifact, as JSON; one that begins with an underscore is its own affair.

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

    def options(self) -> dict[str, Any]:
        """Its public attributes: plain values, or it raises ValueError."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        for name, value in options.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                what = f"{type(self).__name__}.{name} is a {type(value).__name__}"
                raise ValueError(f"{what}, which no JSON file holds: begin its name with an underscore") from None
        return options

    @abstractmethod
    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> QuantizedWeight:
        """Quantizes one linear layer.

        Args:
            weight: float32 [N, K]; it is the model's own, so it stays as it is.
            hessian: float32 [K, K], mean over the calibration tokens of x̂ x̂ᵀ, where x̂ is the layer's input *on its
                activation grid*, from blocks that are already quantized. None unless ``needs_hessian``.
        """
