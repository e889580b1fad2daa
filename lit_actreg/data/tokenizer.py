"""The tokenizer: a byte-level BPE trained on the training documents, or a tokenizer.json that the user gives.

Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) starts from the 256 bytes and merges, again and again, the
most frequent adjacent pair, until the vocabulary is full; any text can be encoded. `tokenizers` does the work, and
the same documents give the same merges. One special token, ``<|endoftext|>`` (id 0 of a trained tokenizer), follows
every document.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# What a tokenizer may call the token that ends a text: GPT-2 and NeoX, Llama 2, Gemma, Llama 3, BERT
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[EOS]")
TRAINING_BYTES = 200_000_000  # merges hardly change beyond this much text; evenly spaced documents are taken


def train_tokenizer(documents: datasets.Dataset, vocab_size: int, path: Path) -> None:
    """Trains a BPE of ``vocab_size`` entries (fewer if the text has no more pairs) and writes it to ``path``."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} cannot hold the 256 bytes and {END_OF_TEXT}: use {smallest} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=os.isatty(2),
    )
    step = max(1, documents.data.nbytes // TRAINING_BYTES)
    sample = documents.select(range(0, len(documents), step)) if step > 1 else documents

    def batches() -> Iterator[list[str]]:
        for batch in sample.iter(batch_size=100):
            yield [text for text in batch["text"] if text]

    tokenizer.train_from_iterator(batches(), trainer=trainer, length=len(sample))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    tokenizer.save(str(beside))
    beside.replace(path)


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json as it is."""
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {str(path)!r} does not exist: name a tokenizer.json, or null to train one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizer {str(path)!r} is not a tokenizer.json ({reason}): name one, or null") from error


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Reads a tokenizer.json for packing; it may have fewer entries than the model has rows, not more."""
    tokenizer = read_tokenizer(path)
    entries = 1 + max(tokenizer.get_vocab().values(), default=-1)  # ids may have holes: the largest one counts
    if entries > vocab_size:
        raise ValueError(
            f"tokenizer {str(path)!r} has {entries} entries, more than data.vocab_size {vocab_size}: "
            f"set data.vocab_size to {entries} or more, or where a model fixes it name that model's tokenizer"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end_of_text(tokenizer, path)
    return tokenizer


def what_gives_ids(path: Path) -> dict[str, Any]:
    """What of a tokenizer.json decides the ids of a text, however the file is written: no special tokens are added."""
    read = json.loads(read_tokenizer(path).to_str())
    return {part: read[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")}


def gives_other_ids(path: Path, own: Path) -> bool:
    """Whether the tokenizer at ``path`` is another than a checkpoint's own, added tokens aside; who cannot say says no.

    A checkpoint's tokenizer may lack an end of text, or be damaged; then it is right to name a mended one.
    """
    try:
        given, theirs = what_gives_ids(path), what_gives_ids(own)
    except (OSError, ValueError):
        return False
    return any(given[part] != theirs[part] for part in given if part != "added_tokens")


def end_of_text(tokenizer: Tokenizer, path: Path) -> int:
    """The id of the token that ends a document."""
    ids = [tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES]
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise ValueError(
            f"tokenizer {str(path)!r} has none of {', '.join(END_OF_TEXT_NAMES)}: add one as special token"
        )
    return found
