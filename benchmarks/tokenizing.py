"""Tokenizing and packing a corpus against `tokenizers` alone, on the same cores, and the second start.

    python benchmarks/tokenizing.py train.jsonl.xz [--vocab_size 16384] [--rounds 2]

Alone: ``encode_batch_fast`` over documents that lie in memory, 256 a call, nothing kept. Ours: ``prepare_data`` of the
DataModule with the same tokenizer given: decompress, hold out by hash, tokenize, cut, count, write. The rounds
alternate, so that what else the machine does falls on both. Each of ours has a new cache folder; the second start opens
the last.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import datasets
from tokenizers import Tokenizer

from lit_actreg.data import TextDataModule
from lit_actreg.data.corpus import load_source, parse_source
from lit_actreg.data.tokenizer import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        documents = load_source(parse_source(options.corpus), "text", Path(scratch))["train"]
        texts, path = documents["text"][:], Path(scratch) / "tokenizer.json"
        train_tokenizer(documents.select(range(0, len(documents), 8)), options.vocab_size, path)
        tokenizer, num_bytes = Tokenizer.from_file(str(path)), sum(len(text.encode()) for text in texts)
        print(f"{num_bytes / 1e6:.0f} MB, {len(texts)} documents, {len(os.sched_getaffinity(0))} cores")

        def alone() -> None:
            for start in range(0, len(texts), 256):
                tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False)

        def start(cache: str) -> TextDataModule:
            data = TextDataModule(
                options.corpus, tokenizer=str(path), vocab_size=options.vocab_size, context=2048, cache_dir=cache
            )
            data.prepare_data()
            data.setup("fit")
            return data

        for number in range(options.rounds):
            seconds = []
            for work in (alone, lambda cache=f"{scratch}/{number}": start(cache)):
                begin = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begin)
            rates = [num_bytes / 1e6 / s for s in seconds]
            print(f"alone {rates[0]:.2f} MB/s, packed {rates[1]:.2f} MB/s: {rates[1] / rates[0]:.0%}")
        begin = time.perf_counter()
        data = start(f"{scratch}/{options.rounds - 1}")
        print(f"second start {time.perf_counter() - begin:.2f} s, {data.num_train_tokens / 1e6:.1f} M tokens")


if __name__ == "__main__":
    main()
