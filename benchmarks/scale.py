"""Memory and time of a fit by number of GPUs, computed from its configuration: docs/scale.md shows the formulas.

    python benchmarks/scale.py configs/fit_1b.yaml [--tokens 20e9] [--mfu 0.4] [--peak 989.4]

Needs no GPU: parameters are counted on the meta device, and what a block keeps for its backward pass is counted on the
CPU, as storages that autograd saves, for one and two sequences of 128 tokens through one and two blocks; the difference
is a block's per sequence, and with flash attention proportional to its tokens. A GPU's kernels may save a little less
or more (the compiler's choice of what to compute again), so this is an estimate, to be checked with the first steps'
peak memory.
"""

import argparse
from pathlib import Path

import torch
import yaml

from lit_actreg.callbacks.kurtosis import KurtosisRegularization
from lit_actreg.callbacks.throughput import flops_per_token, num_block_parameters
from lit_actreg.config import SITES, ModelConfig, QuantConfig
from lit_actreg.contracts import LossTerm
from lit_actreg.model import Block, Decoder, rotary_angles
from lit_actreg.quant.statistics import token_kurtosis

GIB, PROBE_TOKENS = 2**30, 128


def saved_bytes(block: Block, num_sequences: int, num_blocks: int) -> int:
    """Bytes that autograd keeps of so many blocks' forward pass, in bf16 autocast; their parameters aside."""
    config, storages = block.config, {}
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address its own
        return tensor

    angles = rotary_angles(PROBE_TOKENS, config.head_width, config.rope_theta, torch.device("cpu"))
    x = torch.randn(num_sequences, PROBE_TOKENS, config.width, requires_grad=True)
    y = torch.zeros_like(x, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        for _ in range(num_blocks):
            x, y, _ = block(x, y, *angles)
    return sum(size for size, _ in storages.values())


def bytes_per_token(config: ModelConfig, quant: QuantConfig, penalized: bool, compiled: bool) -> float:
    """What one more token adds to what is saved for one more block."""
    block = Block(config, quant)
    for site in SITES:
        getattr(block, site).input_quantizer.fused = True  # as on a GPU
    if penalized:
        callback = KurtosisRegularization()
        block.loss_terms = (LossTerm(token_kurtosis, callback.sites, every_nth_token=callback.every_nth_token),)
    if compiled:
        block.compile(fullgraph=True, dynamic=False)
    found = {(n, m): saved_bytes(block, n, m) for n in (1, 2) for m in (1, 2)}
    return (found[2, 2] - found[2, 1] - found[1, 2] + found[1, 1]) / PROBE_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--tokens", type=float, default=20e9)
    parser.add_argument("--mfu", type=float, nargs="+", default=[0.25, 0.4, 0.5], help="assumed, not measured")
    parser.add_argument("--peak", type=float, default=989.4, help="dense bf16 TFLOP/s of one GPU")
    options = parser.parse_args()
    given = yaml.safe_load(options.config.read_text())
    data, trainer = given["data"], given["trainer"]
    config = ModelConfig(**given["model"]["shape"], context=data["context"])
    with torch.device("meta"):
        model = Decoder(config, QuantConfig(), data["vocab_size"])
    shape = config, num_block_parameters(model), data["vocab_size"]
    total, flops = model.num_parameters(), flops_per_token(*shape, data["context"])
    step = data["batch_size"] * data["context"] * trainer["devices"] * trainer["accumulate_grad_batches"]
    print(f"{total / 1e6:.0f} M parameters, {flops / 1e9:.2f} GFLOP a token, {step:,} tokens a step")

    batch, tokens = data["batch_size"], data["batch_size"] * data["context"]
    logits = tokens * data["vocab_size"] * 2  # bf16; their gradient takes their place
    recompute = config.num_layers * tokens * config.width * (4 + 2)  # x and y
    plain, static = QuantConfig(activations="none"), QuantConfig()
    cases = {
        "16-bit, eager": (plain, False, False),
        "QAT + kurtosis, eager": (static, True, False),
        "16-bit, compiled": (plain, False, True),
        "QAT + kurtosis, compiled": (static, True, True),
    }
    print(f"\nactivations of a batch of {batch} sequences, GiB (logits {logits / GIB:.1f} included)")
    for name, case in cases.items():
        per_token = bytes_per_token(config, *case)
        block = per_token * tokens
        kept, again = config.num_layers * block + logits, recompute + block + logits
        unit = f"{per_token / config.width:.0f} D bytes a token and block"
        print(f"  {name:26} kept {kept / GIB:6.1f}   checkpointed {again / GIB:5.1f}   ({unit})")

    print("\nGPUs   states ddp   states fsdp2   hours at MFU " + "  ".join(f"{m:.0%}" for m in options.mfu))
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        root = data["vocab_size"] * config.width * (1 if config.tie_embeddings else 2)
        ddp, fsdp = 22 * total, 16 * total / gpus + 6 * root + 2 * 6 * (total - root) / config.num_layers
        hours = [options.tokens * flops / (gpus * m * options.peak * 1e12) / 3600 for m in options.mfu]
        row = "  ".join(f"{h:7.1f}" for h in hours)
        print(f"{gpus:4} {ddp / GIB:9.1f} GiB {fsdp / GIB:9.1f} GiB     {row}")


if __name__ == "__main__":
    main()
