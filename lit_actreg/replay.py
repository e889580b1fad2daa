"""CUDA graphs: a sequence of kernels recorded once, and replayed with one call.

Launching kernels one by one from the host can take longer than running them: those of one new token, and integer ones
of a whole validation batch. A graph can be replayed as long as nothing in it depends on the host: not a shape, not an
address, not a decision. So inputs and results lie where they lay when it was recorded.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from lit_actreg.config import QuantConfig
from lit_actreg.model import Decoder, LayerCache


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Runs ``step`` once, eagerly, so that its kernels are compiled; then records it without running it."""
    side = torch.cuda.Stream()  # as capture does: libraries allocate their workspaces by stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Another thread, which pins the next batch's memory, may go on as it likes.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph


class ReplayedDecoder(Decoder):
    """A decoder that a GPU replays, for many batches without gradients; :func:`replay` makes one of any.

    The first batch of a shape runs as it is; the second is recorded, and keeps the memory of a forward pass for good.
    What a replay returns is overwritten by the next one. Everything runs as it is with gradients, in generation
    (``rotary`` is given then), on a CPU, and while hooks, which a replay would not call, wait at any module; those of
    sharded modules do. Weights that have moved are recorded anew.
    """

    def forget(self) -> None:
        self.places = self.current_places()
        self.seen: set[torch.Size] = set()
        self.recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]] = {}

    def forward(
        self,
        ids: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if rotary is not None or not ids.is_cuda or torch.is_grad_enabled() or self.is_watched():
            return super().forward(ids, rotary, caches)
        if self.places != self.current_places():
            self.forget()
        if ids.shape not in self.seen:
            self.seen.add(ids.shape)
            return super().forward(ids)
        if ids.shape not in self.recorded:
            self.recorded[ids.shape] = self.record(ids)
        graph, mine, result = self.recorded[ids.shape]
        mine.copy_(ids)
        graph.replay()
        return result

    def set_activations(self, quant: QuantConfig) -> None:
        super().set_activations(quant)
        self.forget()

    def current_places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in chain(self.parameters(), self.buffers())]

    def is_watched(self) -> bool:
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())

    def record(self, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]:
        with torch.inference_mode(False):  # or nobody could write it outside of that mode
            mine = ids.clone()
        results: list[tuple[Tensor, Tensor]] = []
        graph = captured(lambda: results.append(Decoder.forward(self, mine)))
        return graph, mine, results[-1]


def replay(decoder: Decoder) -> None:
    """Makes a decoder a :class:`ReplayedDecoder`, in place."""
    decoder.__class__ = ReplayedDecoder
    assert isinstance(decoder, ReplayedDecoder)
    decoder.forget()
