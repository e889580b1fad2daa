"""Every shipped configuration parses for its subcommand, and what --print_config shows of it parses to the same."""

from pathlib import Path

import pytest

from lit_actreg.cli import main

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.yaml"))
REQUIRED = {
    "quantize": ["--output=out", "--ckpt_path=null"],
    "table": ["--checkpoints={a: a.ckpt}"],
}


def subcommand_of(name: str) -> str:
    return name.removesuffix(".yaml").split("_")[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_parses_and_round_trips(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What is printed is the parsed configuration; the checkpoint that a path names is looked at later, in a run.
    monkeypatch.setattr("lit_actreg.cli.ActRegCLI._parse_ckpt_path", lambda self: None)

    def printed(config: Path, *options: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main([subcommand_of(name), f"--config={config}", *options, "--print_config"])
        assert exit.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    first = printed(FOLDER / name, *REQUIRED.get(subcommand_of(name), []))
    (tmp_path / "again.yaml").write_text(first)
    assert printed(tmp_path / "again.yaml") == first


@pytest.mark.parametrize("name", CONFIGS)
def test_its_first_line_says_what_it_is_for(name):
    first, *_ = (FOLDER / name).read_text().splitlines()
    assert first.startswith("# ")
    assert len(first) > 30
