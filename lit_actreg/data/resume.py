"""Exact resume: a continued fit sees the batches that an uninterrupted one would have seen.

Lightning 2.6's fit loop restores its progress counters, then asks for the training loader, calls ``iter`` on it at
once and skips nothing: a plain loader would begin its pass anew while the loop believes to be in the middle of one.
Here the counters are the state. ``batch_progress.total.processed`` counts the batches that training_step and, at the
end of an accumulation window, the optimizer are done with, over all passes; it is in every checkpoint, is the same on
every rank, and is right at every ``iter`` (a fit's start, a restored one's, the next pass's), however many batches
workers have fetched ahead. The sampler starts there.

A checkpoint written inside an accumulation window (by time, on SIGTERM, on an exception) lacks the gradients gathered
so far. :func:`rewind` sets the restored counters back to the window's first batch.

The loader's own ``state_dict`` holds what the order of batches depends on beside the counters, so that resuming with
other data, another batch size or window is an error rather than a silent change of course.
"""

import time
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader


def num_trained_batches(trainer: Trainer | None) -> int:
    """Batches (not optimizer steps) trained on so far, over all passes; 0 outside a Trainer.

    With ``overfit_batches`` every pass repeats the first ones, so 0 too.
    """
    if trainer is None or trainer.overfit_batches:  # type: ignore[attr-defined]
        return 0
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def rewind(trainer: Trainer) -> None:
    """Sets a restored fit loop back to the start of the accumulation window it was saved in, if it was inside one."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    inside = progress.current.processed % trainer.accumulate_grad_batches
    # a pass's last window may be short: Lightning has stepped at its end
    if not trainer.fit_loop.restarting or progress.is_last_batch or not inside:
        return
    for counter in (progress.total, progress.current):
        start = counter.processed - inside
        counter.ready = counter.started = counter.processed = counter.completed = start


class ResumableLoader(DataLoader[Tensor]):
    """A DataLoader that recognizes what it was saved with; Lightning stores its state in the checkpoint.

    Args:
        order: What the order of batches depends on, plain values by name.
        options: As of ``DataLoader``.

    Attributes:
        seconds_waited: Time that the training loop has stood still for a batch, since the loader was made.
    """

    def __init__(self, order: dict[str, int | str], **options: Any) -> None:
        super().__init__(**options)
        self.order = order
        self.seconds_waited = 0.0

    def __iter__(self) -> Any:
        return self._timed(super().__iter__())

    def _timed(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same batches; adds up how long the caller has waited for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return dict(self.order)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = {name: value for name, value in self.order.items() if name in state}  # older ones say less
        changed = [f"{name} {state[name]} → {value}" for name, value in known.items() if state[name] != value]
        if changed:
            raise ValueError(
                f"the checkpoint was trained on other batches ({', '.join(changed)}): "
                "resume with the data, data.batch_size × devices, trainer.accumulate_grad_batches and data.seed it was "
                "written with"
            )
