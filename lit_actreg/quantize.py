"""Quantizes a trained decoder block by block: the function behind ``lit-actreg quantize`` and the post-fit callback.

For every block: the second moments of its linears' inputs, on the activation grid and behind quantized blocks
(:mod:`lit_actreg.quant.calibration`); a quantizer makes each weight's codes; the result is saved; the hidden states
advance through the quantized block. Learned clips, or clips calibrated here, become the activation scales.

Resuming: finished blocks lie in ``<output>.work`` (:mod:`lit_actreg.work_folder`). The same command reads them instead
of calibrating, and gives the same bytes. The folder goes when the artifact is in its place.

Memory: the model, one block and its moments and factors on the device, and the hidden states on the host; the report
states the terms (:func:`lit_actreg.plan.memory_estimate`).
"""

import contextlib
import ctypes
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from lit_actreg.plan import memory_estimate, plan_layers, stored_quant_config
from lit_actreg.quant.calibration import advance, calibrate_clips, embed_tokens, input_hessians
from lit_actreg.quant.clips import ClipMethod
from lit_actreg.quant.linear import QuantLinear
from lit_actreg.quant.quantized_linear import QuantizedLinear
from lit_actreg.quant.weight_grid import dequantize_weight, relative_layer_error, round_to_nearest
from lit_actreg.report import print_report
from lit_actreg.work_folder import WorkFolder, described, fingerprint

logger = logging.getLogger(__name__)


class StageClock:
    """Seconds of every stage of a job, added up. A GPU is waited for when a stage ends, so that each pays its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spent = time.perf_counter() - started
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        logger.info("%s: %.2f s", stage, spent)


def return_freed_memory() -> None:
    """Has glibc give freed memory back to the system; left alone it keeps blocks of up to 32 MiB (mallopt(3))."""
    with contextlib.suppress(OSError, AttributeError):  # other systems' C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def float_block(model: Decoder, index: int, quant: QuantConfig, device: torch.device) -> Block:
    """A float32 copy of one block on the device, free of hooks, compilation and whatever training set on the model."""
    with torch.device("meta"):  # initial weights would be drawn for nothing, and take longer than the copy
        block = Block(model.config, quant)
    state = model.blocks[index].state_dict()
    state = {name: tensor.detach().to(device, torch.float32, copy=True) for name, tensor in state.items()}
    block.load_state_dict(state, assign=True)
    return block.requires_grad_(False).eval()


def _quantize_layer(
    linear: QuantLinear, name: str, quantizer: Quantizer, hessian: Tensor | None
) -> tuple[QuantizedWeight, dict[str, Any]]:
    """Codes of one linear, and its line of the report."""
    started = time.perf_counter()
    weight = linear.weight.data
    try:
        result = quantizer.quantize_weight(weight, hessian)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(result, QuantizedWeight):
        raise ValueError(f"{name}: {type(quantizer).__name__} gave {type(result).__name__}, not a QuantizedWeight")
    if fault := result.fault(quantizer, weight.shape):
        raise ValueError(f"{name}: {type(quantizer).__name__} gave {fault}")
    dequantized = dequantize_weight(result.codes, result.scale, result.zero_point)
    line: dict[str, Any] = {"layer": name, "shape": list(weight.shape), "bits": result.bits}
    line["groups"] = result.scale.shape[1]
    line["mean_scale"] = result.scale.mean().item()
    line["weight_error"] = ((weight - dequantized).square().sum() / weight.square().sum().clamp(min=1e-30)).item()
    if hessian is not None:
        search = quantizer.options().get("scale_search", "mse")  # the yardstick has the method's scales
        rtn = round_to_nearest(weight, quantizer.bits, quantizer.group_size, quantizer.symmetric, search)
        rtn_weight = dequantize_weight(rtn.codes, rtn.scale, rtn.zero_point)
        line["error"] = relative_layer_error(weight, dequantized, hessian)
        line["rtn_error"] = relative_layer_error(weight, rtn_weight, hessian)
    line |= result.notes
    line["seconds"] = round(time.perf_counter() - started, 3)
    return result, line


def _quantize_block(
    block: Block, index: int, quantizer: Quantizer, hidden: list[Tensor], device: torch.device, clock: StageClock
) -> tuple[dict[Site, QuantizedWeight], list[dict[str, Any]]]:
    """Codes and report lines of a block's four linears."""
    weights, layers = {}, []
    hessians: dict[Site, Tensor] = {}
    if quantizer.needs_hessian:
        with clock("moments"):
            hessians = input_hessians(block, f"blocks.{index}", hidden, device)
    with clock("rounding"):
        for site in SITES:
            linear = getattr(block, site)
            weights[site], line = _quantize_layer(linear, f"blocks.{index}.{site}", quantizer, hessians.pop(site, None))
            inputs = linear.input_quantizer
            line |= {"activations": inputs.mode, "activation_bits": inputs.bits if inputs.mode != "none" else None}
            line |= {} if inputs.group_size is None else {"activation_group_size": inputs.group_size}
            if inputs.mode == "static":
                line |= {"clip_low": inputs.low.item(), "clip_high": inputs.high.item()}
            layers.append(line)
    return weights, layers


def estimate_seconds(
    model: Decoder, quantizer: Quantizer, quant: QuantConfig, batches: list[Tensor], device: torch.device
) -> float:
    """Expected seconds of the loop over blocks, from its first block done for real on one batch.

        blocks · (t_rounding + (tokens / tokens of the batch) · (t_moments + t_advance))

    Nothing is assumed of the machine. What is left out is reading the checkpoint, writing the artifact, and what is
    done once: libraries wake up, kernels are compiled.
    """
    clock = StageClock(device)
    block = float_block(model, 0, quant, device)
    hidden = embed_tokens(model, batches[:1])
    hessians: dict[Site, Tensor] = {}
    for stage in ("first use", "moments"):
        with clock(stage):
            if quantizer.needs_hessian:
                hessians = input_hessians(block, "blocks.0", hidden, device)
    for stage in ("first use", "advance"):
        with clock(stage):
            advance(block, hidden, device)
    for stage, sites in (("first use", ("attn_proj",)), ("rounding", SITES)):
        with clock(stage):
            for site in sites:
                _quantize_layer(getattr(block, site), f"blocks.0.{site}", quantizer, hessians.get(site))
    num_batches = sum(ids.numel() for ids in batches) / batches[0].numel() if batches else 0.0
    passes = clock.seconds["moments"] + clock.seconds["advance"]
    return len(model.blocks) * (clock.seconds["rounding"] + num_batches * passes)


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
    calibrate: ClipMethod | None = None,
) -> dict[str, Any]:
    """Quantizes a decoder and writes the artifact; the model itself is left as it is.

    Args:
        model: The trained decoder, on any device.
        quantizer: What turns weights into codes.
        calibration: Token ids int64 [B, T] a batch; looked at only if the quantizer or ``calibrate`` needs it.
        output: Folder of the artifact; ``<output>.work`` beside it holds finished blocks.
        tokenizer: A tokenizer.json, or a folder that has one, to go with it.
        device: Where a block is calibrated and quantized.
        overwrite: Whether an artifact, or another job's unfinished work, that is in the way is replaced.
        dry_run: Checks everything, prints layers, memory and expected seconds, and writes nothing.
        format: Storage of the weights.
        round_zero_point: Whether a model trained with a real zero point is moved to the nearest integer one.
        calibrate: How static clips are set from the first calibration batch; None keeps the model's own.

    Returns:
        The report, as in report.json.
    """
    device, output = torch.device(device), Path(output)
    check_output(output, overwrite)
    quant, messages = stored_quant_config(model.quant, round_zero_point, format, calibrate)
    stored_format = choose_format(quantizer.bits, quantizer.symmetric, format)
    if stored_format == "gptq_v2":
        check_gptq(model, quantizer.bits, quantizer.group_size)
    layers = plan_layers(model, quantizer, quant)
    needs_tokens = quantizer.needs_hessian or calibrate is not None
    batches = list(calibration) if needs_tokens else []
    num_tokens = sum(ids.numel() for ids in batches)
    largest = max(line["shape"][1] for line in layers)
    if needs_tokens and num_tokens == 0:
        raise ValueError("the calibration has no tokens: name a corpus with text, or a quantizer that needs none")
    if quantizer.needs_hessian and num_tokens < largest:
        messages.append(
            f"{num_tokens} calibration tokens are fewer than the largest layer's {largest} inputs: use more"
        )
    for message in messages:
        warnings.warn(message, stacklevel=2)
    options = {"name": type(quantizer).__name__, **quantizer.options()}
    report: dict[str, Any] = {
        "quantizer": options,
        "format": stored_format,
        "activations": quant.activations,
        "activation_bits": quant.activation_bits if quant.activations != "none" else None,
        "calibration_tokens": num_tokens,
        "memory_bytes": memory_estimate(model, quantizer, batches),
        "messages": messages,
        "layers": layers,
    }
    if dry_run:
        report["expected_seconds"] = round(estimate_seconds(model, quantizer, quant, batches, device), 1)
        print_report(report)
        return report

    started, clock = time.perf_counter(), StageClock(device)
    with clock("fingerprint"):
        settings = {"quantizer": described(quantizer), "round_zero_point": round_zero_point, "calibrate": calibrate}
        job = fingerprint(model, quant, settings, batches)
    work = WorkFolder(output.with_name(f"{output.name}.work"), job, overwrite)
    with clock("embedding"):
        hidden = embed_tokens(model, batches)
    linears: list[dict[Site, QuantizedLinear]] = []
    lines: list[dict[str, Any]] = []
    for index in tqdm(range(len(model.blocks)), desc="quantize", unit="block", file=sys.stdout):
        with clock("block to device"):
            block = float_block(model, index, quant, device)
        if calibrate is not None:
            with clock("clips"):
                calibrate_clips(block, hidden[0], calibrate, device)
        finished = work.load(index, quantizer.bits)
        if finished is None:
            weights, block_lines = _quantize_block(block, index, quantizer, hidden, device, clock)
            with clock("save"):
                work.save(index, weights, block_lines)
        else:
            weights, block_lines = finished
        made: dict[Site, QuantizedLinear] = {}
        with clock("replace weights"):
            for site, weight in weights.items():
                linear = getattr(block, site)
                bias = None if linear.bias is None else linear.bias.data
                quantized = QuantizedLinear.from_input_quantizer(weight, bias, linear.input_quantizer).to(device)
                linear.weight.data = quantized.dequantized_weight()
                made[site] = quantized.cpu()
        if index + 1 < len(model.blocks):
            with clock("advance"):
                advance(block, hidden, device)
        linears.append(made)
        with clock("return memory"):
            return_freed_memory()
        lines += [{**planned, **line} for planned, line in zip(layers[4 * index :], block_lines, strict=False)]
    report["layers"] = lines
    report["fallbacks"] = [line["layer"] for line in lines if "fallback" in line]
    report["worse_than_rtn"] = [line["layer"] for line in lines if line.get("error", 0) > line.get("rtn_error", 0)]
    report["seconds"] = round(time.perf_counter() - started, 3)
    report["stage_seconds"] = {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()}
    del hidden
    state = model.state_dict()
    outside = {name: t.detach() for name, t in state.items() if not any(f".{site}." in name for site in SITES)}
    artifact = Artifact(model.config, quant, model.vocab_size, outside, linears, report, options)
    with clock("artifact"):
        write_artifact(output, artifact, tokenizer, format, overwrite)
    report["stage_seconds"]["artifact"] = round(clock.seconds["artifact"], 3)  # after the file: not in it
    shutil.rmtree(work.path)
    print_report(report)
    return report
