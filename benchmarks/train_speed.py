"""What QAT and kurtosis regularization cost a training step (the paper's Table 4, arXiv 2404.03605), on one GPU.

    python benchmarks/train_speed.py [--size 98m|125m|1b|…] [--style llama] [--bfloat16-stream]
                                     [--sequences N] [--accumulate N] [--rounds 8] [--profile]
    python benchmarks/train_speed.py --size tiny --device cpu          # shows that it works; its times mean nothing

Method: one model, one optimizer, one batch of random tokens; a variant is a setting of the model, so all share weights
and memory. Blocks and loss are compiled, as ``fit`` with ``compile: true`` does. A step is forward, backward and fused
AdamW under bfloat16 autocast, without logging or data; ``--accumulate`` is the number of passes before AdamW. Variants
take turns round by round in one process, so that clocks and heat are shared; a turn is one step to warm up and STEPS
timed ones; a figure is the median over rounds. Before that, the fused operators' gradients must agree with the
formula's, and compiled ones with eager ones, or nothing is printed and the status is 1. The check runs the first
CHECKED_BLOCKS blocks alone, which are the compiled code of all of them: every block of 4-bit rounding amplifies the
difference of a last bit, 24 of them to 30 %.

``--style llama``: RMSNorm, SwiGLU and no biases, with 8/3 of the width inside the MLP, so as many parameters, and grids
as configs/fit_llama.yaml has them. ``--bfloat16-stream`` is ``model.bfloat16_stream``.

Utilization is model FLOPs (:func:`lit_actreg.callbacks.throughput.flops_per_token`) over an H100 SXM's dense bfloat16
peak; quantization, norms and recomputation count nothing.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lit_actreg.callbacks.throughput import PEAK_TFLOPS, flops_per_token, num_block_parameters
from lit_actreg.config import ModelConfig, QuantConfig
from lit_actreg.contracts import LossTerm
from lit_actreg.model import Decoder
from lit_actreg.module import next_token_loss
from lit_actreg.parallel import compile_blocks
from lit_actreg.quant.clips import initial_clips
from lit_actreg.quant.linear import QuantLinear
from lit_actreg.quant.observe import observe_inputs
from lit_actreg.quant.statistics import token_kurtosis

STEPS = 4
KURTOSIS_WEIGHT = 1e-4  # the callback's
# Blocks, width, heads, tied embeddings, vocabulary, sequences, context; batches that fit 80 GB in every variant
SIZES = {
    "tiny": (2, 32, 2, False, 300, 2, 16),
    "98m": (12, 768, 12, True, 16384, 64, 512),
    "125m": (12, 768, 12, False, 32768, 16, 2048),
    "1b": (24, 1920, 16, False, 32768, 8, 2048),
    # heads of 128 instead of 64 and 120; the second is also wider, by whole tiles, and has 13 % more parameters
    "125m-h128": (12, 768, 6, False, 32768, 16, 2048),
    "1b-h128": (24, 2048, 16, False, 32768, 8, 2048),
}
LLAMA_GRIDS = {"per_token_sites": ["mlp_proj"], "token_group_size": 64}  # configs/fit_llama.yaml
CHECKED_BLOCKS = 2
# Two paths that round the same numbers in different places may differ by as much as one of them from itself when its
# input is rounded to bfloat16 once more: a value that this takes over an edge is a whole step of the grid off. Below
# the floor nothing was amplified. A gradient that got lost is 100 %.
YARDSTICKS, FLOOR = 2.0, 0.01


@dataclass(frozen=True)
class Variant:
    """How one row of the table sets up the model."""

    name: str
    activations: str
    fused: bool
    every_nth_token: int = 0  # that kurtosis regularization looks at; 0: none

    def apply(self, model: Decoder) -> None:
        grids = LLAMA_GRIDS if model.config.style == "llama" else {}
        model.set_activations(QuantConfig(activations=self.activations, **grids))
        model.set_fused(self.fused)
        every = self.every_nth_token
        model.set_loss_terms((LossTerm(token_kurtosis, every_nth_token=every),) if every else ())


PLAIN = Variant("plain", "none", False)
FORMULA = Variant("QAT, formula", "static", False)
FUSED = Variant("QAT, fused", "static", True)
KURTOTIC = Variant("QAT, fused, kurtosis", "static", True, 4)
SPARSER = Variant("… of 1 token in 8", "static", True, 8)
VARIANTS = (PLAIN, FORMULA, FUSED, KURTOTIC, SPARSER)


class Trainee:
    """The model, its optimizer and its batch on one device."""

    def __init__(
        self,
        size: str,
        device: str,
        num_sequences: int | None,
        accumulate: int,
        style: Literal["neox", "llama"] = "neox",
        bfloat16_stream: bool = False,
    ) -> None:
        layers, width, heads, tied, vocab_size, default, context = SIZES[size]
        num_sequences = num_sequences or default
        torch.manual_seed(0)
        shape = {"num_layers": layers, "width": width, "num_heads": heads, "context": context}
        self.config = ModelConfig(style=style, tie_embeddings=tied, **shape)
        self.device, self.accumulate = device, accumulate
        with torch.device(device):
            self.model = Decoder(self.config, QuantConfig(), vocab_size)
        self.model.bfloat16_stream = bfloat16_stream
        self.batch = torch.randint(vocab_size, (num_sequences, context + 1), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device == "cuda")
        self.loss = next_token_loss
        self.flops_per_token = flops_per_token(self.config, num_block_parameters(self.model), vocab_size, context)
        self.calibrate()
        if device == "cuda":
            compile_blocks(self.model)
            self.loss = torch.compile(next_token_loss)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Clips from the batch, as a fit has them after its first step."""

        def observer(layer: int, site: str, linear: torch.nn.Module, x: Tensor) -> None:
            assert isinstance(linear, QuantLinear)
            q = linear.input_quantizer
            low, high = initial_clips(x, "mse", q.bits, q.integer_zero_point, q.lower_bound)
            q.low.copy_(low)
            q.high.copy_(high)

        with torch.autocast(self.device, torch.bfloat16):
            observe_inputs(self.model, self.batch[:2, :-1], observer)

    def backward(self, num_parts: int = 1, weight: float = KURTOSIS_WEIGHT) -> None:
        for part in self.batch.chunk(num_parts):
            with torch.autocast(self.device, torch.bfloat16):
                hidden, values = self.model(part[:, :-1])
                loss = self.loss(self.model.head, hidden, part[:, 1:]) + weight * values.sum()
            (loss / num_parts).backward()

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.accumulate):
            self.backward()
        self.optimizer.step()

    def gradients(self, variant: Variant, eager: bool = True, rounded: bool = False) -> dict[str, Tensor]:
        """Of the whole batch through the first blocks; ``rounded``: with the stream's start rounded otherwise.

        That is to bfloat16; where it is bfloat16 anyway, after a factor that moves values across its edges and that the
        norms divide out. Eagerly in parts of about 4096 tokens, because the eager formula is hungry for memory.
        Kurtosis weighs 1, or nobody would see its gradient.
        """
        blocks, embedding = self.model.blocks, self.model.embedding.weight.data
        kept = embedding.clone()
        variant.apply(self.model)
        self.model.blocks = blocks[:CHECKED_BLOCKS]
        if rounded:
            embedding.copy_(embedding * (1 + 2**-9) if self.model.bfloat16_stream else embedding.bfloat16())
        self.optimizer.zero_grad(set_to_none=True)
        with torch.compiler.set_stance("force_eager" if eager else "default"):
            self.backward(max(1, self.batch[:, 1:].numel() // 4096) if eager else 1, weight=1.0)
        found = {n: p.grad.float().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        embedding.copy_(kept)
        self.model.blocks = blocks
        return found

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


KINDS = ("weights", "clips")


def relative_difference(expected: dict[str, Tensor], found: dict[str, Tensor], kind: str) -> float:
    """Norm of all gradients' differences over the norm of the expected ones, for weights or for clips."""
    names = [name for name in expected if ("input_quantizer" in name) == (kind == "clips")]
    distance = torch.stack([(expected[n] - found[n]).norm() for n in names]).norm()
    return (distance / torch.stack([expected[n].norm() for n in names]).norm()).item()


def disagreement(
    what: str, expected: dict[str, Tensor], found: dict[str, Tensor], allowed: dict[str, float]
) -> list[str]:
    """What is wrong with ``found``, one line a finding; prints how near the two are."""
    if expected.keys() != found.keys():
        return [f"{what}: in one of them no gradient for {sorted(expected.keys() ^ found.keys())}"]
    wrong = []
    for kind in KINDS:
        error = relative_difference(expected, found, kind)
        print(f"gradients of {kind}, {what}: relative difference {error:.2%}, allowed {allowed[kind]:.2%}")
        if not error <= allowed[kind]:
            wrong.append(f"{what}: gradients of {kind} differ by {error:.2%}")
    return wrong + [f"{what}: no gradient reached {n}" for n in expected if expected[n].any() and not found[n].any()]


def check_gradients(trainee: Trainee) -> list[str]:
    """Fused operators against the formula, both eager; compiled against eager, without kurtosis and with it."""
    wrong = []
    for variant in (FUSED, KURTOTIC):
        eager, moved = trainee.gradients(variant), trainee.gradients(variant, rounded=True)
        allowed = {kind: max(FLOOR, YARDSTICKS * relative_difference(eager, moved, kind)) for kind in KINDS}
        if variant is FUSED:
            wrong += disagreement("fused against formula, eager", trainee.gradients(FORMULA), eager, allowed)
        compiled = trainee.gradients(variant, eager=False)
        wrong += disagreement(f"{variant.name}: compiled against eager", eager, compiled, allowed)
    return wrong


def measure(trainee: Trainee, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds a step of every round, and the highest peak of memory in GiB, by variant."""
    times: dict[str, list[float]] = {v.name: [] for v in VARIANTS}
    peaks = dict.fromkeys(times, 0.0)
    for index in range(rounds):
        for variant in VARIANTS[index % len(VARIANTS) :] + VARIANTS[: index % len(VARIANTS)]:
            variant.apply(trainee.model)
            trainee.step()
            if trainee.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = trainee.clock()
            for _ in range(STEPS):
                trainee.step()
            times[variant.name].append((trainee.clock() - start) / STEPS * 1e3)
            if trainee.device == "cuda":
                peaks[variant.name] = max(peaks[variant.name], torch.cuda.max_memory_allocated() / 2**30)
    return times, peaks


def print_table(trainee: Trainee, times: dict[str, list[float]], peaks: dict[str, float]) -> None:
    tokens, flops = trainee.accumulate * trainee.batch[:, 1:].numel(), trainee.flops_per_token
    print(f"{'':22}{'ms/step':>9}{'spread':>8}{'tokens/s':>11}{'of plain':>10}{'peak GiB':>10}{'memory':>8}{'MFU':>7}")
    for name, found in times.items():
        ms = statistics.median(found)
        # paired: both of a round ran within the same second
        ratio = statistics.median(p / v for p, v in zip(times[PLAIN.name], found, strict=True))
        spread, rate = (max(found) - min(found)) / ms, tokens / ms * 1e3
        memory = peaks[name] / peaks[PLAIN.name] if peaks[PLAIN.name] else float("nan")
        print(
            f"{name:22}{ms:9.2f}{spread:8.1%}{rate:11,.0f}{ratio:9.3f}x{peaks[name]:10.2f}{memory:7.2f}x"
            f"{rate * flops / (1e12 * PEAK_TFLOPS['H100']):7.1%}"
        )


def print_profile(trainee: Trainee, variant: Variant) -> None:
    """The 15 kernels that take longest, by milliseconds a step."""
    variant.apply(trainee.model)
    trainee.step()
    activity = ProfilerActivity.CUDA if trainee.device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(STEPS):
            trainee.step()
        trainee.clock()
    kind = "device" if trainee.device == "cuda" else "cpu"
    events = sorted(found.key_averages(), key=lambda e: -getattr(e, f"self_{kind}_time_total"))
    total = sum(getattr(e, f"self_{kind}_time_total") for e in events) / STEPS / 1e3
    print(f"\n{variant.name}: {total:.2f} ms a step in kernels")
    for e in events[:15]:
        print(f"{getattr(e, f'self_{kind}_time_total') / STEPS / 1e3:8.3f} ms {e.count / STEPS:6.0f} × {e.key[:110]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="98m")
    parser.add_argument("--style", choices=["neox", "llama"], default="neox", help="of the block")
    parser.add_argument("--bfloat16-stream", action="store_true", help="the residual stream in bfloat16, not float32")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sequences", type=int, help="in a pass, instead of the size's own number")
    parser.add_argument("--accumulate", type=int, default=1, help="passes a step")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="print the 15 longest kernels of every variant")
    args = parser.parse_args()
    start = time.perf_counter()
    trainee = Trainee(args.size, args.device, args.sequences, args.accumulate, args.style, args.bfloat16_stream)
    if wrong := check_gradients(trainee):
        print("REFUSED: " + "; ".join(wrong))
        return 1
    for variant in VARIANTS:  # compiles
        variant.apply(trainee.model)
        trainee.step()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    shape = f"{args.accumulate} × {list(trainee.batch[:, 1:].shape)}"
    million = trainee.model.num_parameters() / 1e6
    model = f"{args.size} ({million:.0f} M), {args.style}{', bfloat16 stream' if args.bfloat16_stream else ''}"
    print(f"{model}, {shape} tokens a step, {name}, torch {torch.__version__}")
    print(f"built and compiled in {trainee.clock() - start:.0f} s")
    print_table(trainee, *measure(trainee, args.rounds))
    if args.profile:
        for variant in VARIANTS:
            print_profile(trainee, variant)
    print(f"{trainee.clock() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
