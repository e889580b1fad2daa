"""How a built decoder is made fast, one function a technique, in the order that works: compile, then shard.

Each block is compiled in place, so parameter names, checkpoints and hooks between blocks stay as they are. The
LightningModule itself is never compiled: ``self.log`` does not survive it.
"""

from lit_actreg.model import Decoder


def compile_blocks(model: Decoder) -> None:
    """Compiles every block as one graph each; they share the compiled code."""
    for block in model.blocks:
        block.compile(fullgraph=True)
