"""A fit that SIGTERM, Ctrl-C or SIGKILL ends goes on with ``--ckpt_path last`` to the losses of one that nothing ended.

Real processes, through the command line, with every callback on, ended at a moment that differs from run to run.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_fit import CONTEXT, VOCAB_SIZE, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_actreg.checkpoint import damage, load_lightning_checkpoint
from lit_actreg.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, INTERVAL = 60, 5
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def arguments(folder: Path, name: str, *extra: str) -> list[str]:
    settings = {
        "model.shape": "{num_layers: 2, width: 32, num_heads: 2}",
        "optim.warmup_steps": 3,
        "kurtosis": "{weight: 1e-3, warmup_steps: 6}",
        "clips": "{lr: 0.01, bits: {0: 16, 2: 8, 14: 4}, calibrate_steps: [0, 3, 15, 30], momentum: 0.5}",
        "outliers": "{every_n_steps: 30, num_tokens: 64, pictures_every: 0}",
        "checkpoint.every_n_steps": INTERVAL,
        "data.source": folder / "corpus",
        "data.cache_dir": folder / "cache",
        "data.vocab_size": VOCAB_SIZE,
        "data.context": CONTEXT,
        "data.batch_size": 4,
        "data.valid_share": 0.1,
        "data.num_workers": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": STEPS,
        "trainer.accumulate_grad_batches": 3,
        "trainer.gradient_clip_val": 1.0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "TensorBoardLogger",
        "trainer.logger.save_dir": folder,
        "trainer.logger.name": name,
    }
    return ["fit", *(f"--{key}={value}" for key, value in settings.items()), *extra]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    write_corpus(folder / "corpus", num_words=200)
    main(arguments(folder, "whole"))
    return folder


def scalars(version: Path, after: int) -> dict[str, list[tuple[int, float]]]:
    """What a fit logged from the step on that follows ``after``; what depends on the clock aside."""
    events = EventAccumulator(str(version), {"scalars": 0}).Reload()
    clock = ("train/tokens_per_second", "train/data_wait_seconds", "train/hours_left", "outliers/snapshot_seconds")
    tags = [tag for tag in events.Tags()["scalars"] if tag not in clock]
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag) if e.step >= after] for tag in tags}
    return {tag: values for tag, values in found.items() if values}


def ended(command: list[str], checkpoints: Path, with_signal: signal.Signals, group: bool) -> tuple[int, str]:
    """Starts a fit and ends it, a random moment after its first checkpoint; exit status and stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (checkpoints / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 0.4))
    (os.killpg if group else os.kill)(process.pid, with_signal)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.parametrize(
    ("with_signal", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_ended_fit_goes_on_to_the_same_losses(folder, with_signal, status, caplog):
    """Signals go to all processes of the job, data workers included, as SLURM and terminals send them."""
    name = with_signal.name
    checkpoints = folder / name / "version_0" / "checkpoints"
    found, stderr = ended(["-m", "lit_actreg", *arguments(folder, name)], checkpoints, with_signal, group=True)
    assert found == status, stderr
    last = load_lightning_checkpoint(checkpoints / "last.ckpt")["global_step"]
    reached = max(step for step, _ in scalars(folder / name / "version_0", 0)["train/loss"]) + 1
    assert 0 < last < STEPS
    if with_signal != signal.SIGKILL:
        assert f"{name}: {checkpoints / f'step={last}.ckpt'} is written" in stderr
    else:
        assert last % INTERVAL == 0
        assert reached - last <= INTERVAL
    caplog.set_level("INFO")
    main(arguments(folder, name, "--ckpt_path=last"))
    assert f"--ckpt_path last is {checkpoints / f'step={last}.ckpt'}" in caplog.text
    resumed, expected = scalars(folder / name / "version_1", last), scalars(folder / "whole" / "version_0", last)
    assert [step for step, _ in resumed["train/loss"]] == list(range(last, STEPS))
    assert len(resumed) > 80
    assert "val/loss" in resumed
    for tag in [tag for tag in expected if tag.startswith(("outliers", "clips"))]:
        # counted by steps made: what belongs to the step that the checkpoint was written at is in the ended run's log
        expected[tag] = [event for event in expected[tag] if event[0] > last]
    assert resumed == {tag: values for tag, values in expected.items() if values}


STRATEGIES = {
    "ddp": ["--trainer.strategy=ddp"],
    "fsdp2": [
        "--trainer.strategy=ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1",
    ],
}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_stop_together(folder, strategy, capsys):
    """torchrun passes SIGTERM on; the ranks agree, or one would wait for the other. In shards a checkpoint is a folder,
    whole or not there as well."""
    checkpoints = folder / strategy / "version_0" / "checkpoints"
    command = [*TORCHRUN, "-m", "lit_actreg", *arguments(folder, strategy, *STRATEGIES[strategy])]
    command[command.index("--trainer.devices=1")] = "--trainer.devices=2"
    status, stderr = ended(command, checkpoints, signal.SIGTERM, group=False)
    assert status != 0
    last = (checkpoints / "last.ckpt").resolve()
    assert f"{last.name} is written" in stderr
    assert 0 < load_lightning_checkpoint(last)["global_step"] < STEPS
    assert damage(last) is None
    assert not list(checkpoints.glob(".*"))
    if strategy == "fsdp2":
        with pytest.raises(SystemExit):
            main(arguments(folder, "alone", f"--ckpt_path={last}"))
        assert "is in shards: resume it with trainer.strategy ModelParallelStrategy" in capsys.readouterr().err
        shard = next(last.glob("*.distcp"))
        os.truncate(shard, shard.stat().st_size - 100)
        assert damage(last) == f"{shard.name} is too short"
