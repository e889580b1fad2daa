"""Packed corpora: the documents' tokens end to end, cut into blocks of context + 1, as memory-mapped Arrow files.

Every document is followed by the end-of-text token; the stream t₀ t₁ … is cut without overlap, block i being
t[i·(C+1) : (i+1)·(C+1)], so that a block's first C tokens predict its last C. What is left at a split's end (fewer
than C + 1 tokens) is dropped. Ids are stored as uint16 up to a
vocabulary of 65,536 and as uint32 above, so 20 B tokens take 40 GB; nothing holds more than a few batches in memory.

A cached result is a folder named by the hash of everything it was made from. It is made beside, under a name that
starts with a dot, and renamed when complete: a folder under its final name is whole.
"""

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter
from datasets.utils import tqdm
from filelock import FileLock
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

CODE_VERSION = 1  # part of every cache key: raise it when the same inputs give other tokens or another layout
IGNORE = -100  # the tokens of a padding row: PyTorch's ignore_index
DOCUMENTS_PER_BATCH = 256
BATCHES_IN_FLIGHT = 4


def cache_folder(cache_dir: Path, kind: str, inputs: Any) -> Path:
    """Where the result made from ``inputs`` (plain values) lies, whether or not it is there yet."""
    key = hashlib.sha256(json.dumps([CODE_VERSION, inputs], sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / f"{kind}-{key}"


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Has ``build(empty folder)`` make a cached folder, unless it is there.

    Of several processes one builds and the others wait for it; a failed build leaves no folder.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
                result = Path(beside) / "result"
                result.mkdir()
                build(result)
                os.replace(result, folder)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class Encoder:
    """Texts → ids, each text followed by the end-of-text token."""

    def __init__(self, tokenizer: Tokenizer, end_id: int, dtype: type) -> None:
        self.tokenizer, self.end_id, self.dtype = tokenizer, end_id, dtype

    def __call__(self, texts: list[str | None]) -> list[np.ndarray]:
        """Ids of every text that is not empty."""
        encodings = self.tokenizer.encode_batch_fast([t for t in texts if t], add_special_tokens=False)
        return [np.array([*encoding.ids, self.end_id], dtype=self.dtype) for encoding in encodings]


def tokenize(documents: datasets.Dataset, encoder: Encoder) -> Iterator[np.ndarray]:
    """The documents' ids in order, in pieces of many documents.

    The threads of `tokenizers` keep every core busy as long as they have several batches to choose from: while Python
    turns one batch's ids into arrays, or one waits for its longest document, they work on the others.
    """
    nothing: np.ndarray = np.empty(0, encoder.dtype)
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(BATCHES_IN_FLIGHT) as pool, tqdm(total=len(documents), desc="tokenizing") as progress:
        for batch in documents.iter(DOCUMENTS_PER_BATCH):
            waiting.append(pool.submit(lambda texts: np.concatenate([nothing, *encoder(texts)]), batch["text"]))
            if len(waiting) > BATCHES_IN_FLIGHT:
                yield waiting.popleft().result()
            progress.update(len(batch["text"]))
        for piece in waiting:
            yield piece.result()


def cut(pieces: Iterator[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Joins pieces end to end and yields arrays [blocks, length]; the last incomplete block is dropped."""
    rest: list[np.ndarray] = []
    for piece in pieces:
        tokens = np.concatenate([*rest, piece])
        whole = len(tokens) // length * length
        if whole:
            yield tokens[:whole].reshape(-1, length)
        rest = [tokens[whole:]]


def pack(documents: datasets.Dataset, encoder: Encoder, context: int, vocab_size: int, path: Path) -> np.ndarray:
    """Writes the blocks of one split to ``path``; returns how often each token id occurs in them, int64 [V]."""
    length, dtype = context + 1, encoder.dtype
    counts = np.zeros(vocab_size, dtype=np.int64)
    features = datasets.Features({"ids": datasets.Sequence(datasets.Value(np.dtype(dtype).name), length=length)})
    with ArrowWriter(path=str(path), features=features) as writer:
        for blocks in cut(tokenize(documents, encoder), length):
            counts += np.bincount(blocks.ravel(), minlength=vocab_size)
            column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), length)
            writer.write_table(pa.table({"ids": column}, schema=features.arrow_schema))
        writer.finalize()
    return counts


class PackedBlocks(Dataset[Tensor]):
    """The blocks of one split, memory-mapped: index → int64 [context + 1]; index -1 → a row of ``IGNORE``."""

    def __init__(self, path: Path) -> None:
        self.rows = datasets.Dataset.from_file(str(path)).with_format("arrow")
        self.length: int = self.rows.features["ids"].length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """One read for a whole batch: [B] indices → int64 [B, context + 1] (the DataLoader calls this)."""
        batch = torch.full((len(indices), self.length), IGNORE)
        real = [i for i, index in enumerate(indices) if index >= 0]
        if real:
            table = self.rows[[indices[i] for i in real]]
            ids = table["ids"].combine_chunks().flatten().to_numpy().reshape(-1, self.length)
            batch[real] = torch.from_numpy(ids.astype(np.int64))
        return batch
