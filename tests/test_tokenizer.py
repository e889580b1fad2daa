"""Training is deterministic and lossless; a given tokenizer must fit the vocabulary."""

import datasets
import pytest
from tokenizers import Tokenizer, models

from lit_actreg.data.tokenizer import END_OF_TEXT, end_of_text, load_tokenizer, train_tokenizer

TEXTS = [
    f"The {word} of the people, by the people — Ünïcödé 日本 {i}!\n" for i, word in enumerate(["will", "law"] * 50)
]


@pytest.fixture
def documents():
    return datasets.Dataset.from_dict({"text": [*TEXTS, "", None]})


def test_training_is_deterministic_and_lossless(documents, tmp_path):
    for name in "ab":
        train_tokenizer(documents, 400, tmp_path / name / "tokenizer.json")
    one, other = (tmp_path / name / "tokenizer.json" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert [p.name for p in one.parent.iterdir()] == ["tokenizer.json"]
    tokenizer = load_tokenizer(one, 400)
    assert tokenizer.get_vocab_size() <= 400
    assert end_of_text(tokenizer, one) == 0 == tokenizer.token_to_id(END_OF_TEXT)
    for text in [*TEXTS, "any bytes \x00 🎉 \t"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0]) // 2


def test_vocabulary_that_does_not_fit(documents, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"vocab_size 100 cannot hold the 256 bytes.*use 257"):
        train_tokenizer(documents, 100, path)
    train_tokenizer(documents, 300, path)
    with pytest.raises(ValueError, match=r"has 300 entries, more than data.vocab_size 280: set data.vocab_size to 300"):
        load_tokenizer(path, 280)
    load_tokenizer(path, 5000)


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist: name a tokenizer.json"):
        load_tokenizer(tmp_path / "no.json", 300)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json") as caught:
        load_tokenizer(tmp_path / "bad.json", 300)
    assert "\n" not in str(caught.value)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "no_end.json"))
    with pytest.raises(ValueError, match=r"has none of <\|endoftext\|>"):
        load_tokenizer(tmp_path / "no_end.json", 300)
