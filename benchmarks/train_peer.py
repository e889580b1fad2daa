"""Our plain 16-bit training step beside that of transformers' model of the same shape, on one GPU.

    python benchmarks/train_peer.py [--size 98m|125m|1b] [--rounds 8]
    python benchmarks/train_peer.py --size tiny --device cpu          # shows that it works; its times mean nothing

Both: bfloat16 autocast, float32 weights, torch.compile (transformers' whole, as its documentation has it; ours a block
at a time and the loss, as ``fit`` does), fused AdamW, the same batch of random tokens. transformers computes the loss
itself, from labels. The weights are the same, and so must the loss of a sequence be, in float32, or nothing is printed
and the status is 1.
Turns and figures as in :mod:`train_speed`. ``pip install -c constraints.txt transformers``.
"""

import argparse
import statistics
import sys

import torch
import transformers
from train_speed import PLAIN, SIZES, STEPS, Trainee
from transformers import AutoConfig

from lit_actreg.callbacks.throughput import PEAK_TFLOPS
from lit_actreg.huggingface import huggingface_config, to_huggingface
from lit_actreg.module import next_token_loss

TOLERANCE = 1e-4  # nats, of a loss of about ln V


class Peer:
    """transformers' model with the trainee's weights and batch."""

    def __init__(self, ours: Trainee) -> None:
        settings = huggingface_config(ours.config, ours.model.vocab_size)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        family = getattr(transformers, settings["architectures"][0])
        state = to_huggingface(ours.config, ours.model.state_dict())  # names as in files, which this translates
        options = {"attn_implementation": "sdpa", "dtype": torch.float32}
        self.model = family.from_pretrained(None, config=config, state_dict=state, **options).to(ours.device).train()
        self.model.config.use_cache = False
        self.device, self.ids, self.targets = ours.device, ours.batch[:, :-1], ours.batch[:, 1:].contiguous()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=ours.device == "cuda")
        if ours.device == "cuda":
            self.model.compile()

    def loss(self, num_sequences: int | None = None) -> torch.Tensor:
        ids, targets = self.ids[:num_sequences], self.targets[:num_sequences]
        return self.model(input_ids=ids, labels=ids, shift_labels=targets).loss

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()


@torch.no_grad()
def first_losses(ours: Trainee, peer: Peer) -> tuple[float, float]:
    """Of the batch's first sequence, float32, eager: in bfloat16 24 random blocks drift apart by a hundredth."""
    with torch.compiler.set_stance("force_eager"):
        hidden, _ = ours.model(ours.batch[:1, :-1])
        return next_token_loss(ours.model.head, hidden, ours.batch[:1, 1:]).item(), peer.loss(1).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="125m")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    ours = Trainee(args.size, args.device, None, 1)
    PLAIN.apply(ours.model)
    peer = Peer(ours)
    losses = first_losses(ours, peer)
    print(f"first loss: ours {losses[0]:.4f}, transformers {losses[1]:.4f}")
    if abs(losses[0] - losses[1]) > TOLERANCE:
        print("REFUSED: not the same model")
        return 1
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    for index in range(args.rounds):
        for name in list(times)[:: -1 if index % 2 else 1]:
            step = ours.step if name == "ours" else peer.step
            step()
            start = ours.clock()
            for _ in range(STEPS):
                step()
            times[name].append((ours.clock() - start) / STEPS * 1e3)
    tokens = ours.batch[:, 1:].numel()
    print(f"{args.size}, {list(ours.batch[:, 1:].shape)} tokens a step, torch {torch.__version__}")
    for name, found in times.items():
        ms = statistics.median(found)
        ratio = statistics.median(p / v for p, v in zip(times["ours"], found, strict=True))
        mfu = tokens / ms * 1e3 * ours.flops_per_token / (1e12 * PEAK_TFLOPS["H100"])
        print(f"{name:14}{ms:9.2f} ms{tokens / ms * 1e3:11,.0f} tokens/s{ratio:7.3f}x{mfu:7.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
