"""Which way imports flow, read from the source: kernels know nothing, the application does not know its plugins."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"lit_actreg": "lit_actreg", "plugins": "lit_actreg_plugins", "kernels": "lit_actreg_kernels"}
CORE = ("model", "config", "contracts", "quant")  # no Lightning in these


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


SOURCES = {module_name(path): path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from package import module" imports the module
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & SOURCES.keys()) or {node.module or ""}
    return names


def is_core(name: str) -> bool:
    return name.startswith("lit_actreg.") and name.split(".")[1] in CORE


def tops(name: str) -> set[str]:
    return {other.split(".")[0] for other in imported(SOURCES[name])} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("lit_actreg_kernels")])
def test_kernels_import_torch_and_triton_alone(name):
    assert tops(name) <= {"torch", "triton", "lit_actreg_kernels"}


@pytest.mark.parametrize("name", [name for name in SOURCES if is_core(name)])
def test_the_core_imports_torch_kernels_and_itself(name):
    assert tops(name) <= {"torch", "lit_actreg", "lit_actreg_kernels"}
    assert all(is_core(other) for other in imported(SOURCES[name]) if other.startswith("lit_actreg."))


@pytest.mark.parametrize("name", [name for name in SOURCES if name.split(".")[0] == "lit_actreg"])
def test_the_application_meets_plugins_by_entry_point_only(name):
    assert not tops(name) & {"lit_actreg_plugins", "plugins", "kernels", "pytorch_lightning"}


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("lit_actreg_plugins")])
def test_plugins_do_not_know_the_command_line(name):
    assert not tops(name) & {"plugins", "kernels", "pytorch_lightning"}
    assert not imported(SOURCES[name]) & {"lit_actreg.cli", "lit_actreg.trainer"}


def test_there_are_no_cycles():
    graph = {name: imported(path) & SOURCES.keys() - {name} for name, path in SOURCES.items()}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_the_installed_folders_are_no_packages_of_their_own():
    """A package named ``kernels`` exists on PyPI; and the same file under two names would be two classes."""
    assert not (ROOT / "plugins" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
