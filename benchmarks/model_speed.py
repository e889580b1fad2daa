"""How fast a whole W4A4 model is beside its bfloat16 twin: validation, generation at batch 1, bytes of the linears.

    python benchmarks/model_speed.py --size 1b [--cases validation generation] [--out benchmarks/results/NAME.csv]
    python benchmarks/model_speed.py --size 1b --profile          # and which kernels the time goes to
    python benchmarks/model_speed.py --size tiny --device cpu     # only shows that the script runs

Random weights do for speed: no kernel's time depends on values, except through the power that realistic codes draw, so
activation grids span ±3σ of each linear's measured input. Weights are rounded to nearest. Both models have the same
shape, the same loop and bfloat16 between the linears.

**validation**: mean loss of a batch of sequences, as `lit-actreg validate` computes it, LM head included; eager, and
with blocks and loss compiled. **generation**: the step of :mod:`lit_actreg.generate` as a CUDA graph at batch 1, with
blocks eager and compiled. Candidates take turns, round by round; a figure is the median over rounds, the spread is from
the 10th to the 90th percentile, and a speed-up is over the *fastest* bfloat16 candidate of its case.
A validation batch is a replayed CUDA graph (:mod:`lit_actreg.replay`) of every candidate but eager bfloat16.

Nothing is printed unless these checks pass:

- every block in float32 against the fake-quantized float block, both given the same input: the difference is at most
  3 % of what the block adds (root mean square). Not zero: a value on the edge between two codes may take either;
- the logits in bfloat16 against the fake-quantized float model: less apart than quantization itself moves them;
- the greedy tokens of the captured step are those of the eager one.
"""

import argparse
import copy
import csv
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lit_actreg_kernels.module import Int4Linear
from lit_actreg_plugins.int4_block import Int4Block
from lit_actreg_plugins.w4a4_precision import W4A4Precision
from torch import Tensor, nn

from lit_actreg.config import SITES, ModelConfig, QuantConfig
from lit_actreg.generate import Continuation, generate
from lit_actreg.model import Decoder
from lit_actreg.module import next_token_loss
from lit_actreg.quant.linear import GELU_MINIMUM, QuantLinear
from lit_actreg.quant.quantized_linear import QuantizedLinear
from lit_actreg.quant.weight_grid import round_to_nearest
from lit_actreg.replay import captured, replay

# Shape, vocabulary, and sequences of one validation batch.
SIZES = {
    "tiny": (ModelConfig(num_layers=2, width=64, num_heads=4, context=64, tie_embeddings=False), 512, 2),
    "98m": (ModelConfig(num_layers=12, width=768, num_heads=12, context=512), 16384, 32),
    "1b": (ModelConfig(num_layers=24, width=1920, num_heads=16, context=2048, tie_embeddings=False), 50432, 8),
}
BARS = {"validation": 1.2, "generation": 2.0}
MEMORY_BAR = 0.27


class CheckFailed(Exception):
    """The W4A4 model does not compute what it should."""


def relative(error: Tensor, size: Tensor) -> float:
    """Root mean square of ``error`` over that of ``size``."""
    return (error.double().norm() / size.double().norm()).item()


def quantized_decoder(config: ModelConfig, vocab_size: int, ids: Tensor) -> tuple[Decoder, Decoder, float]:
    """A random decoder with static grids: fake-quantized (float32), and of ``QuantizedLinear`` layers.

    Also returns how far quantization moved the logits of ``ids``, relative to their size.
    """
    with ids.device:
        fake = Decoder(config, QuantConfig(), vocab_size).requires_grad_(False)
        twin = Decoder(config, QuantConfig(), vocab_size).requires_grad_(False)
    for name, parameter in fake.named_parameters():
        if "norm" in name or name.endswith("bias"):  # new, they are all one or zero, and a mistake would not show
            parameter += 0.1 * torch.randn_like(parameter)
    fake.set_activations(QuantConfig(activations="none"))
    exact = fake.logits(fake(ids)[0])
    fake.set_activations(QuantConfig())

    def clip_at_3_sigma(linear: QuantLinear, args: tuple[Tensor]) -> None:
        clips, span = linear.input_quantizer, 3 * args[0].std()
        clips.low.data.fill_(-span if clips.lower_bound is None else GELU_MINIMUM)
        clips.high.data.fill_(1.07 * span)  # not symmetric: ±c has the zero point −½, a toss of the last bit

    linears = [(block, site, getattr(block, site)) for block in fake.blocks for site in SITES]
    weights = [round_to_nearest(linear.weight, 4, None, True, "minmax") for _, _, linear in linears]
    for (_, _, linear), weight in zip(linears, weights, strict=True):
        linear.weight.data = weight.codes * weight.scale
    hooks = [linear.register_forward_pre_hook(clip_at_3_sigma) for _, _, linear in linears]
    moved = relative(fake.logits(fake(ids)[0]) - exact, exact)
    for hook in hooks:
        hook.remove()

    twin.load_state_dict(fake.state_dict())
    for block, ours in zip(fake.blocks, twin.blocks, strict=True):
        for site in SITES:
            linear = getattr(block, site)
            quantized = QuantizedLinear.from_input_quantizer(weights.pop(0), linear.bias, linear.input_quantizer)
            setattr(ours, site, quantized)
    return fake, twin, moved


def check_blocks(fake: Decoder, integer: Decoder, ids: Tensor) -> float:
    """The largest relative difference of a block from its fake-quantized twin on the same input, float32."""
    x, rotary = fake.begin_stream(ids), fake.rotary(ids)
    worst = 0.0
    for i, (block, ours) in enumerate(zip(fake.blocks, integer.blocks, strict=True)):
        if not isinstance(ours, Int4Block):
            raise CheckFailed(f"block {i} is not fused")
        before, y, _ = block(x, None, *rotary)
        expected, (found, *_) = before + y, ours(x, None, *rotary)
        worst = max(worst, relative(found - expected, expected - x))
        x = expected
    if not worst < 0.03:
        raise CheckFailed(f"a block differs from its fake-quantized twin by {worst:.2%} of what it adds")
    return worst


def build(config: ModelConfig, vocab_size: int, device: torch.device) -> tuple[Decoder, Decoder]:
    """The bfloat16 model and the W4A4 one, checked."""
    ids = torch.randint(vocab_size, (1, min(128, config.context)), device=device)
    fake, twin, moved = quantized_decoder(config, vocab_size, ids)
    integer = W4A4Precision("float32").convert_module(twin)
    assert isinstance(integer, Decoder)
    block_error = check_blocks(fake, integer, ids)
    integer.bfloat16()  # Int4Linear keeps its scales
    expected = fake.logits(fake(ids)[0])
    error = relative(integer.logits(integer(ids)[0]).float() - expected, expected)
    if not error < moved:
        raise CheckFailed(f"bf16 logits are {error:.3f} off, quantization itself moved them by {moved:.3f}")
    plain = fake.bfloat16()
    plain.set_activations(QuantConfig(activations="none"))
    print(f"check: blocks within {block_error:.2%}, bf16 logits {error:.3f} apart (quantization: {moved:.3f})")
    return plain, integer


@dataclass
class Candidate:
    """Something to time: ``call`` gives ``tokens`` tokens; a round is a ``reset`` and ``calls`` calls."""

    name: str
    call: Callable[[], Any]
    tokens: int
    calls: int
    reset: Callable[[], Any] = lambda: None


def tokens_per_second(candidate: Candidate, device: torch.device) -> float:
    """Of one round."""
    candidate.reset()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(candidate.calls):
            candidate.call()
        return candidate.tokens * candidate.calls / (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(candidate.calls):
        candidate.call()
    end.record()
    end.synchronize()
    return candidate.tokens * candidate.calls / (begin.elapsed_time(end) / 1000)


def measure(candidates: list[Candidate], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Tokens/s of every round by candidate, in turn; a round before warms up and compiles."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for turn in range(rounds + 1):
        for candidate in candidates:
            speed = tokens_per_second(candidate, device)
            if turn:
                times[candidate.name].append(speed)
    return times


def with_compiled_blocks(model: Decoder) -> Decoder:
    """The same weights in blocks that are compiled; the few shapes here get code of their own each."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)  # a shallow copy shares the dictionary
    twin.blocks = nn.ModuleList(copy.copy(block) for block in model.blocks)
    for block in twin.blocks:
        block.compile(fullgraph=True, dynamic=False)
    replay(twin)
    return twin


def validation(models: dict[str, Decoder], batch: Tensor) -> list[Candidate]:
    """Candidates whose call is the mean loss of the batch."""
    compiled_loss = torch.compile(next_token_loss)
    ids, targets = batch[:, :-1], batch[:, 1:]

    def candidate(name: str, model: Decoder) -> Candidate:
        loss = compiled_loss if name.endswith("compiled") else next_token_loss
        return Candidate(name, lambda: loss(model.head, model(ids)[0], targets), ids.numel(), calls=2)

    return [candidate(name, model) for name, model in models.items()]


def generation(models: dict[str, Decoder], prompt: Tensor) -> list[Candidate]:
    """Candidates whose call is one step, captured on a GPU, of a continuation of the prompt."""
    num_prompt = prompt.shape[1]
    num_new = min(256, next(iter(models.values())).config.context - num_prompt)

    def candidate(name: str, model: Decoder) -> Candidate:
        with torch.compiler.set_stance("force_eager"):  # compiling the prefill too would take long
            continuation = Continuation(model, prompt, num_new)
        call = captured(continuation.step).replay if prompt.is_cuda else continuation.step
        return Candidate(name, call, 1, num_new - 2, lambda: continuation.position.fill_(num_prompt))

    return [candidate(name, model) for name, model in models.items()]


def check_generation(model: Decoder, prompt: Tensor) -> None:
    """Refuses a captured step that differs from the eager one."""
    if not torch.equal(generate(model, prompt, 12), generate(model, prompt, 12, cuda_graph=False)):
        raise CheckFailed("a captured step's tokens are not those of the eager one")


def print_case(case: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A case's table; its rows for the CSV."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    baseline = max(value for name, value in medians.items() if name.startswith("bf16"))
    rows = []
    for name, values in times.items():
        ordered, speedup = sorted(values), medians[name] / baseline
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        bar = "" if name.startswith("bf16") else f"{BARS[case]}x"
        spread = f"{low:.1f}-{high:.1f}"
        print(f"{case:12} {name:16} {medians[name]:12.1f} tokens/s {spread:>22} {speedup:6.2f}x {bar:>5}", flush=True)
        figures = {"value": medians[name], "p10": low, "p90": high, "ratio": speedup}
        rows.append({"case": case, "candidate": name} | {key: round(value, 3) for key, value in figures.items()})
    return rows


def profile(candidate: Candidate) -> None:
    """Which kernels one call's time goes to, on a GPU."""
    calls = min(20, candidate.calls)
    candidate.reset()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            candidate.call()
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.self_device_time_total]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) / calls
    print(f"{candidate.name}: {total:.0f} µs in {sum(e.count for e in events) / calls:.0f} kernels a call")
    for event in events[:14]:
        here, each = event.self_device_time_total / calls, event.self_device_time_total / event.count
        print(f"    {here:9.1f} µs  {event.count / calls:5.0f} × {each:7.1f}  {event.key[:90]}")


def linear_bytes(model: Decoder) -> int:
    """Bytes of everything that the blocks' linears hold."""
    linears = [getattr(block, site) for block in model.blocks for site in SITES]
    assert all(isinstance(linear, nn.Linear | Int4Linear) for linear in linears)
    tensors = [t for linear in linears for t in (*linear.parameters(recurse=False), *linear.buffers(recurse=False))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def print_bytes(plain: Decoder, integer: Decoder) -> list[dict[str, Any]]:
    """The linears' memory; its rows for the CSV."""
    sizes = {"bf16": linear_bytes(plain), "w4a4": linear_bytes(integer)}
    rows = []
    for name, size in sizes.items():
        ratio = size / sizes["bf16"]
        bar = "" if name == "bf16" else f"{MEMORY_BAR}x"
        print(f"{'linears':12} {name:16} {size:12} bytes {'':25} {ratio:6.3f}x {bar:>5}")
        rows.append({"case": "linears, bytes", "candidate": name, "value": size, "ratio": round(ratio, 4)})
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    parser.add_argument("--style", choices=["neox", "llama"], default="neox")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], help="default: both; on a CPU eager")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print each candidate's kernels (GPU)")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible: try --size tiny --device cpu")
    torch.manual_seed(0)
    config, vocab_size, num_sequences = SIZES[arguments.size]
    config = replace(config, style=arguments.style)
    setting = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "size": arguments.size,
        "style": arguments.style,
    }
    print(" ".join(f"{name}={value}" for name, value in setting.items()), flush=True)
    try:
        plain, integer = build(config, vocab_size, device)
        prompt = torch.randint(vocab_size, (1, min(128, config.context // 2)), device=device)
        check_generation(plain, prompt)
        check_generation(integer, prompt)
    except CheckFailed as error:
        sys.exit(f"no figures: {error}")
    rows = print_bytes(plain, integer)
    models = {}
    for mode in arguments.modes or (["eager", "compiled"] if on_gpu else ["eager"]):
        for name, model in (("bf16", plain), ("w4a4", integer)):
            models[f"{name} {mode}"] = with_compiled_blocks(model) if mode == "compiled" else model
    batch = torch.randint(vocab_size, (num_sequences, config.context + 1), device=device)
    for case in arguments.cases:
        candidates = generation(models, prompt) if case == "generation" else validation(models, batch)
        rows += print_case(case, measure(candidates, arguments.rounds, device))
        if arguments.profile and on_gpu:
            for candidate in candidates:
                profile(candidate)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["case", "candidate", "value", "p10", "p90", "ratio", *setting])
            writer.writeheader()
            writer.writerows([row | setting for row in rows])


if __name__ == "__main__":
    main()
