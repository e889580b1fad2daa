"""A step whose loss is not finite, or leaps, is left out to the bit or ends the fit, with its step and its data named.

``Spoil`` spoils the hidden states of chosen batches; the optimizer is AdamW as a CPU has it and fused as a GPU has it.
Under torchrun (``torchrun --nproc-per-node 2 test_loss_guard.py CORPUS OUTPUT``) this file is the distributed fits.
"""

import copy
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from small_fit import (
    Losses,
    as_one_of_two_processes,
    datamodule,
    launch_two_processes,
    lit_module,
    parameters,
    trainer,
    write_corpus,
)

from lit_actreg.callbacks.clip_schedule import ClipSchedule
from lit_actreg.callbacks.loss_guard import FINE, NAN, SPIKE, LossGuard
from lit_actreg.parallel import whole

pytestmark = pytest.mark.usefixtures("one_thread")
ACCUMULATE, STEPS, BAD_STEP = 2, 8, 5
SPOILS = {"nan": float("nan"), "spike": 100.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("guard") / "corpus")


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def optimizer(request, monkeypatch):
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **o: adamw(groups, **(o | {"fused": request.param})))


class Spoil(Callback):
    """Multiplies the hidden states of the second batch of some steps; keeps what is trained before and after each."""

    def __init__(self, factor: float, steps: tuple[int, ...] = (BAD_STEP,)) -> None:
        self.factor, self.steps = factor, steps
        self.states: list[tuple[dict, dict]] = []
        self.batches: dict[int, list[torch.Tensor]] = {}

    def on_train_start(self, trainer, pl_module):
        def hook(model, args, output):
            second = trainer.fit_loop.epoch_loop.batch_progress.current.ready % ACCUMULATE == 0
            hidden, statistics = output
            return (hidden * self.factor if second and trainer.global_step in self.steps else hidden), statistics

        pl_module.model.register_forward_hook(hook)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.setdefault(trainer.global_step, []).append(batch)

    def on_train_batch_end(self, trainer, pl_module, *_):
        optimizer = trainer.optimizers[0]
        self.states.append((parameters(pl_module), copy.deepcopy(optimizer.state_dict()["state"])))

    def after(self, step: int) -> tuple[dict, dict]:
        """Weights and optimizer state after a step."""
        return self.states[ACCUMULATE * (step + 1) - 1]


class Deferred(LossGuard):
    """As on a GPU: the host reads verdicts now and then."""

    @staticmethod
    def host_knows(loss):
        return False


def fit(corpus, guard, spoil, steps=STEPS, resume_from=None, save_to=None, **options):
    losses = Losses()
    engine = trainer([guard, ClipSchedule(0.03), spoil, losses], steps, accumulate_grad_batches=ACCUMULATE, **options)
    data = datamodule(corpus, batch_size=4)
    engine.fit(lit_module(), datamodule=data, ckpt_path=resume_from)
    if save_to:
        engine.save_checkpoint(save_to)
    return losses.values, data, engine


def guard(kind: str, action: str, cls=LossGuard, **options) -> LossGuard:
    """A spike needs a window shorter than the fit."""
    return cls(**{"nan": "ignore", "window": 4, "spike_std": 3.0, kind: action} | options)


def assert_same(found: dict, expected: dict) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", SPOILS)
def test_a_skipped_step_leaves_everything_as_it_was(corpus, optimizer, kind, caplog):
    caplog.set_level("INFO")
    spoil = Spoil(SPOILS[kind])
    _, data, engine = fit(corpus, guard(kind, "skip"), spoil)
    (weights, state), (old_weights, old_state) = spoil.after(BAD_STEP), spoil.after(BAD_STEP - 1)
    assert_same(weights, old_weights)
    assert_same(state, old_state)
    for step in (BAD_STEP - 1, BAD_STEP + 1):
        moved = [not torch.equal(p, spoil.after(step - 1)[0][name]) for name, p in spoil.after(step)[0].items()]
        assert sum(moved) > 20
    assert all(p.isfinite().all() for p in spoil.after(STEPS - 1)[0].values())
    assert engine.logger.of("train/skipped_steps")[STEPS - 1] == 1
    (line,) = [message for message in caplog.messages if "skipped" in message]
    assert line.startswith(f"step {BAD_STEP}: loss ")
    first = BAD_STEP * ACCUMULATE
    assert f"in batches {first}-{first + 1}, sequences " in line
    ids = [int(i) for i in re.search(r"sequences ([\d ]+):", line)[1].split()]
    assert torch.equal(data.blocks["train"].__getitems__(ids), torch.cat(spoil.batches[BAD_STEP]))


@pytest.mark.parametrize("kind", SPOILS)
def test_a_skipping_fit_resumes_exactly(corpus, tmp_path, kind):
    whole = Spoil(SPOILS[kind])
    losses, *_ = fit(corpus, guard(kind, "skip"), whole)
    for stop in (BAD_STEP - 1, BAD_STEP + 1):
        fit(corpus, guard(kind, "skip"), Spoil(SPOILS[kind]), steps=stop, save_to=tmp_path / "x.ckpt")
        rest, resumed = Spoil(SPOILS[kind]), guard(kind, "skip")
        found, *_ = fit(corpus, resumed, rest, resume_from=tmp_path / "x.ckpt")
        assert resumed.num_skipped == 1
        torch.testing.assert_close(found, losses[stop * ACCUMULATE :], rtol=0, atol=0, equal_nan=True)
        assert_same(rest.states[-1][0], whole.states[-1][0])


@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("cls", [LossGuard, Deferred])
def test_a_stopped_fit_has_the_weights_before_the_step(corpus, optimizer, kind, cls):
    """Where the host reads late, the steps until then are left out as well."""
    spoil = Spoil(SPOILS[kind])
    with pytest.raises(ValueError, match=rf"^step {BAD_STEP}: loss .* in batches 10-11, sequences .*: stopped"):
        fit(corpus, guard(kind, "stop", cls), spoil, log_every_n_steps=1 if cls is LossGuard else 50)
    weights, state = spoil.after(BAD_STEP - 1)
    assert len(spoil.states) == ACCUMULATE * (BAD_STEP if cls is LossGuard else STEPS) + (cls is LossGuard)
    assert_same(spoil.states[-1][0], weights)
    assert_same(spoil.states[-1][1], state)


def test_no_checkpoint_is_written_of_a_fit_that_is_to_stop(corpus, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == BAD_STEP + 1:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    with pytest.raises(ValueError, match=f"^step {BAD_STEP}: "):
        trainer(
            [guard("nan", "stop", Deferred), Spoil(SPOILS["nan"]), Save()], STEPS, accumulate_grad_batches=ACCUMULATE
        ).fit(lit_module(), datamodule=datamodule(corpus, batch_size=4))
    assert not (tmp_path / "x.ckpt").exists()


def test_too_many_in_a_row_stop_the_fit(corpus):
    spoil = Spoil(SPOILS["nan"], (2, 3, 5, 6, 7))
    with pytest.raises(ValueError, match=r"^step 7: .*stopped after 3 skipped in a row"):
        fit(corpus, guard("nan", "skip", max_skipped=3), spoil)


def test_ignored_it_goes_its_way(corpus):
    """The control: without the guard the weights are lost, and nothing is spoiled without Spoil."""
    spoil = Spoil(SPOILS["nan"])
    fit(corpus, LossGuard(nan="ignore"), spoil)
    assert not spoil.after(STEPS - 1)[0]["blocks.0.qkv.weight"].isfinite().any()
    clean, watched = Spoil(1.0), Spoil(1.0)
    losses, *_ = fit(corpus, LossGuard(nan="ignore"), clean)
    assert fit(corpus, LossGuard(nan="skip", spike="skip", window=4, spike_std=8.0), watched)[0] == losses


def test_the_loss_of_a_short_window_is_a_mean_too(corpus):
    """A pass of three batches ends in a window of one; Lightning divides its loss by two all the same."""
    judged = []

    class Recording(LossGuard):
        def judge(self, loss, norm):
            judged.append(loss.item())
            return super().judge(loss, norm)

    losses, *_ = fit(corpus, Recording(), Spoil(1.0), steps=4, limit_train_batches=3)
    windows = [losses[:2], losses[2:3], losses[3:5], losses[5:]]
    assert judged == pytest.approx([sum(window) / len(window) for window in windows], rel=1e-6)


def test_the_running_statistics_are_those_of_the_docstring():
    found, losses = LossGuard(spike="skip", window=5, spike_std=2.0), [4.0, 3.0, 3.5, 3.2, 3.4, 9.0, 3.3, float("nan")]
    one = torch.ones(())
    kinds = [int(found.judge(torch.tensor(loss), one)[1][0]) for loss in losses]
    assert kinds == [FINE] * 5 + [SPIKE, FINE, NAN]
    mean = variance = 0.0
    for count, loss in enumerate([loss for loss in losses[:-1] if loss != 9.0]):
        share = 1 / min(count + 1, 5)
        distance = loss - mean
        mean, variance = mean + share * distance, (1 - share) * (variance + share * distance**2)
    running = found.state_dict()["running"]
    assert running == pytest.approx([mean, variance, 6, 1, 1], rel=1e-6)  # nan: "stop"
    assert mean == pytest.approx(3.36, abs=0.1)
    assert int(found.judge(torch.tensor(3.0), torch.tensor(float("inf")))[1][0]) == NAN


@pytest.mark.slow
def test_two_processes_leave_the_same_step_out(corpus, tmp_path):
    """A loss that is not a number on one rank, on whole weights and in shards, plain and fused."""
    launch_two_processes(__file__, corpus, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == 4
    for name, moved in found.items():
        assert moved == [step != BAD_STEP for step in range(STEPS)], name


def main(corpus: Path, output: Path) -> None:
    """Whether weights moved in each step, by strategy and optimizer."""
    adamw, moved = torch.optim.AdamW, {}
    for strategy in ("ddp", "fsdp2"):
        for fused in (False, True):
            torch.optim.AdamW = lambda groups, f=fused, **o: adamw(groups, **(o | {"fused": f}))
            mesh = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            spoil = Spoil(SPOILS["nan"] if int(os.environ["RANK"]) == 1 else 1.0)
            fit(corpus, guard("nan", "skip"), spoil, strategy=mesh if strategy == "fsdp2" else "ddp", devices=2)
            states = [whole(weights["blocks.0.qkv.weight"]) for weights, _ in spoil.states]
            weights = states[ACCUMULATE - 1 :: ACCUMULATE]
            before = [states[0], *weights]
            pairs = zip(before[:-1], weights, strict=True)
            moved[f"{strategy} fused={fused}"] = [
                bool((new != old).any() and new.isfinite().all()) for old, new in pairs
            ]
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(moved))


if __name__ == "__main__":
    as_one_of_two_processes()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
