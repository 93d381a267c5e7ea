"""The notebooks of the documentation, without executing them: `make docs` does that."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the cells of a kind."""
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def sources(path: Path, *, shell: bool) -> list[str]:
    """Return the code of the cells in Python, or that of the cells in the shell."""
    texts = ["".join(cell["source"]) for cell in cells(path, "code")]
    return [text.removeprefix("%%sh\n") for text in texts if text.startswith("%%sh\n") == shell]


def name(path: Path) -> str:
    """Return the name of a test's notebook."""
    return path.stem


def test_there_are_three() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"sam", "spectrum", "folder"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_is_a_valid_notebook(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")  # of the extra docs
    nbformat.validate(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_stores_no_outputs(path: Path) -> None:
    """Stored outputs would become stale, and their bytes would hide the change in a review."""
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert set(cell["metadata"]) <= {"alt"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_plot_has_a_description(path: Path) -> None:
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        shows = "plt.subplots" in source or "spectrum.plot" in source
        assert shows == bool(cell["metadata"].get("alt")), source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_python_cells_parse_and_their_imports_exist(path: Path) -> None:
    imported = 0
    for source in sources(path, shell=False):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
                    imported += 1
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                    imported += 1
    assert imported > 5


def test_commands_parse() -> None:
    """Those of cells, and those that the text gives as an alternative."""
    from fastsam import cli

    (path,) = [path for path in NOTEBOOKS if path.stem == "folder"]
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    fences = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    shell = "\n".join(sources(path, shell=True) + fences).replace("\\\n", "")
    inline = [words for words in re.findall(r"`fastsam ([^`]+)`", text) if " -" in words]
    commands = re.findall(r"^fastsam (.+)$", shell, re.MULTILINE) + inline
    assert {command.split()[0] for command in commands} >= {"data", "train", "predict", "report"}
    for command in commands:
        cli.parse(shlex.split(command))
