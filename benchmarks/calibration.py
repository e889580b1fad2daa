"""What it is worth that GPTQ is calibrated on the inputs as the model will have them.

    python benchmarks/calibration.py --ckpt_path runs/…/last.ckpt --source sotu

Many tools calibrate with the activation quantizers switched off. For a trained checkpoint, weight bits and several
samples of calibration tokens, this makes the weights both ways,

    on the grid       second moments of x̂, from blocks before whose inputs are on their grids: what `quantize` does
    in 16 bits        second moments of x, from blocks before whose weights are quantized and whose inputs are not

and gives the perplexity of the *same* W4A4 or W3A4 model for each: learned clips as activation scales in both cases.
Beside it: in how many layers GPTQ's error ‖(W − Ŵ)X̂‖² is below round-to-nearest's, from the reports.
"""

import argparse
import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from statistics import mean, stdev

import torch
from lit_actreg_plugins.gptq import GPTQ

from lit_actreg.artifact import read_artifact
from lit_actreg.checkpoint import load_decoder, read_checkpoint_info
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.contracts import QuantizedWeight
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.model import Decoder
from lit_actreg.quant.quantized_linear import QuantizedLinear
from lit_actreg.quantize import quantize_model
from lit_actreg.table import perplexity

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quantized(model: Decoder, bits: int, batches: list[torch.Tensor]) -> tuple[Decoder, list[tuple[float, float]]]:
    """The artifact's decoder, and every layer's error with RTN's."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        report = quantize_model(model, GPTQ(bits), batches, Path(folder) / "artifact", device=DEVICE)
        made = read_artifact(Path(folder) / "artifact")
    return made, [(layer["error"], layer["rtn_error"]) for layer in report["layers"]]


def give_clips(made: Decoder, trained: Decoder) -> None:
    """Puts the inputs of a weights-only artifact on the grids of the model that it was made from."""
    for block, source in zip(made.blocks, trained.blocks, strict=True):
        for site in SITES:
            layer, quantizer = getattr(block, site), getattr(source, site).input_quantizer
            weight = QuantizedWeight(layer.codes, layer.weight_scale, layer.weight_zero_point, layer.weight_bits)
            setattr(block, site, QuantizedLinear.from_input_quantizer(weight, layer.bias, quantizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="a .ckpt of a fit with learned clips")
    parser.add_argument("--source", default="sotu", help="text, as data.source")
    parser.add_argument("--valid_source", default=None, help="held-out text, as data.valid_source")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--samples", type=int, default=3, help="calibration samples")
    parser.add_argument("--cache_dir", default="runs/cache")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "WEIGHTS ONLY")

    info = read_checkpoint_info(options.ckpt_path, Path(options.cache_dir))
    if info.quant is None or info.quant.activations != "static":
        parser.error(f"{options.ckpt_path} was not trained with learned clips: name another")
    data = TextDataModule(
        options.source,
        valid_source=options.valid_source,
        tokenizer=str(info.tokenizer),
        vocab_size=info.vocab_size,
        context=options.context,
        num_workers=0,
        cache_dir=options.cache_dir,
    )
    data.prepare_data()
    data.setup()
    trained = load_decoder(options.ckpt_path)
    print(f"W16A4 {perplexity(trained, data.val_dataloader(), DEVICE):.4f}; {options.tokens} calibration tokens")
    print(f"perplexity, mean ± standard deviation over {options.samples} samples of them")
    print("weights  calibrated on the grid  in 16 bits         difference         layers better than RTN")
    for bits in (4, 3, 2):
        found: list[tuple[float, float]] = []
        layers: list[tuple[float, float]] = []
        for seed in range(options.samples):
            batches = list(data.calibration_batches(options.tokens, seed))
            model = load_decoder(options.ckpt_path)
            on_grid, errors = quantized(model, bits, batches)
            layers += errors
            model.set_activations(QuantConfig(activations="none"))
            in_16_bits, _ = quantized(model, bits, batches)
            give_clips(in_16_bits, trained.cpu())
            found.append(tuple(perplexity(m, data.val_dataloader(), DEVICE) for m in (on_grid, in_16_bits)))
        differences = [b - a for a, b in found]
        columns = [[a for a, _ in found], [b for _, b in found], differences]
        cells = [f"{mean(c):.4f} ± {stdev(c) if len(c) > 1 else 0:.4f}" for c in columns]
        better = sum(error < rtn for error, rtn in layers)
        print(f"W{bits}A4     {cells[0]:22}  {cells[1]:17}  {cells[2]:17}  {better} of {len(layers)}", flush=True)


if __name__ == "__main__":
    main()
