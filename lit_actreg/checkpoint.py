"""What a path given as a checkpoint is, and what it says of the model and its tokenizer.

Three kinds are understood: a Lightning checkpoint (.ckpt), a folder that `quantize` wrote, and an unquantized Hugging
Face folder. A Lightning checkpoint carries its tokenizer, so that it can be used on any text and on any machine. It is
one file, or, as ModelParallelStrategy writes it, a folder to which every rank has written its shards.

Of a fit's own checkpoints, ``step=N.ckpt`` in one folder, a torn one (the machine failed, the disk was full) is told
from a whole one by its end: a file's table of contents comes last, and a folder's index knows how long every shard is.
"""

import hashlib
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
from torch.distributed.checkpoint import load as load_shards

from lit_actreg.artifact import is_artifact, write_whole
from lit_actreg.compressed_tensors import read_quantization_config
from lit_actreg.config import ModelConfig, QuantConfig
from lit_actreg.huggingface import check_tensors, load_huggingface, model_config, read_config
from lit_actreg.model import Decoder

TOKENIZER_KEY = "tokenizer_json"


@dataclass
class CheckpointInfo:
    """What a checkpoint fixes.

    Attributes:
        shape: Shape of the decoder.
        quant: How its inputs are quantized; None where it does not say (an unquantized Hugging Face folder).
        vocab_size: Rows of its embedding.
        tokenizer: Its tokenizer.json, if it has one.
        folder: A folder that the module reads its weights from by itself; None for a .ckpt file, which Lightning reads.
    """

    shape: ModelConfig
    quant: QuantConfig | None
    vocab_size: int
    tokenizer: Path | None
    folder: Path | None


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a Lightning checkpoint in shards."""
    return (path / "meta.pt").is_file()


def read_shards(path: Path) -> dict[str, Any]:
    """A sharded checkpoint's plain values, and its weights put together; optimizer states stay where they are.

    PyTorch keeps the index of shards as a pickle: like any, it could run code.
    """
    reader = FileSystemReader(path)
    prefix = "state_dict."
    weights = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }
    load_shards(weights, storage_reader=reader, no_dist=True)
    checkpoint = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
    return checkpoint | {"state_dict": {name.removeprefix(prefix): tensor for name, tensor in weights.items()}}


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint of a fit, in a few words; None if it is whole. No weight is read."""
    try:
        if not path.is_dir():
            if not zipfile.is_zipfile(path):
                return "its end is missing"
            torch.load(path, "cpu", weights_only=True, mmap=True)
            return None
        torch.load(path / "meta.pt", "cpu", weights_only=True)
        lengths: dict[str, int] = {}
        for stored in FileSystemReader(path).read_metadata().storage_data.values():
            end = stored.offset + stored.length
            lengths[stored.relative_path] = max(end, lengths.get(stored.relative_path, 0))
        short = [name for name, length in lengths.items() if (path / name).stat().st_size < length]
        return f"{short[0]} is too short" if short else None
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, TypeError, EOFError) as error:
        return " ".join(str(error).split())[:100]


def newest_first(folder: Path) -> list[Path]:
    """A fit's checkpoints in a folder, by the time they were written; ``last.ckpt`` is none, nor others' names."""
    ours = [path for path in folder.glob("step=*.ckpt") if re.fullmatch(r"step=\d+\.ckpt", path.name)]
    return sorted(ours, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def whole_or_before(path: Path) -> Path:
    """``path``; if it is one of a fit's checkpoints and torn, the newest whole one before it, and a line says so."""
    real = path.resolve()
    newest = newest_first(real.parent)
    return first_whole(newest[newest.index(real) :]) if real in newest else path


def last_checkpoint(folders: list[Path]) -> Path | None:
    """The newest whole checkpoint of a fit in any of the folders; None if they hold none."""
    found = sorted((p for f in folders for p in newest_first(f)), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    return first_whole(found) if found else None


def first_whole(paths: list[Path]) -> Path:
    """The first of checkpoints, newest first, that is not torn; a line names those that are."""
    torn: list[str] = []
    for path in paths:
        reason = damage(path)
        if reason is None:
            if torn:
                rank_zero_info(f"torn: {', '.join(torn)}; the fit goes on from the checkpoint before, {path}")
            return path
        torn.append(f"{path} ({reason})")
    raise ValueError(f"no whole checkpoint: {', '.join(torn)}: name another with --ckpt_path, or start anew without")


def _check_weights(path: Path, checkpoint: dict[str, Any]) -> None:
    saved = checkpoint["hyper_parameters"]
    try:
        with torch.device("meta"):
            model = Decoder(ModelConfig(**saved["shape"]), QuantConfig(**saved["quant"]), saved["vocab_size"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its hyper-parameters make no model ({error}): name another checkpoint") from None
    found = {name: t for name, t in checkpoint["state_dict"].items() if name.startswith("model.")}
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    check_tensors(path, found, expected, "hyper-parameters")


def load_lightning_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a .ckpt, on the CPU; a file is memory-mapped and loaded without running any code from it.

    Raises:
        ValueError: It is no such file, or its tensors do not fit its hyper-parameters.
    """
    path = Path(path)
    try:
        sharded = is_sharded(path)
        checkpoint = read_shards(path) if sharded else torch.load(path, "cpu", weights_only=True, mmap=True)
        if "state_dict" in checkpoint and {"shape", "quant", "vocab_size"} <= set(checkpoint["hyper_parameters"]):
            _check_weights(path, checkpoint)
            return checkpoint
    except (OSError, RuntimeError, pickle.UnpicklingError, TypeError, KeyError, EOFError):
        pass
    raise ValueError(f"{path} is not a checkpoint of lit-actreg: name a .ckpt file that `lit-actreg fit` wrote")


def load_decoder(path: Path) -> Decoder:
    """The decoder of a .ckpt or of an unquantized Hugging Face folder, without grids then; float32 on the CPU."""
    if path.is_dir() and not is_sharded(path):
        shape, vocab_size, weights = load_huggingface(path)
        model = Decoder(shape, QuantConfig(activations="none"), vocab_size)
        model.load_state_dict(weights, strict=False)  # it has no clips
        return model.requires_grad_(False)
    checkpoint = load_lightning_checkpoint(path)
    saved = checkpoint["hyper_parameters"]
    model = Decoder(ModelConfig(**saved["shape"]), QuantConfig(**saved["quant"]), saved["vocab_size"])
    prefix = "model."
    state = {name.removeprefix(prefix): t for name, t in checkpoint["state_dict"].items() if name.startswith(prefix)}
    model.load_state_dict(state)
    return model.requires_grad_(False)


def read_checkpoint_info(path: Path, cache_dir: Path) -> CheckpointInfo:
    """What the checkpoint at ``path`` says; the tokenizer of a .ckpt is unpacked into ``cache_dir``.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is none of the three kinds.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist: name a .ckpt file or a checkpoint folder")
    if path.is_dir() and not is_sharded(path):
        config = read_config(path)
        shape, vocab_size = model_config(config, path)
        quant = None
        if is_artifact(path):
            quant, _ = read_quantization_config(config["quantization_config"], shape.style, path)
        tokenizer = path / "tokenizer.json"
        return CheckpointInfo(shape, quant, vocab_size, tokenizer if tokenizer.exists() else None, path)
    checkpoint = load_lightning_checkpoint(path)
    saved = checkpoint["hyper_parameters"]
    tokenizer_path = None
    if TOKENIZER_KEY in checkpoint:
        text = checkpoint[TOKENIZER_KEY]
        folder = cache_dir / f"tokenizer-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        tokenizer_path = folder / "tokenizer.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not tokenizer_path.exists() or tokenizer_path.read_bytes() != text.encode():
            write_whole(tokenizer_path, text)
    return CheckpointInfo(
        ModelConfig(**saved["shape"]),
        QuantConfig(**saved["quant"]),
        saved["vocab_size"],
        tokenizer_path,
        path if is_sharded(path) else None,
    )
