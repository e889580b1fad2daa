"""GPTQ: rounds a weight column by column and lets the columns to come make up for each rounding error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, algorithm 1. The layer's loss is ‖(W − Ŵ) X̂‖² = tr(Δ H Δᵀ) with H = mean x̂ x̂ᵀ, where
x̂ is the input *on its activation grid*, so what is minimized is the error of the layer as it will run. For column i:

    q_i = round to the grid of w_i        e_i = (w_i − ŵ_i) / U_ii        w_j ← w_j − e_i · U_ij   for all j > i

U is the upper Cholesky factor of the inverse, (H + λI)⁻¹ = UᵀU, whose row i is what optimal brain surgery gives when
the columns before i are fixed. The damping is relative: λ = damping · mean(diag H).

How U is found: H⁻¹ is never formed. With J the reversal of the order of columns, J(H + λI)J = LLᵀ gives U = (JLJ)⁻¹:
one Cholesky and one triangular inverse. They run in float64: on Hessians of a small trained W4A4 model float32 gives
U to 2e-5 with damping 0.01 (condition 5e3) but only to 1e-3 with 1e-4 (4e5), and saves little (K = 2048 on two CPU
cores: 0.16 against 0.21 s). The rounding of columns runs in the weight's dtype.

Blocks: updates within ``block_size`` columns are made column by column, on a GPU by one kernel
(:mod:`lit_actreg_kernels.gptq_columns`); those of all later columns wait for the end of the block and are one matrix
product (the paper's lazy batch updates, same result).

Groups: without ``activation_order`` a group's grid is chosen when its first column is reached, from the weights as
updated so far. With it, columns are visited by falling diag H, so grids are chosen before (static groups), and the
codes stay in the weight's own column order: nothing that runs the model needs to know.

Failures stay local and are reported in ``notes``: a column whose input is always zero ("dead_columns") is rounded to
nearest, and neither gives nor takes a correction; where the Cholesky fails, damping is raised tenfold until it is 1,
and after that the layer is rounded to nearest ("fallback").
"""

import torch
from lit_actreg_kernels import ops
from lit_actreg_kernels.grid import num_groups
from torch import Tensor

from lit_actreg.contracts import QuantizedWeight, Quantizer
from lit_actreg.quant.weight_grid import ScaleSearch, round_to_nearest, weight_grid


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """Upper triangular U with H⁻¹ = UᵀU, for H [K, K]; None where H is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if info.item() or not lower.isfinite().all():
        return None
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    del lower, identity
    return inverse.flip(0, 1) if inverse.isfinite().all() else None


def damped_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """U of H + λI with λ = damping · mean(diag H), and the damping that it took: raised tenfold up to 1 on failure.

    The Hessian is damped in place: a copy of the largest one is gigabytes.
    """
    diagonal = hessian.diagonal().clone()
    while True:
        hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
        factor = inverse_factor(hessian)
        if factor is not None or damping >= 1.0:
            return factor, damping
        damping = min(10 * damping, 1.0) if damping > 0 else 1e-4


class GPTQ(Quantizer):
    """Rounds column by column, each error compensated in the columns to come, on the inputs as the model will run.

    Args:
        bits: Bits of the weight grid, 2-8.
        group_size: Input columns that share a scale; null for one scale per output channel.
        symmetric: Whether zero is the middle of the grid (no zero points).
        scale_search: Range of the grids. "mse": the shrunken range with the least squared error; "minmax": all
            weights.
        activation_order: Visit columns by falling mean square of their input instead of left to right.
        damping: λ added to the diagonal of the Hessian, relative to its mean.
        block_size: Columns whose updates are made at once, 1-256; changes speed, not results.
    """

    needs_hessian = True

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        symmetric: bool = True,
        scale_search: ScaleSearch = "mse",
        activation_order: bool = True,
        damping: float = 0.01,
        block_size: int = 128,
    ) -> None:
        super().__init__(bits, group_size, symmetric)
        if scale_search not in ("minmax", "mse"):
            raise ValueError(f'scale_search "{scale_search}" is unknown: choose "minmax" or "mse"')
        if not 0 <= damping <= 1:
            raise ValueError(f"damping {damping} is out of range: choose 0 to 1, 0.01 as a rule")
        if not 1 <= block_size <= ops.MAX_GPTQ_COLUMNS:
            limit = ops.MAX_GPTQ_COLUMNS
            raise ValueError(f"block_size {block_size} is out of range: choose 1 to {limit}, 128 as a rule")
        self.scale_search: ScaleSearch = scale_search
        self.activation_order, self.damping, self.block_size = activation_order, damping, block_size

    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> QuantizedWeight:
        """See :meth:`lit_actreg.contracts.Quantizer.quantize_weight`. Runs on the weight's device, in its dtype."""
        assert hessian is not None, "GPTQ needs the Hessian of the layer's inputs"
        for name, tensor in (("weight", weight), ("Hessian", hessian)):
            if not tensor.isfinite().all():
                raise ValueError(f"the {name} has NaN or infinite values: quantize an earlier checkpoint")
        h_KK = hessian.to(torch.float64, copy=True)
        dead = h_KK.diagonal() == 0
        # Any positive number will do: a dead column's row is zero elsewhere. The mean leaves the damping as it is.
        h_KK.diagonal()[dead] = h_KK.diagonal()[~dead].mean() if not dead.all() else 1.0
        order = torch.arange(len(h_KK), device=h_KK.device)
        if self.activation_order:
            order = h_KK.diagonal().argsort(descending=True, stable=True)
        h_KK = h_KK[order[:, None], order]
        factor, damping = damped_factor(h_KK, self.damping)
        del h_KK
        if factor is None:
            result = round_to_nearest(weight, self.bits, self.group_size, self.symmetric, self.scale_search)
            result.notes = {"damping": damping, "fallback": "RTN: the Hessian is not positive definite"}
            return result
        result = self._round_columns(weight, factor.to(weight.dtype), order)
        result.notes = {"damping": damping}
        if dead.any():
            result.notes["dead_columns"] = int(dead.sum())
        return result

    def _round_columns(self, weight: Tensor, factor_KK: Tensor, order: Tensor) -> QuantizedWeight:
        """Algorithm 1, on the transposed weight so that a column of W is contiguous."""
        num_columns = weight.shape[1]
        groups = num_groups(num_columns, self.group_size)
        width = num_columns // groups
        static_groups = self.activation_order or groups == 1
        scale, zero_point = weight_grid(
            weight.unflatten(1, (groups, width)), self.bits, self.symmetric, self.scale_search
        )
        w_KN = weight.t()[order].contiguous()
        codes_KN = torch.empty_like(w_KN, dtype=torch.int8)
        group_K, start = order // width, 0
        while start < num_columns:
            end = min(start + self.block_size, num_columns)
            if not static_groups:  # a block lies within a group, whose grid is chosen when it is reached
                group = start // width
                end = min(end, (group + 1) * width)
                if start % width == 0:
                    group_N1C = w_KN[start : start + width].t().unsqueeze(1)
                    s, z = weight_grid(group_N1C, self.bits, self.symmetric, self.scale_search)
                    scale[:, group], zero_point[:, group] = s[:, 0], z[:, 0]
            block = slice(start, end)
            codes_KN[block], errors_CN = ops.gptq_columns(
                w_KN[block], factor_KK[block, block], scale, zero_point, group_K[block], self.bits
            )
            w_KN[end:].addmm_(factor_KK[block, end:].t(), errors_CN, alpha=-1)
            start = end
        codes = torch.empty_like(codes_KN)
        codes[order] = codes_KN
        z_int8 = None if self.symmetric else zero_point.to(torch.int8)
        return QuantizedWeight(codes.t().contiguous(), scale, z_int8, self.bits)
