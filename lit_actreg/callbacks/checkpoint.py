"""The checkpoint to resume from: written every N optimizer steps, on SIGTERM or Ctrl-C, and when a fit ends.

In the folder ``checkpoints`` of the run lie the newest two, ``step=N.ckpt``, and ``last.ckpt``, a link to the newest.
`fit --ckpt_path last` finds it, also from a new version of the same run; where it is torn, the one before it is used
(:mod:`lit_actreg.checkpoint`). A kill loses at most one interval.

**Whole or not there.** A checkpoint is written beside its place, as ``.step=N.part``, flushed to the disk, and renamed;
the link is replaced by a rename too. Lightning does not do that by itself: its writer fills a file in the system's
temporary folder and moves it, which between two file systems is a copy that a kill can interrupt; before that, it
holds the whole checkpoint in memory, twice. :class:`PlainFile` writes straight to the file. In shards
(ModelParallelStrategy) every rank writes into the folder ``.step=N.part``, and the folder is renamed.

**SIGTERM and Ctrl-C** (:mod:`lit_actreg.callbacks.preemption`) are answered after the batch at hand: a checkpoint is
written, and the process exits with status 143 or 130. Inside an accumulation window the gradients gathered so far are
not in it: the resumed fit goes back to the window's first batch (:mod:`lit_actreg.data.resume`).

For the best by validation loss add Lightning's ModelCheckpoint to ``trainer.callbacks``.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_actreg.callbacks.preemption import Preemption
from lit_actreg.checkpoint import newest_first


class PlainFile(TorchCheckpointIO):
    """Writes a checkpoint of one file as torch does, through no buffer in memory and no temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(checkpoint, path)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if "inline_container" not in reason and "iostream" not in reason:
                raise
            free = shutil.disk_usage(Path(path).parent).free  # a full disk fails so in the zip file's writer
            raise OSError(f"{path} cannot be written ({reason}); its disk has {free / 2**20:.0f} MiB free") from error


def leaves_files(trainer: Trainer) -> bool:
    """Whether a fit writes checkpoints, and so has an answer to signals: not under ``fast_dev_run``."""
    return not trainer.fast_dev_run  # type: ignore[attr-defined]


def run_folder(trainer: Trainer) -> Path:
    """Where a fit's logs lie: the logger's folder, name and version; without a logger the Trainer's root folder."""
    logger, root = trainer.logger, Path(trainer.default_root_dir)
    if logger is None:
        return root
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = Path(logger.save_dir or root) / str(logger.name) / version
    return Path(os.path.expandvars(folder)).expanduser()  # as TensorBoardLogger does


def take_run_folder(trainer: Trainer, next_version: bool, resumes: bool) -> None:
    """Makes the folder of the logger's next version, so that a fit that begins while this one packs takes another.

    A new fit in a folder that was named is refused where it would replace another's checkpoints (ValueError).
    """
    while next_version and trainer.is_global_zero:
        folder = run_folder(trainer)
        try:
            return folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
            trainer.logger._version += 1  # type: ignore[union-attr]  # somebody has taken it just now
    folder = run_folder(trainer)
    if not resumes and newest_first(folder / "checkpoints"):
        option = "trainer.default_root_dir" if trainer.logger is None else "version"
        raise ValueError(
            f"{folder} has another fit's checkpoints, which a new one would replace: resume it with --ckpt_path last, "
            f"or name another {option}"
        )


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of entries, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(beside: Path, path: Path) -> None:
    """Flushes what was written beside and renames it to ``path``."""
    for written in [beside, *beside.rglob("*")]:
        flush(written)
    if path.is_dir():  # a folder is not replaced by a rename
        shutil.rmtree(path)
    os.replace(beside, path)
    flush(path.parent)


class ResumeCheckpoint(Checkpoint):
    """Keeps the newest checkpoints, ``step=N.ckpt``, and a link to the newest, ``last.ckpt``.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: Newest checkpoints that are kept; with two, a torn one leaves another.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        for name, value in {"every_n_steps": every_n_steps, "keep": keep}.items():
            if value < 1:
                raise ValueError(f"checkpoint.{name} {value} is too small: use 1 or more")
        self.every_n_steps, self.keep = every_n_steps, keep
        self._folder = Path()
        self._saved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.preemption = Preemption()
            if isinstance(version := getattr(trainer.logger, "_version", None), int):
                # Other ranks have looked for the next version when rank 0 had made its folder
                trainer.logger._version = trainer.strategy.broadcast(version)  # type: ignore[union-attr]
            self._folder = Path(trainer.strategy.broadcast(run_folder(trainer) / "checkpoints"))
            sharded = isinstance(trainer.strategy, ModelParallelStrategy)
            if not sharded and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = PlainFile()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if leaves_files(trainer):
            self.preemption.replace_lightnings_handler(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.preemption.take_interrupts()  # answered after the first batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        if leaves_files(trainer):
            self.preemption.take_interrupts()  # a resumed fit has no sanity check

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Preemption.restore_lightnings_handler(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        Preemption.restore_lightnings_handler(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Saves where the interval divides the step, and at once after SIGTERM or Ctrl-C."""
        if not leaves_files(trainer):
            return
        if trainer.global_step % self.every_n_steps == 0:
            self.save_once(trainer)
        self._end_if_requested(trainer)

    def _end_if_requested(self, trainer: Trainer) -> None:
        """Ends the process if a rank has received a signal, with a checkpoint of this step; all ranks must ask."""
        if number := self.preemption.requested():
            name, path = signal.Signals(number).name, self._path(trainer)
            if not path.exists():
                self.save(trainer)
            rank_zero_info(f"{name}: {path} is written; the same fit with --ckpt_path last goes on")
            raise SystemExit(128 + number)  # what a shell reports of a process that the signal ended

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is worth keeping, whether or not the interval divides it."""
        if leaves_files(trainer):
            self.save_once(trainer)
            self._end_if_requested(trainer)  # what came during the last validation

    def _path(self, trainer: Trainer) -> Path:
        return self._folder / f"step={trainer.global_step}.ckpt"

    def save_once(self, trainer: Trainer) -> None:
        """Saves unless this step is saved, or is the one that the fit began with."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes the checkpoint of this step; all ranks take part."""
        path = self._path(trainer)
        beside = path.with_name(f".{path.stem}.part")
        if trainer.is_global_zero:
            for left_over in self._folder.glob(".step=*.part"):
                remove(left_over)
        trainer.strategy.barrier("room for the checkpoint")
        try:
            trainer.save_checkpoint(beside, weights_only=False)  # said, or Lightning says it every time
        except OSError:
            remove(beside)
            raise
        if trainer.is_global_zero:
            put_in_place(beside, path)
            link = self._folder / ".last"
            remove(link)
            link.symlink_to(path.name)
            os.replace(link, self._folder / "last.ckpt")
            for old in newest_first(self._folder)[self.keep :]:
                remove(old)
        trainer.strategy.barrier("checkpoint in place")
        self._saved_step = trainer.global_step
