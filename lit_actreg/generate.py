"""Generation with a key/value cache: read the prompt once, then one token a step.

Predicting token n takes attention to all tokens before it. Their keys and values do not change, since attention is
causal, so every block keeps them (:class:`lit_actreg.model.LayerCache`) and a step computes those of one token only:

    prefill   tokens 0 … w − 1 at once: causal attention, and w entries of the cache are written
    step      token p: its key and value go to entry p, its query attends to the entries 0 … p       → token p + 1

**Static shapes.** A step is a sequence of hundreds of small kernels, and launching them one by one takes longer than
running them. A CUDA graph records the sequence once and replays it with one call, provided that nothing in it depends
on the host: not a shape, not an address, not a decision. So the cache has its full length from the beginning, the
position is a tensor on the device that the step itself advances, attention stops at the entry that it names
(:mod:`lit_actreg_kernels.decode_attention`), and the token is drawn on the device and written where the next step reads
it. On a CPU, and for weights sharded over several processes, the same step runs eagerly.

**Sampling.** With temperature t > 0 token v has the probability p_v = softmax(logits / t)_v. argmax_v p_v / e_v with
independent e_v ~ Exp(1) is a draw from it (the smallest of exponential waiting times e_v / p_v: v wins with
probability p_v), and needs no look by the host, as ``torch.multinomial`` does. t = 0 takes the likeliest token.

**At the end of the context** C (positions beyond it were not trained) the text goes on from its recent part: the window
moves by half a context at a time, so token n is predicted from the tokens s … n − 1 with

    s = 0 for n ≤ C,    s = h · ⌈(n − C) / h⌉ for n > C,    h = ⌊C / 2⌋

which are the last C − h + 1 to C tokens, read anew (one prefill) every h tokens. s depends on n alone: a text continued
in two runs is continued as in one.

Every model that is a :class:`~lit_actreg.model.Decoder` generates so: float, fake-quantized, or on integer kernels.
Shapes: B prompts of T tokens (all of one length); a cache of C' ≤ C entries; G key/value heads of width E.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_actreg.model import Decoder, LayerCache, rotary_angles
from lit_actreg.replay import captured


def window_start(num_tokens: int, context: int) -> int:
    """The first of ``num_tokens`` tokens that the next one is predicted from (s in the module's formula)."""
    half = max(1, context // 2)
    return max(0, -(-(num_tokens - context) // half) * half)


def sample(logits: Tensor, temperature: float) -> Tensor:
    """Tokens int64 [B] of logits [B, V]; see the module on the exponential race."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


class Continuation:
    """One window of text that is being continued: its tokens, and the cache of what the model has read of them.

    Args:
        model: The decoder, in evaluation mode.
        window_BW: Token ids int64 [B, W], read at once (the prefill).
        num_new: Tokens to come after them; W + num_new − 1 entries must be within the model's context.
        temperature: See :func:`sample`.

    Attributes:
        tokens: int64 [B, W + num_new]; the first W + 1 are known from the start, every :meth:`step` gives one more.
    """

    def __init__(self, model: Decoder, window_BW: Tensor, num_new: int, temperature: float = 0.0) -> None:
        self.model, self.temperature = model, temperature
        (num_batch, num_read), device, c = window_BW.shape, window_BW.device, model.config
        length = num_read + num_new - 1  # the last token is not read
        assert length <= c.context, (length, c.context)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.embedding.weight.dtype
        # Zeros: what reads a whole cache and hides the rest gives it the weight 0, and 0 · NaN would not vanish.
        shape = (num_batch, c.kv_heads, length, c.head_width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in model.blocks]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.cos, self.sin = rotary_angles(length, c.head_width, c.rope_theta, device)
        self.tokens = torch.cat([window_BW, window_BW.new_zeros(num_batch, num_new)], dim=1)
        places = torch.arange(length, device=device)
        self.tokens[:, num_read] = self._next(window_BW, places[:num_read])
        self.position = places.new_tensor([num_read])  # of the token that the next step reads

    def _next(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Reads the tokens at these positions and returns the one after them, int64 [B]."""
        caches = [LayerCache(*layer, positions_T[:1]) for layer in zip(self.keys, self.values, strict=True)]
        hidden, _ = self.model(ids_BT, (self.cos[positions_T], self.sin[positions_T]), caches)
        return sample(self.model.logits(hidden[:, -1]), self.temperature)

    def step(self) -> None:
        """Reads one token and writes the next: the same kernels on the same addresses every time."""
        token_B = self._next(self.tokens.index_select(1, self.position), self.position)
        self.position += 1
        self.tokens.index_copy_(1, self.position, token_B[:, None])


def run_steps(step: Callable[[], None], count: int, cuda_graph: bool) -> None:
    """Runs ``step`` ``count`` times; as a CUDA graph, if asked to, from the second time on."""
    if cuda_graph and count > 2:  # recording costs about as much as running
        graph = captured(step)
        for _ in range(count - 1):
            graph.replay()
    else:
        for _ in range(count):
            step()


@torch.no_grad()
def generate(
    model: Decoder, prompts_BT: Tensor, new_tokens: int, temperature: float = 0.0, cuda_graph: bool = True
) -> Tensor:
    """Continues prompts int64 [B, T] by ``new_tokens`` tokens each: int64 [B, T + new_tokens].

    Args:
        model: Any decoder, on the prompts' device.
        prompts_BT: At least one token each; all of one length.
        new_tokens: How many to generate. Past the context the window moves, as the module says.
        temperature: 0 for the likeliest token, 1 for the model's own distribution.
        cuda_graph: Whether a GPU replays a step as a CUDA graph; the tokens are the same without.
    """
    if prompts_BT.shape[1] == 0:
        raise ValueError("a prompt is empty: there is nothing to continue; give at least the end-of-text token")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative: choose 0 for the likeliest token, or more")
    sharded = any(isinstance(parameter, DTensor) for parameter in model.blocks.parameters())
    cuda_graph = cuda_graph and prompts_BT.is_cuda and not sharded
    context, ids, num_wanted = model.config.context, prompts_BT, prompts_BT.shape[1] + new_tokens
    while ids.shape[1] < num_wanted:
        start = window_start(ids.shape[1], context)
        window = ids[:, start:]
        num_new = min(num_wanted - ids.shape[1], context + 1 - window.shape[1])
        continuation = Continuation(model, window, num_new, temperature)
        run_steps(continuation.step, num_new - 1, cuda_graph)
        ids = torch.cat([ids[:, :start], continuation.tokens], dim=1)
    return ids
