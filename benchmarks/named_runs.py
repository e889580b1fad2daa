"""NAME=FOLDER arguments of the scripts that read finished fits."""

from argparse import ArgumentParser
from pathlib import Path


def named_runs(parser: ArgumentParser, arguments: list[str]) -> dict[str, Path]:
    """The folders by name; ends the script where one is no name and folder."""
    runs = {name: Path(folder) for name, _, folder in (argument.partition("=") for argument in arguments)}
    for name, folder in runs.items():
        if folder == Path() or not folder.is_dir():
            parser.error(f"{name}={folder if folder != Path() else ''}: give NAME=FOLDER, a folder of event files")
    return runs
