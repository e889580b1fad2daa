"""Writes and reads the quantized checkpoint: a folder that *is* a Hugging Face checkpoint.

    config.json             the architecture, "quantization_config", and under "lit_actreg" what they cannot say
    model.safetensors       codes and scales of the linears inside blocks; embeddings, norms, head in float32
    tokenizer.json          with tokenizer_config.json, if the tokenizer is known
    report.json             what quantization did to every layer

transformers with compressed-tensors loads it as it is (:mod:`lit_actreg.compressed_tensors` has the format);
:func:`read_artifact` gives our decoder with :class:`~lit_actreg.quant.quantized_linear.QuantizedLinear` in its
blocks, equal to theirs bit by bit in float32.

A folder is written beside its place and renamed into it, so it is there whole or not at all.
"""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lit_actreg.compressed_tensors import (
    WeightFormat,
    choose_format,
    empty_linear,
    linear_from_file,
    linear_to_file,
    quantization_config,
    read_quantization_config,
)
from lit_actreg.config import SITES, ModelConfig, QuantConfig, Site
from lit_actreg.data.tokenizer import END_OF_TEXT_NAMES
from lit_actreg.gptq_format import gptq_config, to_gptq
from lit_actreg.huggingface import (
    check_tensors,
    huggingface_config,
    model_config,
    outside_names,
    read_config,
    read_tensors,
)
from lit_actreg.model import Decoder
from lit_actreg.quant.quantized_linear import QuantizedLinear

ARTIFACT_VERSION = 1


@dataclass
class Artifact:
    """Everything that one folder holds but the tokenizer.

    Attributes:
        config: Shape of the decoder.
        quant: How inputs are quantized: activations "static", "token" or "none", integer zero points.
        vocab_size: Rows of the embedding.
        outside: Float tensors outside the blocks' linears, by our names; a tied head may be left out.
        linears: The quantized linears of every block; they share bits, symmetry and group size.
        report: Becomes report.json.
        quantizer: Name and options of the method, for whoever reads the folder later.
    """

    config: ModelConfig
    quant: QuantConfig
    vocab_size: int
    outside: dict[str, Tensor]
    linears: list[dict[Site, QuantizedLinear]]
    report: dict[str, Any]
    quantizer: dict[str, Any]


def is_artifact(path: Path) -> bool:
    """Whether the folder is one that :func:`write_artifact` wrote."""
    try:
        return "lit_actreg" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the file system refuses within it becomes one line that names the reason and the mend."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"cannot write {path} ({reason}): mend that and repeat the command, which continues where it stopped; or "
            "name another output folder"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it: who reads it meanwhile, or after a full disk, sees the old one."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # processes of several machines may write one file
    try:
        with writing(path):
            beside.write_text(text)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses an output folder that would cost the user something."""
    if is_artifact(path):
        if not overwrite:
            raise FileExistsError(f"{path} already holds a quantized checkpoint: name another folder or set overwrite")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a quantized checkpoint: name another output folder")


def _copy_tokenizer(source: Path, folder: Path, context: int) -> dict[str, Any]:
    """Copies a tokenizer so that AutoTokenizer finds it; returns what config.json should say of its end of text."""
    source = source / "tokenizer.json" if source.is_dir() else source
    try:
        tokenizer = json.loads(source.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is not a tokenizer.json ({error}): name the file that was trained with") from None
    shutil.copyfile(source, folder / "tokenizer.json")
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", []) if token["special"]}
    end = next((token for token in END_OF_TEXT_NAMES if token in special), None)
    beside = source.with_name("tokenizer_config.json")
    if beside.exists():
        shutil.copyfile(beside, folder / beside.name)
    else:
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
        if end is not None:
            settings |= {"bos_token": end, "eos_token": end, "pad_token": end}
        (folder / beside.name).write_text(json.dumps(settings, indent=2) + "\n")
    return {} if end is None else {"bos_token_id": special[end], "eos_token_id": special[end]}


def write_artifact(
    path: Path,
    artifact: Artifact,
    tokenizer: Path | None = None,
    format: WeightFormat = "auto",
    overwrite: bool = False,
) -> None:
    """Writes the folder beside ``path`` and renames it there.

    Args:
        path: Folder to write.
        artifact: What to write.
        tokenizer: A tokenizer.json, or a folder that has one.
        format: Storage of the weights; "auto" packs where stock readers can load it, "gptq_v2" is the weights-only
            export (:mod:`lit_actreg.gptq_format`), which :func:`read_artifact` does not read.
        overwrite: Whether an artifact that is already there is replaced.
    """
    check_output(path, overwrite)
    config = artifact.config
    # where a group is as wide as some layers, their one scale a row does not tell that there are groups
    example = max(artifact.linears[0].values(), key=lambda linear: linear.weight_scale.shape[1])
    chosen = choose_format(example.weight_bits, example.weight_zero_point is None, format)
    tensors = {
        theirs: artifact.outside[ours].float().cpu().contiguous() for ours, theirs in outside_names(config).items()
    }
    for index, linears in enumerate(artifact.linears):
        for site, linear in linears.items():
            stored = linear_to_file(config, index, site, linear, chosen)
            tensors |= to_gptq(stored, linear.weight_bits) if chosen == "gptq_v2" else stored
    theirs = huggingface_config(config, artifact.vocab_size)
    if chosen == "gptq_v2":
        group_size = example.in_features // example.weight_scale.shape[1]
        theirs["quantization_config"] = gptq_config(example.weight_bits, group_size, example.weight_zero_point is None)
    else:
        theirs["quantization_config"] = quantization_config(config, artifact.quant, example, chosen)
    theirs["lit_actreg"] = {"version": ARTIFACT_VERSION, "quantizer": artifact.quantizer}

    partial, old = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with writing(path):
        partial.mkdir(parents=True)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            theirs |= _copy_tokenizer(tokenizer, partial, config.context)
        (partial / "report.json").write_text(json.dumps(artifact.report, indent=2) + "\n")
        (partial / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        # save_file's own mode lets nobody but the owner read it.
        shutil.copymode(partial / "config.json", partial / "model.safetensors")
        if path.exists():
            path.rename(old)
        partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def read_artifact(path: Path, device: torch.device | str = "cpu") -> Decoder:
    """The quantized decoder of a folder: its blocks hold ``QuantizedLinear`` layers.

    Raises:
        FileNotFoundError: There is no such folder, or files are missing from it.
        ValueError: It is not an artifact, or its tensors do not fit its config.json.
    """
    path = Path(path)
    if path.is_dir() and not is_artifact(path):
        raise ValueError(f"{path} is not a quantized checkpoint: name a folder that `lit-actreg quantize` wrote")
    theirs = read_config(path)
    version = theirs["lit_actreg"]["version"]
    if version != ARTIFACT_VERSION:
        raise ValueError(f"{path}: its version is {version}, this program reads {ARTIFACT_VERSION}: quantize again")
    config, vocab_size = model_config(theirs, path)
    quant, weights = read_quantization_config(theirs["quantization_config"], config.style, path)
    format = theirs["quantization_config"]["format"]
    with torch.device("meta"):
        model = Decoder(config, quant, vocab_size)
    found = read_tensors(path)
    try:
        state = {ours: found.pop(name) for ours, name in outside_names(config).items()}
        for index, block in enumerate(model.blocks):
            for site in SITES:
                old = getattr(block, site)
                (rows, columns), bias = old.weight.shape, old.bias is not None
                linear = empty_linear(rows, columns, bias, quant, site, weights)
                setattr(block, site, linear)
                buffers = linear_from_file(config, index, site, linear, format, found)
                state |= {f"blocks.{index}.{site}.{name}": tensor for name, tensor in buffers.items()}
    except KeyError as error:
        raise ValueError(f"{path}: tensor {error} is missing: it does not fit its config.json") from None
    except (RuntimeError, TypeError, IndexError):  # parts that cannot be unpacked or joined
        raise ValueError(f"{path}: the tensors of blocks.{index}.{site} do not fit its config.json") from None
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    check_tensors(path, state | found, model.state_dict())  # what is still in found is unexpected
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.requires_grad_(False).to(device)
