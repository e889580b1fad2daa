"""The paper's Table 1 for a set of checkpoints: perplexity by weight bits, quantizer and activations.

For every checkpoint: its float weights, then one artifact a quantizer, each with native (16-bit) and with quantized
activations, of the bits that the models were trained with. A model trained with clips uses its own; one without gets
dynamic per-token grids, as the paper's RTN, of the other models' bits or else 4. Quantized activations run as integers,
through the Trainer's precision plugin where it is :class:`~lit_actreg_plugins.w4a4_precision.W4A4Precision`.

Artifacts and results lie in the output folder. Each number stands in results.json beside all that it was made from, and
is not computed again where that is the same: checkpoint file, text, quantizer and its options, calibration tokens,
precision plugin. So an interrupted table continues, and one more checkpoint costs its own rows only.
"""

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from lit_actreg.artifact import is_artifact, read_artifact, write_whole
from lit_actreg.checkpoint import load_decoder, read_checkpoint_info
from lit_actreg.config import QuantConfig
from lit_actreg.contracts import Quantizer
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.data.packed import IGNORE
from lit_actreg.data.tokenizer import what_gives_ids
from lit_actreg.model import Decoder
from lit_actreg.plan import plan_layers
from lit_actreg.quant.quantized_linear import QuantizedLinear
from lit_actreg.quantize import quantize_model
from lit_actreg.work_folder import described

Results = dict[str, dict[str, float]]  # checkpoint's name → column → perplexity


@torch.no_grad()
def perplexity(model: Decoder, batches: Iterable[Tensor], device: torch.device) -> float:
    """exp of the mean cross-entropy over all targets of batches [B, T + 1] that are not padding."""
    model = model.to(device).eval()
    loss, num_targets = 0.0, 0
    for batch in batches:
        targets = batch[:, 1:].to(device)
        hidden, _ = model(batch[:, :-1].to(device).clamp(min=0))
        logits = model.logits(hidden).float().flatten(0, 1)
        loss += F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum").item()
        num_targets += int((targets != IGNORE).sum())
    return math.exp(loss / num_targets)


def with_activations(quant: QuantConfig, bits: int) -> QuantConfig:
    """The same model's quantization with native activations (16), or with quantized ones: its clips, or per token."""
    if bits == 16:
        return replace(quant, activations="none")
    quant = replace(quant, activation_bits=bits)
    if quant.activations == "none":  # its configuration may name sites and groups; the paper's RTN has none
        return replace(quant, activations="token", token_group_size=None)
    return replace(quant, activations="token" if quant.activations == "token" else "static")


def column(weights: str, activation_bits: int) -> str:
    """Name of a column: "W4A4 GPTQ"."""
    bits, _, method = weights.partition(" ")
    return f"{bits}A{activation_bits} {method}".strip()


def weight_names(quantizers: list[Quantizer]) -> list[str]:
    """Names like "W4 GPTQ"; where several share one, also the options in which they differ: "W4 GPTQ group_size=32"."""
    named = [(f"W{q.bits} {type(q).__name__}", q.options()) for q in quantizers]
    names = []
    for name, options in named:
        others = [theirs for its_name, theirs in named if its_name == name]
        differing = [f"{key}={value}" for key, value in options.items() if any(o.get(key) != value for o in others)]
        names.append(" ".join([name, *differing]))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"quantizers has {', '.join(twice)} twice with the same options: name each once")
    return names


def plain(part: Any) -> dict[str, Any]:
    """Class and options of a plugin, as they read in JSON."""
    options = json.loads(json.dumps(vars(part), default=str))
    return {"class": f"{type(part).__module__}.{type(part).__qualname__}", **options}


def common_bits(checkpoints: dict[str, Path], cache_dir: Path) -> int:
    """Bits of the checkpoints' activations; refuses those whose numbers could not stand in one table.

    A Hugging Face folder without a tokenizer is taken to have the table's.
    """
    if not checkpoints:
        raise ValueError("checkpoints is empty: name .ckpt files, for instance '{ours: runs/a/last.ckpt}'")
    bits: dict[str, int] = {}
    tokenizers: dict[str, Any] = {}
    vocab_sizes: dict[str, Any] = {}
    for name, path in checkpoints.items():
        if is_artifact(path):
            raise ValueError(f"checkpoints {name}: {path} is quantized: name the checkpoint that it was made from")
        info = read_checkpoint_info(path, cache_dir)
        quant = info.quant or QuantConfig(activations="none")
        if quant.activations in ("rotated", "quest"):
            raise ValueError(
                f'{name} was trained with activations "{quant.activations}", which no artifact holds: validate it'
            )
        if quant.activations in ("static", "clamp") and quant.clipped_sites and quant.zero_point == "real":
            raise ValueError(f'{name} was trained with zero_point "real", which no artifact holds: validate it')
        if quant.activations != "none":
            bits[name] = quant.activation_bits
        if info.tokenizer is not None:
            tokenizers[name] = what_gives_ids(info.tokenizer)
        vocab_sizes[name] = info.vocab_size
    for what, found in (("tokenizer", tokenizers), ("vocab_size", vocab_sizes)):
        first = next(iter(found), "")
        if different := [name for name in found if found[name] != found[first]]:
            raise ValueError(
                f"checkpoints {different[0]} has another {what} than {first}, so their perplexities are of other "
                "tokens: give it a table of its own"
            )
    if len(set(bits.values())) > 1:
        raise ValueError(f"checkpoints have activations of different bits, {bits}: give each a table of its own")
    return next(iter(bits.values()), 4)


def refuse(checkpoints: dict[str, Path], quantizers: list[Quantizer], calibration_tokens: int, cache_dir: Path) -> None:
    """Raises a ValueError where no table can be made, before anything is computed."""
    common_bits(checkpoints, cache_dir)
    weight_names(quantizers)
    if calibration_tokens < 1:
        raise ValueError(f"calibration_tokens {calibration_tokens} is too small: use 1 or more")
    for name, path in checkpoints.items():
        if Path(name).name != name:
            raise ValueError(f'checkpoints "{name}" is no name of a row: its artifacts would lie elsewhere')
        info = read_checkpoint_info(path, cache_dir)
        quant = info.quant or QuantConfig(activations="none")
        with torch.device("meta"):
            model = Decoder(info.shape, QuantConfig(activations="none"), info.vocab_size)
        for quantizer in quantizers:
            try:
                plan_layers(model, quantizer, with_activations(quant, quant.activation_bits))
            except ValueError as error:
                raise ValueError(f"checkpoints {name}, {type(quantizer).__name__}: {error}") from None


def num_sequences(data: TextDataModule, limit: int | float) -> int:
    """How many validation sequences a perplexity is of; limit as trainer.limit_val_batches: batches, or a share."""
    num_batches = limit if isinstance(limit, int) else int(limit * len(data.val_dataloader()))
    if num_batches < 1:
        raise ValueError(f"trainer.limit_val_batches {limit} leaves no batch to compute a perplexity of: raise it")
    return min(num_batches * data.batch_size, len(data.blocks["valid"]))


def fill_table(
    checkpoints: dict[str, Path],
    quantizers: list[Quantizer],
    data: TextDataModule,
    output: Path,
    calibration_tokens: int,
    device: torch.device,
    convert: Callable[[Decoder], Any],
    precision: dict[str, Any] | None = None,
    limit_val_batches: int | float = 1.0,
) -> Results:
    """Computes what is missing from ``output/results.json`` and returns all of it.

    Args:
        checkpoints: .ckpt files or Hugging Face folders by the name of their row; their tokenizer is the data's.
        quantizers: One pair of columns each.
        data: A prepared DataModule; its validation split is the text.
        output: Folder of artifacts, results, table and picture.
        calibration_tokens: Tokens of the training text that calibration sees.
        device: Where to compute.
        convert: Swaps the linears of an artifact's decoder for integer kernels, in place.
        precision: What ``convert`` is and its options (:func:`plain`).
        limit_val_batches: The first so many batches, or share of the batches, are the text.
    """
    weights, activation_bits = ["W16", *weight_names(quantizers)], common_bits(checkpoints, data.cache_dir)
    sequences = num_sequences(data, limit_val_batches)
    num_batches = math.ceil(sequences / data.batch_size)
    output.mkdir(parents=True, exist_ok=True)
    stored = output / "results.json"
    known: dict[str, dict[str, Any]] = json.loads(stored.read_text()) if stored.exists() else {}

    def store(name: str, what: str, made_from: dict[str, Any], **found: float) -> None:
        known[name][what] = {**found, "made_from": made_from}
        write_whole(stored, json.dumps(known, indent=2) + "\n")

    progress = tqdm(total=len(checkpoints) * len(weights) * 2, desc="table", unit="perplexity")
    for name, path in checkpoints.items():
        row = known.setdefault(name, {})
        parts = sorted(path.rglob("*")) if path.is_dir() else [path]
        file = [str(path.resolve()), *([part.name, part.stat().st_mtime_ns, part.stat().st_size] for part in parts)]
        for label, quantizer in zip(weights, [None, *quantizers], strict=True):
            folder = output / f"{name}-{label.replace(' ', '-').lower()}"
            artifact: dict[str, Any] = {"checkpoint": file, "text": data.packed_folder.name}
            artifact["activation_bits"] = activation_bits
            if quantizer is not None:
                artifact |= {"quantizer": described(quantizer), "calibration_tokens": calibration_tokens}
            for bits in (16, activation_bits):
                progress.update()
                number = artifact | {"sequences": sequences}
                if quantizer is not None and bits == activation_bits:
                    number["precision"] = precision
                if row.get(column(label, bits), {}).get("made_from") == number:
                    continue
                if quantizer is None:
                    model = load_decoder(path)
                    model.set_activations(with_activations(model.quant, bits))
                else:
                    same = row.get(f"artifact {label}", {}).get("made_from") == artifact
                    if not same or not is_artifact(folder):
                        model = load_decoder(path)
                        model.set_activations(with_activations(model.quant, activation_bits))
                        batches = data.calibration_batches(calibration_tokens, seed=0)
                        quantize_model(
                            model, quantizer, batches, folder, data.tokenizer_path, device=device, overwrite=True
                        )
                        store(name, f"artifact {label}", artifact)
                    model = read_artifact(folder)
                    if bits == activation_bits:
                        convert(model)
                    else:
                        for layer in model.modules():
                            if isinstance(layer, QuantizedLinear):
                                layer.activations = "none"
                text = itertools.islice(data.val_dataloader(), num_batches)
                store(name, column(label, bits), number, perplexity=perplexity(model, text, device))
    progress.close()
    columns = [column(label, bits) for label in weights for bits in (16, activation_bits)]
    return {name: {c: known[name][c]["perplexity"] for c in columns} for name in checkpoints}


def write_table(results: Results, output: Path) -> str:
    """Writes table.csv and table.png beside the results; returns the table as text."""
    columns = list(next(iter(results.values())))
    with (output / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", *columns])
        writer.writerows([name, *(f"{row[c]:.4f}" for c in columns)] for name, row in results.items())
    figure = Figure(figsize=(1.2 * len(columns), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results)
    for i, (name, row) in enumerate(results.items()):
        axes.bar([x + i * width for x in range(len(columns))], [row[c] for c in columns], width, label=name)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(columns))], [c.replace(" ", "\n") for c in columns])
    axes.set(ylabel="perplexity", yscale="log")
    axes.legend()
    figure.savefig(output / "table.png", dpi=120)
    names = max(len(name) for name in ["model", *results])
    lines = ["  ".join([f"{'model':{names}}", *(f"{c:>10}" for c in columns)])]
    for name, row in results.items():
        lines.append("  ".join([f"{name:{names}}", *(f"{row[c]:>{max(10, len(c))}.2f}" for c in columns)]))
    return "\n".join(lines)
