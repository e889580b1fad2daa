"""SIGTERM and Ctrl-C as a question that every rank answers alike: may this process be about to end?

A cluster that wants its machine back sends SIGTERM, to one process or to all of them, and SIGKILL some time later
(SLURM: ``--signal=TERM@120``; torchrun passes it on to its workers); Ctrl-C sends SIGINT to all that run in a terminal.
A rank that leaves alone lets the others wait for ever in the next collective. So the handler only takes note, and after
every batch the ranks agree: stop if any has noted one. Ctrl-C once more ends a process at once.

They agree over a gloo group of their own, from host to host: a tenth of a millisecond on one machine, and the
accelerator is not waited for. Lightning asks every rank too, but through the accelerator and with ``.item()``, which
holds the host back until all queued work is done, in every batch; and its handler starts a broadcast of its own in
the middle of whatever collective is under way, or ends the process with status 0. While a fit runs both are replaced;
the handlers that were there before Lightning itself puts back, however the fit ends.
"""

import os
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer


class Preemption:
    """The handler of both signals, of one fit."""

    def __init__(self) -> None:
        self._noted = 0
        self._speaks = False
        self._group: dist.ProcessGroup | None = None
        self._flag = torch.zeros((), dtype=torch.int64)  # one for all steps: gloo's thread may hold it past the wait

    def replace_lightnings_handler(self, trainer: Trainer) -> None:
        """Has Lightning register this handler of SIGTERM for the fit, in its own's place; all ranks take part."""
        self._speaks = trainer.is_global_zero
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        trainer._signal_connector._sigterm_notifier_fn = self._note  # type: ignore[method-assign,assignment]

    @staticmethod
    def restore_lightnings_handler(trainer: Trainer) -> None:
        """For what the Trainer does after the fit."""
        vars(trainer._signal_connector).pop("_sigterm_notifier_fn", None)

    def take_interrupts(self) -> None:
        """Takes Ctrl-C over from Python, unless it is another's or ignored, as in what a shell starts with ``&``."""
        in_main = threading.current_thread() is threading.main_thread()  # only there does Python handle signals
        if in_main and not self._noted and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, _: Any) -> None:
        self._noted = max(self._noted, number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._speaks:  # past Python's stream, in the middle of whose writing this may be
                os.write(2, b"\nInterrupted: a checkpoint is written after the next batch; once more ends at once\n")

    def requested(self) -> int:
        """The signal that a rank has received (SIGTERM of both), or 0; all ranks must ask."""
        if self._group is None:
            return self._noted
        self._flag.fill_(self._noted)
        dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group)
        return int(self._flag)
