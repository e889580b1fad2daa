"""Model FLOPs are those that torch counts in a step; what is logged follows from tokens, time and peak."""

import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from small_fit import CONTEXT, datamodule, lit_module, trainer, write_corpus
from small_models import VOCAB_SIZE, small_decoder, text_ids
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_actreg.callbacks.throughput import Throughput, flops_per_token, num_block_parameters, peak_flops
from lit_actreg.config import ModelConfig
from lit_actreg.data.packed import PackedBlocks
from lit_actreg.module import next_token_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("style", ["neox", "llama"])
def test_model_flops_are_those_of_a_step(style, tie):
    """Plain attention computes all T × T products; the formula counts the causal half of them."""
    model = small_decoder(style, tie=tie).requires_grad_(True)
    ids = text_ids(2, 65)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden, _ = model(ids[:, :-1])
        next_token_loss(model.head, hidden, ids[:, 1:]).backward()
    c = model.config
    half_of_attention = 6 * c.num_layers * 64 * c.width
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # no matrix product
    expected = flops_per_token(c, num_block_parameters(model) - vectors, VOCAB_SIZE, 64) + half_of_attention
    assert counter.get_total_flops() == expected * 2 * 64


def test_the_papers_shape_has_the_flops_that_the_docs_say():
    paper = ModelConfig(num_layers=24, width=1920, num_heads=16, context=2048, tie_embeddings=False)
    blocks = 24 * 12 * 1920**2  # biases and norms aside
    assert flops_per_token(paper, blocks, 50432, 2048) == pytest.approx(7.52e9, rel=1e-3)
    attention = 6 * 24 * 2048 * 1920
    assert attention / 7.52e9 == pytest.approx(0.08, abs=0.005)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GT 1030", None),
    ],
)
def test_the_peak_is_looked_up_by_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), "bf16-mixed") == peak
    assert peak_flops(torch.device("cuda", 0), "32-true") is None
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None


def test_what_is_logged_follows_from_tokens_and_time(tmp_path, monkeypatch):
    """Every second step of three batches; the first interval, in which blocks compile, is not logged."""
    sleep, read = 0.02, PackedBlocks.__getitems__

    def slow(self, indices):
        time.sleep(sleep)
        return read(self, indices)

    monkeypatch.setattr(PackedBlocks, "__getitems__", slow)
    module, data = lit_module(), datamodule(write_corpus(tmp_path / "corpus"), batch_size=4)
    module.shape.context = 8 * CONTEXT  # a model from elsewhere may know longer sequences than it is trained on
    options = {"accumulate_grad_batches": 3, "log_every_n_steps": 2, "limit_val_batches": 3, "val_check_interval": 7}
    engine = trainer([Throughput(peak_tflops=1e-3)], steps=8, **options)
    start = time.perf_counter()
    engine.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    logged = {name: engine.logger.of(f"train/{name}") for name in ("tokens_per_second", "mfu", "hours_left")}
    assert all(list(values) == [3, 5, 7] for values in logged.values())
    flops = flops_per_token(module.shape, num_block_parameters(module.model), module.vocab_size, CONTEXT)
    waits, spent = engine.logger.of("train/data_wait_seconds"), 0.0
    for step, rate in logged["tokens_per_second"].items():
        interval = 2 * 3 * 4 * CONTEXT / rate
        assert 6 * sleep <= waits[step] < interval
        assert logged["mfu"][step] == pytest.approx(rate * flops / 1e9, rel=1e-5)
        assert logged["hours_left"][step] == pytest.approx((7 - step) / 2 * interval / 3600, rel=1e-5)
        spent += interval
    assert spent < seconds


def test_validation_does_not_count(tmp_path, monkeypatch):
    """A training batch takes a second, one of validation a hundred; validated is before the first log, and after it."""
    seconds = 0.0

    class Clock(Callback):
        def on_train_batch_start(self, *_):
            nonlocal seconds
            seconds += 1

        def on_validation_batch_start(self, *_):
            nonlocal seconds
            seconds += 100

    monkeypatch.setattr("lit_actreg.callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: seconds))
    options = {"log_every_n_steps": 3, "limit_val_batches": 2, "val_check_interval": 2}
    engine = trainer([Throughput(), Clock()], steps=9, **options)
    engine.fit(lit_module(), datamodule=datamodule(write_corpus(tmp_path / "corpus"), batch_size=4))
    assert engine.logger.of("train/tokens_per_second") == {5: 4 * CONTEXT, 8: 4 * CONTEXT}
    assert len(engine.logger.of("val/loss")) == 4


def test_without_a_known_peak_no_mfu_is_logged(tmp_path):
    engine = trainer([Throughput()], steps=3)
    engine.fit(lit_module(), datamodule=datamodule(write_corpus(tmp_path / "corpus")))
    assert list(engine.logger.of("train/tokens_per_second")) == [1, 2]
    assert not engine.logger.of("train/mfu")
