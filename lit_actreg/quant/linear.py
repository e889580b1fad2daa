"""The linear layer of the method: a float weight whose input passes a 4-bit grid.

The clips are two parameters of shape [1] (FSDP2 refuses 0-dimensional ones). They are learned by gradient; how fast,
from when on and from which start is the clip schedule's business (:mod:`lit_actreg.callbacks.clip_schedule`).
"""

import torch
import torch.nn.functional as F
from lit_actreg_kernels import training_ops
from lit_actreg_kernels.grid import num_groups
from lit_actreg_kernels.narrow_linear import narrow_linear
from torch import Tensor, nn

from lit_actreg.config import QuantConfig, Site
from lit_actreg.quant.fake_quant import fake_quantize, fake_quantize_per_token
from lit_actreg.quant.rivals import fake_quantize_quest, fake_quantize_rotated

# Lowest value of the activation function, where c⁻ belongs. min GELU(x) = −0.16997, at x = −0.7518.
GELU_MINIMUM = -0.17
RIVALS = {"rotated": fake_quantize_rotated, "quest": fake_quantize_quest}


class InputQuantizer(nn.Module):
    """Puts the input of one site on its grid: [..., K] → [..., K], same dtype.

    Args:
        site: Which of the block's four linear inputs this is.
        config: Grid, gradient treatment, and which sites are quantized.
        lower_bound: Lowest value the input can take, if it is known.

    Attributes:
        enabled: While False, inputs pass unchanged (before a delayed start). The clips then still take part
            in the graph, with zero gradients, as DistributedDataParallel wants. Changing it, or ``bits``, makes a
            compiled block compile once more.
        fused: Whether the fused operators (:mod:`lit_actreg.quant.fused`) run where there is one: None, on a CUDA
            device; True and False, everywhere and nowhere (for tests and benchmarks).
    """

    def __init__(self, site: Site, config: QuantConfig, lower_bound: float | None = None) -> None:
        super().__init__()
        self.site = site
        self.lower_bound = lower_bound
        self.enabled = True
        self.fused: bool | None = None
        self.configure(config)
        # On a known bound c⁻ stays: learned, it rose above GELU's minimum and masked the whole negative lobe.
        lowest = -4.0 if lower_bound is None else lower_bound
        self.low = nn.Parameter(torch.full((1,), lowest), self.has_clips and lower_bound is None)
        self.high = nn.Parameter(torch.full((1,), 4.0), self.has_clips)

    @property
    def has_clips(self) -> bool:
        return self.mode in ("static", "clamp")

    def configure(self, config: QuantConfig) -> None:
        """Takes grid, gradient treatment and mode from ``config``."""
        self.outside = config.outside_gradient
        self.integer_zero_point = config.zero_point == "integer"
        self.bits = config.activation_bits
        self.mode = config.mode(self.site)
        self.group_size = config.token_group_size if self.mode == "token" else None

    def fuses(self, x: Tensor, mode: str = "static") -> bool:
        """Whether a fused operator for this mode stands for the formula, for an input on the device of x."""
        return self.mode == mode and self.enabled and (x.is_cuda if self.fused is None else self.fused)

    def grid_options(self) -> tuple[int, bool, bool]:
        """What the fused operators want to know: bits, whether zero is exact, whether outside gradients are masked."""
        return self.bits, self.integer_zero_point, self.outside == "masked"

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "none":
            return x
        if not self.enabled:
            return x + 0.0 * (self.low + self.high).to(x.dtype)
        if self.mode == "token":
            return fake_quantize_per_token(x, self.bits, self.group_size)
        if self.mode in RIVALS:
            return RIVALS[self.mode](x, self.bits)
        if self.fuses(x):
            return training_ops.fake_quantize(x, self.low, self.high, *self.grid_options())
        rounds = self.mode == "static"
        return fake_quantize(x, self.low, self.high, self.bits, self.integer_zero_point, self.outside, rounds)

    def extra_repr(self) -> str:
        return f"{self.site}, {self.mode}, {self.bits} bits"


class QuantLinear(nn.Linear):
    """y = W x̂ + b with x̂ = ``input_quantizer(x)``: [..., K] → [..., N]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        site: Site,
        config: QuantConfig,
        lower_bound: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        num_groups(in_features, config.token_group_size if config.mode(site) == "token" else None, "token_group_size")
        self.input_quantizer = InputQuantizer(site, config, lower_bound)

    def project(self, x_hat: Tensor, detach_bias: bool = False) -> Tensor:
        """W x̂ + b of an input that is on its grid already; ``detach_bias``: b gets its gradient elsewhere."""
        bias = self.bias.detach() if detach_bias else self.bias
        if not (x_hat.is_cuda and torch.is_autocast_enabled("cuda") and self.weight.dtype == torch.float32):
            return F.linear(x_hat, self.weight, bias)
        dtype = torch.get_autocast_dtype("cuda")
        return narrow_linear(x_hat.to(dtype), self.weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.input_quantizer(x))
