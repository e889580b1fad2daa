"""Text in, fixed blocks of tokens out: corpus → tokenizer → packed blocks on disk → DataModule.

Only :class:`TextDataModule` is meant for the outside; the other files each do one of the arrows.
"""

from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.data.packed import IGNORE

__all__ = ["IGNORE", "TextDataModule"]
