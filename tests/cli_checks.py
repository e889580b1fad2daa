"""What the tests of the command line share: ``main`` in this process, and its one line for a mistake."""

import shlex
from pathlib import Path

import pytest

from lit_actreg.cli import main

QUIET = "--trainer.accelerator=cpu --trainer.devices=1 --trainer.logger=false --trainer.enable_progress_bar=false"


def mistake(capsys, command: str) -> str:
    """The one line on stderr beside Lightning's and the tokenizer's progress."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(command))
    assert exit.value.code == 2
    progress = ("Seed set", "Generating", "Downloading", "holding documents out", "tokenizing")
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith(progress)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("lit-actreg: ")
    return lines[0].removeprefix("lit-actreg: ")


def written() -> list[Path]:
    """The files under the working directory, the cache's aside."""
    return [path for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts]
