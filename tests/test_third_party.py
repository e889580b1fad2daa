"""A quantizer that someone else ships: one file, one class, one entry point, and it is an option of the command line.

It is installed as pip would leave it, a module and a ``.dist-info`` folder, and run in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_fit import CONTEXT, datamodule, lit_module, trainer, write_corpus

SOURCE = '''
from lit_actreg.contracts import QuantizedWeight, Quantizer


class PowerOfTwo(Quantizer):
    """Rounds to nearest, with scales that are powers of two.

    Args:
        bits: Bits of the weight grid, 2-8.
        headroom: Octaves above the smallest scale that covers a row.
    """

    def __init__(self, bits: int = 4, headroom: int = 0) -> None:
        super().__init__(bits)
        if headroom < 0:
            raise ValueError(f"headroom {headroom} is negative: use 0 or more")
        self.headroom = headroom

    def quantize_weight(self, weight, hessian):
        top = 2 ** (self.bits - 1) - 1
        scale = (weight.abs().amax(1, keepdim=True) / top).log2().ceil().add(self.headroom).exp2()
        return QuantizedWeight((weight / scale).round().char(), scale, None, self.bits, {"headroom": self.headroom})
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder as ``pip install --target`` makes it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "power_of_two.py").write_text(SOURCE)
    info = folder / "power_of_two-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: power-of-two\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lit_actreg.plugins]\npower_of_two = power_of_two:PowerOfTwo\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    engine = trainer([], steps=1)
    engine.fit(lit_module(), datamodule=datamodule(write_corpus(folder / "corpus")))
    engine.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "lit_actreg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=site)


def test_its_options_have_help(site):
    done = run(site, "quantize", "--quantizer.help", "PowerOfTwo")
    assert done.returncode == 0, done.stderr
    assert "--quantizer.headroom" in done.stdout
    assert "Octaves above the smallest scale that covers a row." in " ".join(done.stdout.split())


def test_it_quantizes_with_its_options_from_the_command_line(site, checkpoint, tmp_path):
    data = [f"--data.source={checkpoint.parent / 'corpus'}", f"--data.cache_dir={checkpoint.parent / 'cache'}"]
    data += [
        f"--data.context={CONTEXT}",
        "--data.valid_share=0.1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    where = [f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'out'}", *data]
    done = run(site, "quantize", "--quantizer=PowerOfTwo", "--quantizer.bits=3", "--quantizer.headroom=1", *where)
    assert done.returncode == 0, done.stderr
    layers = json.loads((tmp_path / "out" / "report.json").read_text())["layers"]
    assert len(layers) == 8
    assert all(layer["bits"] == 3 and layer["headroom"] == 1 for layer in layers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "PowerOfTwo" in json.dumps(config["lit_actreg"])


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lit_actreg.plugins]\nmine = broken_module:Mine\n")
    done = run(tmp_path, "--help")
    assert done.returncode == 2
    line = (
        "lit-actreg: plugin mine = broken_module:Mine of the package broken cannot be imported (ModuleNotFoundError: "
    )
    assert done.stderr.splitlines()[-1].startswith(line)


@pytest.mark.slow
def test_its_mistakes_are_one_line_too(site, checkpoint):
    options = ["--quantizer=PowerOfTwo", "--quantizer.headroom=-1", "--output=out", f"--ckpt_path={checkpoint}"]
    done = run(site, "quantize", *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "lit-actreg: headroom -1 is negative: use 0 or more"
