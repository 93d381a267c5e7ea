"""Examples in README, guides and docstrings work: Python runs, commands parse."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language; "python no-run" is a different language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def modules_with_examples() -> list[str]:
    files = (ROOT / "fastsam").rglob("*.py")
    return sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in files
        if ">>> " in file.read_text()
    )


@pytest.fixture
def headless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, and write files to a temporary folder."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("headless")
def test_python_blocks_run_in_order(guide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(blocks(guide, "python"))
    module = ModuleType("guide")  # dataclasses look up the module that they are in
    monkeypatch.setitem(sys.modules, "guide", module)
    exec(compile(code, str(guide), "exec"), vars(module))


@pytest.mark.parametrize("document", [ROOT / "README.md", *GUIDES], ids=lambda path: path.stem)
def test_commands_parse(document: Path) -> None:
    """Every `fastsam` command parses with all of its flags."""
    pytest.importorskip("tyro")
    from fastsam import cli

    shell = "\n".join(blocks(document, "sh")).replace("\\\n", "")
    pattern = r"(?:^fastsam|fastsam\.cli) (.+?)(?:\s{2,}#.*)?$"
    for command in re.findall(pattern, shell, re.MULTILINE):
        cli.parse(shlex.split(command))


def test_there_is_something_to_run_and_to_parse() -> None:
    assert {"sam", "spectra", "longtail"} <= {
        path.stem for path in GUIDES if blocks(path, "python")
    }
    for document in (ROOT / "README.md", ROOT / "docs" / "longtail.md"):
        assert "\nfastsam " in "\n".join(blocks(document, "sh"))


@pytest.mark.parametrize("name", modules_with_examples())
@pytest.mark.usefixtures("headless")
def test_examples_in_docstrings_run(name: str) -> None:
    if name.startswith("fastsam.optim.local"):
        pytest.skip("its example needs several processes: examples/ddp_local.py has it")
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0
