"""A fit that stops anywhere and resumes sees the batches, and gives the losses, of one that did not stop.

Run as a program (``python test_resume_data.py CORPUS CHECKPOINTS resume|killed``) it is the process of the last test.
"""

import contextlib
import hashlib
import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_actreg.data import TextDataModule

WORDS = ["the", "of", "and", "to", "in", "that", "is", "was", "for", "it", "with", "as", "his", "on", "be", "at"]


class Bigram(LightningModule):
    """The smallest language model: an embedding and a head. Records (batch's hash, loss) of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300)
        self.seen: list[tuple[str, float]] = []

    def training_step(self, batch, batch_idx):
        logits = self.head(self.embedding(batch[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.seen.append((hashlib.sha256(batch.numpy().tobytes()).hexdigest(), loss.item()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_tokens", float((batch >= 0).sum()))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "step"}]


class StopAt(Callback):
    """Writes a checkpoint after a batch (counted over all passes) and ends the fit there."""

    def __init__(self, num_batches: int, path: Path) -> None:
        self.num_batches, self.path = num_batches, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.num_batches:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of a model this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(WORDS, k=60)))
    return folder


def datamodule(corpus: Path, **options) -> TextDataModule:
    """10 batches of 17 a pass, and some blocks over; with 3 accumulated a pass ends in a short window."""
    given = {"context": 16, "batch_size": 17, "num_workers": 0, "vocab_size": 300, "valid_share": 0.1} | options
    return TextDataModule(str(corpus), cache_dir=str(corpus.parent / "cache"), **given)


def fit(corpus: Path, data=None, resume_from=None, callbacks=(), accumulate=1, steps=20, **options):
    """Runs a fit to ``steps`` optimizer steps, or to an interrupt; returns (hash, loss) of its batches."""
    torch.manual_seed(0)
    module = Bigram()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(module, data or datamodule(corpus), ckpt_path=resume_from)
    return module.seen


@pytest.mark.parametrize(
    ("stop", "num_workers"), [(1, 0), (7, 0), (9, 0), (10, 0), (11, 0), (17, 0), (20, 0), (7, 2), (10, 2)]
)
def test_resume_from_any_batch(corpus, tmp_path, stop, num_workers):
    whole = fit(corpus, steps=25)
    data = datamodule(corpus, num_workers=num_workers)
    before = fit(corpus, data, callbacks=[StopAt(stop, tmp_path / "x.ckpt")], steps=25)
    after = fit(corpus, datamodule(corpus, num_workers=num_workers), tmp_path / "x.ckpt", steps=25)
    assert len(whole) == len({batch for batch, _ in whole}) == 25
    assert len(before) == stop
    assert before + after == whole


# windows start at batches 0 3 6 9 of a pass of 10; a stop inside one goes back to its start
@pytest.mark.parametrize(
    ("stop", "start"), [(3, 3), (4, 3), (5, 3), (9, 9), (10, 10), (11, 10), (12, 10), (19, 19), (20, 20), (22, 20)]
)
def test_resume_inside_an_accumulation_window(corpus, tmp_path, stop, start):
    whole = fit(corpus, accumulate=3, steps=12)
    before = fit(corpus, callbacks=[StopAt(stop, tmp_path / "x.ckpt")], accumulate=3, steps=12)
    after = fit(corpus, resume_from=tmp_path / "x.ckpt", accumulate=3, steps=12)
    assert len(whole) == 30
    assert before == whole[:stop]
    assert after == whole[start:]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("limit", [{}, {"limit_train_batches": 7}])
def test_resume_from_model_checkpoint_with_validation(corpus, tmp_path, accumulate, limit):
    """A pass cut short by limit_train_batches goes on where the last one ended, so passes still cover the corpus."""
    options = {"accumulate": accumulate, "steps": 9, "val_check_interval": 5, **limit}
    whole = fit(corpus, **options)
    every = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    assert fit(corpus, callbacks=[every], **options) == whole
    for step in (4, 8):
        start = len(whole) - len(fit(corpus, resume_from=tmp_path / f"step={step}.ckpt", **options))
        assert fit(corpus, resume_from=tmp_path / f"step={step}.ckpt", **options) == whole[start:]
        assert start == (step if accumulate == 1 else {4: 10, 8: 20}[step])  # windows: 3 3 3 1, or 3 3 1


@pytest.mark.parametrize(("accumulate", "stop", "start"), [(1, 7, 7), (3, 7, 6), (3, 9, 9)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_a_stream(corpus, tmp_path, accumulate, stop, start, num_workers):
    """Lightning fetches one batch ahead of an unsized loader; the cursor counts what was trained on."""
    data = [datamodule(corpus, stream=True, num_workers=num_workers, batch_size=8) for _ in range(3)]
    options = {"accumulate": accumulate, "steps": 5 if accumulate == 3 else 15}
    whole = fit(corpus, data[0], **options)
    assert len({batch for batch, _ in whole}) == 15
    assert fit(corpus, data[1], callbacks=[StopAt(stop, tmp_path / "x.ckpt")], **options) == whole[:stop]
    assert fit(corpus, data[2], tmp_path / "x.ckpt", **options) == whole[start:]


def test_resume_with_other_batches_is_an_error(corpus, tmp_path):
    fit(corpus, callbacks=[StopAt(3, tmp_path / "x.ckpt")])
    with pytest.raises(ValueError, match=r"sequences a batch 17 → 16.*resume with"):
        fit(corpus, datamodule(corpus, batch_size=16), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"seed 0 → 1"):
        fit(corpus, datamodule(corpus, seed=1), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"batches a step 1 → 3.*resume with"):  # or some would be seen twice
        fit(corpus, resume_from=tmp_path / "x.ckpt", accumulate=3)
