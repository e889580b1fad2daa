"""Packed corpora: the documents' tokens end to end, cut into blocks of context + 1, as memory-mapped Arrow files.

Every document is followed by the end-of-text token; the stream t₀ t₁ … is cut without overlap, block i being
t[i·(C+1) : (i+1)·(C+1)], so that a block's first C tokens predict its last C. What is left at a split's end (fewer
than C + 1 tokens) is dropped. The cut does not depend on the number of processes. Ids are stored as uint16 up to a
vocabulary of 65,536 and as uint32 above, so 20 B tokens take 40 GB; nothing holds more than a few batches in memory.

A cached result is a folder named by the hash of everything it was made from. It is made beside, under a name that
starts with a dot, and renamed when complete: a folder under its final name is whole.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
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

from lit_actreg.data.corpus import SPLITS, Batch, Split, held_out

CODE_VERSION = 1  # part of every cache key: raise it when the same inputs give other tokens or another layout
IGNORE = -100  # the tokens of a padding row: PyTorch's ignore_index
CHARACTERS_PER_TASK = 1 << 18  # about 0.15 s of a worker: no core idles for long at the end, and few are sent
TASKS_AHEAD = 4  # read for every worker: 0.6 s of work, more than any one read takes
TOKENS_PER_WRITE = 1 << 20
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds a period, or "max"; and the period


def cache_folder(cache_dir: Path, kind: str, inputs: Any) -> Path:
    """Where the result made from ``inputs`` (plain values) lies, whether or not it is there yet."""
    key = hashlib.sha256(json.dumps([CODE_VERSION, inputs], sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / f"{kind}-{key}"


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder for one process at a time, which then is gone; what a killed one has left the next removes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Has ``build(empty folder)`` make a cached folder, unless it is there.

    Of several processes one builds and the others wait for it; a failed build leaves no folder.
    """
    if folder.is_dir():
        return
    with scratch_folder(folder.with_name(f".{folder.name}")) as beside:
        if not folder.is_dir():
            result = beside / "result"
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


@dataclass(frozen=True)
class Piece:
    """What some consecutive documents add to one split: their number, and their ids end to end."""

    split: Split
    num_documents: int
    ids: np.ndarray


def encode(encoder: Encoder, valid_share: float, batch: Batch) -> list[Piece]:
    """Divides a batch into splits and encodes it."""
    splits, texts = batch
    sides = held_out(texts, valid_share) if len(splits) > 1 else [0] * len(texts)
    pieces = []
    for side, split in enumerate(splits):
        if split:
            ours = [text for text, its_side in zip(texts, sides, strict=True) if its_side == side]
            pieces.append(Piece(split, len(ours), np.concatenate([np.empty(0, encoder.dtype), *encoder(ours)])))
    return pieces


def tasks(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same documents in the same order, in batches of equal work whatever the documents' length."""
    for splits, run in itertools.groupby(batches, key=lambda batch: batch[0]):
        texts: list[str | None] = []
        characters = 0
        for text in itertools.chain.from_iterable(batch[1] for batch in run):
            texts.append(text)
            characters += 1 + len(text or "")
            if characters >= CHARACTERS_PER_TASK:
                yield splits, texts
                texts, characters = [], 0
        if texts:
            yield splits, texts


def read_ahead(batches: Iterator[Batch], number: int) -> Iterator[Batch]:
    """The same batches, some of them read before they are asked for, by a thread: unpacking does not hold the lock."""
    with ThreadPoolExecutor(1) as reader:
        coming = deque(reader.submit(next, batches, None) for _ in range(number))
        while batch := coming.popleft().result():
            coming.append(reader.submit(next, batches, None))
            yield batch


_encode: Callable[[Batch], list[Piece]]  # in a worker process: what it was started for


def _start_worker(function: Callable[[Batch], list[Piece]]) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker's own threads would only fight the other workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how a broken pool ends the others, whatever the parent does with it
    _encode = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no pool: its workers would wait for ever, and a lock's open file with them."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(batch: Batch) -> list[Piece]:
    return _encode(batch)


def tokenize(batches: Iterable[Batch], encoder: Encoder, valid_share: float, num_cores: int) -> Iterator[Piece]:
    """The documents' ids, in order, by a worker process a core; this process reads on meanwhile.

    Processes, because threads of one would wait for each other: for the interpreter at every token that becomes a
    Python number, and for the cache that a `tokenizers` object keeps. Forked, as a DataLoader's are, so that none has
    to import anything.
    """
    function = functools.partial(encode, encoder, valid_share)
    todo = tasks(batches)
    first = list(itertools.islice(todo, num_cores))  # no more workers than tasks
    if len(first) < 2:
        yield from itertools.chain.from_iterable(map(function, itertools.chain(first, todo)))
        return
    fork, running = multiprocessing.get_context("fork"), deque[Future[list[Piece]]]()
    with ProcessPoolExecutor(len(first), fork, _start_worker, (function,)) as pool:
        for task in itertools.chain(first, read_ahead(todo, len(first))):  # the thread starts after the fork
            running.append(pool.submit(_work, task))
            if len(running) >= TASKS_AHEAD * len(first):
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def num_usable_cores(quota: Path = CPU_QUOTA) -> int:
    """Cores that this process may use: those of its affinity, or fewer if a container has a CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, round(int(limit) / int(period))))
    return cores


def whole_blocks(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts tokens into blocks [blocks, length] and what is left over."""
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length), tokens[whole:]


def cut(pieces: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Joins pieces end to end and yields arrays [blocks, length]; the last incomplete block is dropped."""
    rest: list[np.ndarray] = []
    for piece in pieces:
        blocks, left = whole_blocks(np.concatenate([*rest, piece]), length)
        if len(blocks):
            yield blocks
        rest = [left]


class SplitWriter:
    """Writes the blocks of one split to ``path``; counts documents, and how often each id occurs in blocks: int64 [V].

    An Arrow batch holds about ``TOKENS_PER_WRITE``: a file of many small ones takes long to open.
    """

    def __init__(self, path: Path, length: int, vocab_size: int, dtype: type) -> None:
        ids = datasets.Sequence(datasets.Value(np.dtype(dtype).name), length=length)
        self.features, self.length, self.num_documents = datasets.Features({"ids": ids}), length, 0
        self.counts: np.ndarray = np.zeros(vocab_size, dtype=np.int64)
        self.writer = ArrowWriter(path=str(path), features=self.features)
        self.waiting: list[np.ndarray] = [np.empty(0, dtype)]

    def add(self, piece: Piece) -> None:
        self.num_documents += piece.num_documents
        self.waiting.append(piece.ids)
        if sum(map(len, self.waiting)) >= TOKENS_PER_WRITE:
            self._write()

    def finish(self) -> None:
        """Writes what is left, but for the last incomplete block, and closes the file."""
        self._write()
        self.writer.finalize()

    def _write(self) -> None:
        blocks, left = whole_blocks(np.concatenate(self.waiting), self.length)
        self.counts += np.bincount(blocks.ravel(), minlength=len(self.counts))
        column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), self.length)
        self.writer.write_table(pa.table({"ids": column}, schema=self.features.arrow_schema))
        self.waiting = [left]


def pack(
    batches: Iterable[Batch],
    encoder: Encoder,
    valid_share: float,
    context: int,
    vocab_size: int,
    folder: Path,
    num_cores: int | None = None,
    num_documents: Callable[[int], int | None] = lambda passed: None,
) -> dict[Split, SplitWriter]:
    """Writes the blocks of every split to ``folder``, a file each; the finished writers tell what they counted.

    Args:
        num_cores: How many processes encode; None means one on every core that this process may use.
        num_documents: How many there will be, once so many have passed, as far as is known: asked every second, and
            the progress bar shows the time left.
    """
    writers = {s: SplitWriter(folder / f"{s}.arrow", context + 1, vocab_size, encoder.dtype) for s in SPLITS}
    asked = monotonic()
    with tqdm(desc="tokenizing", unit=" documents", total=num_documents(0)) as progress:
        for piece in tokenize(batches, encoder, valid_share, num_cores or num_usable_cores()):
            writers[piece.split].add(piece)
            if monotonic() > asked + 1.0:
                progress.total = num_documents(progress.n + piece.num_documents) or progress.total
                asked = monotonic()
            progress.update(piece.num_documents)
    for writer in writers.values():
        writer.finish()
    return writers


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
