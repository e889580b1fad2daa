"""The benchmarks of whole models run: on a CPU, at a size whose times mean nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = ["--size", "tiny", "--device", "cpu", "--rounds", "1"]


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (
            ["train_speed.py", *TINY],
            ["plain", "QAT, formula", "QAT, fused", "QAT, fused, kurtosis", "… of 1 token in 8"],
        ),
        (["train_speed.py", *TINY, "--style", "llama", "--bfloat16-stream"], ["plain", "QAT, fused, kurtosis"]),
        (["model_speed.py", *TINY], ["linears", "validation", "generation"]),
    ],
)
def test_a_table_is_printed(command, rows, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, "-W", "ignore", FOLDER / command[0], *command[1:]]
    result = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    for row in rows:
        assert any(line.startswith(row) for line in result.stdout.splitlines()), (row, result.stdout)
