"""The DataModule: from source names to batches of tokens, and what others ask about the training text.

Every batch is one int64 tensor [B, context + 1], B = ``batch_size``: inputs are ``batch[:, :-1]``, targets
``batch[:, 1:]``. Training batches hold tokens only. The last validation and test batches may end in padding rows,
all :data:`~lit_actreg.data.packed.IGNORE` (-100): as targets, cross-entropy ignores them; as inputs, clamp them to 0.
To be independent of batch size and world size, a perplexity sums its losses and divides once by the number of targets
that are not IGNORE.

The cache is in ``runs/cache`` under the working directory by default: derived data lies with the runs it was made
for, in sight, is deleted with them, and does not fill a home directory, which on clusters is small.
"""

import contextlib
import errno
import functools
import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_actreg.data.corpus import SPLITS, Corpus, Split, load_source, parse_source
from lit_actreg.data.packed import Encoder, PackedBlocks, build_once, cache_folder, pack, scratch_folder, token_dtype
from lit_actreg.data.resume import ResumableLoader, num_trained_batches, rewind
from lit_actreg.data.sampler import EvalSampler, TrainSampler
from lit_actreg.data.stream import StreamedBlocks, StreamLoader, training_stream
from lit_actreg.data.tokenizer import end_of_text, load_tokenizer, train_tokenizer


class TextDataModule(LightningDataModule):
    """Text, tokenized and packed into blocks; batches are int64 tensors of batch_size × (context + 1) token ids.

    Args:
        source: Training text: "sotu" (State of the Union addresses, embedded), a file, glob or folder (.txt, .jsonl,
            .parquet, also compressed), "hub:NAME[:CONFIG][@SPLIT]" (Hugging Face hub), or a list of these.
        weights: Share of each source in a mixture, by documents; null joins the sources whole.
        valid_source: Validation and test text; null takes a source's own validation split if it has one, else
            holds documents out by a hash of their text.
        valid_share: Share of the documents held out for validation, and again for test.
        text_field: Column of .jsonl, .parquet and hub data that holds the text.
        max_documents: Use only the first documents of each source; null means all.
        stream: Read the training documents while training, store nothing, and never end (set trainer.max_steps and a
            trainer.val_check_interval in batches). The first max_documents (null: 10000) of each source are read
            ahead for the tokenizer, validation and calibration.
        tokenizer: Path of a tokenizer.json; null trains a byte-level BPE on the training documents.
        vocab_size: Rows of the embedding: entries of the trained tokenizer, upper limit for a given one.
        context: Tokens of a training sequence.
        batch_size: Sequences per batch and device.
        num_workers: Processes that load batches, per device; 0 loads them in the training process.
        cache_dir: Folder of trained tokenizers and packed blocks.
        seed: Seed of the order of training sequences and of a mixture's draws.
        prompts: Texts that `predict` continues.
    """

    def __init__(
        self,
        source: str | list[str] = "sotu",
        weights: list[float] | None = None,
        valid_source: str | None = None,
        valid_share: float = 0.02,
        text_field: str = "text",
        max_documents: int | None = None,
        stream: bool = False,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        context: int = 256,
        batch_size: int = 16,
        num_workers: int = 1,
        cache_dir: str = "runs/cache",
        seed: int = 0,
        prompts: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.prompts = prompts or []
        names = [source] if isinstance(source, str) else source
        if not names or not all(names):
            raise ValueError(f'data.source {source!r} names nothing: name a source, for instance "sotu"')
        if weights is not None and (len(weights) != len(names) or min(weights) <= 0):
            raise ValueError(f"data.weights {weights} do not fit {len(names)} sources: give one positive number each")
        if not 0 < valid_share < 0.5:
            raise ValueError(f"data.valid_share {valid_share} is out of range: choose a share between 0 and 0.5")
        least = {"context": 1, "batch_size": 1, "max_documents": 1, "num_workers": 0, "seed": 0}
        given = {"context": context, "batch_size": batch_size, "max_documents": max_documents}
        for name, value in (given | {"num_workers": num_workers, "seed": seed}).items():
            if value is not None and value < least[name]:
                raise ValueError(f"data.{name} {value} is too small: use {least[name]} or more")
        self.names, self.weights, self.valid_name, self.valid_share = names, weights, valid_source, valid_share
        self.text_field, self.stream = text_field, stream
        self.max_documents = max_documents or (10_000 if stream else None)
        self.given_tokenizer = Path(tokenizer).expanduser() if tokenizer else None
        self.vocab_size, self.context, self.batch_size, self.seed = vocab_size, context, batch_size, seed
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir).expanduser()
        self.blocks: dict[Split, PackedBlocks] = {}

    # What the cache's folders are named by; every rank computes the same without reading a document

    @functools.cached_property
    def sources(self) -> list[Any]:
        return [parse_source(name) for name in self.names]

    @functools.cached_property
    def valid_source(self) -> Any:
        return parse_source(self.valid_name) if self.valid_name else None

    @functools.cached_property
    def corpus_identity(self) -> dict[str, Any]:
        return {
            "sources": [source.identity() for source in self.sources],
            "weights": self.weights and [*self.weights, self.seed],
            "valid_source": self.valid_source and self.valid_source.identity(),
            "valid_share": self.valid_share,
            "text_field": self.text_field,
            "max_documents": self.max_documents,
            "stream": self.stream,
        }

    @functools.cached_property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json in use (of a trained one: where it will be once the data are prepared)."""
        trained_on = {"corpus": self.corpus_identity, "vocab_size": self.vocab_size}
        return self.given_tokenizer or cache_folder(self.cache_dir, "tokenizer", trained_on) / "tokenizer.json"

    @functools.cached_property
    def packed_folder(self) -> Path:
        """Folder of the packed splits, one .arrow each, and of the training token counts.

        Named by the tokenizer's content: a checkpoint's copy of a trained one finds the blocks that it was made for.
        """
        load_tokenizer(self.tokenizer_path, self.vocab_size)
        tokenizer = hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()
        return cache_folder(self.cache_dir, "packed", [self.corpus_identity, tokenizer, self.vocab_size, self.context])

    # Making and opening

    def prepare_data(self) -> None:
        """Trains the tokenizer and packs the blocks, unless the cache has them. Lightning calls it on one process."""
        predicts = self.trainer is not None and self.trainer.state.fn == "predict"
        if predicts and self.given_tokenizer:
            return  # text is generated, none is read
        if (self.given_tokenizer or self.tokenizer_path.is_file()) and self.packed_folder.is_dir():
            return
        beside = cache_folder(self.cache_dir, ".corpus", self.corpus_identity)
        with scratch_folder(beside) as scratch:
            corpus = self._corpus(scratch)
            if not self.given_tokenizer:
                build_once(
                    self.tokenizer_path.parent,
                    lambda folder: train_tokenizer(corpus.tables["train"], self.vocab_size, folder / "tokenizer.json"),
                )
            build_once(self.packed_folder, lambda folder: self._pack(corpus, folder))

    def _corpus(self, scratch: Path) -> Corpus:
        return Corpus(
            self.sources,
            self.weights,
            self.valid_source,
            self.text_field,
            self.valid_share,
            self.max_documents,
            self.seed,
            scratch,
            self.stream,
        )

    def _pack(self, corpus: Corpus, folder: Path) -> None:
        """Packs every split into ``folder``; a training or validation split without one block is an error."""
        shape = (self.valid_share, self.context, self.vocab_size)
        packed = pack(corpus.batches(), self._encoder(), *shape, folder, num_documents=corpus.num_documents)
        np.save(folder / "train_counts.npy", packed["train"].counts)
        if not packed["train"].counts.any():
            raise ValueError(
                f"data.source {self.names} ({packed['train'].num_documents} documents for training) is shorter than "
                f"one block of {self.context + 1} tokens: give more text or a smaller data.context"
            )
        if not packed["valid"].counts.any():
            raise self._too_short(f"{packed['valid'].num_documents} validation documents")

    def _too_short(self, held_out: str) -> ValueError:
        """The error of held-out text without one block: what it comes from, and how there is more."""
        if self.valid_name:
            origin, more = f"data.valid_source {self.valid_name!r}", "give more text or a smaller data.context"
        else:
            origin = f"data.source {self.names}"
            more = f"set data.valid_source, or raise data.valid_share {self.valid_share}"
        return ValueError(f"{origin} gives {held_out}, less than one block of {self.context + 1} tokens: {more}")

    def _encoder(self) -> Encoder:
        tokenizer = load_tokenizer(self.tokenizer_path, self.vocab_size)
        return Encoder(tokenizer, end_of_text(tokenizer, self.tokenizer_path), token_dtype(self.vocab_size))

    def setup(self, stage: str | None = None) -> None:
        """Opens the packed splits (memory-mapped: nothing is read); `predict` needs none."""
        if stage == "predict":
            return
        if not self.packed_folder.exists():
            raise FileNotFoundError(f"{self.packed_folder} does not exist: call prepare_data() before setup()")
        with self._whole():
            self.blocks = {split: PackedBlocks(self.packed_folder / f"{split}.arrow") for split in SPLITS}

    # Batches

    @property
    def num_ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def train_dataloader(self) -> DataLoader[Tensor]:
        if self.trainer:
            rewind(self.trainer)
        blocks = self.blocks["train"]
        per_batch = self.batch_size * self.num_ranks
        fingerprint = hashlib.sha256(self.train_token_counts.tobytes()).hexdigest()[:16]
        order: dict[str, int | str] = {
            "seed": self.seed,
            "sequences a batch": per_batch,
            "sequences": len(blocks),
            "token counts": fingerprint,
            "batches a step": self.trainer.accumulate_grad_batches if self.trainer else 1,
        }
        if self.stream:
            return self._streaming_dataloader(order)
        if len(blocks) < per_batch:
            raise ValueError(
                f"data.source {self.names} gives {len(blocks)} training sequences, fewer than one batch of {per_batch} "
                f"(data.batch_size {self.batch_size} × {self.num_ranks} devices): give more text or a smaller batch"
            )
        sampler = TrainSampler(
            blocks, self.batch_size, self.num_ranks, self.rank, self.seed, lambda: num_trained_batches(self.trainer)
        )
        return ResumableLoader(order, **self._loader_options(blocks, sampler))

    def _streaming_dataloader(self, order: dict[str, int | str]) -> DataLoader[Tensor]:
        parts = [load_source(source, self.text_field, self.cache_dir, streaming=True) for source in self.sources]
        share = None if self.valid_source else self.valid_share
        documents = training_stream(parts, self.weights, share, self.seed, self.rank, self.num_ranks)
        return StreamLoader(
            order | {"sequences": "a stream", "ranks": self.num_ranks},
            StreamedBlocks(documents, self._encoder(), self.context, ", ".join(self.names)),
            self.batch_size,
            lambda: num_trained_batches(self.trainer),
            num_workers=min(1, self.num_workers),
            multiprocessing_context="fork" if self.num_workers else None,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._eval_dataloader("valid")

    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._eval_dataloader("test")

    def check_prompts(self) -> None:
        """Raises ValueError where `predict` has nothing to continue."""
        if not self.prompts:
            raise ValueError("data.prompts is empty: give the texts to continue, for instance \"['The state of']\"")

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The prompts, one int64 [1, T] each, encoded as training text is: without the tokenizer's special tokens."""
        self.check_prompts()
        tokenizer = load_tokenizer(self.tokenizer_path, self.vocab_size)
        empty = [end_of_text(tokenizer, self.tokenizer_path)]
        ids = [tokenizer.encode(prompt, add_special_tokens=False).ids or empty for prompt in self.prompts]
        encoded = [torch.tensor([prompt_ids]) for prompt_ids in ids]
        return DataLoader(encoded, batch_size=None)  # type: ignore[arg-type]

    def decode(self, ids: Tensor) -> str:
        """Text of token ids [T]."""
        return load_tokenizer(self.tokenizer_path, self.vocab_size).decode(ids.tolist())

    def _eval_dataloader(self, split: Split) -> DataLoader[Tensor]:
        blocks = self.blocks[split]
        if not len(blocks):
            raise self._too_short(f"{split} text")
        sampler = EvalSampler(blocks, self.batch_size, self.num_ranks, self.rank)
        return DataLoader(**self._loader_options(blocks, sampler))

    def _loader_options(self, blocks: PackedBlocks, sampler: TrainSampler | EvalSampler) -> dict[str, Any]:
        return {
            "dataset": blocks,
            "sampler": sampler,
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "multiprocessing_context": "fork" if self.num_workers else None,
            "worker_init_fn": leave_signals_to_the_trainer,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": as_batch,
            # its own generator: starting an iteration must not draw from the global one, on which a resumed run depends
            "generator": torch.Generator().manual_seed(self.seed),
        }

    # What others ask

    @property
    def num_train_tokens(self) -> int:
        """Tokens in the training blocks (of a stream: in those read ahead)."""
        return len(self.blocks["train"]) * (self.context + 1)

    @functools.cached_property
    def train_token_counts(self) -> np.ndarray:
        """How often each token id occurs in the training blocks, int64 [vocab_size]."""
        with self._whole():
            return np.load(self.packed_folder / "train_counts.npy")

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """The cache is renamed into place when it is whole; what has gone wrong since is said in one line."""
        try:
            yield
        except (OSError, ValueError, EOFError) as error:
            if getattr(error, "errno", None) not in (None, errno.ENOENT):  # not the file's fault
                raise
            raise ValueError(f"{self.packed_folder} is damaged ({error}): delete it, and it is made again") from error

    def calibration_batches(self, num_tokens: int, seed: int) -> Iterator[Tensor]:
        """Random training sequences, none twice, at least ``num_tokens`` in all if there are: int64 [≤ B, context]."""
        blocks = self.blocks["train"]
        num_sequences = min(math.ceil(num_tokens / self.context), len(blocks))
        chosen = np.random.default_rng(seed).choice(len(blocks), num_sequences, replace=False).tolist()
        for start in range(0, num_sequences, self.batch_size):
            yield blocks.__getitems__(chosen[start : start + self.batch_size])[:, :-1]

    def unigram_perplexity(self, split: Split = "valid") -> float:
        """Perplexity of a held-out split's targets if tokens were drawn by their training frequency alone.

        p(v) = (count(v) + 1) / (Σ count + V): add-one smoothing over the vocabulary. What a model has learned beyond
        token frequencies is the distance to this number.
        """
        counts = self.train_token_counts + 1
        blocks = self.blocks[split]
        targets = np.zeros_like(counts)
        for start in range(0, len(blocks), 1024):
            batch = blocks.__getitems__(list(range(start, min(start + 1024, len(blocks)))))
            targets += np.bincount(batch[:, 1:].ravel().numpy(), minlength=self.vocab_size)
        return math.exp(-(targets * np.log(counts / counts.sum())).sum() / targets.sum())


def leave_signals_to_the_trainer(worker: int) -> None:
    """A cluster's SIGTERM to all processes of a job must not end the workers before the trainer has its checkpoint.

    Nor must Ctrl-C, which goes to all of a terminal's, before the trainer ends its fit. The trainer's own SIGTERM does:
    it sends one, and then waits, where it exits with a loader still in use.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # here and in the threads that are started from here on: in a forked worker, all
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
        pass
    os._exit(0)


def as_batch(rows: Tensor) -> Tensor:
    """Collates nothing: the dataset hands a whole batch over already."""
    return rows
