"""Packing loses no token but the tail, in any number of processes, and is on disk whole or not at all."""

import itertools
import multiprocessing
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from lit_actreg.data import packed
from lit_actreg.data.corpus import held_out
from lit_actreg.data.packed import (
    IGNORE,
    Encoder,
    PackedBlocks,
    build_once,
    cache_folder,
    cut,
    pack,
    tasks,
    token_dtype,
    tokenize,
)
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


def write(documents, encoder, folder, num_cores=None):
    """All the documents as training text."""
    batches = ((("train",), batch["text"]) for batch in documents.iter(50))
    return pack(batches, encoder, 0.1, 15, 300, folder, num_cores)["train"]


def stream_of(texts, encoder) -> list[int]:
    return [i for text in texts if text for i in [*encoder.tokenizer.encode(text).ids, 0]]


@pytest.mark.parametrize(("num_cores", "characters_per_task"), [(1, 700), (2, 700), (5, 700), (2, 1), (2, 1 << 18)])
def test_blocks_are_the_stream_of_tokens(monkeypatch, documents, encoder, tmp_path, num_cores, characters_per_task):
    monkeypatch.setattr(packed, "CHARACTERS_PER_TASK", characters_per_task)
    monkeypatch.setattr(packed, "TOKENS_PER_WRITE", 3000)
    stream = stream_of(TEXTS, encoder)
    written = write(documents, encoder, tmp_path, num_cores)
    blocks = PackedBlocks(tmp_path / "train.arrow")
    assert len(blocks) == len(stream) // 16
    ids = blocks.__getitems__(list(range(len(blocks))))
    assert ids.dtype == torch.int64
    assert ids.flatten().tolist() == stream[: len(blocks) * 16]
    assert (written.counts == np.bincount(ids.flatten(), minlength=300)).all()
    assert written.num_documents == len(TEXTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test.arrow", "train.arrow", "valid.arrow"]


def test_splits_divided_while_packing_keep_the_order(monkeypatch, encoder, tmp_path):
    """By hash, or of one split each; a side that a source has of its own (None) takes nothing by hash."""
    monkeypatch.setattr(packed, "CHARACTERS_PER_TASK", 700)
    side = held_out(TEXTS, 0.2)
    batches = [(("train", "valid", "test"), TEXTS), (("valid",), TEXTS[:9]), (("train", "valid", None), TEXTS)]
    written = pack(iter(batches), encoder, 0.2, 15, 300, tmp_path)
    train, valid, test = ([t for t, s in zip(TEXTS, side, strict=True) if s == i] for i in range(3))
    for split, texts in {"train": train * 2, "valid": valid + TEXTS[:9] + valid, "test": test}.items():
        blocks, stream = PackedBlocks(tmp_path / f"{split}.arrow"), stream_of(texts, encoder)
        assert len(blocks) == len(stream) // 16 > 0
        assert blocks.__getitems__(list(range(len(blocks)))).flatten().tolist() == stream[: len(blocks) * 16]
        assert written[split].num_documents == len(texts)


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", 8), ("250000 100000", 2), ("1000 100000", 1), ("9000000 100000", 8)]
)
def test_a_containers_quota_counts(monkeypatch, tmp_path, text, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    quota = tmp_path / "cpu.max"
    assert packed.num_usable_cores(quota) == 8
    quota.write_text(text + "\n")
    assert packed.num_usable_cores(quota) == cores


def test_the_progress_bar_asks_how_many_will_come(monkeypatch, encoder, tmp_path, capfd):
    monkeypatch.setattr(packed, "CHARACTERS_PER_TASK", 700)
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr(packed, "monotonic", lambda: next(clock))  # every piece takes seconds
    asked = []

    def guess(passed: int) -> int | None:
        asked.append(passed)
        return len(TEXTS) + 7 if passed > 5 else None

    pack([(("train",), TEXTS)], encoder, 0.2, 15, 300, tmp_path, 1, guess)
    assert asked[0] == 0
    assert asked == sorted(asked)
    assert asked[-1] == len(TEXTS)
    assert f"{len(TEXTS)}/{len(TEXTS) + 7} " in capfd.readouterr().err.replace("\r", "\n")


def test_the_file_does_not_depend_on_the_number_of_processes(monkeypatch, documents, encoder, tmp_path):
    monkeypatch.setattr(packed, "CHARACTERS_PER_TASK", 700)
    files = []
    for num_cores in (1, 2, 5):
        folder = tmp_path / str(num_cores)
        folder.mkdir()
        write(documents, encoder, folder, num_cores)
        files.append((folder / "train.arrow").read_bytes())
    assert files[0] == files[1] == files[2]


class Mortal(Encoder):
    """Ends its process, or fails, at one of the texts."""

    def __call__(self, texts):
        if "die" in texts:
            os._exit(1)
        if "fail" in texts:
            raise ValueError("cannot")
        return super().__call__(texts)


@pytest.mark.parametrize(("text", "error"), [("die", BrokenProcessPool), ("fail", ValueError)])
def test_a_worker_that_ends_or_fails_ends_the_packing(monkeypatch, encoder, tmp_path, text, error):
    monkeypatch.setattr(packed, "CHARACTERS_PER_TASK", 100)
    documents = datasets.Dataset.from_dict({"text": [*TEXTS[:300], text, *TEXTS[:300]]})
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(error):
            write(documents, Mortal(encoder.tokenizer, 0, encoder.dtype), tmp_path, 2)
    finally:
        signal.signal(signal.SIGTERM, before)


class Slow(Encoder):
    """Says which process it runs in, and takes its time."""

    def __call__(self, texts):
        (Path(texts[0]) / str(os.getpid())).touch()
        time.sleep(1)
        return super().__call__(texts)


def pack_slowly(encoder, folder):
    batches = ((("train",), [str(folder)]) for _ in range(1000))
    pack(batches, Slow(encoder.tokenizer, 0, encoder.dtype), 0.1, 15, 300, folder, 2)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_workers_end_with_a_killed_parent(monkeypatch, encoder, tmp_path):
    monkeypatch.setattr(packed, "CHARACTERS_PER_TASK", 1)
    parent = multiprocessing.get_context("fork").Process(target=pack_slowly, args=(encoder, tmp_path))
    parent.start()

    def workers() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]

    assert wait_until(lambda: len(workers()) == 2)
    parent.kill()
    parent.join()
    assert wait_until(lambda: not any(is_running(worker) for worker in workers()))


def test_a_file_that_breaks_off_ends_the_packing(monkeypatch, encoder, tmp_path):
    monkeypatch.setattr(packed, "CHARACTERS_PER_TASK", 100)

    def batches():
        yield ("train",), TEXTS
        raise ValueError("cannot be read")

    with pytest.raises(ValueError, match="cannot be read"):
        pack(batches(), encoder, 0.1, 15, 300, tmp_path, 2)


def test_batches_are_of_equal_work_and_few_are_read_ahead(monkeypatch, encoder):
    monkeypatch.setattr(packed, "CHARACTERS_PER_TASK", 1000)
    long_and_short = ["x" * 5000, *["y" * 100] * 25, "z" * 5000]
    assert [len(texts) for _, texts in tasks([(("train",), long_and_short)])] == [1, 10, 10, 6]
    read = []
    pieces = tokenize(((("train",), read.append(i) or ["a " * 1000]) for i in range(10_000)), encoder, 0.1, 2)
    assert next(pieces).num_documents == 1
    assert len(read) < 100
    pieces.close()


def test_reading_in_any_order_with_padding(documents, encoder, tmp_path):
    write(documents, encoder, tmp_path)
    blocks = PackedBlocks(tmp_path / "train.arrow")
    batch = blocks.__getitems__([7, -1, 3, 7])
    assert torch.equal(batch[0], blocks[7])
    assert torch.equal(batch[2], blocks[3])
    assert torch.equal(batch[3], blocks[7])
    assert (batch[1] == IGNORE).all()


def test_large_vocabularies_need_wider_integers(documents, encoder, tmp_path):
    assert (token_dtype(65536), token_dtype(65537)) == (np.uint16, np.uint32)
    packed_ids = []
    for dtype in (np.uint16, np.uint32):
        folder = tmp_path / np.dtype(dtype).name
        folder.mkdir()
        write(documents, Encoder(encoder.tokenizer, 0, dtype), folder)
        packed_ids.append(PackedBlocks(folder / "train.arrow"))
        assert packed_ids[-1].rows.features["ids"].feature.dtype == np.dtype(dtype).name
    assert torch.equal(packed_ids[0][5], packed_ids[1][5])


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
    (tmp_path / f".{folder.name}").mkdir()
    (tmp_path / f".{folder.name}" / "result").mkdir()  # of one that was killed
    build_once(folder, lambda at: (at / "whole").write_text("yes"))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [folder.name]
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
