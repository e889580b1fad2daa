"""Quantizes a trained decoder block by block: the function behind ``lit-actreg quantize`` and the post-fit callback.

For every block: the second moments of its linears' inputs, on the activation grid and behind quantized blocks
(:mod:`lit_actreg.quant.calibration`); a quantizer makes each weight's codes; the result is saved; the hidden states
advance through the quantized block. Learned clips become the activation scales.

Resuming: finished blocks lie in ``<output>.work`` (:mod:`lit_actreg.resume`). The same command reads them instead of
calibrating, and gives the same bytes. The folder goes when the artifact is in its place.

Memory: the model, one block and its moments and factors on the device, and the hidden states on the host; the report
states the terms (:func:`memory_estimate`).
"""

import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_actreg.artifact import Artifact, check_output, write_artifact
from lit_actreg.compressed_tensors import WeightFormat, choose_format
from lit_actreg.config import SITES, QuantConfig, Site
from lit_actreg.contracts import QuantizedWeight, Quantizer
from lit_actreg.gptq_format import check_gptq
from lit_actreg.model import Block, Decoder
from lit_actreg.quant.calibration import advance, embed_tokens, input_hessians
from lit_actreg.quant.linear import QuantLinear
from lit_actreg.quant.quantized_linear import QuantizedLinear, int4_obstacle
from lit_actreg.quant.weight_grid import dequantize_weight, num_groups, relative_layer_error, round_to_nearest
from lit_actreg.report import print_report
from lit_actreg.resume import WorkFolder, fingerprint


def stored_quant_config(
    quant: QuantConfig, round_zero_point: bool, format: WeightFormat = "auto"
) -> tuple[QuantConfig, list[str]]:
    """How the artifact's inputs are quantized, given how the model was trained, and what the user should be told."""
    if format == "gptq_v2":
        reason = 'format "gptq_v2" has no place for activation scales'
        return replace(quant, activations="none"), [f"WEIGHTS ONLY (16-bit activations): {reason}"]
    if quant.activations == "static" and quant.sites and quant.zero_point == "real":
        if not round_zero_point:
            raise ValueError(
                'the model was trained with zero_point "real", which no checkpoint format can hold: set '
                'round_zero_point to move each to the nearest integer, or train with zero_point "integer"'
            )
        return replace(quant, zero_point="integer"), ["zero points were rounded: inputs differ from those in training"]
    if quant.activations in ("static", "token") and quant.sites:
        return quant, []
    reason = f'the model\'s activations are "{quant.activations}"' if quant.sites else "the model has no quantized site"
    return replace(quant, activations="none"), [f"WEIGHTS ONLY (16-bit activations): {reason}"]


def memory_estimate(model: Decoder, calibration: Sequence[Tensor]) -> dict[str, int]:
    """Expected memory in bytes, term by term. The device's terms are one block's; without calibration few remain."""
    shapes = [getattr(model.blocks[0], site).weight.shape for site in SITES]
    num_weights, largest = sum(n * k for n, k in shapes), max(k for _, k in shapes)
    num_tokens = sum(ids.numel() for ids in calibration)
    batch_tokens = max((ids.numel() for ids in calibration), default=0)
    return {
        "host_model": 4 * model.num_parameters(),
        "host_codes": len(model.blocks) * num_weights,
        "host_hidden_states": 4 * num_tokens * model.config.width,
        "device_block": 4 * num_weights,
        # Σ (N + 2K): every linear's output, its input and that on the grid
        "device_activations": 4 * batch_tokens * sum(n + 2 * k for n, k in shapes),
        "device_hessians": 4 * sum(k * k for _, k in shapes) if calibration else 0,
        # float64: H, its Cholesky factor, the identity, the inverse, and one copy within the solver
        "device_factor_workspace": 5 * 8 * largest * largest if calibration else 0,
        # the largest weight beside its copy that is updated, its dequantized form and codes
        "device_weight_workspace": 13 * max(n * k for n, k in shapes),
    }


def float_block(model: Decoder, index: int, quant: QuantConfig, device: torch.device) -> Block:
    """A float32 copy of one block on the device, free of hooks, compilation and whatever training set on the model."""
    block = Block(model.config, quant)
    block.load_state_dict(model.blocks[index].state_dict())
    return block.float().to(device).requires_grad_(False).eval()


def _quantize_layer(
    linear: QuantLinear, name: str, quantizer: Quantizer, hessian: Tensor | None
) -> tuple[QuantizedWeight, dict[str, Any]]:
    """Codes of one linear, whose weight becomes Ŵ in place, and its line of the report."""
    started = time.perf_counter()
    weight = linear.weight.data
    try:
        result = quantizer.quantize_weight(weight, hessian)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    dequantized = dequantize_weight(result.codes, result.scale, result.zero_point)
    line: dict[str, Any] = {"layer": name, "shape": list(weight.shape), "bits": result.bits}
    line["groups"] = result.scale.shape[1]
    line["mean_scale"] = result.scale.mean().item()
    line["weight_error"] = ((weight - dequantized).square().sum() / weight.square().sum().clamp(min=1e-30)).item()
    if hessian is not None:
        rtn = round_to_nearest(weight, quantizer.bits, quantizer.group_size, quantizer.symmetric, "minmax")
        rtn_weight = dequantize_weight(rtn.codes, rtn.scale, rtn.zero_point)
        line["error"] = relative_layer_error(weight, dequantized, hessian)
        line["rtn_error"] = relative_layer_error(weight, rtn_weight, hessian)
    line |= result.notes
    line["seconds"] = round(time.perf_counter() - started, 3)
    linear.weight.data = dequantized
    return result, line


def _quantize_block(
    block: Block, index: int, quantizer: Quantizer, hidden: list[Tensor], device: torch.device
) -> tuple[dict[Site, QuantizedWeight], list[dict[str, Any]]]:
    """Codes and report lines of a block's four linears; the block's weights become Ŵ in place."""
    weights, layers = {}, []
    hessians: dict[Site, Tensor] = {}
    if quantizer.needs_hessian:
        hessians = input_hessians(block, f"blocks.{index}", hidden, device)
    for site in SITES:
        linear = getattr(block, site)
        weights[site], line = _quantize_layer(linear, f"blocks.{index}.{site}", quantizer, hessians.pop(site, None))
        inputs = linear.input_quantizer
        line |= {"activations": inputs.mode, "activation_bits": inputs.bits if inputs.mode != "none" else None}
        if inputs.mode == "static":
            line |= {"clip_low": inputs.low.item(), "clip_high": inputs.high.item()}
        layers.append(line)
    return weights, layers


def plan(model: Decoder, quantizer: Quantizer, quant: QuantConfig) -> list[dict[str, Any]]:
    """Shapes, groups and the kernel that will serve each layer; refuses a group size that does not divide."""
    layers = []
    for index, block in enumerate(model.blocks):
        for site in SITES:
            linear = getattr(block, site)
            try:
                groups = num_groups(linear.in_features, quantizer.group_size)
            except ValueError as error:
                raise ValueError(f"blocks.{index}.{site}: {error}") from None
            inputs = quant.activations if site in quant.sites else "none"
            obstacle = int4_obstacle(quantizer.bits, quantizer.symmetric, inputs)
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


def quantize_model(
    model: Decoder,
    quantizer: Quantizer,
    calibration: Iterable[Tensor],
    output: Path,
    tokenizer: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    format: WeightFormat = "auto",
    round_zero_point: bool = False,
) -> dict[str, Any]:
    """Quantizes a decoder and writes the artifact; the model itself is left as it is.

    Args:
        model: The trained decoder, on any device.
        quantizer: What turns weights into codes.
        calibration: Token ids int64 [B, T] a batch; looked at only if the quantizer needs it.
        output: Folder of the artifact; ``<output>.work`` beside it holds finished blocks.
        tokenizer: A tokenizer.json, or a folder that has one, to go with it.
        device: Where a block is calibrated and quantized.
        overwrite: Whether an artifact, or another job's unfinished work, that is in the way is replaced.
        dry_run: Checks everything, prints layers and memory, and writes nothing.
        format: Storage of the weights.
        round_zero_point: Whether a model trained with a real zero point is moved to the nearest integer one.

    Returns:
        The report, as in report.json.
    """
    device = torch.device(device)
    check_output(output, overwrite)
    quant, messages = stored_quant_config(model.quant, round_zero_point, format)
    stored_format = choose_format(quantizer.bits, quantizer.symmetric, format)
    if stored_format == "gptq_v2":
        check_gptq(model, quantizer.bits, quantizer.group_size)
    layers = plan(model, quantizer, quant)
    batches = list(calibration) if quantizer.needs_hessian else []
    num_tokens = sum(ids.numel() for ids in batches)
    largest = max(line["shape"][1] for line in layers)
    if quantizer.needs_hessian and num_tokens == 0:
        raise ValueError("the calibration has no tokens: name a corpus with text, or a quantizer that needs none")
    if quantizer.needs_hessian and num_tokens < largest:
        messages.append(
            f"{num_tokens} calibration tokens are fewer than the largest layer's {largest} inputs: use more"
        )
    for message in messages:
        warnings.warn(message, stacklevel=2)
    options = {"name": type(quantizer).__name__, **vars(quantizer)}
    report: dict[str, Any] = {
        "quantizer": options,
        "format": stored_format,
        "activations": quant.activations,
        "activation_bits": quant.activation_bits if quant.activations != "none" else None,
        "calibration_tokens": num_tokens,
        "memory_bytes": memory_estimate(model, batches),
        "messages": messages,
        "layers": layers,
    }
    if dry_run:
        print_report(report)
        return report

    started = time.perf_counter()
    job = fingerprint(model, quant, {**options, "round_zero_point": round_zero_point}, batches)
    work = WorkFolder(output.with_name(f"{output.name}.work"), job, overwrite)
    hidden = embed_tokens(model, batches)
    linears: list[dict[Site, QuantizedLinear]] = []
    lines: list[dict[str, Any]] = []
    for index in tqdm(range(len(model.blocks)), desc="quantize", unit="block", file=sys.stdout):
        block = float_block(model, index, quant, device)
        finished = work.load(index, quantizer.bits)
        if finished is None:
            weights, block_lines = _quantize_block(block, index, quantizer, hidden, device)
            work.save(index, weights, block_lines)
        else:
            weights, block_lines = finished
        made: dict[Site, QuantizedLinear] = {}
        for site, weight in weights.items():
            linear = getattr(block, site)
            bias = None if linear.bias is None else linear.bias.data
            made[site] = QuantizedLinear.from_input_quantizer(weight, bias, linear.input_quantizer).cpu()
            linear.weight.data = made[site].dequantized_weight().to(device)
        if index + 1 < len(model.blocks):
            advance(block, hidden, device)
        linears.append(made)
        lines += [{**planned, **line} for planned, line in zip(layers[4 * index :], block_lines, strict=False)]
    report["layers"] = lines
    report["fallbacks"] = [line["layer"] for line in lines if "fallback" in line]
    report["worse_than_rtn"] = [line["layer"] for line in lines if line.get("error", 0) > line.get("rtn_error", 0)]
    report["seconds"] = round(time.perf_counter() - started, 3)
    state = model.state_dict()
    outside = {name: t.detach() for name, t in state.items() if not any(f".{site}." in name for site in SITES)}
    artifact = Artifact(model.config, quant, model.vocab_size, outside, linears, report, options)
    write_artifact(output, artifact, tokenizer, format, overwrite)
    shutil.rmtree(work.path)
    print_report(report)
    return report
