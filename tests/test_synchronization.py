"""Between two logs the host hands steps to the device and never waits for it: what it asks for it asks for at logs."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from small_fit import datamodule, lit_module, trainer, write_corpus
from torch.utils._python_dispatch import TorchDispatchMode

from lit_actreg.callbacks.checkpoint import ResumeCheckpoint
from lit_actreg.callbacks.clip_schedule import ClipSchedule
from lit_actreg.callbacks.kurtosis import KurtosisRegularization
from lit_actreg.callbacks.loss_guard import LossGuard
from lit_actreg.callbacks.outlier_monitor import OutlierMonitor
from lit_actreg.callbacks.throughput import Throughput
from lit_actreg.module import LitLanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("synchronization") / "corpus")


def engine(folder, guard: LossGuard, watch: Callback, steps: int, **options):
    """A trainer with all that a fit has."""
    callbacks = [KurtosisRegularization(), ClipSchedule(calibrate_steps=[]), guard, Throughput()]
    callbacks += [OutlierMonitor(every_n_steps=50), ResumeCheckpoint(every_n_steps=50), TQDMProgressBar(10), watch]
    options |= {"enable_progress_bar": True, "enable_checkpointing": True, "log_every_n_steps": 5}
    return trainer(callbacks, steps, logger=TensorBoardLogger(folder), **options)


class Readings(TorchDispatchMode):
    """Counts how often a tensor is asked for its value: where it is a GPU's, the host waits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class ReadsLater(LossGuard):
    """As on a GPU; counts."""

    host_knows = staticmethod(lambda loss: False)
    num_readings = 0

    def read(self, trainer):
        self.num_readings += 1
        super().read(trainer)


def test_the_host_does_not_wait_for_the_device_between_logs(corpus, tmp_path, monkeypatch):
    """Nothing is read in batches before the first log; what the bar shows from then on Lightning reads after every
    batch, so that has to be on the host."""
    adamw, to_host, log, shown = torch.optim.AdamW, torch.Tensor.cpu, LitLanguageModel.log, []

    def marked(tensor: torch.Tensor) -> torch.Tensor:
        tensor = to_host(tensor).clone()
        tensor.came_to_the_host = True
        return tensor

    def noted(module, name, value, **options):
        if options.get("prog_bar"):
            shown.append((name, value))
        log(module, name, value, **options)

    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **o: adamw(groups, **(o | {"fused": True})))  # as on a GPU
    monkeypatch.setattr(torch.Tensor, "cpu", marked)
    monkeypatch.setattr(LitLanguageModel, "log", noted)
    guard, counts = ReadsLater(), []

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            counts.append(readings.count)

    fit = engine(tmp_path, guard, Watch(), steps=10, accumulate_grad_batches=2).fit
    with Readings() as readings:
        fit(lit_module(), datamodule=datamodule(corpus, batch_size=4))
    assert counts[1] == counts[9]  # the first log comes after ten batches
    assert len(counts) == 20
    assert guard.num_readings <= 2 + 2  # at logs; before the last checkpoint and at the end
    assert {"train/loss", "train/tokens_per_second"} <= {name for name, _ in shown}
    for name, value in shown:
        assert value.came_to_the_host if name == "train/loss" else isinstance(value, torch.Tensor), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_no_operation_between_logs_synchronizes(corpus, tmp_path, compile):
    """PyTorch raises an error at one that does."""
    modes = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 10:  # behind the second log
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            modes.append(torch.cuda.get_sync_debug_mode())
            if batch_idx == 13:  # before the third
                torch.cuda.set_sync_debug_mode("default")

    fit = engine(tmp_path, LossGuard(), Watch(), steps=16, accelerator="gpu", precision="bf16-mixed").fit
    try:
        fit(lit_module(compile=compile), datamodule=datamodule(corpus, batch_size=4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes == [0] * 10 + [2] * 4 + [0] * 2
