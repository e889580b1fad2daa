"""How fast a fit is: tokens a second, share of the hardware's peak, seconds spent waiting for data, time left.

**Model FLOPs** of a training step, per token (forward and backward; a multiplication and an addition are two):

    6 · (N + V · D)  +  6 · L · T · D

N: parameters of blocks and norms, without the embedding; V · D: the head, tied to the embedding or not, which is a
matrix product; the embedding itself is a look-up. Each weight is used once forward (2) and twice backward (4). The
second term is attention, Q Kᵀ and the weighted sum of V, over L layers of width D in sequences of T tokens. It would be
12 · L · T · D if every token attended to all T; **causal attention, half of it, is what is counted here**. PaLM's
convention (arXiv 2204.02311, appendix B) counts all: at the paper's 1 B shape (24 × 1920, T = 2048) 8 % more.
Not counted: norms, softmax, fake quantization, and what activation checkpointing computes again.

**MFU** (model FLOPs utilization) = tokens a second · FLOPs a token / (devices · peak), the peak being the device's
dense one (no sparsity) in 16 bits, from :data:`PEAK_TFLOPS` by its name, or given. Unknown, or in float32: not logged.

Lightning's ThroughputMonitor is not used: it waits for the device after every batch, and its table of peaks lacks the
H200 and has sparse figures among the dense.
"""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_actreg.config import ModelConfig
from lit_actreg.data.resume import ResumableLoader
from lit_actreg.model import Decoder
from lit_actreg.module import LitLanguageModel

# Dense bf16 / fp16 tensor-core peak of one device in TFLOP/s, from NVIDIA's data sheets; the first name that occurs in
# torch.cuda.get_device_name() holds. "H100 80GB HBM3" is what an H100 SXM calls itself.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
}


def flops_per_token(config: ModelConfig, num_block_parameters: int, vocab_size: int, num_tokens: int) -> int:
    """Model FLOPs of training on one token, causal attention counted as half.

    Args:
        config: Shape of the decoder.
        num_block_parameters: Parameters without the embedding and the head.
        vocab_size: Rows of the head.
        num_tokens: T, of a training sequence (the model may know longer ones).
    """
    weights = num_block_parameters + vocab_size * config.width
    return 6 * weights + 6 * config.num_layers * num_tokens * config.width


def num_block_parameters(model: Decoder) -> int:
    """N: parameters without the embedding and the head; whole ones, where they are sharded."""
    outside = {id(model.embedding.weight), id(model.head.weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s at a Lightning precision; None if it is not known."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part.lower() in name), None)


class Throughput(Callback):
    """Logs ``train/tokens_per_second``, ``train/mfu``, ``train/data_wait_seconds`` and ``train/hours_left``.

    All are of the time since the last log (every ``trainer.log_every_n_steps`` steps), validation left out. Data wait
    is what the training loop stood still for in the loader, summed, on this process. No number waits for the device.

    Args:
        peak_tflops: Dense 16-bit peak of one device in TFLOP/s; null looks the device's name up.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"throughput.peak_tflops {peak_tflops} is not positive: name the device's peak, or null")
        self.peak_tflops = peak_tflops
        self._tokens = self._flops = 0
        self._since = self._waited = self._paused = 0.0
        self._logged_step = self._block_parameters = 0
        self._peak: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        self._block_parameters = num_block_parameters(pl_module.model)
        known = peak_flops(pl_module.device, str(trainer.precision))
        self._peak = 1e12 * self.peak_tflops if self.peak_tflops is not None else known
        self._since = 0.0  # the first batches compile: the clock starts at the first log
        self._tokens = self._flops = 0
        self._logged_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since += time.perf_counter() - self._paused if self._since else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        model, tokens, length = pl_module.model, batch[:, 1:].numel() * trainer.world_size, batch.shape[1] - 1
        self._tokens += tokens
        self._flops += tokens * flops_per_token(model.config, self._block_parameters, model.vocab_size, length)
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every or step == self._logged_step:
            return
        now, loader = time.perf_counter(), trainer.train_dataloader
        waited = loader.seconds_waited if isinstance(loader, ResumableLoader) else 0.0
        if self._since:
            for name, value in self.numbers(trainer, now - self._since, step - self._logged_step).items():
                pl_module.log(f"train/{name}", torch.tensor(value), prog_bar=True)  # on the host: module.py says why
            pl_module.log("train/data_wait_seconds", torch.tensor(waited - self._waited), prog_bar=True)
        self._since, self._waited, self._logged_step = now, waited, step
        self._tokens = self._flops = 0

    def numbers(self, trainer: Trainer, seconds: float, steps: int) -> dict[str, float]:
        """What the tokens and FLOPs counted mean in so many seconds and optimizer steps."""
        found = {"tokens_per_second": self._tokens / seconds}
        if self._peak:
            found["mfu"] = self._flops / (seconds * trainer.world_size * self._peak)
        if trainer.max_steps > 0:
            found["hours_left"] = (trainer.max_steps - trainer.global_step) * seconds / steps / 3600
        return found
