"""The monitor reports what was planted, into TensorBoard files that are read back, and disturbs nothing."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from small_fit import Losses, datamodule, lit_module, trainer, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounter

from lit_actreg.callbacks.clip_schedule import ClipSchedule
from lit_actreg.callbacks.outlier_monitor import OutlierMonitor, input_statistics
from lit_actreg.config import SITES
from lit_actreg.quant.fake_quant import fake_quantize
from lit_actreg.quant.statistics import channel_means

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNEL = 5
PICTURES = {"outliers/channels over steps", "outliers/share by layer", "outliers/largest channel"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("monitor") / "corpus")


class PlantOutlier(Callback):
    """Makes one channel of block 1's input to the MLP 80 times as large, and keeps the inputs of a pass to it."""

    def on_train_start(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.model.blocks[1].norm_2.weight[CHANNEL] = 80.0
        inputs: list[torch.Tensor] = []
        linear = pl_module.model.blocks[1].mlp_in
        hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        ids = trainer.datamodule.blocks["valid"].__getitems__(list(range(4)))[:, :-1]  # 4 × 16 tokens
        with torch.no_grad():
            pl_module.model(ids)
        hook.remove()
        self.x, self.weight, self.quantizer = inputs[0], linear.weight.detach().clone(), linear.input_quantizer


def read(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0, "histograms": 0}).Reload()


@pytest.fixture(scope="module")
def planted(corpus, tmp_path_factory):
    """A fit of 5 steps with an outlier channel planted before its first snapshot, and its event files."""
    plant = PlantOutlier()
    monitor = OutlierMonitor(every_n_steps=2, num_tokens=64, pictures_every=2, layer=1, site="mlp_in")
    logger = TensorBoardLogger(tmp_path_factory.mktemp("tensorboard"))
    engine = trainer([plant, monitor], steps=5, logger=logger)
    engine.fit(lit_module(lr=1e-4), datamodule=datamodule(corpus))
    logger.finalize("success")
    return plant, monitor, read(logger.log_dir)


def first(events: EventAccumulator, tag: str) -> float:
    (event, *_) = events.Scalars(tag)
    assert event.step == 0
    return event.value


def test_the_planted_channel_is_found_where_it_is_and_nowhere_else(planted):
    plant, _, events = planted
    mean_abs = plant.x.double().abs().mean((0, 1))
    assert mean_abs.argmax() == CHANNEL
    assert first(events, "outliers_mlp_in/share_01") == pytest.approx(1 / 32)
    assert first(events, "outliers_mlp_in/largest_ratio_01") == pytest.approx((mean_abs / mean_abs.mean()).max().item())
    mean = plant.x.double().mean((0, 1))[CHANNEL].abs()
    assert first(events, "outliers_mlp_in/shift_01") == pytest.approx((mean / mean_abs[CHANNEL]).item(), rel=1e-4)
    for layer, site in [(layer, site) for layer in (0, 1) for site in SITES if (layer, site) != (1, "mlp_in")]:
        assert first(events, f"outliers_{site}/share_{layer:02d}") == 0.0


@pytest.mark.parametrize(("channel", "shift"), [([3.0, 4.0, 5.0, 6.0], 1.0), ([-9.0, 9.0, -9.0, 9.0], 0.0)])
def test_a_shifted_channel_is_told_from_a_scaled_one(channel, shift):
    x = torch.randn(1, 4, 8)
    x[0, :, 2] = -torch.tensor(channel)
    assert input_statistics(x, torch.nn.Identity(), *channel_means(x))["shift"] == shift


def test_numbers_are_those_of_the_raw_input_and_the_weight(planted):
    plant, _, events = planted
    x, q, w = plant.x, plant.quantizer, plant.weight.double()
    found = {what: first(events, f"outliers_mlp_in/{what}_01") for what in ("saturation", "snr_db", "kurtosis")}
    assert found["saturation"] == pytest.approx(((x < -4) | (x > 4)).double().mean().item(), rel=1e-5)
    noise = fake_quantize(x, torch.tensor([-4.0]), torch.tensor([4.0])) - x
    decibels = 10 * torch.log10(x.square().sum() / noise.square().sum()).item()
    assert found["snr_db"] == pytest.approx(decibels, rel=1e-4)
    assert q.bits == 4
    centred = (x - x.mean(-1, keepdim=True)).double()
    expected = ((centred**4).mean(-1) / (centred**2).mean(-1) ** 2).mean().item()
    assert found["kurtosis"] == pytest.approx(expected, rel=1e-4)
    rows = w.norm(dim=1)
    assert first(events, "outliers_mlp_in/row_max_01") == pytest.approx((rows.max() / rows.mean()).item(), rel=1e-5)
    columns = w.norm(dim=0)
    assert first(events, "outliers_mlp_in/column_max_01") == pytest.approx(
        (columns.max() / columns.mean()).item(), rel=1e-5
    )
    assert 0 < first(events, "outliers_mlp_in/error_4bit_01") < first(events, "outliers_mlp_in/error_3bit_01") < 0.1


def test_snapshots_at_their_steps_and_pictures_at_theirs(planted):
    _, monitor, events = planted
    tags = events.Tags()
    assert monitor.steps == [0, 2, 4]
    assert [event.step for event in events.Scalars("outliers_qkv/share_00")] == [0, 2, 4]
    assert set(tags["images"]) == PICTURES
    for tag in PICTURES:
        assert [event.step for event in events.Images(tag)] == [0, 4]
        assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in events.Images(tag))
        assert all(event.width >= 400 and event.height >= 300 for event in events.Images(tag))
    assert [event.step for event in events.Histograms("outliers/channel ratios")] == [0, 4]
    assert [max(range(32), key=snapshot.__getitem__) for snapshot in monitor.channels] == [CHANNEL] * 3
    assert monitor.shares[0][1] == [0.0, 0.0, pytest.approx(1 / 32), 0.0]


def fit(corpus, callbacks, module=None, steps=6, resume_from=None, **options):
    losses = Losses()
    engine = trainer([*callbacks, losses], steps, **options)
    engine.fit(module or lit_module(), datamodule=datamodule(corpus), ckpt_path=resume_from)
    return engine, losses.values


def test_training_is_the_same_with_and_without_it(corpus):
    watched = fit(corpus, [OutlierMonitor(every_n_steps=1, num_tokens=64)])[1]
    assert watched == fit(corpus, [OutlierMonitor(every_n_steps=0)])[1]


def test_one_snapshot_a_step_however_many_batches_it_accumulates(corpus):
    monitor = OutlierMonitor(every_n_steps=2, num_tokens=64)
    engine, _ = fit(corpus, [monitor], accumulate_grad_batches=3)
    assert monitor.steps == [0, 2, 4, 6]
    assert len([step for step, found in engine.logger.metrics if "outliers_qkv/share_00" in found]) == 4


def test_snapshots_and_calibration_compile_nothing(corpus):
    """A recompilation a snapshot would cost more than the training it watches."""

    def num_graphs(*callbacks):
        torch._dynamo.reset()
        module, counter = lit_module(), CompileCounter()
        module.configure_model()
        for block in module.model.blocks:
            block.compile(fullgraph=True, backend=counter)
        fit(corpus, callbacks, module)
        return counter.frame_count

    alone = num_graphs()
    assert alone > 0
    assert num_graphs(OutlierMonitor(every_n_steps=1, num_tokens=64), ClipSchedule(calibrate_steps=[0, 3])) == alone


def test_a_resumed_fit_goes_on_with_the_history(corpus, tmp_path):
    whole = OutlierMonitor(every_n_steps=2, num_tokens=64)
    fit(corpus, [whole])
    engine, _ = fit(corpus, [OutlierMonitor(every_n_steps=2, num_tokens=64)], steps=4)
    engine.save_checkpoint(tmp_path / "x.ckpt")
    rest = OutlierMonitor(every_n_steps=2, num_tokens=64)
    engine, _ = fit(corpus, [rest], resume_from=tmp_path / "x.ckpt")
    assert rest.state_dict() == whole.state_dict()
    assert list(engine.logger.of("outliers_qkv/share_00")) == [6]


@pytest.mark.parametrize("style", ["neox", "llama"])
def test_validate_looks_once_without_training(corpus, style):
    engine = trainer([OutlierMonitor(every_n_steps=100, num_tokens=64)], limit_val_batches=2)
    engine.validate(lit_module(style=style), datamodule=datamodule(corpus), verbose=False)
    for site in SITES:
        for layer in (0, 1):
            assert list(engine.logger.of(f"outliers_{site}/largest_ratio_{layer:02d}")) == [0]


def test_validate_of_a_checkpoint_looks_at_its_step_once_more(corpus, tmp_path):
    engine, _ = fit(corpus, [OutlierMonitor(every_n_steps=2, num_tokens=64)], steps=4)
    engine.save_checkpoint(tmp_path / "x.ckpt")
    monitor = OutlierMonitor(every_n_steps=2, num_tokens=64)
    engine = trainer([monitor], limit_val_batches=1)
    engine.validate(lit_module(), datamodule=datamodule(corpus), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert list(engine.logger.of("outliers_qkv/share_00")) == [4]
    assert monitor.steps == [0, 2, 4]
    assert len(monitor.shares) == len(monitor.channels) == 3


def test_the_validation_that_closes_a_fit_looks_where_the_fit_has_not(corpus):
    """``fit`` on the command line ends with one; the last step's numbers are logged once."""
    for steps, expected in ((4, [0, 2, 4]), (5, [0, 2, 4, 5])):
        data, monitor = datamodule(corpus), OutlierMonitor(every_n_steps=2, num_tokens=64)
        engine, module = trainer([monitor], steps, limit_val_batches=1), lit_module()
        engine.fit(module, datamodule=data)
        engine.validate(module, datamodule=data, verbose=False)
        assert [step for step, found in engine.logger.metrics if "outliers_qkv/share_00" in found] == expected


@pytest.mark.parametrize("layer", [2, -1])
def test_a_block_that_is_not_there_is_refused_before_the_first_step(corpus, layer):
    with pytest.raises(ValueError, match=rf"outliers\.layer {layer} is no block of the model: choose 0 to 1"):
        fit(corpus, [OutlierMonitor(layer=layer)])
    fit(corpus, [OutlierMonitor(every_n_steps=0, layer=layer)], steps=1)
