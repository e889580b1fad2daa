"""The whole application at its smallest: text, DataModule, module, callbacks and Trainer, in seconds on one core."""

import faulthandler
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger

from lit_actreg.config import ModelConfig, OptimConfig, QuantConfig
from lit_actreg.data import TextDataModule
from lit_actreg.module import LitLanguageModel

WORDS = ["the", "of", "and", "to", "in", "that", "is", "was", "for", "it", "with", "as", "his", "on", "be", "at"]
VOCAB_SIZE, CONTEXT = 300, 16


def write_corpus(folder: Path, num_documents: int = 60, num_words: int = 60) -> Path:
    """A folder of text files, one a document; a word depends on the one before, so there is something to learn."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_documents):
        words = [rng.choice(WORDS)]
        for _ in range(num_words - 1):
            words.append(WORDS[(3 * WORDS.index(words[-1]) + rng.choice([1, 2, 5])) % len(WORDS)])
        (folder / f"{i:03}.txt").write_text(" ".join(words))
    return folder


def datamodule(corpus: Path, **options: Any) -> TextDataModule:
    given = {"context": CONTEXT, "batch_size": 8, "num_workers": 0, "vocab_size": VOCAB_SIZE, "valid_share": 0.1}
    return TextDataModule(str(corpus), cache_dir=str(corpus.parent / "cache"), **(given | options))


def lit_module(quant: QuantConfig | None = None, lr: float = 1e-2, style: str = "neox", **options: Any):
    """The schedule ends at step 20 whatever max_steps is, so that a short fit is the start of a long one."""
    shape = ModelConfig(style=style, num_layers=2, width=32, num_heads=2, context=CONTEXT)
    seed_everything(1, verbose=False)
    return LitLanguageModel(shape, quant, OptimConfig(lr=lr, warmup_steps=3, decay_steps=20), VOCAB_SIZE, **options)


def launch_two_processes(file: str, *arguments: Path | str) -> None:
    """Runs a test's file under torchrun, as the docs say; it calls :func:`as_one_of_two_processes` first."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, file, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def as_one_of_two_processes() -> None:
    """A core for each; and processes that wait for each other for four minutes say where they stand, and end."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    faulthandler.dump_traceback_later(240 + 5 * rank, exit=rank == 1)


class Records(DummyLogger):
    """A logger that keeps what it is given: ``of(name)`` is {step: value}."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None, *args, **kwargs):
        self.metrics.append((step, {name: float(value) for name, value in metrics.items()}))

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.metrics if name in metrics}


class Losses(Callback):
    """Keeps the training losses as they were optimized, in full precision (a logger gets float32)."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.values.append((outputs["loss"] * trainer.accumulate_grad_batches).item())


def trainer(callbacks: list[Callback], steps: int = 6, **options: Any) -> Trainer:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    given: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": Records(), "enable_checkpointing": False}
    given |= {"log_every_n_steps": 1, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_steps=steps, callbacks=callbacks, **(given | quiet | options))


def parameters(module: LitLanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}
