"""SIGTERM as a question that every rank answers alike: may this process be about to end?

A cluster that wants its machine back sends SIGTERM, to one process or to all of them, and SIGKILL some time later
(SLURM: ``--signal=TERM@120``; torchrun passes it on to its workers). A rank that leaves alone lets the others wait for
ever in the next collective. So the handler only takes note, and after every batch the ranks agree: stop if any has
noted it.

They agree over a gloo group of their own, from host to host: a tenth of a millisecond on one machine, and the
accelerator is not waited for. Lightning asks every rank too, but through the accelerator and with ``.item()``, which
holds the host back until all queued work is done, in every batch; and its handler starts a broadcast of its own in
the middle of whatever collective is under way. While a fit runs both are replaced; what was there before the fit
Lightning itself puts back, however it ends.
"""

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Preemption:
    """The handler of SIGTERM of one fit."""

    def __init__(self) -> None:
        self._installed = self._noted = False
        self._group: dist.ProcessGroup | None = None
        self._flag = torch.zeros((), dtype=torch.int64)  # one for all steps: gloo's thread may hold it past the wait

    def install(self, trainer: Trainer) -> None:
        """Takes SIGTERM over from Lightning, once; all ranks take part."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread handle signals
        self._installed = True
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self._noted = True

    def requested(self) -> bool:
        """Whether any rank has received SIGTERM; all ranks must ask."""
        if self._group is None:
            return self._noted
        self._flag.fill_(self._noted)
        dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group)
        return bool(self._flag)
