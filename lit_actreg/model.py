"""The decoder: embeddings, pre-norm blocks of one of two styles, a final norm and the LM head. No Lightning in here.

A block has four linears, named by their input site (in order "qkv", "attn_proj", "mlp_in", "mlp_proj"). It returns the
residual stream, in two terms, and a small vector of statistics of its linears' outputs or weights, one number per loss
term and site. Returning them, rather than collecting them in hooks, is what stays right under torch.compile, activation
checkpointing and FSDP2 alike.

Shapes: B sequences, T tokens, D width, H heads, K/V heads G, head width E, vocabulary V.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from lit_actreg_kernels import ops, view_ops
from torch import Tensor, nn

from lit_actreg.config import SITES, ModelConfig, QuantConfig, Site
from lit_actreg.contracts import LossTerm
from lit_actreg.quant.fused import fuses, gelu_linear, norm_linear, swiglu_linear, wide_norm
from lit_actreg.quant.linear import GELU_MINIMUM, QuantLinear
from lit_actreg.quant.statistics import looks, tap_token_kurtosis


def rotary_angles(num_tokens: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, E] of the rotary positions, float32, halves repeated (the GPT-NeoX and Llama convention)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_width, 2, device=device).float() / head_width)  # as transformers
    angles = torch.outer(torch.arange(num_tokens, device=device).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def linear_dtype(x: Tensor) -> torch.dtype:
    """Of what a linear gives for x: autocast's dtype, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class LayerCache(NamedTuple):
    """What one block remembers of the tokens read so far, for generation (:mod:`lit_actreg.generate`).

    It is read and written for the first tokens of a text, all at once, and then for one more at a time.

    Attributes:
        keys: Rotated, [B, G, C, E]; written in place.
        values: [B, G, C, E].
        position: Where a single token that is read stands, int64 [1].
    """

    keys: Tensor
    values: Tensor
    position: Tensor


# Statistics by loss term and site; none of use where an operator was not asked
Found = dict[tuple[int | None, Site], Tensor | None]


class Block(nn.Module):
    """One pre-norm block: x ← x + attention(norm(x)), then x ← x + MLP(norm(x)).

    The residual stream goes from block to block as two tensors x and y, [B, T, D] each, whose sum it is: y is what the
    MLP before gave, not yet added. So every addition is done by the norm behind it, in the pass that reads the sum
    (:func:`norm_linear`). y is None where nothing is left to add. Returns x, y and the statistics [S].

    Kurtosis of y comes along in the same pass. So of the outputs of "mlp_proj" a block gives that of the one it was
    handed, and :meth:`Decoder.forward` sees to it that statistics are in the rows of the blocks they are of.
    """

    def __init__(self, config: ModelConfig, quant: QuantConfig) -> None:
        super().__init__()
        self.config = config
        self.loss_terms: tuple[LossTerm, ...] = ()
        width, hidden, neox = config.width, config.hidden_width, config.style == "neox"
        num_qkv = (config.num_heads + 2 * config.kv_heads) * config.head_width
        norm = nn.LayerNorm if neox else nn.RMSNorm
        self.norm_1 = norm(width, eps=config.norm_eps)
        self.qkv = QuantLinear(width, num_qkv, neox, "qkv", quant)
        self.attn_proj = QuantLinear(width, width, neox, "attn_proj", quant)
        self.norm_2 = norm(width, eps=config.norm_eps)
        # "llama": the rows of gate, then the rows of up
        self.mlp_in = QuantLinear(width, hidden if neox else 2 * hidden, neox, "mlp_in", quant)
        self.mlp_proj = QuantLinear(hidden, width, neox, "mlp_proj", quant, GELU_MINIMUM if neox else None)

    def attend(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, every_nth_token: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Causal attention: [B, T, (H + 2G)·E] → [B, T, D]; with a cache, also to the tokens in it.

        And the kurtosis of ``qkv``, of one token in so many.
        """
        c = self.config
        num_batch, num_tokens, _ = qkv.shape
        if cache is not None and num_tokens == 1:
            qkv, kappa = tap_token_kurtosis(qkv, every_nth_token)
            return ops.decode_attention(qkv[:, 0], cos, sin, *cache)[:, None], kappa
        # All stays in the order [B, T, H, E]; attention takes views, and lays its output out as it finds q: no copies.
        q, k, v, kappa = view_ops.rotate(qkv, cos, sin, c.num_heads, c.kv_heads, looks(num_tokens, every_nth_token))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            cache.keys[:, :, :num_tokens], cache.values[:, :, :num_tokens] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.kv_heads != c.num_heads)
        return y.transpose(1, 2).reshape(num_batch, num_tokens, c.width), kappa

    def forward(
        self, x_BTD: Tensor, y_BTD: Tensor | None, cos: Tensor, sin: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        # add → norm → quantize → linear; activation → quantize → linear (fused.py)
        found: Found = {}
        term = self.kurtosis_term
        x_BTD, qkv, found[term, "mlp_proj"] = norm_linear(  # of the block before
            self.norm_1, self.qkv, x_BTD, y_BTD, self.every_nth_token("mlp_proj")
        )
        qkv = self.look_at("qkv", qkv, found)
        attended, found[term, "qkv"] = self.attend(qkv, cos, sin, cache, self.every_nth_token("qkv"))
        attended = self.look_at("attn_proj", self.attn_proj(attended), found)
        bias = self.bias_for_gelu(x_BTD)
        x_BTD, hidden, found[term, "attn_proj"] = norm_linear(
            self.norm_2, self.mlp_in, x_BTD, attended, self.every_nth_token("attn_proj"), detach_bias=bias is not None
        )
        hidden, every = self.look_at("mlp_in", hidden, found), self.every_nth_token("mlp_in")
        if self.config.style == "neox":
            y_BTD, found[term, "mlp_in"] = gelu_linear(self.mlp_proj, hidden, every, bias)
        else:
            y_BTD, found[term, "mlp_in"] = swiglu_linear(self.mlp_proj, hidden, every)
        y_BTD = self.look_at("mlp_proj", y_BTD, found)
        if not self.loss_terms:
            return x_BTD, y_BTD, x_BTD.new_zeros(0, dtype=torch.float32)
        return x_BTD, y_BTD, torch.stack([cast(Tensor, found[column]) for column in self.columns])

    @property
    def columns(self) -> list[tuple[int, Site]]:
        """What the S statistics are of: loss terms by their index, and their sites."""
        return [(i, site) for i, term in enumerate(self.loss_terms) for site in term.sites]

    def nothing_to_add(self, x_BTD: Tensor) -> Tensor | None:
        """The y of the first block: zeros, with the dtype and the ``requires_grad`` of the other blocks' y.

        So the first block runs their compiled code, too. Nobody uses the gradient.
        """
        return torch.zeros_like(x_BTD, dtype=linear_dtype(x_BTD), requires_grad=x_BTD.requires_grad)

    @property
    def kurtosis_term(self) -> int | None:
        """The loss term whose statistic operators compute on the way."""
        return next((i for i, term in enumerate(self.loss_terms) if term.every_nth_token is not None), None)

    def every_nth_token(self, site: Site) -> int | None:
        """At one token in how many of this linear's output an operator looks; None: it does not."""
        i = self.kurtosis_term
        return None if i is None or site not in self.loss_terms[i].sites else self.loss_terms[i].every_nth_token

    def bias_for_gelu(self, x_BTD: Tensor) -> Tensor | None:
        """The bias of "mlp_in" where GELU's operator sums its gradient; None where "mlp_in" itself does.

        The operator writes the whole gradient of that linear's output if both linears are fused and no other loss term
        looks at the output; then it can sum it over tokens on the way.
        """
        fused = self.config.style == "neox" and fuses(self.mlp_in, x_BTD) and fuses(self.mlp_proj, x_BTD)
        seen = any(
            i != self.kurtosis_term and term.of == "output" and "mlp_in" in term.sites
            for i, term in enumerate(self.loss_terms)
        )
        return self.mlp_in.bias if fused and not seen else None

    def look_at(self, site: Site, y: Tensor, found: Found) -> Tensor:
        """Notes the other statistics of a linear and its output; returns the y to go on with."""
        for i, term in enumerate(self.loss_terms):
            if site in term.sites and i != self.kurtosis_term:
                y, found[i, site] = term.look_at(y, getattr(self, site).weight)
        return y


class Decoder(nn.Module):
    """The language model: token ids [B, T] → hidden states [B, T, D]; :meth:`logits` gives [B, T, V].

    Attributes:
        bfloat16_stream: Under autocast the residual stream is bfloat16; else it has the embedding's dtype.
    """

    def __init__(self, config: ModelConfig, quant: QuantConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.quant, self.vocab_size = config, quant, vocab_size
        self.bfloat16_stream = False
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, quant) for _ in range(config.num_layers))
        self.norm = (nn.LayerNorm if config.style == "neox" else nn.RMSNorm)(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights, zero biases; the projections into the residual stream are scaled down with depth (GPT-2)."""
        std = self.config.init_std
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.head.weight, std=std)
        for block in self.blocks:
            for site in SITES:
                linear = getattr(block, site)
                into_residual = site in ("attn_proj", "mlp_proj")
                nn.init.normal_(linear.weight, std=std / math.sqrt(2 * len(self.blocks)) if into_residual else std)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def set_loss_terms(self, terms: tuple[LossTerm, ...]) -> None:
        """Chooses the statistics that every block returns; a block already compiled is compiled anew."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.loss_terms = terms

    def set_activations(self, quant: QuantConfig) -> None:
        """Changes how the linears' inputs are quantized; clips and weights stay."""
        self.quant = quant
        for block in self.blocks:
            for site in SITES:
                getattr(block, site).input_quantizer.configure(quant)

    def set_fused(self, fused: bool | None) -> None:
        """Where quantizers run on the fused operators: everywhere, nowhere, or (None, as at first) on GPUs."""
        for block in self.blocks:
            for site in SITES:
                getattr(block, site).input_quantizer.fused = fused

    def begin_stream(self, ids: Tensor) -> Tensor:
        """The residual stream before the first block, [B, T, D]; the blocks keep its dtype."""
        x: Tensor = self.embedding(ids)
        return x.bfloat16() if self.bfloat16_stream and torch.is_autocast_enabled(ids.device.type) else x

    def end_stream(self, x_BTD: Tensor, y_BTD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states: the final norm of the sum, under autocast already in the dtype that the head takes.

        And the kurtosis of y, which the last block gave, if it is asked for.
        """
        kappa = None
        if y_BTD is not None:
            y_BTD, kappa = tap_token_kurtosis(y_BTD, cast(Block, self.blocks[-1]).every_nth_token("mlp_proj"))
            x_BTD = x_BTD + y_BTD
        hidden = wide_norm(self.norm, x_BTD)
        return hidden.to(linear_dtype(hidden)), kappa

    def rotary(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, E] for ids [B, T] from the first position on."""
        return rotary_angles(ids.shape[1], self.config.head_width, self.config.rope_theta, ids.device)

    def forward(
        self,
        ids: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, D] after the final norm, and the blocks' statistics [L, S] (float32).

        For generation, ``caches`` hold what each block has read before, and ``rotary`` the cos and sin [T, E] of where
        the ids stand.
        """
        cos, sin = rotary or self.rotary(ids)
        x = self.begin_stream(ids)
        y = cast(Block, self.blocks[0]).nothing_to_add(x)
        statistics = []
        for i, block in enumerate(self.blocks):
            x, y, found = block(x, y, cos, sin) if caches is None else block(x, y, cos, sin, caches[i])
            statistics.append(found)
        hidden, kappa = self.end_stream(x, y)
        found_LS = torch.stack(statistics)
        if kappa is not None:
            # Of the MLPs' outputs a block has given the statistic of the block before, the first one that of zeros.
            block = cast(Block, self.blocks[0])
            column = block.columns.index((cast(int, block.kurtosis_term), "mlp_proj"))
            own = torch.cat([found_LS[1:, column], kappa[None]])[:, None]
            found_LS = torch.cat([found_LS[:, :column], own, found_LS[:, column + 1 :]], dim=1)
        return hidden, found_LS

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        return self.head(hidden_BTD)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
