"""The numbers of the table are those of its parts: own clips where a model has them, per token where it has none.

And a number that is there already stands only for what it was made from.
"""

import errno
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lit_actreg_plugins.rtn import RTN
from lit_actreg_plugins.w4a4_precision import W4A4Precision
from safetensors.torch import load_file, save_file
from small_models import small_decoder, text_ids
from tokenizers import Tokenizer, models, processors

from lit_actreg.artifact import read_artifact
from lit_actreg.checkpoint import TOKENIZER_KEY, load_decoder
from lit_actreg.config import SITES, ModelConfig, QuantConfig
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.data.packed import IGNORE
from lit_actreg.huggingface import huggingface_config, to_huggingface
from lit_actreg.module import LitLanguageModel
from lit_actreg.table import fill_table, perplexity, plain, refuse, weight_names, with_activations, write_table
from lit_actreg.trainer import ActRegTrainer

CPU = torch.device("cpu")


def text(tmp_path: Path, valid_share: float = 0.2) -> TextDataModule:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"the {i}th fox jumps over {i * i} lazy dogs, " * 20)
    data = TextDataModule(str(tmp_path / "*.txt"), valid_share=valid_share, context=16, batch_size=8, num_workers=0)
    data.vocab_size, data.cache_dir = 300, tmp_path / "cache"
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def data(tmp_path: Path) -> TextDataModule:
    return text(tmp_path)


def tokenizer(*entries: str, **settings) -> str:
    made = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=entries[0]))
    for name, value in settings.items():
        setattr(made, name, value)
    return made.to_str()


WORDS = tokenizer("a", "b")


def checkpoint(path: Path, activations: str, bits: int = 4, tokenizer: str = WORDS, vocab_size: int = 300) -> Path:
    torch.manual_seed(0)
    module = LitLanguageModel(
        ModelConfig(num_layers=2, width=32, num_heads=2, context=16, init_std=0.3),
        QuantConfig(activations=activations, activation_bits=bits),
        vocab_size=vocab_size,
    )
    module.configure_model()
    for name, parameter in module.model.named_parameters():
        if name.endswith("high"):
            parameter.data.fill_(1.5)  # narrow enough to be told from every other grid
    saved = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), TOKENIZER_KEY: tokenizer}
    torch.save(saved, path)
    return path


def table(checkpoints, quantizers, data, output, calibration_tokens=256, **options):
    return fill_table(checkpoints, quantizers, data, output, calibration_tokens, CPU, lambda model: model, **options)


def test_a_hugging_face_folder_is_a_row(tmp_path, data):
    path = checkpoint(tmp_path / "none.ckpt", "none")
    model, folder = load_decoder(path), tmp_path / "hub"
    folder.mkdir()
    save_file(to_huggingface(model.config, model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(huggingface_config(model.config, model.vocab_size)))
    # the same ids from another file, and none: then it is the table's
    (folder / "tokenizer.json").write_text(tokenizer("a", "b", post_processor=processors.TemplateProcessing()) + "\n")
    results = table({"fit": path, "hub": folder}, [RTN(bits=4)], data, tmp_path / "table")
    assert results["hub"] == pytest.approx(results["fit"], rel=1e-6)
    (folder / "tokenizer.json").unlink()
    assert table({"fit": path, "hub": folder}, [RTN(bits=4)], data, tmp_path / "table") == results
    weights = folder / "model.safetensors"
    status = weights.stat()
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))  # an older file of the same size
    assert table({"hub": folder}, [], data, tmp_path / "table")["hub"]["W16A16"] != results["hub"]["W16A16"]
    with pytest.raises(ValueError, match=r"checkpoints a: .* is quantized: name the checkpoint that it was made from"):
        table({"a": tmp_path / "table" / "fit-w4-rtn"}, [RTN(bits=4)], data, tmp_path / "other")


def test_columns_are_what_their_names_say(tmp_path, data):
    paths = {name: checkpoint(tmp_path / f"{name}.ckpt", name) for name in ("static", "clamp", "none")}
    results = table(paths, [RTN(bits=4)], data, tmp_path / "table")
    for name, row in results.items():
        model = load_decoder(paths[name])
        for bits, activations in ((16, "none"), (4, "token" if name == "none" else "static")):
            model.set_activations(QuantConfig(activations=activations))
            assert row[f"W16A{bits}"] == pytest.approx(perplexity(model, data.val_dataloader(), CPU), rel=1e-6)
        artifact = read_artifact(tmp_path / "table" / f"{name}-w4-rtn")
        assert artifact.quant.activations == activations
        assert row["W4A4 RTN"] == pytest.approx(perplexity(artifact, data.val_dataloader(), CPU), rel=1e-6)
        assert len({round(value, 6) for value in row.values()}) == 4, "columns that ought to differ are equal"
    assert "W4A16 RTN" in write_table(results, tmp_path / "table")
    assert (tmp_path / "table" / "table.png").stat().st_size > 0


def test_padding_is_no_target():
    model, ids = small_decoder("neox"), text_ids(2, 17)
    parts = [ids[:1], ids[1:, :9]]
    losses = [F.cross_entropy(model.logits(model(p[:, :-1])[0])[0], p[0, 1:], reduction="sum").item() for p in parts]
    ids[1, 9:] = IGNORE
    assert perplexity(model, [ids], CPU) == pytest.approx(math.exp(sum(losses) / (16 + 8)), rel=1e-6)


def test_grids_of_the_table():
    plain = QuantConfig("none", per_token_sites=["mlp_proj"], token_group_size=8)  # as a twin of the Llama block's QAT
    assert with_activations(plain, 16) == plain
    four = with_activations(plain, 4)
    assert {four.mode(site) for site in SITES} == {"token"}
    assert four.token_group_size is None
    for activations in ("static", "clamp"):
        four = with_activations(replace(plain, activations=activations), 4)
        assert [four.mode(site) for site in SITES] == ["static", "static", "static", "token"]
        assert four.token_group_size == 8


def test_a_rotation_is_refused(tmp_path, data):
    paths = {"ours": checkpoint(tmp_path / "ours.ckpt", "quest")}
    with pytest.raises(ValueError, match='ours was trained with activations "quest", which no artifact holds'):
        table(paths, [RTN(bits=4)], data, tmp_path / "table")


def test_what_is_known_is_not_computed_again(tmp_path, data, monkeypatch):
    paths = {"a": checkpoint(tmp_path / "a.ckpt", "static")}
    first = table(paths, [RTN(bits=4)], data, tmp_path / "table")
    monkeypatch.setattr("lit_actreg.table.perplexity", lambda *_: pytest.fail("computed again"))
    assert table(paths, [RTN(bits=4)], data, tmp_path / "table") == first


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({}, 0),
        ({"valid_share": 0.3}, 4),
        ({"quantizer": RTN(bits=4, scale_search="minmax")}, 2),
        ({"calibration_tokens": 512}, 2),
        ({"precision": {"dtype": "torch.bfloat16"}}, 1),
        ({"limit_val_batches": 2}, 4),
    ],
)
def test_what_was_made_from_something_else_is_computed_again(tmp_path, data, monkeypatch, change, columns):
    """Into the same folder: the float weights' two numbers depend on the text alone, the plugin's on one column's."""
    paths = {"a": checkpoint(tmp_path / "a.ckpt", "static")}
    before = table(paths, [RTN(bits=4)], data, tmp_path / "table")
    computed = []
    monkeypatch.setattr("lit_actreg.table.perplexity", lambda *args: computed.append(1) or perplexity(*args))
    if "valid_share" in change:
        data = text(tmp_path, change.pop("valid_share"))
    quantizers = [change.pop("quantizer", RTN(bits=4))]
    after = table(paths, quantizers, data, tmp_path / "table", **change)
    assert len(computed) == columns
    if quantizers[0].scale_search == "minmax":
        assert after["a"]["W4A4 RTN"] != before["a"]["W4A4 RTN"], "the artifact is still that of the other options"


def test_names_may_differ_in_case_alone_and_results_are_whole_or_old(tmp_path, data, monkeypatch):
    paths = {"QAT": checkpoint(tmp_path / "a.ckpt", "static"), "qat": checkpoint(tmp_path / "b.ckpt", "none")}
    table(paths, [RTN(bits=4)], data, tmp_path / "table")
    artifacts = [read_artifact(tmp_path / "table" / f"{name}-w4-rtn") for name in paths]
    assert [artifact.quant.activations for artifact in artifacts] == ["static", "token"]

    def full(path, text, write=Path.write_text):
        write(path, text[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match=r"cannot write .*results.json \(No space left on device\)"):
        table(paths, [RTN(bits=4)], data, tmp_path / "table", limit_val_batches=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_artifact_that_is_gone_is_made_again(tmp_path, data):
    paths, quantizers = {"a": checkpoint(tmp_path / "a.ckpt", "static")}, [RTN(bits=4)]
    expected = table(paths, quantizers, data, tmp_path / "table")
    table(paths, quantizers, data, tmp_path / "table", limit_val_batches=1)  # the numbers known are now of other text
    shutil.rmtree(tmp_path / "table" / "a-w4-rtn")
    assert table(paths, quantizers, data, tmp_path / "table") == expected


def test_columns_are_named_by_the_bits_that_the_models_have(tmp_path, data):
    paths = {name: checkpoint(tmp_path / f"{name}.ckpt", name, bits=8) for name in ("static", "token")}
    paths["plain"] = checkpoint(tmp_path / "plain.ckpt", "none")
    results = table(paths, [RTN(bits=4)], data, tmp_path / "table")
    for name, row in results.items():
        assert list(row) == ["W16A16", "W16A8", "W4A16 RTN", "W4A8 RTN"]
        model = load_decoder(paths[name])
        model.set_activations(QuantConfig("static" if name == "static" else "token", activation_bits=8))
        assert row["W16A8"] == pytest.approx(perplexity(model, data.val_dataloader(), CPU), rel=1e-6)
        assert read_artifact(tmp_path / "table" / f"{name}-w4-rtn").quant.activation_bits == 8


def test_quantizers_of_one_class_and_bits_keep_columns_of_their_own(tmp_path, data):
    quantizers = [RTN(bits=4), RTN(bits=4, group_size=16), RTN(bits=3)]
    assert weight_names(quantizers) == ["W4 RTN group_size=None", "W4 RTN group_size=16", "W3 RTN"]
    row = table({"a": checkpoint(tmp_path / "a.ckpt", "static")}, quantizers, data, tmp_path / "table")["a"]
    assert row["W4A4 RTN group_size=None"] != row["W4A4 RTN group_size=16"]
    with pytest.raises(ValueError, match="quantizers has W4 RTN twice with the same options: name each once"):
        weight_names([RTN(bits=4), RTN(bits=4)])


def test_the_first_batches_are_the_text_where_their_number_is_limited(tmp_path, data):
    paths = {"a": checkpoint(tmp_path / "a.ckpt", "none")}
    batches = list(data.val_dataloader())
    for limit, num_batches in ((2, 2), (0.5, len(batches) // 2), (10**6, len(batches))):
        found = table(paths, [], data, tmp_path / "table", limit_val_batches=limit)["a"]["W16A16"]
        assert found == pytest.approx(perplexity(load_decoder(paths["a"]), batches[:num_batches], CPU), rel=1e-6)
    with pytest.raises(ValueError, match="limit_val_batches 0 leaves no batch"):
        table(paths, [], data, tmp_path / "table", limit_val_batches=0)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"tokenizer": tokenizer("b", "a")}, "other has another tokenizer than ours"),
        ({"vocab_size": 310}, "other has another vocab_size than ours"),
        ({"bits": 8}, r"activations of different bits, \{'ours': 4, 'other': 8\}"),
    ],
)
def test_checkpoints_that_do_not_compare_are_refused(tmp_path, data, other, says):
    paths = {
        "ours": checkpoint(tmp_path / "a.ckpt", "static"),
        "other": checkpoint(tmp_path / "b.ckpt", "static", **other),
    }
    with pytest.raises(ValueError, match=says) as caught:
        table(paths, [RTN(bits=4)], data, tmp_path / "table")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"checkpoints is empty: name \.ckpt files"):
        table({}, [RTN(bits=4)], data, tmp_path / "table")


@pytest.mark.parametrize(
    ("name", "quant", "quantizer", "tokens", "says"),
    [
        ("../a", {}, RTN(), 256, r'checkpoints "\.\./a" is no name of a row'),
        ("a", {"zero_point": "real"}, RTN(), 256, 'a was trained with zero_point "real", which no artifact holds'),
        ("a", {}, RTN(group_size=48), 256, r"checkpoints a, RTN: blocks\.0\.qkv: group_size 48 does not divide"),
        ("a", {}, RTN(), 0, "calibration_tokens 0 is too small"),
    ],
)
def test_what_makes_no_table_is_refused_before_packing(tmp_path, name, quant, quantizer, tokens, says):
    path = checkpoint(tmp_path / "a.ckpt", "static")
    saved = torch.load(path, weights_only=True)
    saved["hyper_parameters"]["quant"].update(quant)
    torch.save(saved, path)
    with pytest.raises(ValueError, match=says):
        refuse({name: path}, [quantizer], tokens, tmp_path / "cache")


def test_the_trainer_tells_the_table_its_plugin_and_limit(tmp_path, data):
    paths = {1: checkpoint(tmp_path / "a.ckpt", "static")}  # as YAML reads a seed
    quiet = {"logger": False, "accelerator": "cpu", "devices": 1}
    engine = ActRegTrainer(limit_val_batches=1, plugins=W4A4Precision("bfloat16"), **quiet)
    engine.table(LitLanguageModel(ModelConfig()), data, paths, [RTN(bits=4)], tmp_path / "out", 256)
    row = json.loads((tmp_path / "out" / "results.json").read_text())["1"]
    assert row["W4A4 RTN"]["made_from"]["precision"] == plain(W4A4Precision("bfloat16"))
    assert row["W4A4 RTN"]["made_from"]["sequences"] == data.batch_size


def test_parts_read_as_plain_values():
    assert plain(W4A4Precision("bfloat16")) == {
        "class": "lit_actreg_plugins.w4a4_precision.W4A4Precision",
        "dtype": "torch.bfloat16",
    }
    assert plain(RTN(bits=3))["bits"] == 3
