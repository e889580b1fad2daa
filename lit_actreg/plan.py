"""What a quantization will do and what it will need, known before any calibration.

How inputs will be stored, the shape, groups and kernel of every layer, memory term by term; and everything that cannot
work is refused here. The time is measured, not computed: :func:`lit_actreg.quantize.estimate_seconds`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lit_actreg_kernels.grid import num_groups
from torch import Tensor

from lit_actreg.compressed_tensors import WeightFormat
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.contracts import Quantizer
from lit_actreg.model import Decoder
from lit_actreg.quant.clips import ClipMethod
from lit_actreg.quant.quantized_linear import int4_obstacle


def stored_quant_config(
    quant: QuantConfig, round_zero_point: bool, format: WeightFormat, calibrate: ClipMethod | None
) -> tuple[QuantConfig, list[str]]:
    """How the artifact's inputs are quantized, given how the model was trained, and what the user should be told."""
    if format == "gptq_v2" and calibrate is not None:
        raise ValueError(
            f'format "gptq_v2" has no place for clips: leave calibrate "{calibrate}" out, or choose "auto"'
        )
    if format == "gptq_v2":
        reason = 'format "gptq_v2" has no place for activation scales'
        return replace(quant, activations="none"), [f"WEIGHTS ONLY (16-bit activations): {reason}"]
    if calibrate is not None:
        calibrated = replace(quant, activations="static", zero_point="integer")
        if not calibrated.clipped_sites:
            raise ValueError(f'calibrate "{calibrate}" has no site whose clips it could set: name quant.sites')
        return calibrated, [f'clips were calibrated by "{calibrate}"']
    if quant.activations == "static" and quant.clipped_sites and quant.zero_point == "real":
        if not round_zero_point:
            raise ValueError(
                'the model has zero_point "real", which no checkpoint format can hold: set round_zero_point to move '
                'each to the nearest integer, or train with zero_point "integer"'
            )
        return replace(quant, zero_point="integer"), ["zero points were rounded: inputs differ from those in training"]
    if quant.activations in ("static", "token") and quant.sites:
        return quant, []
    reasons = {
        "none": 'the model\'s activations are "none"; model.quant.activations "token" or calibrate quantizes them too',
        "clamp": 'the model\'s activations are "clamp", and nothing clamps now; model.quant.activations "static" makes '
        "grids of the clips",
    }
    unheld = f'the model\'s activations are "{quant.activations}", which no checkpoint format holds'
    reason = reasons.get(quant.activations, unheld) if quant.sites else "the model has no quantized site"
    return replace(quant, activations="none"), [f"WEIGHTS ONLY (16-bit activations): {reason}"]


def plan_layers(model: Decoder, quantizer: Quantizer, quant: QuantConfig) -> list[dict[str, Any]]:
    """Shapes, groups and the kernel that will serve each layer; refuses a group size that does not divide."""
    layers = []
    for index, block in enumerate(model.blocks):
        for site in SITES:
            linear = getattr(block, site)
            inputs = quant.mode(site)
            try:
                groups = num_groups(linear.in_features, quantizer.group_size)
                token_group_size = quant.token_group_size if inputs == "token" else None
                in_groups = num_groups(linear.in_features, token_group_size, "token_group_size")
            except ValueError as error:
                raise ValueError(f"blocks.{index}.{site}: {error}") from None
            on_input = (inputs, quant.activation_bits, groups, in_groups)
            obstacle = int4_obstacle(quantizer.bits, quantizer.symmetric, *on_input)
            layers.append(
                {
                    "layer": f"blocks.{index}.{site}",
                    "shape": [linear.out_features, linear.in_features],
                    "bits": quantizer.bits,
                    "groups": groups,
                    "activations": inputs,
                    "kernel": "int4" if obstacle is None else "float",
                }
            )
    return layers


def pinned_bytes(num_bytes: int) -> int:
    """What a tensor takes in host memory: beside a GPU it is pinned, and the pinned allocator gives powers of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes and torch.cuda.is_available() else num_bytes


def memory_estimate(model: Decoder, quantizer: Quantizer, calibration: Sequence[Tensor]) -> dict[str, int]:
    """Expected memory in bytes, term by term; the job never needs more than their sum.

    The device's terms are one block's. Scales, biases and token ids are left out: they are hundreds of times smaller.
    """
    shapes = [getattr(model.blocks[0], site).weight.shape for site in SITES]
    num_weights, largest = sum(n * k for n, k in shapes), max(k for _, k in shapes)
    batch_tokens = max((ids.numel() for ids in calibration), default=0)
    return {
        "host_model": 4 * model.num_parameters(),
        "host_codes": len(model.blocks) * num_weights,
        # the file's tensors, made beside the codes when all blocks are done
        "host_file": (len(model.blocks) * num_weights * (quantizer.bits if quantizer.bits in (4, 8) else 8)) // 8,
        # pack_int32's shifted and joined bytes of the largest weight
        "host_packing": 3 * max(n * k for n, k in shapes),
        "host_hidden_states": sum(pinned_bytes(4 * ids.numel() * model.config.width) for ids in calibration),
        "device_block": 4 * num_weights,
        # Σ (N + 2K): every linear's output, its input and that on the grid
        "device_activations": 4 * batch_tokens * sum(n + 2 * k for n, k in shapes),
        "device_hessians": 4 * sum(k * k for _, k in shapes) if quantizer.needs_hessian else 0,
        # float64: H, its Cholesky factor, the identity, the inverse, and one copy within the solver
        "device_factor_workspace": 5 * 8 * largest * largest if quantizer.needs_hessian else 0,
        # the largest weight beside its copy that is updated, its dequantized form and codes
        "device_weight_workspace": 13 * max(n * k for n, k in shapes),
    }
