"""The callback quantizes what the fit ended with, and refuses before it what would fail after it."""

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lit_actreg_plugins.gptq import GPTQ
from lit_actreg_plugins.post_fit import PostFitQuantization
from lit_actreg_plugins.rtn import RTN
from small_fit import CONTEXT, datamodule, lit_module, trainer, write_corpus
from torch.utils.data import DataLoader

from lit_actreg.artifact import read_artifact
from lit_actreg.config import QuantConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("post_fit") / "corpus")


def test_a_fit_ends_with_an_artifact_of_its_last_weights(corpus, tmp_path):
    module = lit_module(style="llama")
    callback = PostFitQuantization(GPTQ(8), tmp_path / "out", calibration_tokens=512)
    trainer([callback], steps=2).fit(module, datamodule=datamodule(corpus))
    read = read_artifact(tmp_path / "out")
    assert torch.equal(read.embedding.weight, module.model.embedding.weight)
    linear, trained = read.blocks[1].mlp_in, module.model.blocks[1].mlp_in
    # GPTQ moves a weight by a step here and there
    torch.testing.assert_close(linear.dequantized_weight(), trained.weight, rtol=0, atol=0.05)
    assert module.model.blocks[0].qkv.weight.requires_grad
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_batches_without_text_are_enough_for_rounding(tmp_path):
    batches = DataLoader(torch.arange(CONTEXT + 1).repeat(2, 1), batch_size=2)
    trainer([PostFitQuantization(RTN(), tmp_path / "out")], steps=1).fit(lit_module(), batches)
    assert read_artifact(tmp_path / "out").blocks[0].qkv.weight_bits == 4
    with pytest.raises(ValueError, match="GPTQ calibrates on text: fit with a TextDataModule"):
        trainer([PostFitQuantization(GPTQ(), tmp_path / "other")], steps=1).fit(lit_module(), batches)


def test_what_cannot_be_quantized_stops_the_fit_before_it_begins(corpus, tmp_path):
    trainer([PostFitQuantization(RTN(), tmp_path / "out")], steps=1).fit(lit_module(), datamodule=datamodule(corpus))
    for quantizer, quant, output, mistake in (
        (RTN(), None, "out", "already holds a quantized checkpoint"),
        (RTN(), QuantConfig(zero_point="real"), "other", 'zero_point "real", which no checkpoint format can hold'),
        (RTN(group_size=24), None, "other", r"blocks\.0\.qkv: .*24"),
    ):
        again = trainer([PostFitQuantization(quantizer, tmp_path / output)], steps=1)
        with pytest.raises((FileExistsError, ValueError), match=mistake):
            again.fit(lit_module(quant), datamodule=datamodule(corpus))
        assert again.global_step == 0


def test_a_sharded_model_is_refused_before_the_fit():
    class Sharded:
        strategy = ModelParallelStrategy()

    with pytest.raises(ValueError, match="cannot gather a sharded model"):
        PostFitQuantization(RTN()).setup(Sharded(), None, "fit")
