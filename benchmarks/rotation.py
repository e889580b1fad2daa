"""A 16-bit model's W4A4 perplexity behind Hadamard rotations, a rival that needs no training.

    python benchmarks/rotation.py runs/…/last.ckpt --source train.jsonl.xz --valid_source valid.jsonl.xz --context 512

W · Rᵀ Q(R x), as :mod:`lit_actreg.quant.rivals` has it (whose H is R here): every linear's input is rotated on the fly,
in blocks of the largest power of two that divides its width, and quantized on a min-max grid a token. W Rᵀ is rounded
to nearest and by GPTQ, each with min-max scales, and with scales of least squared error.

GPTQ wants the Hessian of the inputs that the rounded weight will have, the rotated ones. R is linear, so it is made of
the Hessian H = mean x̂ x̂ᵀ that calibration measures of the inputs x̂ = Rᵀ Q(R x) as the linear sees them:

    mean (R x̂) (R x̂)ᵀ = R H Rᵀ

Calibration is that of `quantize` and `table` (:mod:`lit_actreg.quant.calibration`): block by block, behind blocks that
are already rounded, with all inputs on their activation grids. There a model without clips has min-max grids a token;
here it has the same grids behind the rotation. The tokens are those that `table` draws, too.
"""

import argparse
import warnings
from pathlib import Path

import torch
from lit_actreg_plugins.gptq import GPTQ
from lit_actreg_plugins.rtn import RTN
from torch import Tensor

from lit_actreg.checkpoint import load_decoder, read_checkpoint_info
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.model import Decoder
from lit_actreg.quant.calibration import advance, embed_tokens, input_hessians
from lit_actreg.quant.rivals import block_hadamard
from lit_actreg.quant.weight_grid import dequantize_weight
from lit_actreg.table import perplexity


def round_behind_rotation(quantizer: RTN | GPTQ, weight: Tensor, hessian: Tensor | None) -> Tensor:
    """Ŵ = Q(W Rᵀ) R [N, K] of a weight [N, K]; H [K, K] is that of the inputs before the rotation."""
    if hessian is not None:
        hessian = block_hadamard(block_hadamard(hessian).t())
    rounded = quantizer.quantize_weight(block_hadamard(weight), hessian)
    assert "fallback" not in rounded.notes, rounded.notes["fallback"]
    return block_hadamard(dequantize_weight(rounded.codes, rounded.scale, rounded.zero_point))


@torch.no_grad()
def round_model(quantizer: RTN | GPTQ, model: Decoder, calibration: list[Tensor], device: torch.device) -> None:
    """Rounds the weights of every block's linears in place; the model, in mode "rotated", is on the device."""
    hidden = embed_tokens(model, calibration) if quantizer.needs_hessian else []
    for index, block in enumerate(model.blocks):
        hessians = input_hessians(block, f"blocks.{index}", hidden, device) if quantizer.needs_hessian else {}
        for site in SITES:
            weight = getattr(block, site).weight
            weight.copy_(round_behind_rotation(quantizer, weight, hessians.get(site)))
        advance(block, hidden, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".ckpt of a fit")
    parser.add_argument("--source", default="sotu", help="as data.source")
    parser.add_argument("--valid_source", help="as data.valid_source")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--calibration_tokens", type=int, default=65536, help="tokens of the training text for GPTQ")
    parser.add_argument("--cache_dir", default="runs/cache")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    info = read_checkpoint_info(options.checkpoint, Path(options.cache_dir))
    data = TextDataModule(
        options.source,
        valid_source=options.valid_source,
        tokenizer=str(info.tokenizer),
        vocab_size=info.vocab_size,
        context=options.context,
        batch_size=options.batch_size,
        cache_dir=options.cache_dir,
    )
    data.prepare_data()
    data.setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calibration = list(data.calibration_batches(options.calibration_tokens, seed=0))
    grids = [(bits, search) for bits in (4, 3) for search in ("minmax", "mse")]
    for quantizer in [None, *(method(bits, scale_search=search) for method in (RTN, GPTQ) for bits, search in grids)]:
        model = load_decoder(options.checkpoint).to(device)
        model.set_activations(QuantConfig(activations="rotated"))
        name = "W16A4 rotated"
        if quantizer is not None:
            round_model(quantizer, model, calibration, device)
            name = f"W{quantizer.bits}A4 {type(quantizer).__name__} {quantizer.scale_search}, rotated"
        print(f"{name:28}{perplexity(model, data.val_dataloader(), device):9.3f}", flush=True)


if __name__ == "__main__":
    main()
