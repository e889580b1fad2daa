"""The precision plugin swaps what the integer kernels can serve, and says what it leaves."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lit_actreg_kernels.module import Int4Linear
from lit_actreg_plugins.rtn import RTN
from lit_actreg_plugins.w4a4_precision import W4A4Precision
from small_models import small_decoder, text_ids
from torch import nn

from lit_actreg.artifact import read_artifact
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.model import Decoder
from lit_actreg.quant.quantized_linear import QuantizedLinear
from lit_actreg.quantize import quantize_model
from lit_actreg.replay import ReplayedDecoder


def artifact(folder, quantizer=None, quant=None):
    quantize_model(small_decoder("neox", quant), quantizer or RTN(), [], folder)
    return read_artifact(folder)


def kinds(model):
    return [type(block.get_submodule(site)) for block in model.blocks for site in SITES]


@pytest.mark.parametrize("quantizer", [RTN(4), RTN(3), RTN(2, group_size=9)])
@pytest.mark.parametrize("activations", ["static", "token"])
def test_integer_kernels_give_the_models_logits(quantizer, activations, tmp_path):
    model = artifact(tmp_path / "out", quantizer, QuantConfig(activations=activations))
    ids = text_ids(2)
    expected = model.logits(model(ids)[0])
    assert W4A4Precision().convert_module(model) is model
    assert kinds(model) == [Int4Linear] * 8
    found = model.logits(model(ids)[0])
    # One code that flips on a last bit moves a logit by far more than a float's error: nearly all are equal.
    assert ((found - expected).abs() < 1e-4 * expected.abs().max()).float().mean() > 0.99


@pytest.mark.parametrize(
    ("quantizer", "quant", "reason"),
    [
        (RTN(8), QuantConfig(), "8 stay in float: their weights have 8 bits, the kernels hold 4"),
        (RTN(4, symmetric=False), QuantConfig(), "8 stay in float: their weights are asymmetric"),
        (RTN(4), QuantConfig(sites=["qkv", "mlp_in"]), "4 stay in float: their inputs are not quantized"),
        (
            RTN(4),
            QuantConfig(activation_bits=8, per_token_sites=["mlp_proj"], token_group_size=9),
            "2 stay in float: their inputs have groups of 8 bits, the kernels take up to 7",
        ),
    ],
)
def test_what_cannot_be_served_stays_and_is_said(quantizer, quant, reason, tmp_path, caplog):
    model = artifact(tmp_path / "out", quantizer, quant)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        W4A4Precision().convert_module(model)
    assert reason in caplog.text
    assert kinds(model).count(QuantizedLinear) == int(reason.split()[0])


def test_bfloat16_reaches_all_but_the_scales(tmp_path):
    model = W4A4Precision("bfloat16").convert_module(artifact(tmp_path / "out"))
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.head.weight is model.embedding.weight
    assert model.blocks[0].qkv.weight_scale.dtype == torch.float32
    assert model.logits(model(text_ids(1))[0]).dtype == torch.bfloat16


def test_a_second_validation_of_one_module_leaves_it_alone(tmp_path):
    model = W4A4Precision().convert_module(artifact(tmp_path))
    parts = list(model.modules())
    assert W4A4Precision().convert_module(model) is model
    assert list(model.modules()) == parts


def test_decoders_are_replayed_unless_they_are_of_another_class(tmp_path):
    assert type(W4A4Precision().convert_module(artifact(tmp_path))) is ReplayedDecoder

    class ShardedDecoder(Decoder):
        pass

    sharded = read_artifact(tmp_path)
    sharded.__class__ = ShardedDecoder
    assert type(W4A4Precision().convert_module(sharded)) is ShardedDecoder


def test_a_model_without_quantized_linears_is_refused():
    with pytest.raises(ValueError, match="found no quantized linear"):
        W4A4Precision().convert_module(nn.Linear(2, 2))


def test_lightning_applies_it(tmp_path):
    class Module(LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def validation_step(self, ids, _):
            assert kinds(self.model) == [Int4Linear] * 8
            self.log("hidden", self.model(ids)[0].square().mean())

    trainer = Trainer(
        plugins=[W4A4Precision()], accelerator="cpu", logger=False, enable_progress_bar=False, barebones=False
    )
    module = Module(artifact(tmp_path / "out"))
    metrics = trainer.validate(module, torch.utils.data.DataLoader(text_ids(4), batch_size=2), verbose=False)
    assert metrics[0]["hidden"] > 0
