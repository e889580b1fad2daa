"""Text in, fixed blocks of tokens out: corpus → tokenizer → packed blocks on disk → DataModule.

Only :class:`TextDataModule` is meant for the outside; the other files each do one of the arrows.
"""

from lit_actreg.data.datamodule import TextDataModule

__all__ = ["TextDataModule"]
