"""The checkpoint to resume from: written every N optimizer steps and when a fit ends.

One file, ``last.ckpt`` in the logger's folder, links to the newest; a kill loses at most one interval. Lightning
writes a checkpoint beside its place and renames it. For the best by validation loss add Lightning's ModelCheckpoint
to ``trainer.callbacks``.
"""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class ResumeCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoint, ``step=N.ckpt``, and a link to it, ``last.ckpt``.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__(
            filename="{step}",
            every_n_train_steps=every_n_steps,
            save_last="link",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is worth keeping, whether or not the interval divides it."""
        if trainer.global_step != self._last_global_step_saved:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
