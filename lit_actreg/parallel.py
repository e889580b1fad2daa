"""How a built decoder is made to fit and made fast, one function a technique, in the order that works:

1. :func:`checkpoint_blocks`: recompute a block's activations in the backward pass rather than keep them;
2. :func:`compile_blocks`: one graph a block, the checkpointing inside it, and one of the final norm;
3. :func:`shard`: split parameters, gradients and optimizer states over the ranks (FSDP2), around the compiled blocks.

Each works in place on the blocks, so that parameter names, checkpoints and what stands at ``model.blocks[i]`` stay as
they are. The LightningModule itself is never compiled: ``self.log`` does not survive it.
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lit_actreg.model import Block, Decoder


def checkpoint_blocks(model: Decoder) -> None:
    """Keeps only every block's input; the backward pass runs the block again.

    Nothing in a block is random, so no random state is kept. A loss term's statistic is one of the block's outputs; it
    is computed again too, and enters the loss once.
    """

    def run(block: Block, *args: Tensor | None) -> Any:
        return checkpoint(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False)

    for block in model.blocks:
        block.forward = MethodType(run, block)


def compile_blocks(model: Decoder) -> None:
    """Compiles every block as one graph each, which share the compiled code, and the final norm.

    Under DistributedDataParallel, too: its own optimizer, which is switched off for the whole process, would cut a
    block's graph wherever a bucket of gradients is full, so that their reduction begins before the graph's end. With
    many blocks it begins early enough.
    """
    config = torch._dynamo.config  # asked when a graph is traced
    config.optimize_ddp = False
    # Of a block's forms: training, validation, reading a prompt, generating, each of batches of one and of other sizes
    config.recompile_limit = max(32, config.recompile_limit)
    for block in model.blocks:
        block.compile(fullgraph=True)
    compiled = torch.compile(type(model).end_stream, fullgraph=True)
    model.end_stream = MethodType(compiled, model)  # type: ignore[method-assign]  # a deep copy's is its own


def shard(model: Decoder, mesh: DeviceMesh) -> None:
    """Shards parameters over the data-parallel ranks: one group a block, and one of all else (the root).

    Every rank must come with the same weights: they are split, not broadcast. Embedding and head, tied or not, are in
    the root's group, whose weights stay whole from the forward pass to the backward pass: the loss applies the head
    after the decoder's forward has returned.

    Args:
        model: The decoder, checkpointed and compiled if it is to be.
        mesh: Lightning's mesh, of dimensions "data_parallel" and "tensor_parallel".
    """
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"trainer.strategy has tensor_parallel_size {size}, but only data is parallel here: set it to 1 and "
            "data_parallel_size to the number of devices"
        )
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=False)
    # The gradient of a parameter outside every group would not be reduced, and ranks would drift apart.
    outside = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    assert not outside, outside


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in its place.

    The device sees to it while the host goes on. Lightning's ``strategy.reduce`` begins with a barrier, at which the
    host waits until the device has done all its work.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, with all its values on every rank; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
