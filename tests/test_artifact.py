"""The folder that is written is the folder that is read, whole or not at all."""

import json

import pytest
import torch
from lit_actreg_plugins.rtn import RTN
from safetensors.torch import load_file, save_file
from small_models import VOCAB_SIZE, small_decoder, text_ids

from lit_actreg.artifact import read_artifact
from lit_actreg.compressed_tensors import choose_format, pack_int32, unpack_int32
from lit_actreg.config import SITES, ModelConfig, QuantConfig
from lit_actreg.model import Decoder
from lit_actreg.quantize import quantize_model

QKV = "model.layers.0.self_attn.q_proj.weight_packed"


def written(folder, style="llama", quantizer=None, quant=None, tie=True, **options):
    model = small_decoder(style, quant, tie)
    quantize_model(model, quantizer or RTN(), [], folder, **options)
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_packing_is_compressed_tensors_own(bits, columns):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    packed = pack_int32(codes, bits)
    assert torch.equal(unpack_int32(packed, bits, columns), codes)
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    assert torch.equal(packed, helpers.pack_to_int32(codes, bits))


@pytest.mark.parametrize("style", ["neox", "llama"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("quantizer", "format"),
    [
        (RTN(4), "pack-quantized"),
        (RTN(8, group_size=9), "pack-quantized"),
        (RTN(3), "int-quantized"),
        (RTN(4, symmetric=False, group_size=9), "int-quantized"),
    ],
)
def test_codes_and_float_tensors_survive(style, tie, quantizer, format, tmp_path):
    model = written(tmp_path / "out", style, quantizer, tie=tie)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == format
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not tie and style == "llama")
    read = read_artifact(tmp_path / "out")
    assert (read.config, read.quant.activations, read.vocab_size) == (model.config, "static", model.vocab_size)
    assert (read.head.weight is read.embedding.weight) == tie
    for index, block in enumerate(model.blocks):
        for site in SITES:
            expected = quantizer.quantize_weight(block.get_submodule(site).weight.data, None)
            linear = read.blocks[index].get_submodule(site)
            assert torch.equal(linear.codes, expected.codes)
            assert torch.equal(linear.weight_scale, expected.scale)
            if expected.zero_point is not None:
                assert torch.equal(linear.weight_zero_point, expected.zero_point)
            # What runs is the trained layer with Ŵ for W, to the bit.
            trained = block.get_submodule(site)
            trained.weight.data = linear.dequantized_weight()
            x = 2 * torch.randn(3, 5, linear.in_features)
            assert torch.equal(linear(x), trained(x))
    ids = text_ids(2)
    assert torch.equal(read.logits(read(ids)[0]), model.logits(model(ids)[0]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_as_wide_as_the_model_survive(symmetric, tmp_path):
    """One group a row everywhere but in the MLP's projection, which has two."""
    model = Decoder(ModelConfig(num_layers=1, width=32, num_heads=2, mlp_width=64), QuantConfig(), VOCAB_SIZE)
    quantize_model(model, RTN(4, group_size=32, symmetric=symmetric), [], tmp_path / "out")
    (block,) = read_artifact(tmp_path / "out").blocks
    assert [block.get_submodule(site).weight_scale.shape[1] for site in SITES] == [1, 1, 1, 2]


@pytest.mark.parametrize("activations", ["static", "token", "none", "clamp"])
@pytest.mark.parametrize("sites", [list(SITES), ["qkv", "mlp_in"], ["mlp_proj"], []])
def test_input_grids_by_site(activations, sites, tmp_path):
    quant = QuantConfig(activations=activations, activation_bits=5, sites=sites)
    kept = {"clamp": "none"}.get(activations, activations)
    if kept == "none" or not sites:
        with pytest.warns(UserWarning, match="WEIGHTS ONLY"):
            written(tmp_path / "out", quant=quant)
    else:
        written(tmp_path / "out", quant=quant)
    read = read_artifact(tmp_path / "out")
    for site in SITES:
        linear = read.blocks[1].get_submodule(site)
        assert linear.activations == (kept if site in sites else "none")
        assert linear.activations == "none" or linear.activation_bits == 5


def test_grids_that_follow_tokens_at_some_sites(tmp_path):
    quant = QuantConfig(sites=["qkv", "attn_proj", "mlp_proj"], per_token_sites=["mlp_proj"], token_group_size=9)
    written(tmp_path / "out", quant=quant)
    read = read_artifact(tmp_path / "out")
    assert read.quant == quant
    linears = [read.blocks[1].get_submodule(site) for site in SITES]
    assert [linear.activations for linear in linears] == ["static", "static", "none", "token"]
    assert [linear.activation_groups for linear in linears] == [1, 1, 1, linears[3].in_features // 9]
    with pytest.raises(ValueError, match=r"per_token_sites \['mlp_in'\] are not quantized"):
        QuantConfig(sites=["qkv"], per_token_sites=["mlp_in"])


def test_a_wish_that_stock_readers_cannot_load_is_refused():
    assert choose_format(4, True, "int-quantized") == "int-quantized"
    for bits, symmetric in ((3, True), (4, False)):
        with pytest.raises(ValueError, match='format "pack-quantized" holds symmetric weights of 4 or 8 bits'):
            choose_format(bits, symmetric, "pack-quantized")


def test_existing_folders_are_safe(tmp_path):
    out = tmp_path / "out"
    written(out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a quantized checkpoint"):
        written(out, quantizer=RTN(3))
    assert (out / "model.safetensors").read_bytes() == before
    written(out, quantizer=RTN(3), overwrite=True)
    assert read_artifact(out).blocks[0].qkv.weight_bits == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is not a quantized checkpoint"):
        written(tmp_path / "mine", overwrite=True)


def test_a_failed_write_leaves_the_old_artifact(tmp_path):
    out = tmp_path / "out"
    written(out)
    before = (out / "model.safetensors").read_bytes()
    (tmp_path / "tokenizer.json").write_text("not JSON")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        written(out, quantizer=RTN(3), overwrite=True, tokenizer=tmp_path / "tokenizer.json")
    assert (out / "model.safetensors").read_bytes() == before


def test_what_is_not_an_artifact_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_artifact(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a quantized checkpoint"):
        read_artifact(tmp_path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"model\.norm\.weight' is missing"),
        (lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale"), "weight_scale' is missing"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), r"unexpected 1 tensors \(extra\)"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(35)}),
            r"norm.weight is \[35\], not \[36\]",
        ),
        (
            lambda tensors: tensors.update({QKV: tensors[QKV][:-1].contiguous()}),
            r"blocks\.0\.qkv\.codes is \[71, 36\], not \[72, 36\]",
        ),
        (lambda tensors: tensors.update({QKV: tensors[QKV].float()}), "the tensors of blocks.0.qkv do not fit its"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(change, line, tmp_path):
    written(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=line) as error:
        read_artifact(tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda config: config.pop("hidden_size"), "config.json has no number hidden_size, but None"),
        (lambda config: config.update(num_hidden_layers="two"), "has no number num_hidden_layers, but 'two'"),
        (lambda config: config["quantization_config"].pop("config_groups"), "has no config_groups"),
        (lambda config: config["lit_actreg"].update(version=99), "its version is 99, this program reads"),
    ],
)
def test_a_config_that_says_too_little_is_refused_in_one_line(change, line, tmp_path):
    written(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=line) as error:
        read_artifact(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "out") in str(error.value)
