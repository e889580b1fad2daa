"""A decoder's forward pass as a CUDA graph gives what it gives without."""

import gc
import weakref

import pytest
import torch
from lit_actreg_plugins.rtn import RTN
from lit_actreg_plugins.w4a4_precision import W4A4Precision
from quantizer_checks import DEVICE
from small_models import small_decoder, text_ids

from lit_actreg.artifact import read_artifact
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.model import Decoder
from lit_actreg.quant.observe import observe_inputs
from lit_actreg.quantize import quantize_model
from lit_actreg.replay import ReplayedDecoder, replay

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_everything_runs_as_it_is():
    model, ids = small_decoder("neox", QuantConfig()), text_ids(2)
    expected = model(ids)[0]
    replay(model)
    for _ in range(3):
        torch.testing.assert_close(model(ids)[0], expected, rtol=0, atol=0)
    assert not model.recorded


def test_any_weight_that_moves_and_other_grids_are_noticed():
    model = small_decoder("neox", QuantConfig())
    replay(model)
    assert model.places == model.current_places()
    model.blocks[0].norm_1.weight.data = model.blocks[0].norm_1.weight.data.clone()
    assert model.places != model.current_places()
    model.recorded[torch.Size([1])] = ()
    model.set_activations(QuantConfig(activations="none"))
    assert not model.recorded


def test_a_recording_does_not_keep_its_model_alive(monkeypatch):
    """Without a GPU the pass is run and not recorded; what is kept beside the graph is the same."""
    if DEVICE == "cpu":
        monkeypatch.setattr("lit_actreg.replay.captured", lambda step: step())
    model, ids = small_decoder("neox", QuantConfig(activations="none")).to(DEVICE), text_ids(2).to(DEVICE)
    replay(model)
    with torch.no_grad():
        model.recorded[ids.shape] = model.record(ids)
    weight = weakref.ref(model.embedding.weight)
    gc.disable()  # it would free a cycle too, but some day, and a GPU's memory is wanted now
    del model
    alive = weight() is not None
    gc.enable()
    assert not alive


@needs_gpu
@pytest.mark.parametrize("grad", [False, True])
def test_batches_of_two_shapes(grad):
    model = small_decoder("neox", QuantConfig(activations="none")).cuda().requires_grad_(grad)
    replay(model)
    batches = [text_ids(count).cuda().roll(i, 1) for i, count in enumerate((4, 4, 4, 2, 4, 2, 2))]
    with torch.set_grad_enabled(grad):
        for ids in batches:
            found, expected = model(ids)[0], Decoder.forward(model, ids)[0]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            assert found.requires_grad == grad
    assert len(model.recorded) == (0 if grad else 2)


@needs_gpu
def test_hooks_see_every_batch():
    model = small_decoder("neox", QuantConfig(activations="none")).cuda()
    replay(model)
    with torch.no_grad():
        for i in range(3):
            model(text_ids(4).cuda())
            seen = []
            observe_inputs(model, text_ids(4).cuda(), lambda layer, site, linear, x, to=seen: to.append((layer, site)))
            assert len(seen) == 2 * len(SITES), i


@needs_gpu
def test_recorded_in_inference_mode_and_replayed_outside():
    model = small_decoder("neox", QuantConfig(activations="none")).cuda()
    replay(model)
    ids = text_ids(4).cuda()
    with torch.inference_mode():
        for _ in range(3):
            expected = model(ids)[0].clone()
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], expected)


@needs_gpu
def test_weights_that_have_moved_are_recorded_anew():
    model, ids = small_decoder("neox", QuantConfig(activations="none")).cuda(), text_ids(4).cuda()
    replay(model)
    with torch.no_grad():
        for _ in range(3):
            expected = model(ids)[0].clone()
        for parameter in model.parameters():
            parameter.data = 2 * parameter.data
        assert not torch.allclose(model(ids)[0], expected)
        torch.testing.assert_close(model(ids)[0], Decoder.forward(model, ids)[0])


@needs_gpu
def test_integer_kernels_are_replayed_bit_for_bit(tmp_path):
    model = small_decoder("neox", QuantConfig())
    quantize_model(model, RTN(), [text_ids(4)], tmp_path)
    served = W4A4Precision("bfloat16").convert_module(read_artifact(tmp_path)).cuda()
    assert isinstance(served, ReplayedDecoder)
    with torch.no_grad():
        for shift in range(4):
            ids = text_ids(4).cuda().roll(shift, 1)
            torch.testing.assert_close(served(ids)[0], Decoder.forward(served, ids)[0], rtol=0, atol=0)
    assert len(served.recorded) == 1
