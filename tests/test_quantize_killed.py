"""`quantize`, killed with SIGKILL while it works, continues by the same command and gives the same bytes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import safe_open
from small_fit import CONTEXT, datamodule, trainer, write_corpus

from lit_actreg.config import ModelConfig, OptimConfig
from lit_actreg.module import LitLanguageModel

NUM_BLOCKS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Wide enough that a block takes a good part of a second, so that a kill falls between two of them."""
    folder = tmp_path_factory.mktemp("fit")
    shape = ModelConfig(num_layers=NUM_BLOCKS, width=128, num_heads=2, context=CONTEXT)
    module = LitLanguageModel(shape, optim=OptimConfig(lr=1e-3, warmup_steps=1, decay_steps=2), vocab_size=300)
    engine = trainer([], steps=1)
    engine.fit(module, datamodule=datamodule(write_corpus(folder / "corpus")))
    engine.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


def started(checkpoint: Path, output: Path) -> subprocess.Popen:
    data = f"--data.source={checkpoint.parent}/corpus --data.cache_dir={checkpoint.parent}/cache --data.valid_share=0.1"
    command = f"quantize --quantizer=GPTQ --ckpt_path={checkpoint} --output={output} --calibration_tokens=2048"
    options = f"--data.context={CONTEXT} --trainer.accelerator=cpu --trainer.logger=false"
    arguments = f"{command} {data} {options}".split()
    return subprocess.Popen(
        [sys.executable, "-m", "lit_actreg", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=checkpoint.parent,
    )


def finished(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def killed_when(process: subprocess.Popen, block: Path) -> None:
    deadline = time.monotonic() + 120
    while not block.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{block} was never written"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had already ended"


def test_killed_between_blocks_it_continues_and_gives_the_same_bytes(checkpoint, tmp_path):
    finished(started(checkpoint, tmp_path / "whole"))
    out, work = tmp_path / "out", tmp_path / "out.work"
    killed_when(started(checkpoint, out), work / "block_0002.safetensors")
    assert not out.exists()
    blocks = sorted(work.glob("*.safetensors"))
    assert 3 <= len(blocks) < NUM_BLOCKS
    for block in blocks:  # none is half written
        with safe_open(block, "pt") as file:
            assert "layers" in file.metadata()
    before = {block: block.stat().st_mtime_ns for block in blocks}
    process = started(checkpoint, out)
    while process.poll() is None and work.exists():
        for block, time_ns in before.items():
            with suppress(FileNotFoundError):  # the work is removed when all is done
                assert block.stat().st_mtime_ns == time_ns, "a finished block was computed again"
        time.sleep(0.01)
    finished(process)
    assert not work.exists()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
