"""Packing loses no token but the tail, in any size of batches, and is on disk whole or not at all."""

import multiprocessing
import time

import datasets
import numpy as np
import pytest
import torch

from lit_actreg.data import packed
from lit_actreg.data.packed import IGNORE, Encoder, PackedBlocks, build_once, cache_folder, cut, pack, token_dtype
from lit_actreg.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [f"{i} ships sailed to the isle of {'many ' * (i % 7)}winds." for i in range(600)] + ["", None]


@pytest.fixture(scope="module")
def documents():
    return datasets.Dataset.from_dict({"text": TEXTS})


@pytest.fixture(scope="module")
def encoder(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(documents, 300, path)
    return Encoder(load_tokenizer(path, 300), 0, token_dtype(300))


@pytest.mark.parametrize("documents_per_batch", [7, 256])
def test_blocks_are_the_stream_of_tokens(monkeypatch, documents, encoder, tmp_path, documents_per_batch):
    monkeypatch.setattr(packed, "DOCUMENTS_PER_BATCH", documents_per_batch)
    stream = [i for text in TEXTS if text for i in [*encoder.tokenizer.encode(text).ids, 0]]
    counts = pack(documents, encoder, 15, 300, tmp_path / "x.arrow")
    blocks = PackedBlocks(tmp_path / "x.arrow")
    assert len(blocks) == len(stream) // 16
    ids = blocks.__getitems__(list(range(len(blocks))))
    assert ids.dtype == torch.int64
    assert ids.flatten().tolist() == stream[: len(blocks) * 16]
    assert (counts == np.bincount(ids.flatten(), minlength=300)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["x.arrow"]


def test_reading_in_any_order_with_padding(documents, encoder, tmp_path):
    pack(documents, encoder, 15, 300, tmp_path / "x.arrow")
    blocks = PackedBlocks(tmp_path / "x.arrow")
    batch = blocks.__getitems__([7, -1, 3, 7])
    assert torch.equal(batch[0], blocks[7])
    assert torch.equal(batch[2], blocks[3])
    assert torch.equal(batch[3], blocks[7])
    assert (batch[1] == IGNORE).all()


def test_large_vocabularies_need_wider_integers(documents, encoder, tmp_path):
    assert (token_dtype(65536), token_dtype(65537)) == (np.uint16, np.uint32)
    pack(documents, encoder, 15, 300, tmp_path / "a.arrow")
    pack(documents, Encoder(encoder.tokenizer, 0, np.uint32), 15, 300, tmp_path / "b.arrow")
    assert torch.equal(PackedBlocks(tmp_path / "a.arrow")[5], PackedBlocks(tmp_path / "b.arrow")[5])


def test_cut_carries_over():
    pieces = [np.arange(0, 3), np.arange(3, 4), np.arange(4, 20), np.arange(0), np.arange(20, 23)]
    blocks = list(cut(iter(pieces), 5))
    assert np.concatenate(blocks).tolist() == np.arange(20).reshape(4, 5).tolist()


def test_a_failed_build_leaves_nothing(tmp_path):
    folder = cache_folder(tmp_path, "packed", {"a": 1})
    assert folder != cache_folder(tmp_path, "packed", {"a": 2})

    def fail(at):
        (at / "half").write_text("written")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build_once(folder, fail)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    build_once(folder, lambda at: (at / "whole").write_text("yes"))
    build_once(folder, fail)  # it is there: not built again
    assert (folder / "whole").read_text() == "yes"


def _slow_build(folder, counter):
    def build(at):
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.3)
        (at / "whole").write_text("yes")

    build_once(folder, build)


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    processes = [context.Process(target=_slow_build, args=(tmp_path / "x", counter)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.value == 1
