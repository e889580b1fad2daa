"""The benchmarks' pictures of finished fits: the numbers behind them, from small folders and tables."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_actreg.config import SITES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(monkeypatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


def write_run(folder: Path, steps: list[int], offset: float) -> None:
    """One more event file. A fit's are named by the second they begin in, and read in that order; these by a number."""
    earlier = set(folder.glob("*"))
    with SummaryWriter(str(folder)) as writer:
        for step in steps:
            for block in range(3):
                writer.add_scalar(f"outliers_qkv/largest_ratio_{block:02d}", step + block + offset, step)
                writer.add_scalar(f"outliers_qkv/share_{block:02d}", block / 10, step)
    (made,) = set(folder.glob("*")) - earlier
    made.rename(folder / f"events.out.tfevents.{len(earlier):010d}.test")


def test_outlier_maps_take_a_step_that_was_logged_twice_once(monkeypatch, tmp_path):
    write_run(tmp_path / "a", [0, 10, 20], 0.5)
    write_run(tmp_path / "a", [20, 30], 0.25)  # resumed from step 10
    write_run(tmp_path / "b", [0, 10], 0.0)
    folders = [f"{name}={tmp_path / name}" for name in ("a", "b")]
    run(monkeypatch, "outlier_maps.py", *folders, "--out", str(tmp_path / "map"))
    rows = list(csv.DictReader((tmp_path / "map.csv").open()))
    assert len(rows) == 3 * (4 + 2)
    found = {(row["run"], int(row["step"]), int(row["block"])): float(row["largest_ratio"]) for row in rows}
    assert found["a", 20, 1] == pytest.approx(21.25, rel=0.01)
    assert found["a", 10, 2] == pytest.approx(12.5, rel=0.01)
    assert {row["share"] for row in rows} == {"0", "0.1", "0.2"}
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_outlier_maps_want_two_snapshots(monkeypatch, tmp_path):
    write_run(tmp_path / "a", [0], 0.0)
    with pytest.raises(SystemExit, match="fewer than two outlier snapshots of qkv"):
        run(monkeypatch, "outlier_maps.py", f"a={tmp_path / 'a'}", "--out", str(tmp_path / "map"))


def test_weight_curves_are_means_over_blocks(monkeypatch, tmp_path):
    quantities = ["error_3bit", "error_4bit", "row_max", "weight_kurtosis"]
    with SummaryWriter(str(tmp_path / "a")) as writer:
        for step in (0, 10):
            for site in SITES:
                for block in range(3):
                    for i, quantity in enumerate(quantities):
                        writer.add_scalar(f"outliers_{site}/{quantity}_{block:02d}", step + i + block / 10, step)
            writer.add_scalar("outliers_qkv/largest_ratio_00", 7.0, step)
    run(monkeypatch, "weight_curves.py", f"a={tmp_path / 'a'}", "--out", str(tmp_path / "curves"))
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert [(row["site"], row["step"]) for row in rows] == [(site, step) for site in SITES for step in ("0", "10")]
    assert [float(rows[-1][quantity]) for quantity in quantities] == pytest.approx([10.1, 11.1, 12.1, 13.1])
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_weight_curves_want_a_fits_weights(monkeypatch, tmp_path):
    write_run(tmp_path / "a", [0, 10], 0.0)
    with pytest.raises(SystemExit, match="no outlier snapshot of a fit's weights"):
        run(monkeypatch, "weight_curves.py", f"a={tmp_path / 'a'}", "--out", str(tmp_path / "curves"))


@pytest.mark.parametrize("mistake", ["runs/x", "a=nowhere"])
@pytest.mark.parametrize("script", ["outlier_maps.py", "weight_curves.py"])
def test_what_is_no_name_and_folder_is_said(monkeypatch, capsys, tmp_path, script, mistake):
    with pytest.raises(SystemExit):
        run(monkeypatch, script, mistake, "--out", str(tmp_path / "x"))
    assert "give NAME=FOLDER, a folder of event files" in capsys.readouterr().err


def test_a_sweep_has_a_place_for_zero(monkeypatch, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("model,W16A4,W4A4 GPTQ\n0,40,42\n1e-4,39,41\n1e-3,39.5,41.5\n")
    columns = ["--columns", "W16A4", "W4A4 GPTQ"]
    run(monkeypatch, "sweep_curve.py", str(table), "--option", "λ", *columns, "--out", str(tmp_path / "sweep"))
    assert (tmp_path / "sweep.csv").read_text() == table.read_text()
    assert (tmp_path / "sweep.png").stat().st_size > 1000
