"""The callback quantizes what the fit ended with, and refuses before it what would fail after it."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lit_actreg_plugins.gptq import GPTQ
from lit_actreg_plugins.post_fit import PostFitQuantization
from lit_actreg_plugins.rtn import RTN
from small_models import small_decoder, text_ids

from lit_actreg.artifact import read_artifact


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = small_decoder("llama").requires_grad_(True)

    def training_step(self, ids, _):
        logits = self.model.logits(self.model(ids[:, :-1])[0])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    tokenizer_path = None

    def train_dataloader(self):
        return torch.utils.data.DataLoader(text_ids(8), batch_size=4)

    def calibration_batches(self, num_tokens, seed):
        yield from text_ids(num_tokens // 64).split(4)


def trainer(callback):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_steps=2, accelerator="cpu", callbacks=[callback], enable_checkpointing=False, **quiet)


def test_a_fit_ends_with_an_artifact_of_its_last_weights(tmp_path):
    module = Module()
    trainer(PostFitQuantization(GPTQ(8), tmp_path / "out", calibration_tokens=512)).fit(module, datamodule=Data())
    read = read_artifact(tmp_path / "out")
    assert torch.equal(read.embedding.weight, module.model.embedding.weight)
    linear, trained = read.blocks[1].mlp_in, module.model.blocks[1].mlp_in
    # GPTQ moves a weight by a step here and there
    torch.testing.assert_close(linear.dequantized_weight(), trained.weight, rtol=0, atol=0.05)
    assert module.model.blocks[0].qkv.weight.requires_grad


def test_an_artifact_in_the_way_stops_the_fit_before_it_begins(tmp_path):
    trainer(PostFitQuantization(RTN(), tmp_path / "out")).fit(Module(), datamodule=Data())
    again = trainer(PostFitQuantization(RTN(), tmp_path / "out"))
    with pytest.raises(FileExistsError, match="already holds a quantized checkpoint"):
        again.fit(Module(), datamodule=Data())
    assert again.global_step == 0


def test_a_sharded_model_is_refused_before_the_fit():
    class Sharded:
        strategy = ModelParallelStrategy()

    with pytest.raises(ValueError, match="cannot gather a sharded model"):
        PostFitQuantization(RTN()).setup(Sharded(), None, "fit")
