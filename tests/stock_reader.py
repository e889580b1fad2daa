"""Run in a process of its own: loads artifacts with transformers and compressed-tensors alone.

    python stock_reader.py <folder of requests> <artifact> …

For every artifact it reads ``<name>.in.safetensors`` (token ids "ids" [B, T], and one input a linear, by its name in
the checkpoint) and writes ``<name>.out.safetensors``: that linear's output ("<linear>.y"), the codes of its input while
the model reads the ids ("<linear>.codes"), its dequantized weight ("<linear>.w"), and the perplexity of the text.
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def input_codes(module, x):
    """Codes int8 of a linear's input, by the library's own functions."""
    args = module.quantization_scheme.input_activations
    if args.dynamic:
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, module)
    else:
        scale, zero_point = module.input_scale, module.input_zero_point
    return quantize(x, scale, zero_point, args, dtype=torch.int8)


@torch.no_grad()
def read(folder: Path, artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    request = load_file(folder / f"{artifact.name}.in.safetensors")
    ids = request.pop("ids")
    result, handles = {}, []

    def observe(name):
        def hook(module, args):
            if module.quantization_scheme.input_activations is not None:
                result[f"{name}.codes"] = input_codes(module, args[0])

        return hook

    for name in request:
        handles.append(model.get_submodule(name).register_forward_pre_hook(observe(name)))
    result["perplexity"] = model(ids, labels=ids).loss.double().exp()
    for handle in handles:
        handle.remove()
    for name, x in request.items():
        result[f"{name}.y"] = model.get_submodule(name)(x)
        result[f"{name}.w"] = model.get_submodule(name).weight.data.clone()  # decompressed by the forward above
    if (artifact / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(artifact)
        assert tokenizer.eos_token == "<|endoftext|>"
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert tokenizer.decode(tokenizer("Licensed under the Apache License")["input_ids"]).startswith("Licensed")
    save_file(
        {name: tensor.contiguous() for name, tensor in result.items()}, folder / f"{artifact.name}.out.safetensors"
    )


if __name__ == "__main__":
    for path in sys.argv[2:]:
        read(Path(sys.argv[1]), Path(path))
    assert not [name for name in sys.modules if name.startswith("lit_actreg")]
