"""Memory and time of a quantization against what its dry run foretells, on a random model of a given size.

    python benchmarks/quantize.py --size 100m --tokens 16384                            # a CPU will do
    python benchmarks/quantize.py --size 1b --tokens 262144 --context 2048 --batch 8    # an H100

Weights are random: memory and time do not depend on their values. Peak memory is measured from when the model is there:

    host      the process's largest resident set (getrusage) less what it was before the model was made
    device    torch.cuda.max_memory_allocated

and stands beside the sums of the terms of :func:`lit_actreg.plan.memory_estimate`; on a CPU, where the device's terms
lie in the same memory, beside the sum of all.

Every stage is a line as soon as it ends, with the seconds since the program's start, so that one who runs out of time
knows where it went. At last come the parts of one block's passes and of GPTQ, measured one by one after the job.
"""

import argparse
import contextlib
import io
import logging
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from lit_actreg_plugins.gptq import GPTQ, damped_factor
from lit_actreg_plugins.rtn import RTN

from lit_actreg.config import SITES, ModelConfig, QuantConfig
from lit_actreg.model import Decoder
from lit_actreg.quant.calibration import advance, embed_tokens, input_hessians
from lit_actreg.quantize import StageClock, float_block, quantize_model

logger = logging.getLogger("benchmark")

METHODS: dict[str, type[GPTQ | RTN]] = {"GPTQ": GPTQ, "RTN": RTN}
SIZES = {  # the paper's block: 12 · layers · width² weights in linears, and the embedding
    "10m": (ModelConfig(num_layers=4, width=384, num_heads=6, context=2048), 8192),
    "100m": (ModelConfig(num_layers=12, width=768, num_heads=12, context=2048), 32768),
    "1b": (ModelConfig(num_layers=24, width=1920, num_heads=16, context=2048), 50432),
}


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def random_model(shape: tuple[ModelConfig, int], device: torch.device) -> Decoder:
    """A model in host memory, with weights drawn on the device: a CPU takes long to draw a billion numbers."""
    config, vocab_size = shape
    with device:
        model = Decoder(config, QuantConfig(), vocab_size)
    model = model.requires_grad_(False).cpu()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def load_libraries(size: str, method: str, device: torch.device) -> None:
    """Quantizes one block: a GPU's context and the kernels and solvers of these widths are no memory of the job."""
    config = replace(SIZES[size][0], num_layers=1)
    batches = [torch.zeros(2, 64, dtype=torch.int64)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quantize_model(
            random_model((config, 256), device), METHODS[method](), batches, Path(folder) / "a", device=device
        )


def parts_of_a_block(model: Decoder, quantizer: GPTQ, batches: list[torch.Tensor], device: torch.device) -> None:
    """Prints what the stages of one block are made of, on all tokens."""
    clock = StageClock(device)
    block, hidden = float_block(model, 0, model.quant, device), embed_tokens(model, batches)
    with clock("hidden states to the device and back"):
        for x_BTD in hidden:
            x_BTD.copy_(x_BTD.to(device, non_blocking=True), non_blocking=True)
    with clock("advance"):
        advance(block, hidden, device)
    with clock("moments"):
        hessians = input_hessians(block, "block", hidden, device)
    for site in SITES:
        with clock("factor"):
            damped_factor(hessians[site].double(), quantizer.damping)
        with clock("factor and columns"):
            quantizer.quantize_weight(getattr(block, site).weight, hessians[site])
    seconds, blocks = clock.seconds, len(model.blocks)
    parts = {
        "transfer": seconds["hidden states to the device and back"],
        "forward": seconds["advance"] - seconds["hidden states to the device and back"],
        "moments beyond a forward": seconds["moments"] - seconds["advance"],
        "factor": seconds["factor"],
        "columns": seconds["factor and columns"] - seconds["factor"],
    }
    print("parts of a block's stages, seconds:", ", ".join(f"{part} {value:.3f}" for part, value in parts.items()))
    print(f"  times {blocks} blocks:", ", ".join(f"{part} {value * blocks:.1f}" for part, value in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="100m")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--context", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a batch")
    parser.add_argument("--method", choices=list(METHODS), default="GPTQ")
    parser.add_argument("--group_size", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(relativeCreated)7.0f ms  %(message)s")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    load_libraries(options.size, options.method, device)
    logger.info("%s is ready", name)

    before = resident()
    model = random_model(SIZES[options.size], device)
    logger.info("model: %.0f M parameters in host memory", model.num_parameters() / 1e6)
    quantizer = METHODS[options.method](4, options.group_size)
    num_batches = max(1, options.tokens // (options.batch * options.context))
    generator = torch.Generator().manual_seed(0)
    shape = (num_batches, options.batch, options.context)
    batches = list(torch.randint(model.vocab_size, shape, generator=generator))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        output = Path(folder) / "artifact"
        dry = quantize_model(model, quantizer, batches, output, device=device, dry_run=True)
        logger.info("dry run: %.1f s expected; now the job", dry["expected_seconds"])
        logger.info("%.0f MiB of host memory so far", (resident() - before) / 2**20)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        report = quantize_model(model, quantizer, batches, output, device=device)
        seconds = time.perf_counter() - started
        logger.info("%.0f MiB of host memory at the end", (resident() - before) / 2**20)
        size = (output / "model.safetensors").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    terms = report["memory_bytes"]
    on_device = sum(value for term, value in terms.items() if term.startswith("device"))
    everything = sum(terms.values())

    job = f"{options.method}, {model.num_parameters() / 1e6:.0f} M parameters, {report['calibration_tokens']} tokens"
    print(f"{name}; torch {torch.__version__}; {job} in batches of {options.batch} × {options.context}")
    for term, value in terms.items():
        print(f"  {term.replace('_', ' '):26} {value / 2**20:9.1f} MiB")
    print(f"  file {size / 2**20:.1f} MiB")
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        print(f"device: estimate {on_device / 2**20:.0f} MiB, measured {allocated / 2**20:.0f} MiB")
        print(f"host:   estimate {(everything - on_device) / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB")
    else:
        print(f"memory: estimate {everything / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB")
    print(f"seconds: dry run {dry['expected_seconds']:.1f}, loop {report['seconds']:.1f}, all {seconds:.1f}")
    print(
        "  of them", ", ".join(f"{stage} {value:.1f}" for stage, value in report["stage_seconds"].items()), flush=True
    )
    if isinstance(quantizer, GPTQ):
        parts_of_a_block(model, quantizer, batches, device)


if __name__ == "__main__":
    main()
