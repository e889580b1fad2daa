"""Small decoders that are not trivial: what the quantization tests share.

Random weights, but norms, biases and clips are perturbed, so that zero points are not in the middle, channels differ
in scale and some inputs lie outside the clips. Widths are odd for the formats: 36 is no multiple of 8, 45 none of 2.
"""

from pathlib import Path

import torch
from torch import Tensor

from lit_actreg.config import ModelConfig, QuantConfig
from lit_actreg.model import Decoder

VOCAB_SIZE = 256


def small_decoder(style: str, quant: QuantConfig | None = None, tie: bool = True, layers: int = 2) -> Decoder:
    generator = torch.Generator().manual_seed(11)
    config = ModelConfig(
        style=style,
        num_layers=layers,
        width=36,
        num_heads=6,
        num_kv_heads=3 if style == "llama" else None,
        mlp_width=45,
        context=64,
        tie_embeddings=tie,
    )
    model = Decoder(config, quant or QuantConfig(), VOCAB_SIZE)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("input_quantizer.low"):
            parameter.data = -1.7 - 0.3 * noise.abs()
        elif name.endswith("input_quantizer.high"):
            parameter.data = 2.3 + 0.3 * noise.abs()
        elif "norm" in name or name.endswith("bias"):
            parameter.data = parameter.data + 0.3 * noise
        else:
            parameter.data = 0.2 * noise
    return model.requires_grad_(False)


def text_ids(num_sequences: int, num_tokens: int = 64) -> Tensor:
    """Bytes of a real text, int64 [B, T]."""
    text = (Path(__file__).parents[1] / "LICENSE").read_bytes()[: num_sequences * num_tokens]
    return torch.tensor(list(text)).view(num_sequences, num_tokens)


def correlated_inputs(num_tokens: int, num_columns: int, seed: int = 0) -> Tensor:
    """Inputs whose channels depend on each other and differ in size, as a trained model's do: float64 [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64) / num_columns**0.5
    sizes = torch.rand(num_columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    return torch.randn(num_tokens, num_columns, generator=generator, dtype=torch.float64) @ mix * sizes
