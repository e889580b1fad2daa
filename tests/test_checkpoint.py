"""A fit's checkpoints: the newest two, whole or not there; a torn one is passed over, with a line."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from small_fit import CONTEXT, VOCAB_SIZE, Records, datamodule, lit_module, trainer, write_corpus

from lit_actreg.callbacks.checkpoint import ResumeCheckpoint, take_run_folder
from lit_actreg.checkpoint import damage, last_checkpoint, newest_first, whole_or_before
from lit_actreg.cli import main
from lit_actreg.data import TextDataModule

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("checkpoint") / "corpus")


def fit(corpus: Path, folder: Path, steps: int = 7, every: int = 2, **options) -> Path:
    given = {"logger": False, "enable_checkpointing": True, "default_root_dir": folder}
    engine = trainer([ResumeCheckpoint(every)], steps, **(given | options))
    engine.fit(lit_module(), datamodule=datamodule(corpus))
    return folder / "checkpoints"


FIT = ["fit", "--model.shape={num_layers: 1, width: 32, num_heads: 2}", "--trainer.accelerator=cpu"]
FIT += ["--trainer.devices=1", "--trainer.enable_progress_bar=false"]


def from_corpus(corpus: Path) -> list[str]:
    options = {"source": corpus, "cache_dir": corpus.parent / "cache", "vocab_size": VOCAB_SIZE, "context": CONTEXT}
    return [f"--data.{name}={value}" for name, value in (options | {"valid_share": 0.1, "num_workers": 0}).items()]


def tear(path: Path, share: float) -> None:
    """Leaves the first part of a file, and the time it was written."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.truncate(path, int(share * path.stat().st_size))
    os.utime(path, ns=times)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def written(corpus, tmp_path_factory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("written"))


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy to tear."""
    return shutil.copytree(written, tmp_path / "checkpoints", symlinks=True)


def test_the_newest_two_are_kept(written):
    """The last step as well, which the interval does not divide."""
    assert names(written) == ["last.ckpt", "step=6.ckpt", "step=7.ckpt"]
    assert (written / "last.ckpt").resolve().name == "step=7.ckpt"
    assert [path.name for path in newest_first(written)] == ["step=7.ckpt", "step=6.ckpt"]
    assert torch.load(written / "step=6.ckpt", weights_only=True)["global_step"] == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before the fit


def test_others_checkpoints_stay(corpus, tmp_path):
    """A ModelCheckpoint of the user's beside ours, with names that begin as ours do."""
    theirs = ["step=1-epoch=0.ckpt", "step=best.ckpt"]
    (tmp_path / "checkpoints").mkdir()
    for name in theirs:
        (tmp_path / "checkpoints" / name).write_bytes(b"theirs")
    assert names(fit(corpus, tmp_path)) == sorted(["last.ckpt", "step=6.ckpt", "step=7.ckpt", *theirs])


def test_no_file_is_seen_half_written(corpus, tmp_path, monkeypatch):
    """A write that fails half way leaves the checkpoints as they were, and a line; the next clears what a killed one
    has left."""
    save, seen = torch.save, []

    def half(checkpoint, path):
        save(checkpoint, path)
        seen.append(names(Path(path).parent))
        if checkpoint["global_step"] == 4:
            raise RuntimeError(
                "[enforce fail at inline_container.cc:672] . unexpected pos 317248 vs 317140\nframe #0: …"
            )

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(
        OSError, match=r"/\.step=4\.part cannot be written \(.* vs 317140\); its disk has [0-9]+ MiB free$"
    ):
        fit(corpus, tmp_path)
    assert seen == [[".step=2.part"], [".step=4.part", "last.ckpt", "step=2.ckpt"]]
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "step=2.ckpt"
    assert damage(tmp_path / "checkpoints" / "last.ckpt") is None
    assert names(tmp_path / "checkpoints") == ["last.ckpt", "step=2.ckpt"]
    (tmp_path / "checkpoints" / ".step=4.part").write_bytes(b"half")
    monkeypatch.undo()
    assert names(fit(corpus, tmp_path)) == ["last.ckpt", "step=6.ckpt", "step=7.ckpt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_torn_one_is_passed_over(folder, share, caplog):
    caplog.set_level("INFO")
    newest = folder / "step=7.ckpt"
    assert whole_or_before(newest) == newest
    tear(newest, share)
    assert whole_or_before(folder / "last.ckpt") == whole_or_before(newest) == folder / "step=6.ckpt"
    assert last_checkpoint([folder, folder / "none"]) == folder / "step=6.ckpt"
    line = caplog.messages[0]
    assert "\n" not in line
    assert "step=7.ckpt (" in line
    assert f"from the checkpoint before, {folder / 'step=6.ckpt'}" in line
    tear(folder / "step=6.ckpt", share)
    with pytest.raises(ValueError, match=r"no whole checkpoint: .*step=7.*step=6"):
        whole_or_before(newest)


class Terminated(Callback):
    """Sends SIGTERM at one of the places where Lightning's handler would lose it, or leave ranks waiting."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_validation_batch_start(self, trainer, *_):
        if self.where == ("sanity check" if trainer.sanity_checking else f"validation of step {trainer.global_step}"):
            os.kill(os.getpid(), signal.SIGTERM)

    def setup(self, trainer, pl_module, stage):
        def loader():
            if self.where == "loader":
                os.kill(os.getpid(), signal.SIGTERM)
            return make()

        make, trainer.datamodule.train_dataloader = trainer.datamodule.train_dataloader, loader


@pytest.mark.parametrize(
    ("where", "step"), [("sanity check", 1), ("loader", 1), ("validation of step 1", 2), ("validation of step 3", 3)]
)
def test_sigterm_is_answered_after_the_next_batch_or_the_last_validation(corpus, tmp_path, caplog, where, step):
    caplog.set_level("INFO")
    kept = ResumeCheckpoint()
    for ended in ("first", "second"):
        options = {"logger": False, "enable_checkpointing": True, "default_root_dir": tmp_path / ended}
        options |= {"limit_val_batches": 1, "val_check_interval": 1}
        engine = trainer([kept, Terminated(where)], 3, **options)
        with pytest.raises(SystemExit) as exit:
            engine.fit(lit_module(), datamodule=datamodule(corpus))
        assert exit.value.code == 143
        assert f"SIGTERM: {tmp_path}/{ended}/checkpoints/step={step}.ckpt is written" in caplog.text
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before the fit
        assert "_sigterm_notifier_fn" not in vars(engine._signal_connector)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_an_interrupt_that_is_ignored_stays_so(corpus, tmp_path, handler):
    class Interrupted(Callback):
        def on_train_batch_start(self, *_):
            if signal.getsignal(signal.SIGINT) != signal.default_int_handler:
                os.kill(os.getpid(), signal.SIGINT)

    options = {"logger": False, "enable_checkpointing": True, "default_root_dir": tmp_path}
    engine, before = trainer([ResumeCheckpoint(), Interrupted()], 2, **options), signal.signal(signal.SIGINT, handler)
    try:
        if handler == signal.SIG_IGN:
            engine.fit(lit_module(), datamodule=datamodule(corpus))
        else:
            with pytest.raises(SystemExit, match="130"):
                engine.fit(lit_module(), datamodule=datamodule(corpus))
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_once_more_ends_at_once(corpus, tmp_path, capfd):
    class Impatient(Callback):
        def on_train_batch_start(self, *_):
            os.kill(os.getpid(), signal.SIGINT)

        def on_before_backward(self, *_):
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second one should have ended the fit")

    engine = trainer([ResumeCheckpoint(), Impatient()], enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.raises(SystemExit):
        engine.fit(lit_module(), datamodule=datamodule(corpus))
    assert "a checkpoint is written after the next batch; once more ends at once" in capfd.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_last_is_found_in_the_run_and_goes_on_from_the_whole_one(corpus, tmp_path, caplog, capsys, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    command = [
        *FIT,
        *from_corpus(corpus),
        "--data.batch_size=4",
        "--outliers.every_n_steps=0",
        "--checkpoint.every_n_steps=2",
        "--optim.decay_steps=8",
        "--trainer.logger=TensorBoardLogger",
        "--trainer.logger.save_dir=runs",
        "--trainer.logger.name=x",
        "--ckpt_path=last",
    ]
    main([*command, "--trainer.max_steps=4"])
    assert "has no checkpoint yet: a new fit" in caplog.text
    first = tmp_path / "runs/x/version_0/checkpoints"
    assert names(first) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    tear(first / "step=4.ckpt", 0.99)
    main([*command, "--trainer.max_steps=6"])
    assert "step=4.ckpt (" in caplog.text
    assert "--ckpt_path last is runs/x/version_0/checkpoints/step=2.ckpt" in caplog.text
    assert names(tmp_path / "runs/x/version_1/checkpoints") == ["last.ckpt", "step=4.ckpt", "step=6.ckpt"]
    main([*command, "--trainer.max_steps=8", "--trainer.logger.version=1"])
    assert "--ckpt_path last is runs/x/version_1/checkpoints/step=6.ckpt" in caplog.text
    assert names(tmp_path / "runs/x/version_1/checkpoints") == ["last.ckpt", "step=6.ckpt", "step=8.ckpt"]
    with pytest.raises(SystemExit):
        main([*command[:-1], "--trainer.max_steps=8", "--trainer.logger.version=1"])
    assert "runs/x/version_1 has another fit's checkpoints, which a new one would replace" in capsys.readouterr().err
    assert names(tmp_path / "runs/x/version_1/checkpoints") == ["last.ckpt", "step=6.ckpt", "step=8.ckpt"]


def test_a_fit_that_begins_while_another_packs_takes_the_next_folder(corpus, tmp_path, monkeypatch):
    """Or each would delete the other's checkpoints."""
    monkeypatch.chdir(tmp_path)
    command = [*FIT, *from_corpus(corpus), "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs"]
    command += ["--trainer.logger.name=x"]
    prepare = TextDataModule.prepare_data

    def begin_another(data: TextDataModule) -> None:
        monkeypatch.setattr(TextDataModule, "prepare_data", prepare)
        main([*command, "--trainer.max_steps=3"])
        prepare(data)

    monkeypatch.setattr(TextDataModule, "prepare_data", begin_another)
    main([*command, "--trainer.max_steps=2"])
    assert names(tmp_path / "runs/x/version_0/checkpoints") == ["last.ckpt", "step=2.ckpt"]
    assert names(tmp_path / "runs/x/version_1/checkpoints") == ["last.ckpt", "step=3.ckpt"]


def test_a_run_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    """And not asked for again and again; "~" is the home, where the logger writes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    engine = trainer([], logger=TensorBoardLogger("~/runs", "x"))
    take_run_folder(engine, next_version=True, resumes=False)
    assert (tmp_path / "runs/x/version_0").is_dir()
    (tmp_path / "runs/x/version_1").touch()
    engine = trainer([], logger=TensorBoardLogger("~/runs", "x", version=1))
    with pytest.raises(FileExistsError, match="runs/x/version_1"):
        take_run_folder(engine, next_version=True, resumes=False)


def test_last_without_a_logger_is_of_this_folder_alone(corpus, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    command = [*FIT, *from_corpus(corpus), "--trainer.max_steps=1", "--ckpt_path=last", "--trainer.logger=false"]
    for name in ("one", "beside"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        main(command)
        assert f"{tmp_path / name} has no checkpoint yet: a new fit" in caplog.text


@pytest.mark.parametrize("stopped_at", [0, 1, 4, 6, 7])
def test_loggers_are_told_the_steps_of_an_uninterrupted_fit(corpus, tmp_path, stopped_at):
    """Wherever in a window of two batches the fit was stopped; its passes have six."""

    class Terminated(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.fit_loop.epoch_loop.batch_progress.total.processed == stopped_at:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"accumulate_grad_batches": 2, "limit_train_batches": 6, "limit_val_batches": 1, "steps": 6}
    options |= {"enable_checkpointing": True}
    whole, rest = Records(), Records()
    trainer([ResumeCheckpoint()], logger=whole, default_root_dir=tmp_path / "whole", **options).fit(
        lit_module(), datamodule=datamodule(corpus)
    )
    with pytest.raises(SystemExit):
        trainer([ResumeCheckpoint(), Terminated()], logger=False, default_root_dir=tmp_path, **options).fit(
            lit_module(), datamodule=datamodule(corpus)
        )
    (last,) = [path for path in (tmp_path / "checkpoints").glob("step=*.ckpt")][-1:]
    trainer([ResumeCheckpoint()], logger=rest, default_root_dir=tmp_path / "rest", **options).fit(
        lit_module(), datamodule=datamodule(corpus), ckpt_path=last
    )
    found, expected = rest.of("train/loss"), whole.of("train/loss")
    assert found
    assert found == {step: expected[step] for step in found}
    assert max(found) == max(expected)
